"""Both visits to a GPU, rehearsed on a CPU from the command to the archive; parts that crash, hang or are killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import steady
import visit_standin

from benchmarks import environment, gpu_visit
from benchmarks.loss.problems import Shape, toy_of
from benchmarks.visit import counters, parts, predictions, processes
from benchmarks.visit.processes import Part

pytestmark = pytest.mark.process

COUNTED = """\
==PROF== Connected to process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","project_kernel","GPU Speed Of Light Throughput","Duration","ms","6.71"
"0","project_kernel","GPU Speed Of Light Throughput","SM Frequency","Ghz","1.41"
"1","nvjet_gemm","GPU Speed Of Light Throughput","Duration","ms","5.48"
"""
BOTH = """
import sys
from benchmarks import run
for words in (["--visit", "a"], ["--visit", "b", "--parts", *sys.argv[3:]]):
    run.main(["gpu_visit", *words, "--rehearse", "--out", sys.argv[1], "--tests", sys.argv[2], "--commit", "abc"])
"""
CASES = {"machine": "visit_machine", "smoke": "visit_smoke", "counters": "visit_counters", "sweep": "gemm_sweep"}
"""Cases of parts that are not called as they are."""
OF_B = ("precompile", "tests", "trajectory_balance", "logprobs", "priority_tree")
"""Parts that need no process of their own; `test_the_trainer_is_rehearsed` has the other one."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Both archives, unpacked."""

    out: Path
    folders: dict[str, Path]
    printed: str

    def result(self, visit: str, name: str) -> dict[str, Any]:
        return json.loads((self.folders[visit] / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    base = tmp_path_factory.mktemp("visit")
    tool = base / "bin" / "ncu"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{COUNTED}END\n")
    tool.chmod(0o755)
    tests = base / "test_two.py"
    tests.write_text("def test_good(): pass\ndef test_bad(): assert 1 + 1 == 3, 'first reason'\n")
    surroundings = environment.child_environment() | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", BOTH, str(base / "out"), str(tests), *OF_B],
        env=surroundings,
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folders = {visit: base / visit for visit in ("a", "b")}
    for visit, folder in folders.items():
        processes.unpack(base / "out" / f"visit_{visit}.tar.gz", folder)
    return Rehearsal(base / "out", folders, done.stdout)


def test_each_visit_leaves_one_archive_and_its_summary(rehearsal: Rehearsal) -> None:
    names = ["visit_a.json", "visit_a.tar.gz", "visit_b.json", "visit_b.tar.gz"]
    assert sorted(path.name for path in rehearsal.out.iterdir()) == names
    texts = {"report.txt", "tests.txt", "failures.txt"}
    found = {visit: {path.name for path in folder.iterdir()} for visit, folder in rehearsal.folders.items()}
    of_a = {f"{part.name}.json" for part in parts.VISITS["a"]}
    assert found["a"] == texts | of_a | {"visit_a.json"}
    assert found["b"] == texts | {f"{name}.json" for name in OF_B if name != "tests"} | {"visit_b.json"}
    for visit in ("a", "b"):
        for path in rehearsal.folders[visit].glob("*.json"):
            is_summary = path.stem == f"visit_{visit}"
            written = json.loads(path.read_text())
            assert written["case"] == ("gpu_visit" if is_summary else CASES.get(path.stem, path.stem))
            assert written["environment"]["versions"]["torch"]
        summary = rehearsal.result(visit, f"visit_{visit}")
        beside = json.loads((rehearsal.out / f"visit_{visit}.json").read_text())
        assert (summary["parts"], summary["predictions"]) == (beside["parts"], beside["predictions"])
        assert summary["environment"]["commit"] == beside["environment"]["commit"] == "abc"
        states = {name: part["status"] for name, part in summary["parts"].items()}
        assert states.pop("tests", "exit status 1") == "exit status 1"  # one of its two fails
        assert set(states.values()) == {"done"}
        assert not any(part.get("not_reached") for part in summary["parts"].values())


def test_every_prediction_has_a_measurement_beside_it(rehearsal: Rehearsal) -> None:
    for visit in ("a", "b"):
        rows = rehearsal.result(visit, f"visit_{visit}")["predictions"]
        made = [prediction for prediction in predictions.PREDICTIONS if prediction.visit == visit]
        assert [row["name"] for row in rows] == [prediction.name for prediction in made]
        for row in rows:
            assert isinstance(row["measured"], float), row["name"]
            assert math.isfinite(row["measured"]), row["name"]
            assert row["ratio"] == pytest.approx(row["measured"] / row["predicted"])
        report = (rehearsal.folders[visit] / "report.txt").read_text()
        shown = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("| ")]
        assert [row["name"] for row in rows] == [name for name in shown if name in {row["name"] for row in rows}]
        assert "| not measured" not in report
        assert "REHEARSAL" in report


def test_measurements_are_those_of_the_parts(rehearsal: Rehearsal) -> None:
    measured = {row["name"]: row["measured"] for v in "ab" for row in rehearsal.result(v, f"visit_{v}")["predictions"]}
    smoke = rehearsal.result("a", "smoke")

    def row(table: str, shape: str, name: str) -> dict[str, Any]:
        (found,) = [r for r in smoke[table] if (r["shape"], r["name"]) == (shape, name)]
        return found

    assert measured["H2048 dW"] == row("products", "T8192-H2048-V151936", "dW")["median_ms"]
    step = row("steps", "T8192-H3584-V151936", "ours")
    assert (measured["H3584 step"], measured["H3584 step, rate"]) == (step["median_ms"], step["tflops"])
    there = [r for r in smoke["steps"] if r["shape"] == "T8192-H4096-V131072" and r["mode"] == "forward"]
    assert measured["T8192-H4096-V131072 forward, x Liger's CuTe scaled CE"] == 12.25 / there[0]["median_ms"]
    toy = toy_of(Shape.parse("T16384-H4096-V151936")).name
    (cell,) = [c for c in rehearsal.result("b", "trajectory_balance")["cells"] if c["name"] == toy]
    ours = next(r for r in cell["rows"] if r["name"] == "ours")
    assert measured["table T16384 H4096 step"] == ours["modes"]["full"]["median_ms"]
    toy = toy_of(Shape.parse("T8192-H896-V151936")).name
    (swept,) = [s for s in rehearsal.result("a", "sweep")["shapes"] if s["shape"] == toy]
    assert measured["H896 best of the sweep"] == max(e["tflops"] for e in swept["entries"] if e["stage"] == 2)


def test_the_smoke_test_checks_every_stage_at_three_sizes(rehearsal: Rehearsal) -> None:
    found = rehearsal.result("a", "smoke")
    assert [(entry["hidden_size"], entry["stage"]) for entry in found["accuracy"]] == [
        (size, stage) for size in (1536, 4096, 896) for stage in ("table", "stage 1")
    ]
    assert {entry["verdict"] for entry in found["accuracy"]} == {"right"}
    assert len(found["bias"]) == 6
    assert all(abs(entry["mean_nats"]) <= entry["largest_nats"] < 2e-5 for entry in found["bias"])
    assert found["failed"] == found["not_reached"] == []
    report = (rehearsal.folders["a"] / "report.txt").read_text()
    assert "bias of log-probs, H4096, stage 1:" in report
    assert "H1536, table: right; log-probs" in report


def test_the_other_parts_leave_what_they_found(rehearsal: Rehearsal) -> None:
    machine = rehearsal.result("a", "machine")
    assert machine["load"]["tflops"] > 0
    assert machine["nsight_compute"].endswith("bin/ncu")
    counted = rehearsal.result("a", "counters")
    assert [entry["shape"] for entry in counted["shapes"]] == list(counters.SHAPES)
    assert counted["shapes"][0]["kernels"] == counters.read(COUNTED)
    assert [job["name"] for job in rehearsal.result("a", "precompile")["jobs"]] == ["bfloat16 H64 V8192 weights"]
    assert rehearsal.result("b", "logprobs")["cells"][0]["rows"]
    assert rehearsal.result("b", "priority_tree")["cells"][0]["name"] == "N100-B8"
    tests = rehearsal.result("b", "visit_b")["parts"]["tests"]
    assert (tests["tests"], tests["failures"]) == (2, 1)
    assert "test_bad FAILED" in (rehearsal.folders["b"] / "tests.txt").read_text()
    assert "first reason" in (rehearsal.folders["b"] / "failures.txt").read_text()
    rows = rehearsal.result("b", "trajectory_balance")["cells"][0]["rows"]
    assert {"ours", "naive", "ceiling: three GEMMs"} <= {row["name"] for row in rows if row["status"] == "ok"}
    assert "ours, backend reference" not in {row["name"] for row in rows}


def test_counters_are_read_by_launch_and_the_reason_is_kept_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counters.read(COUNTED) == [
        {
            "kernel": "project_kernel",
            "counters": {"GPU Speed Of Light Throughput": {"Duration": "6.71 ms", "SM Frequency": "1.41 Ghz"}},
        },
        {"kernel": "nvjet_gemm", "counters": {"GPU Speed Of Light Throughput": {"Duration": "5.48 ms"}}},
    ]
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM: no permission'\necho more\n")
    tool.chmod(0o755)
    found = counters.count(str(tool), "T8192-H1536-V151936", "cpu", 60.0)
    assert (found["kernels"], found["failed"]) == ([], "==ERROR== ERR_NVGPUCTRPERM: no permission")
    tool.write_text("#!/bin/sh\nsleep 600\n")
    assert counters.count(str(tool), "T8192-H1536-V151936", "cpu", 0.5)["failed"] == "no answer within 0 s"
    monkeypatch.setattr(counters, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert counters.measure(counters.Arguments(device="cpu"), tmp_path / "x.json")["not_reached"] == [*counters.SHAPES]


def test_the_program_that_is_counted_runs_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []
    plain = counters.our_engines.product_calls

    def noted(*given: Any) -> dict[str, Callable[[int], object]]:
        def note(name: str, call: Callable[[int], object]) -> Callable[[int], object]:
            return lambda turn: (called.append((name, turn)), call(turn))

        return {name: note(name, call) for name, call in plain(*given).items()}

    monkeypatch.setattr(counters.our_engines, "product_calls", noted)
    monkeypatch.setattr(sys, "argv", ["counters", counters.SHAPES[0], "cpu"])
    counters.main()
    names = ["logits and exp", "sums", "dX", "dW"]
    assert called == [(name, turn) for turn in (0, 1) for name in names]


@pytest.mark.slow
def test_the_trainer_is_rehearsed(tmp_path: Path) -> None:
    words = ["--visit", "b", "--parts", "trainer", "--rehearse", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "gpu_visit", *words],
        env=environment.child_environment(),
        cwd=processes.ROOT,
        check=True,
        timeout=600,
    )
    processes.unpack(tmp_path / "visit_b.tar.gz", tmp_path / "b")
    (row,) = json.loads((tmp_path / "b" / "trainer.json").read_text())["rows"]
    assert row["method"] == "paced_fast"
    assert row["attention"].startswith("shared")  # what a run takes on a CPU
    assert f"attention of paced_fast: {row['attention']}" in (tmp_path / "b" / "report.txt").read_text()


# Parts that do not end well


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts are processes of `visit_standin`, which loads nothing; what hangs is out of time at once."""
    start = processes.start
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("VISIT_MARKS", str(marks))
    monkeypatch.setattr(processes, "time", visit_standin.JumpingClock(marks))
    monkeypatch.setattr(gpu_visit, "time", visit_standin.JumpingClock(marks))
    monkeypatch.setattr(processes, "ENTRY", "visit_standin")
    monkeypatch.setattr(processes, "GRACE_S", 1e3)
    monkeypatch.setattr(
        processes, "start", lambda words, sink, watch: start(words, sink, dataclasses.replace(watch, forks=False))
    )
    monkeypatch.setattr(parts, "VISITS", {"a": tuple(Part(name=n, case=n, seconds=3000.0) for n in STANDINS)})


STANDINS = ("good", "crashes", "hangs", "deaf", "killed", "last")
ENDINGS = {
    "good": ("done", "all"),
    "crashes": ("exit status 1", "at first"),
    "hangs": ("out of time", "when interrupted"),
    "deaf": ("out of time", "at first"),
    "killed": ("killed by SIGKILL", "at first"),
    "last": ("out of time", "when interrupted"),
}


@pytest.mark.usefixtures("standins")
def test_a_part_that_crashes_hangs_or_is_killed_costs_no_other(tmp_path: Path) -> None:
    given = gpu_visit.Arguments(rehearse=True, out=str(tmp_path), minutes=1e4)
    summary = gpu_visit.measure(given, gpu_visit.default_path(given))
    processes.unpack(tmp_path / "visit_a.tar.gz", tmp_path / "a")
    kept = json.loads((tmp_path / "a" / "visit_a.json").read_text())
    for name, (status, known) in ENDINGS.items():
        found = json.loads((tmp_path / "a" / f"{name}.json").read_text())
        assert (summary["parts"][name]["status"], found["known"]) == (status, known), name
        assert kept["parts"][name]["status"] == status
        with pytest.raises(ProcessLookupError):
            os.kill(found["pid"], 0)
    report = (tmp_path / "a" / "report.txt").read_text()
    assert "RuntimeError: no device" in report
    assert "killed: killed by SIGKILL" in report
    assert report.count("| not measured") == sum(p.visit == "a" for p in predictions.PREDICTIONS)


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A visit whose second part hangs, in a process of its own."""
    script = (
        "import dataclasses, sys\n"
        "from benchmarks import gpu_visit, run\n"
        "from benchmarks.visit import parts, processes\n"
        "plain = processes.start\n"
        "processes.ENTRY, processes.GRACE_S = 'visit_standin', 200.0\n"
        "processes.start = lambda words, sink, watch: plain(words, sink, dataclasses.replace(watch, forks=False))\n"
        "names = ('good', 'hangs')\n"
        "parts.VISITS = {'a': tuple(processes.Part(name=n, case=n, seconds=3000.0) for n in names)}\n"
        "run.main(['gpu_visit', '--rehearse', '--out', sys.argv[1]])\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "out")]
    child = subprocess.Popen(words, env=environment.child_environment(), cwd=processes.ROOT, stderr=subprocess.DEVNULL)
    yield child
    child.kill()
    child.wait()


def _packed(archive: Path, name: str) -> dict[str, Any]:
    """A result in an archive, {} while it is not there."""
    if not archive.is_file():
        return {}
    with tarfile.open(archive) as opened:
        found = next((member for member in opened if member.name == name), None)
        stream = opened.extractfile(found) if found is not None else None
        return json.load(stream) if stream is not None else {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_visit_that_is_ended_leaves_what_it_knew(
    ended: subprocess.Popen, tmp_path: Path, number: signal.Signals
) -> None:
    archive = tmp_path / "out" / "visit_a.tar.gz"
    steady.wait_for(lambda: _packed(archive, "hangs.json"), 300.0)
    ended.send_signal(number)
    ended.wait(timeout=300)
    summary, hung = _packed(archive, "visit_a.json"), _packed(archive, "hangs.json")
    assert summary["parts"]["good"]["status"] == "done"
    assert _packed(archive, "good.json")["known"] == "all"
    if number == signal.SIGKILL:
        os.killpg(hung["pid"], signal.SIGKILL)  # nobody could end it
    else:
        assert summary["parts"]["hangs"]["status"] == "running"
        assert hung["known"] == "when interrupted"
        with pytest.raises(ProcessLookupError):
            os.kill(hung["pid"], 0)

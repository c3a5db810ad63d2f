"""Reports of the kernel benchmarks, decision gates, processes of a GPU visit and the tables made from results."""

import json
from pathlib import Path

import pytest
import visit_standin

from benchmarks import gpu_visit, tables
from benchmarks.loss import measure, phases, problems, report
from benchmarks.visit import processes

# Reports and gates


def _row(name: str, ms: float, frozen_ms: float, tflops: float, error: float = 1e-3) -> dict:
    times = {"full": ms, "frozen": frozen_ms}
    modes = {
        mode: {
            "median_ms": time,
            "p10_ms": time,
            "p90_ms": time,
            "own_tflops": tflops,
            "common_tflops": tflops,
            "own_thv": 6,
        }
        for mode, time in times.items()
    }
    return {
        "name": name,
        "status": "ok",
        "ours": name.startswith("ours"),
        "ceiling": name.startswith("ceiling"),
        "note": "",
        "modes": modes,
        "accuracy": {"sequence_max_nats": error, "hidden_grad_relative": error, "weight_grad_relative": error},
    }


def _cell(name: str, tflops: float = 700.0, frozen: float = 0.5, **times: float) -> dict:
    shape = problems.Shape.parse(name)
    rows = [_row(method, ms, frozen * ms, tflops) for method, ms in times.items()]
    return {
        "name": name,
        "inputs": "peaked",
        "shape": {"hidden_size": shape.hidden_size, "tokens": shape.tokens, "vocab_size": shape.vocab_size},
        "rows": rows,
    }


def _gates(cells, gemm=()) -> dict[str, str]:
    return {gate["gate"][:2]: gate["status"] for gate in report.gates(cells, list(gemm))}


HEADLINE = "T16384-H4096-V151936"


def test_gates_pass_lose_or_say_that_nothing_was_measured():
    assert _gates([]) == dict.fromkeys(("G1", "G2", "G3", "G4"), "not measured")
    gemm = [{"hidden_size": 4096, "tflops": 610.0}, {"hidden_size": 896, "tflops": 100.0}]
    good = _cell(HEADLINE, ours=90.0, peer=100.0)
    assert _gates([good], gemm) == dict.fromkeys(("G1", "G2", "G3", "G4"), "pass")
    assert _gates([_cell(HEADLINE, tflops=619.0, ours=90.0, peer=100.0)])["G1"] == "lost"
    assert _gates([good], [*gemm, {"hidden_size": 2048, "tflops": 599.0}])["G2"] == "lost"
    assert _gates([good], [{"hidden_size": 896, "tflops": 700.0}, {"hidden_size": 4096}])["G2"] == "not measured"
    assert _gates([_cell(HEADLINE, frozen=0.72, ours=90.0, peer=100.0)])["G4"] == "lost"  # 1.39 x


def test_gate_of_the_first_stage_looks_at_the_first_stage():
    cell = _cell(HEADLINE, ours=90.0)
    cell["rows"].append(_row("ours, stage 1", 110.0, 50.0, 600.0))
    assert _gates([cell])["G1"] == "lost"


def test_one_lost_cell_loses_the_gate_and_is_named():
    won, lost = _cell(HEADLINE, ours=90.0, peer=100.0), _cell("T4096-H2048-V128256", ours=90.0, quick=98.0)
    small = _cell("T4096-H896-V128256", ours=90.0, quick=10.0)  # the gate is about H >= 2048
    gate = report.gates([won, lost, small], [])[2]
    assert gate["status"] == "lost"
    assert gate["detail"] == "T4096-H2048-V128256 against quick: 1.09 x"
    assert _gates([won, small])["G3"] == "pass"


def test_a_faster_but_less_exact_result_loses_the_gate():
    cell = _cell(HEADLINE, ours=50.0, peer=100.0)
    cell["rows"][0] = _row("ours", 50.0, 25.0, 700.0, error=2e-3)
    gate = report.gates([cell], [])[2]
    assert gate["status"] == "lost"
    assert "weight_grad_relative 2.0e-03 against 1.0e-03" in gate["detail"]


def test_ceilings_failures_and_our_variants_are_no_competitors():
    cell = _cell(HEADLINE, ours=90.0, peer=100.0)
    cell["rows"] += [_row("ceiling: three GEMMs", 70.0, 30.0, 790.0), _row("ours, small", 60.0, 30.0, 790.0)]
    cell["rows"].append({**_row("broken", 1.0, 1.0, 1.0), "status": "failed", "reason": "RuntimeError: no"})
    assert report.speedup(cell, "full") == (pytest.approx(100 / 90), "peer")
    assert report.speedup(cell, "forward") is None
    assert "win, 1.11 x the speed of peer" in report.verdict(cell, "full")
    slow = _cell(HEADLINE, ours=100.0, peer=90.0)
    assert "LOSS, 0.90 x the speed of peer" in report.verdict(slow, "full")


def test_phases_are_means_of_a_step_and_in_its_order():
    step = [("project_kernel", 0.0, 4000.0), ("nvjet_gemm", 5000.0, 2000.0), ("weird", 7000.0, 1000.0)]
    events = [(name, start + 10000 * turn, duration) for turn in (1, 0) for name, start, duration in step]
    found = phases.summarise_events(events, steps=2)
    assert found["busy_ms"] == 7.0
    assert found["families_ms"] == {"projection": 4.0, "library GEMM": 2.0, "other": 1.0}
    assert [kernel["calls"] for kernel in found["kernels"]] == [1.0, 1.0, 1.0]
    assert [entry["name"] for entry in found["first_step"]] == ["project_kernel", "nvjet_gemm", "weird"]


def test_methods_far_slower_than_ours_are_left_out_of_later_cells():
    measured = measure.Measurement("logprobs", measure.toy_arguments(cell_seconds=10.0))
    measured.note_slow(_cell("T1-H2048-V3", ours=10.0, near=29.0, far=31.0))
    assert measured.too_slow == {"far": "took 3.1 x the time of ours at T1-H2048-V3"}
    assert measured._mode_seconds("full", True) == 5.0
    assert measured._mode_seconds("frozen", False) == 1.25


# The visit


def test_junit_counts_and_names_failures(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="t" name="good"/><testcase classname="t" name="bad"><failure message="1 != 2"/></testcase>'
        '<testcase classname="t" name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    assert processes.read_junit(tmp_path / "junit.xml") == {
        "tests": 3,
        "failures": 1,
        "errors": 0,
        "skipped": 1,
        "failed": [{"name": "t.bad", "message": "1 != 2"}],
    }


@pytest.mark.process
def test_a_part_that_hangs_is_ended_and_named_and_restarted_without_its_culprit(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "ENTRY", "visit_standin")
    part = processes.Part(name="logprobs", case="hangs_on_bad", seconds=1.0, exclude=("slow one",), resumable=True)
    found = processes.run_part(part, "cpu", tmp_path, 300.0, processes.Watch(stall_s=3.0))
    assert (found["status"], found["excluded"]) == ("done", ["bad"])
    assert found["seconds"] < 300
    words = json.loads((tmp_path / "logprobs.json").read_text())["words"]
    assert words[words.index("--exclude") :] == ["--exclude", "slow one", "bad"]


@pytest.mark.process
def test_packages_of_other_projects_are_imported_first(monkeypatch, tmp_path):
    (tmp_path / "visit_standin.py").write_text("raise SystemExit(7)\n")
    monkeypatch.setattr(processes, "ENTRY", "visit_standin")
    part = processes.Part(name="logprobs", case="good", seconds=1.0)
    watch = processes.Watch(paths=(str(tmp_path),))
    assert processes.run_part(part, "cpu", tmp_path, 60.0, watch)["status"] == "exit status 7"


@pytest.mark.process
def test_tests_that_hang_are_interrupted_and_leave_their_counts_and_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PACK_EVERY_S", 0.2)
    monkeypatch.setattr(processes, "GRACE_S", 200.0)
    hangs = tmp_path / "test_hangs.py"
    hangs.write_text(
        "import pathlib, time\ndef test_bad(): assert 1 + 1 == 3\n"
        f"def test_hangs():\n    pathlib.Path({str(tmp_path / 'marks' / 'one')!r}).touch()\n    time.sleep(600)\n"
    )
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(processes, "time", visit_standin.JumpingClock(marks))
    packed = []
    watch = processes.Watch(tick=lambda: packed.append(True))
    found = processes.run_tests([str(hangs)], tmp_path, 3000.0, watch)
    assert found["status"] == "out of time"
    assert (found["tests"], found["failures"]) == (1, 1)  # an interrupted pytest still writes its XML
    assert packed  # what was known was packed meanwhile
    assert "assert (1 + 1) == 3" in (tmp_path / "failures.txt").read_text()


@pytest.mark.process
def test_tests_that_take_no_interruption_are_killed_and_their_failures_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "GRACE_S", 1e3)
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(processes, "time", visit_standin.JumpingClock(marks))
    hangs = tmp_path / "test_hangs.py"
    hangs.write_text(
        "import pathlib, signal, time\n"
        "def test_bad(): assert 0, 'first reason'\n"
        f"marks = pathlib.Path({str(marks)!r})\n"
        "def test_hangs():\n    signal.signal(signal.SIGINT, lambda *_: (marks / 'two').touch())\n"
        "    (marks / 'one').touch()\n    while True: time.sleep(600)\n"
    )
    found = processes.run_tests([str(hangs)], tmp_path, 3000.0, processes.Watch())
    assert (found["status"], found["tests"], found["failures_written"]) == ("out of time", None, 1)
    assert "first reason" in (tmp_path / "failures.txt").read_text()
    text = gpu_visit.part_line("tests", found)
    seconds = f"{found['seconds']:.0f} of 3000 s"
    assert text == f"tests: out of time, {seconds}, ended with 1 failures, which failures.txt has"


@pytest.mark.process
def test_failures_of_every_worker_are_streamed(tmp_path):
    pytest.importorskip("xdist")
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(f"def test_{name}(): assert 0, 'reason {name}'\n")
    found = processes.run_tests([str(tmp_path)], tmp_path, 300.0, processes.Watch(), workers=2)
    assert (found["status"], found["tests"], found["failures"]) == ("exit status 1", 2, 2)
    written = (tmp_path / "failures.txt").read_text()
    assert "reason one" in written
    assert "reason two" in written
    assert "2 workers" in (tmp_path / "tests.txt").read_text()


def test_an_archive_is_whole_at_any_time_and_a_second_visit_starts_from_it(tmp_path):
    folder, later, archive = (tmp_path / name for name in ("folder", "later", "out.tar.gz"))
    folder.mkdir()
    later.mkdir()
    processes.unpack(archive, folder)  # a first visit finds nothing
    (folder / "sweep.json").write_text("1")
    processes.pack(folder, archive)
    (folder / "logprobs.json").write_text("2")
    (folder / "trainer.json.part").write_text("half")  # a part is writing it
    processes.pack(folder, archive)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "later", "out.tar.gz"}
    processes.unpack(archive, later)
    assert {path.name: path.read_text() for path in later.iterdir()} == {"sweep.json": "1", "logprobs.json": "2"}


# Tables


def test_kernel_section_is_written_from_results_and_left_alone_without(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "a\n<!-- kernels:begin -->\nold\n<!-- kernels:end -->\nb"
    assert tables.render(text) == text
    cell = _cell("T2048-H576-V49152", ours=1500.0, naive=1200.0) | {"dtype": "float32", "oracle": "float64"}
    cell["rows"].append({"name": "gone", "status": "skipped", "reason": "not here", "modes": {}})
    versions = {"torch": "2", "transformers": "5"}
    where = {"date": "d", "commit": "c", "cpu": "z", "cores": 2, "versions": versions}
    result = {"case": "trajectory_balance", "cells": [cell], "device": {"threads": 1}, "environment": where}
    (tmp_path / "trajectory_balance.json").write_text(json.dumps(result))
    made = tables.render(text)
    assert made.startswith("a\n<!-- kernels:begin -->\n| method |")
    assert "| ours | 1.50 s (1.50 to 1.50) |" in made
    assert "The full step runs at 0.80 x the speed of the fastest other method (naive)" in made.replace("\n", " ")
    assert "gone (not here)" in made
    assert "old" not in made
    assert Path("README.md").name in {path.name for path in tables.READMES}

"""All tests and measurements for a short GPU session, in one command and within a few minutes.

    python -m benchmarks.run gpu_visit --out DIR --minutes 9

Compiles the kernels side by side, runs tests, the profile of a step, configurations of our projection, the priority
tree, the training phase against TRL's, the tables of both operations (most important first), and the decision gates.
Each part is a separate process with a time limit. A part that hangs or loses the GPU is ended and continued without the
method it was measuring. DIR gets two files: visit.json, a summary, and visit.tar.gz with everything, which is replaced
every few seconds, so that what is known survives whatever ends the visit. A second visit to DIR starts from what is in
it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import environment
from benchmarks.loss import report as kernel_report
from benchmarks.loss.problems import TOY_SHAPE
from benchmarks.training import phase_beside_trl
from benchmarks.tree import report as tree_report
from paced_fast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
MAX_RESTARTS = 4
STALL_S = 75.0
PACK_EVERY_S = 10.0
GRACE_S = 15.0
"""Time in which a part that is ended may write what it knows."""
ENTRY = [sys.executable, "-m", "benchmarks.run"]
PARTS = ("precompile", "tests", "phases", "sweep", "priority_tree", "trainer", "trajectory_balance", "logprobs")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Test and measure the kernels on this machine's GPU."""

    out: str = ""
    """Folder for the results; created if missing."""
    minutes: float = 9.0
    """Total time limit in minutes."""
    device: str = "cuda"
    """cuda, or cpu (the same parts at a toy shape, to check that they run)."""
    tests: tuple[str, ...] = ()
    """Files for pytest; none means tests/gpu and every test of the kernels."""
    parts: tuple[str, ...] = PARTS
    """Parts to run, in this order: precompile, tests, phases, sweep, priority_tree, trainer, trajectory_balance,
    logprobs."""
    only: tuple[str, ...] = ()
    """Methods whose name contains one of these words; none means all."""
    commit: str = ""
    """Commit to record if the sources come without their git history."""
    stall_seconds: float = STALL_S
    """A part that reports no progress for this many seconds is ended."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Measurement: a case of `benchmarks.run` that writes `NAME.json`."""

    name: str
    case: str
    share: float
    """Share of the remaining time that it may use."""
    options: tuple[str, ...] = ()
    resumable: bool = False


def precompilation(arguments: Arguments) -> list[Part]:
    """Return what comes before the tests, which would compile one kernel after the other."""
    toy = ("--heads", "2") if arguments.device == "cpu" else ()
    part = Part(name="precompile", case="precompile", share=0.2, options=toy)
    return [part] if part.name in arguments.parts else []


def parts(arguments: Arguments) -> list[Part]:
    """Return the measurements after the tests, in order."""
    toy = arguments.device == "cpu"
    only = ("--only", *arguments.only) if arguments.only else ()
    shapes = ("--shapes", TOY_SHAPE.name) if toy else ()
    cell = ("--repetitions", "2", "--no-memory", "--inputs", "peaked") if toy else ("--cell-seconds", "40")
    table = (*shapes, *cell, *only)
    tree = ("--quick",) if toy else ("--cell-seconds", "8")
    sizes = ("--model", "toy", "--threads", "1", "--repeats", "1")
    if not toy:
        sizes = ("--prompts", "16", "--longest", "1024", "--repeats", "5")
    every = [
        Part(name="phases", case="phases", share=0.12, options=shapes),
        Part(name="sweep", case="gemm_sweep", share=0.15, options=(*shapes, "--repetitions", "2" if toy else "20")),
        Part(name="priority_tree", case="priority_tree", share=0.15, options=(*tree, *only), resumable=True),
        Part(name="trainer", case="trainer", share=0.15, options=sizes),
        Part(name="trajectory_balance", case="trajectory_balance", share=0.72, options=table, resumable=True),
        Part(name="logprobs", case="logprobs", share=1.0, options=table, resumable=True),
    ]
    return [part for part in every if part.name in arguments.parts]


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Run every part and return the summary, which DIR/visit.json also holds at any time."""
    if arguments.device not in ("cuda", "cpu"):
        raise InputError(f"--device {arguments.device!r}: give cuda or cpu")
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        raise InputError(f"unknown part {unknown[0]!r}: the parts are {', '.join(PARTS)}")
    if not arguments.out:
        raise InputError("gpu_visit has no folder for its results: give --out DIR")
    device = environment.choose_device(arguments.device)
    deadline = time.monotonic() + 60 * arguments.minutes - min(10.0, 6 * arguments.minutes)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(out, folder)
        summary: dict[str, Any] = {"settings": asdict(arguments), "device": environment.device(device)}
        summary["environment"] = environment.describe() | ({"commit": arguments.commit} if arguments.commit else {})
        summary |= {"parts": {}, "gates": evaluate_gates(folder)}
        for fresh in ("report.txt", "tests.txt", "failures.txt"):
            (folder / fresh).write_text("")
        visit = _Visit(arguments, out, folder, summary, deadline)
        visit.save()
        try:
            visit.run()
        finally:
            visit.save()
    return summary


@dataclass
class _Visit:
    """The parts of one visit, and what is known so far."""

    arguments: Arguments
    out: Path
    folder: Path
    summary: dict[str, Any]
    deadline: float

    def save(self) -> None:
        self.summary["gates"] = evaluate_gates(self.folder)
        for folder in (self.folder, self.out):
            environment.write_json(folder / "visit.json", environment.headed("gpu_visit", self.summary))
        pack(self.folder, self.out)

    def run(self) -> None:
        known = self.summary["parts"]
        for part in precompilation(self.arguments):
            self._measure(part)
        if "tests" in self.arguments.parts:
            for name, files in test_groups(self.arguments).items():
                limit = (0.15 if name == "kernel tests" else 0.3) * self._left()
                known[name] = run_tests(files, self.folder, limit, self._pack)
                self.save()
        for part in parts(self.arguments):
            self._measure(part)
        text = summary_text(self.summary, self.folder)
        with (self.folder / "report.txt").open("a") as file:
            file.write(f"\n{text}\n")
        print(text)

    def _measure(self, part: Part) -> None:
        seconds = part.share * self._left()
        self.summary["parts"][part.name] = run_part(part, self.arguments, self.folder, seconds, self._pack)
        self.save()

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _pack(self) -> None:
        pack(self.folder, self.out)


def pack(folder: Path, out: Path) -> None:
    """Replace OUT/visit.tar.gz by the files of a folder, at once: whoever reads it meanwhile finds a whole one."""
    part = out / "visit.tar.gz.part"
    with tarfile.open(part, "w:gz", compresslevel=1) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    os.replace(part, out / "visit.tar.gz")


def unpack(out: Path, folder: Path) -> None:
    """Fill a folder with what an earlier visit to OUT found, if there was one."""
    if (out / "visit.tar.gz").is_file():
        with tarfile.open(out / "visit.tar.gz") as archive:
            archive.extractall(folder, filter="data")


def test_groups(arguments: Arguments) -> dict[str, list[str]]:
    """Return name -> test files: those that need the GPU, then those of paced_kernels without the trainer."""
    if arguments.tests:
        return {"tests": list(arguments.tests)}
    folder = ROOT / "tests"
    groups = {"gpu tests": [str(folder / "gpu")]} if (folder / "gpu").is_dir() else {}
    groups["kernel tests"] = []
    for path in sorted(folder.glob("*/test_*.py")):
        text = path.read_text(encoding="utf-8")
        if path.parent.name not in ("gpu", "engine") and "paced_kernels" in text and "paced_fast" not in text:
            groups["kernel tests"].append(str(path))
    return groups


def run_tests(files: list[str], folder: Path, limit_s: float, tick: Callable[[], None]) -> dict[str, Any]:
    """Run pytest in a separate process, on eight workers where there are as many cores.

    Its output goes to tests.txt and each failure at once to failures.txt. Returns the counts and the names of failed
    tests from its XML report; where it was ended without one, how many failures it had written.
    """
    log, failures = folder / "tests.txt", folder / "failures.txt"
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "junit.xml"
        options = ["-v", "-p", "no:cacheprovider", "-m", "gpu or not slow", f"--junitxml={xml}", "--tb=short"]
        options += ["-p", "benchmarks.failures_as_they_happen", "--failures", str(failures)]
        if (os.cpu_count() or 1) >= 8 and importlib.util.find_spec("xdist") is not None:
            options += ["-n", "8"]
        command = [sys.executable, "-m", "pytest", *options, *files]
        started, before = time.monotonic(), _written(failures)
        with log.open("a") as sink:
            status = _watch(command, sink.fileno(), limit_s, None, limit_s, tick)
        found = {"status": status, "seconds": time.monotonic() - started, "files": [Path(f).name for f in files]}
        if xml.is_file():
            return found | read_junit(xml)
        return found | {"tests": None, "failures_written": _written(failures) - before}


def _written(failures: Path) -> int:
    return sum(line.startswith("FAILED ") for line in failures.read_text().splitlines()) if failures.is_file() else 0


def read_junit(path: Path) -> dict[str, Any]:
    """Return the counts of a JUnit XML file, and the failed tests with the start of their messages."""
    root = ElementTree.parse(path).getroot()
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = []
    for test in root.iter("testcase"):
        for kind in ("failure", "error"):
            found = test.find(kind)
            if found is not None:
                said = " ".join((found.get("message") or "").split())[:200]
                failed.append({"name": f"{test.get('classname')}.{test.get('name')}", "message": said})
    return {**counts, "failed": failed}


def run_part(
    part: Part, arguments: Arguments, out: Path, limit_s: float, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run one part until it or its time ends; restart it without a method that hung or broke the GPU."""
    started, excluded, restarts = time.monotonic(), [], 0
    result = out / f"{part.name}.json"
    status = "no time left"
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "running"
        while (left := limit_s - (time.monotonic() - started)) > 1.0:
            command = [*ENTRY, part.case, "--json", str(result), *part.options]
            command += ["--device", arguments.device, "--progress", str(progress), "--seconds", f"{0.85 * left:.1f}"]
            if part.resumable:
                command += ["--resume", *(["--exclude", *excluded] if excluded else [])]
            with (out / "report.txt").open("a") as sink:
                status = _watch(command, sink.fileno(), left, progress, arguments.stall_seconds, tick)
            culprit = progress.read_text().rsplit(" (", 1)[0] if progress.is_file() else ""
            if status in ("done", "out of time") or not part.resumable or not culprit or restarts == MAX_RESTARTS:
                break
            excluded.append(culprit)
            restarts += 1
    kept = environment.read_json(result)
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "excluded": excluded,
        "not_reached": kept.get("not_reached", []),
        "cells": [f"{cell['name']} {cell.get('inputs', '')}".rstrip() for cell in kept.get("cells", [])],
    }


def _watch(
    command: list[str], sink: int, limit_s: float, progress: Path | None, stall_s: float, tick: Callable[[], None]
) -> str:
    """Run until it ends, its time is over, or `progress` is unchanged for `stall_s`; calls `tick` now and then.

    What is not over by then is interrupted, has `GRACE_S` to say what it knows, and its process group is killed.
    """
    started = ticked = time.monotonic()
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment.child_environment(),
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    status = ""
    seen, changed = "", started
    while not status:
        try:
            code = child.wait(timeout=0.2)
            return "done" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        text = progress.read_text() if progress is not None and progress.is_file() else ""
        if text != seen:
            seen, changed = text, now
        if now - started > limit_s:
            status = "out of time"
        elif progress is not None and now - changed > stall_s:
            status = f"no progress for {stall_s:.0f} s"
        elif now - ticked > PACK_EVERY_S:
            tick()
            ticked = time.monotonic()
    # The first process alone: it ends its own workers, whose interruptions it would take for failures.
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return status


def evaluate_gates(out: Path) -> list[dict[str, str]]:
    """Evaluate the decision gates on the results written so far."""
    cells = environment.read_json(out / "trajectory_balance.json").get("cells", [])
    swept = environment.read_json(out / "sweep.json").get("shapes", [])
    first_gemm = [entry for shape in swept for entry in shape["entries"] if entry["stage"] == 2]
    return kernel_report.gates(cells, first_gemm)


def summary_text(summary: dict[str, Any], out: Path) -> str:
    """Format parts, gates, and every comparison with the fastest peer, including those we lose."""
    lines = []
    for name, part in summary["parts"].items():
        line = f"{name}: {part['status']}, {part['seconds']:.0f} s"
        if part.get("tests") is not None:
            line += f", {part['tests']} tests, {part['failures'] + part['errors']} failed, {part['skipped']} skipped"
            line += "".join(f"\n  FAILED {test['name']}: {test['message']}" for test in part["failed"][:10])
        if part.get("failures_written"):
            line += f", ended with {part['failures_written']} failures, which failures.txt has"
        if part.get("excluded"):
            line += f", left out after hanging or losing the GPU: {', '.join(part['excluded'])}"
        if part.get("not_reached"):
            line += f"\n  not reached: {', '.join(part['not_reached'])}"
        lines.append(line)
    for case in ("trajectory_balance", "logprobs"):
        cells = environment.read_json(out / f"{case}.json").get("cells", [])
        lines += [kernel_report.cell_text(case, cell) for cell in cells[:1]]
        for cell in cells[1:]:
            lines += [f"{case} {kernel_report.verdict(cell, mode)}" for mode in kernel_report.SHOWN_MODES]
    trained = environment.read_json(out / "trainer.json")
    lines += phase_beside_trl.lines(trained.get("rows", [])) + [
        f"trainer: {text}" for text in trained.get("left_out", [])
    ]
    tree = environment.read_json(out / "priority_tree.json")
    if tree.get("cells"):
        lines.append(tree_report.summary_text(tree))
        lines += [tree_report.quality_text(entry) for entry in tree["quality"][:1]]
    lines += [f"{gate['gate']}: {gate['status'].upper()} ({gate['detail']})" for gate in summary["gates"]]
    gpu = summary["device"].get("gpu")
    lines.append(f"on {gpu or 'a CPU'}, torch {torch.__version__}")
    return "\n".join(lines)

"""All tests and measurements for a short GPU session, in two commands of a few minutes.

    python -m benchmarks.run gpu_visit --visit a --out DIR      # at most six minutes
    python -m benchmarks.run gpu_visit --visit b --out DIR      # at most five

A checks and times the loss, counts, and sweeps configurations; B runs the tests and the tables (`visit.parts`). Each
part is a process with a time limit: one that crashes, hangs or loses the GPU costs nothing but itself. DIR gets one
archive for each visit, visit_a.tar.gz, and beside it the summary that is also in it, with every prediction next to its
measurement. The archive is replaced every few seconds, so that what is known survives whatever ends the visit. The same
visit to DIR again starts from what is in it. `--rehearse` runs the same on a CPU, at toy shapes, within seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.loss import report as kernel_report
from benchmarks.training import phase_beside_trl
from benchmarks.tree import report as tree_report
from benchmarks.visit import machine, parts, predictions, processes, smoke
from benchmarks.visit.processes import GRACE_S, Part, Watch
from paced_fast.errors import InputError

STALL_S = 60.0
FRESH = ("report.txt", "tests.txt", "failures.txt")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Test and measure the kernels on this machine's GPU."""

    visit: str = "a"
    """a (smoke test, counters, sweep) or b (tests, tables, tree, trainer)."""
    out: str = ""
    """Folder for the results; created if missing."""
    minutes: float = 0.0
    """Total time limit in minutes; 0 means six for a and five for b, and for a rehearsal as long as it takes."""
    rehearse: bool = False
    """Run the same on a CPU at toy shapes, to see that it works; its times say nothing."""
    tests: tuple[str, ...] = ()
    """Files for pytest; none means tests/gpu."""
    parts: tuple[str, ...] = ()
    """Parts to run; none means all of the visit."""
    only: tuple[str, ...] = ()
    """Methods of the tables whose name contains one of these words; none means all."""
    packages: str = ""
    """Folder with packages of other projects to compare with (pip install --target), where there is no network."""
    commit: str = ""
    """Commit to record if the sources come without their git history."""
    stall_seconds: float = STALL_S
    """A part that reports no progress for this many seconds is ended."""


def default_path(arguments: Arguments) -> Path:
    """The summary, beside the archive."""
    if not arguments.out:
        raise InputError("gpu_visit has no folder for its results: give --out DIR")
    return Path(arguments.out, f"visit_{arguments.visit}.json")


def chosen_parts(arguments: Arguments) -> tuple[Part, ...]:
    """Return the parts to run. Raises InputError for a visit or a part that does not exist."""
    if arguments.visit not in parts.VISITS:
        raise InputError(f"--visit {arguments.visit!r}: the visits are {' and '.join(parts.VISITS)}")
    every = parts.parts_of(arguments.visit, rehearse=arguments.rehearse, only=arguments.only)
    names = [part.name for part in every]
    unknown = [name for name in arguments.parts if name not in names]
    if unknown:
        raise InputError(f"--parts {unknown[0]!r}: the parts of visit {arguments.visit} are {', '.join(names)}")
    return tuple(part for part in every if not arguments.parts or part.name in arguments.parts)


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Run every part and return the summary, which `path` also holds at any time."""
    chosen = chosen_parts(arguments)
    if arguments.packages and not Path(arguments.packages).is_dir():
        raise InputError(f"--packages {arguments.packages}: there is no such folder")
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise InputError("gpu_visit: torch finds no GPU on this machine: give --rehearse to try it on a CPU")
    started = time.monotonic()
    unhurried = len(chosen) * parts.UNHURRIED_S / 60
    minutes = arguments.minutes or (unhurried if arguments.rehearse else parts.MINUTES[arguments.visit])
    archive = path.parent / f"visit_{arguments.visit}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, _interrupted_by_termination():
        folder = Path(name)
        processes.unpack(archive, folder)
        for fresh in FRESH:
            (folder / fresh).write_text("")
        summary: dict[str, Any] = {"settings": asdict(arguments), "parts": {}}
        summary["environment"] = environment.describe() | ({"commit": arguments.commit} if arguments.commit else {})
        visit = _Visit(arguments, folder, archive, path, summary, started + 60 * minutes - min(GRACE_S, 6 * minutes))
        visit.save()
        try:
            visit.run(chosen)
        finally:
            visit.finish()
    return summary


@contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """A visit that is told to end packs what it knows, and leaves no process behind."""

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Visit:
    """The parts of one visit, and what is known so far."""

    arguments: Arguments
    folder: Path
    archive: Path
    path: Path
    summary: dict[str, Any]
    deadline: float

    def save(self) -> None:
        """Write the summary and the archive anew."""
        given = self.arguments
        self.summary["gates"] = evaluate_gates(self.folder)
        self.summary["predictions"] = predictions.compared(self.folder, given.visit, given.rehearse)
        whole = environment.headed("gpu_visit", self.summary)
        for path in (self.folder / self.path.name, self.path):
            environment.write_json(path, whole)
        self.pack()

    def pack(self) -> None:
        """Replace the archive."""
        processes.pack(self.folder, self.archive)

    def run(self, chosen: tuple[Part, ...]) -> None:
        """Run the parts one after the other."""
        given = self.arguments
        paths = (str(Path(given.packages).resolve()),) if given.packages else ()
        stall_s = parts.UNHURRIED_S if given.rehearse else given.stall_seconds
        watch = Watch(forks=given.rehearse, stall_s=stall_s, tick=self.pack, paths=paths)
        for at, part in enumerate(chosen):
            limit_s = parts.limit_of(part, chosen[at + 1 :], self.deadline - time.monotonic())
            self.summary["parts"][part.name] = {"status": "running", "limit_s": limit_s}
            self.summary["parts"][part.name] = self._run(part, limit_s, watch)
            self.save()
            sys.stdout.write(part_line(part.name, self.summary["parts"][part.name]) + "\n")
            sys.stdout.flush()

    def _run(self, part: Part, limit_s: float, watch: Watch) -> dict[str, Any]:
        given = self.arguments
        if limit_s <= 1.0:
            return {"status": "no time left", "seconds": 0.0, "limit_s": limit_s}
        if part.case != "tests":
            return processes.run_part(part, "cpu" if given.rehearse else "cuda", self.folder, limit_s, watch)
        files = given.tests or (str(processes.ROOT / "tests" / "gpu"),)
        workers = 0 if given.rehearse else parts.test_workers()
        return processes.run_tests(files, self.folder, limit_s, replace(watch, stall_s=limit_s), workers=workers)

    def finish(self) -> None:
        """Write what is known, as text too."""
        self.save()
        text = summary_text(self.summary, self.folder)
        with (self.folder / "report.txt").open("a") as file:
            file.write(f"\n{text}\n")
        print(text)
        self.pack()


def evaluate_gates(folder: Path) -> list[dict[str, str]]:
    """Evaluate the decision gates on the results written so far."""
    results = predictions.Results(folder)
    swept = results.of("sweep").get("shapes", [])
    first_gemm = [entry for shape in swept for entry in shape["entries"] if entry["stage"] == 2]
    return kernel_report.gates(results.of("trajectory_balance").get("cells", []), first_gemm)


def part_line(name: str, part: dict[str, Any]) -> str:
    """Describe how a part ended, with the first tests that failed."""
    line = f"{name}: {part['status']}, {part.get('seconds', 0.0):.0f} of {part['limit_s']:.0f} s"
    if part.get("tests") is not None:
        line += f", {part['tests']} tests, {part['failures'] + part['errors']} failed, {part['skipped']} skipped"
        line += "".join(f"\n  FAILED {test['name']}: {test['message']}" for test in part["failed"][:10])
    if part.get("failures_written"):
        line += f", ended with {part['failures_written']} failures, which failures.txt has"
    if part.get("excluded"):
        line += f", left out after hanging or losing the GPU: {', '.join(part['excluded'])}"
    if part.get("not_reached"):
        line += f"\n  not reached: {', '.join(part['not_reached'])}"
    return line


def summary_text(summary: dict[str, Any], folder: Path) -> str:
    """Format parts, predictions, gates, and every comparison with the fastest peer, including those we lose."""
    results = predictions.Results(folder)
    found = [part_line(name, part) for name, part in summary["parts"].items()]
    if summary["settings"]["rehearse"]:
        found.insert(0, "REHEARSAL on a CPU at toy shapes: times say nothing")
    versions = summary["environment"]["versions"]
    found.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    sections: list[Callable[[predictions.Results], list[str]]] = [_machine, _smoke, _losses, _trainer, _tree]
    for section in sections:
        found += section(results)
    found.append("\n" + predictions.text(summary["predictions"]))
    found += [f"{gate['gate']}: {gate['status'].upper()} ({gate['detail']})" for gate in summary["gates"]]
    return "\n".join(found)


def _machine(results: predictions.Results) -> list[str]:
    found = results.of("machine")
    return [machine.text(found)] if found else []


def _smoke(results: predictions.Results) -> list[str]:
    found = results.of("smoke")
    lines = [smoke.accuracy_line(entry) for entry in found.get("accuracy", [])]
    lines += [
        f"bias of log-probs, H{row['hidden_size']}, {row['stage']}: {row['mean_nats']:+.1e} nats (standard error "
        f"{row['standard_error_nats']:.0e}), largest {row['largest_nats']:.1e}"
        for row in found.get("bias", [])
    ]
    return lines + [f"smoke test, {row['name']} failed: {row['reason']}" for row in found.get("failed", [])]


def _losses(results: predictions.Results) -> list[str]:
    lines = []
    for case in ("trajectory_balance", "logprobs"):
        cells = results.of(case).get("cells", [])
        lines += [kernel_report.cell_text(case, cell) for cell in cells[:1]]
        for cell in cells[1:]:
            lines += [f"{case} {kernel_report.verdict(cell, mode)}" for mode in kernel_report.SHOWN_MODES]
    return lines


def _trainer(results: predictions.Results) -> list[str]:
    found = results.of("trainer")
    lines = phase_beside_trl.lines(found.get("rows", []))
    lines += [
        f"attention of {row['method']}: {row['attention']}" for row in found.get("rows", []) if "attention" in row
    ]
    return lines + [f"trainer: {text}" for text in found.get("left_out", [])]


def _tree(results: predictions.Results) -> list[str]:
    found = results.of("priority_tree")
    if not found.get("cells"):
        return []
    return [tree_report.summary_text(found), *(tree_report.quality_text(entry) for entry in found["quality"][:1])]

"""Run the parts of a visit as processes that may crash, hang or be killed, and keep what they have written.

A part is a command of `benchmarks.run` or pytest. What is not over in time is interrupted, so that it can write what it
knows, and then its process group is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import environment

ROOT = Path(__file__).resolve().parent.parent.parent
ENTRY = "benchmarks.run"
MAX_RESTARTS = 4
PACK_EVERY_S = 5.0
GRACE_S = 8.0
"""Time in which a part that is interrupted may write what it knows; part of its limit."""
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Part:
    """A case of `benchmarks.run` that writes `NAME.json`; pytest if the case is `tests`."""

    name: str
    case: str
    seconds: float
    """Most time that it gets."""
    least: float = 0.0
    """Time that the parts before it leave for it."""
    options: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Methods that a resumable part leaves out from the start."""
    resumable: bool = False


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How processes are started and watched."""

    forks: bool = False
    """Start a part as a copy of this process, which has loaded everything; only for a rehearsal, where no GPU is."""
    stall_s: float = 60.0
    """A part that reports no progress for this long is ended."""
    tick: Callable[[], None] = lambda: None
    """Called every few seconds while a part runs."""
    paths: tuple[str, ...] = ()
    """Folders that parts import from first."""


class Forked:
    """A copy of this process that runs `MODULE WORDS`; the part of `subprocess.Popen` that is needed here."""

    def __init__(self, words: Sequence[str], sink: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, sink)

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, negative for a signal; subprocess.TimeoutExpired if it runs on."""
        ends = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif ends is not None and time.monotonic() > ends:
                raise subprocess.TimeoutExpired("forked", timeout or 0.0)
            else:
                time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _become(words: Sequence[str], sink: int) -> None:
    """Run `python -m MODULE WORDS` in this process, with its output in `sink`; never returns."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(sink, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(sink), "w", buffering=1) for _ in range(2))
        module, rest = importlib.import_module(words[0]), list(words[1:])
        status = int(module.main(rest) or 0)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # like a process of its own, print it and fail
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


def start(words: Sequence[str], sink: int, watch: Watch) -> Any:
    """Start `python -m MODULE WORDS` in a session of its own, output into the file descriptor `sink`."""
    if watch.forks:
        return Forked(words, sink)
    paths = os.pathsep.join(watch.paths)
    surroundings = environment.child_environment()
    surroundings["PYTHONPATH"] = os.pathsep.join(filter(None, (paths, surroundings["PYTHONPATH"])))
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=surroundings,
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(words: Sequence[str], log: Path, limit_s: float, watch: Watch, progress: Path | None = None) -> str:
    """Run a command until it ends, its time is over, or `progress` is unchanged for `watch.stall_s`; say how it ended.

    Its output is appended to `log`. Whatever happens here, no process of it is left.
    """
    started = time.monotonic()  # the start of a process belongs to its time
    with log.open("a") as sink:
        child = start(words, sink.fileno(), watch)
        try:
            status = _follow(child, started, max(limit_s - GRACE_S, 0.1), watch, progress)
        finally:
            _end(child)
    return status


def _follow(child: Any, started: float, limit_s: float, watch: Watch, progress: Path | None) -> str:
    ticked = changed = started
    seen = ""
    while True:
        try:
            code = child.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        else:
            return "done" if code == 0 else _ending(code)
        text = progress.read_text() if progress is not None and progress.is_file() else ""
        if text != seen:
            seen, changed = text, now
        if now - started > limit_s:
            return "out of time"
        if progress is not None and now - changed > watch.stall_s:
            return f"no progress for {watch.stall_s:.0f} s"
        if now - ticked > PACK_EVERY_S:
            watch.tick()
            ticked = time.monotonic()


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _end(child: Any) -> None:
    """Interrupt what still runs, wait, and kill its process group."""
    if child.returncode is None:
        # The first process alone: it ends its own workers, whose interruptions it would take for failures.
        until = time.monotonic() + GRACE_S
        child.send_signal(signal.SIGINT)
        while time.monotonic() < until:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_S)
                break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_part(part: Part, device: str, folder: Path, limit_s: float, watch: Watch) -> dict[str, Any]:
    """Run one part until it or its time ends; restart it without a method that hung or broke the GPU."""
    started, culprits, restarts = time.monotonic(), [], 0
    result = folder / f"{part.name}.json"
    status = "no time left"
    with tempfile.TemporaryDirectory() as scratch:
        progress = Path(scratch) / "running"
        while (left := limit_s - (time.monotonic() - started)) > 1.0:
            words = [ENTRY, part.case, "--json", str(result), *part.options, "--device", device]
            words += ["--progress", str(progress), "--seconds", f"{0.85 * max(left - GRACE_S, 0.1):.1f}"]
            if part.resumable:
                excluded = [*part.exclude, *culprits]
                words += ["--resume", *(["--exclude", *excluded] if excluded else [])]
            status = run(words, folder / "report.txt", left, watch, progress)
            culprit = progress.read_text().rsplit(" (", 1)[0] if progress.is_file() else ""
            if status in ("done", "out of time") or not part.resumable or not culprit or restarts == MAX_RESTARTS:
                break
            culprits.append(culprit)
            restarts += 1
    kept = environment.read_json(result)
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "limit_s": limit_s,
        "excluded": culprits,
        "not_reached": kept.get("not_reached", []),
        "cells": [f"{cell['name']} {cell.get('inputs', '')}".rstrip() for cell in kept.get("cells", [])],
    }


def run_tests(
    files: Sequence[str], folder: Path, limit_s: float, watch: Watch, *, workers: int = 0, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Run pytest, on several workers where pytest-xdist is.

    Its output goes to tests.txt and each failure at once to failures.txt. Returns the counts and the names of failed
    tests from its XML report; where it was ended without one, how many failures it had written.
    """
    log, failures = folder / "tests.txt", folder / "failures.txt"
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "junit.xml"
        words = ["pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu or not slow", f"--junitxml={xml}", "--tb=short"]
        words += ["-p", "benchmarks.failures_as_they_happen", "--failures", str(failures), *options]
        if workers and importlib.util.find_spec("xdist") is not None:
            words += ["-n", str(workers)]
        started, before = time.monotonic(), _written(failures)
        status = run([*words, *files], log, limit_s, watch)
        found = {
            "status": status,
            "seconds": time.monotonic() - started,
            "limit_s": limit_s,
            "files": [Path(file).name for file in files],
        }
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


def pack(folder: Path, archive: Path) -> None:
    """Replace an archive by the files of a folder, at once: whoever reads it meanwhile finds a whole one."""
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=1) as opened:
        for path in sorted(folder.iterdir()):
            if not path.name.endswith(".part"):  # being written by a process of a part
                with contextlib.suppress(FileNotFoundError):
                    opened.add(path, path.name)
    os.replace(part, archive)


def unpack(archive: Path, folder: Path) -> None:
    """Fill a folder with what an earlier visit left in its archive, if there was one."""
    if archive.is_file():
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")

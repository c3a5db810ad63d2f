"""Recovery from failing processes: four faults in each of six phases on either of two ranks.

    python -m benchmarks.run faults_processes [--only kill/reward/1] [--parallel 3]

Each cell is a complete run of a small model under torchrun with gloo on the CPU. After the fault torchrun restarts both
ranks, and `--resume auto` continues from the newest checkpoint. A cell passes if the run exits with status 0, if its
parameters, optimiser, schedule, replay ring, metrics and rollouts are bit-identical to those of a run without a fault,
and if nothing is left behind: no process, no shared memory, no temporary file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults.faulty_rank import KINDS, PHASES, TAKE
from paced_fast.run.start.run_folder import LOCK_NAME

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
RESTARTS = 3
# Evaluations after step 3, checkpoints after steps 2, 4 and 5.
STRIKES_AT = {"build": 0, "generate": 3, TAKE: 3, "reward": 3, "update": 3, "evaluate": 3, "save": 4}
_TORCHRUN_KILLS_AFTER = 30.0
"""Seconds after which torchrun kills a stopped rank, having asked the ranks to end."""
_REWARD = """
def odd(prompts, completions, **columns):
    return [float(sum(map(ord, p + c)) % 3 == 0) for p, c in zip(prompts, completions)]
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Inject faults into processes."""

    only: tuple[str, ...] = ()
    """Cells to run, as kind/phase/rank; an omitted part matches all."""
    parallel: int = 3
    """Concurrent runs; those with a stopped rank mostly wait."""
    timeout_seconds: float = 6.0
    """Longest wait of one rank for another (`distributed.timeout_seconds`)."""
    limit_seconds: float = 150.0
    """Time limit of a run."""


@dataclass(frozen=True)
class Cell:
    """One fault at one place."""

    kind: str
    phase: str
    rank: int

    @property
    def name(self) -> str:
        """Name as kind/phase/rank."""
        return f"{self.kind}/{self.phase}/{self.rank}"


@dataclass
class Outcome:
    """Outcome of a run."""

    cell: str
    status: int | None
    """Exit status of torchrun; None = killed at the time limit."""
    seconds: float
    """Time from the fault to the end, including the rest of the training."""
    attempts: int
    """Number of times the ranks were started."""
    differs: list[str] = field(default_factory=list)
    """Differences from the run without a fault."""
    left: list[str] = field(default_factory=list)
    """Processes, shared memory and files left behind."""
    struck: bool = True
    """Whether the fault happened at all."""

    @property
    def passed(self) -> bool:
        """Whether the run recovered, is equal and left nothing behind."""
        return self.status == 0 and self.struck and not self.differs and not self.left


class Launcher:
    """Run torchrun in several folders concurrently, from one process that has torch loaded."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.fork_launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            start_new_session=True,
        )
        self._answers: dict[str, queue.Queue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._count = itertools.count()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, folder: Path, arguments: list[str], env: dict[str, str], limit_seconds: float) -> int | None:
        """Return the exit status of torchrun with these arguments in `folder`; None if killed at the time limit."""
        name = str(next(self._count))
        answers = self._answers[name] = queue.Queue()
        log = str(folder / "log.txt")
        job = {"id": name, "arguments": arguments, "env": env, "cwd": str(folder), "log": log}
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        pid = answers.get(timeout=60)["pid"]
        try:
            return int(answers.get(timeout=limit_seconds)["status"])
        except queue.Empty:
            for each in {pid, *(int(path.name) for path in processes_in(folder))}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            return None

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._answers[message["id"]].put(message)


def train_words(folder: Path, timeout_seconds: float) -> list[str]:
    """Return the command line of the small run: 4 prompts with 4 completions each per step, a model of width 16."""
    source = f"task:signed_sums?reward={folder.parent / 'rewards.py'}:odd&split="
    return [
        *("tiny", "--steps", str(STEPS), "--run-dir", "run", "--resume", "auto"),
        *("--model.hidden-size", "16", "--model.intermediate-size", "24", "--model.num-layers", "1"),
        *("--model.num-heads", "2", "--data.train", f"{source}train&size=40", "--data.eval", f"{source}eval&size=12"),
        *("--data.headline", "--warm-start.first.steps", "0", "--warm-start.second.steps", "0"),
        *("--generation.prompts-per-step", "4", "--generation.group-size", "4"),
        *("--generation.max-completion-tokens", "5", "--optimizer.learning-rate", "1e-2", "--log-z.hidden-size", "8"),
        *("--scheduler.warmup-steps", "1", "--replay.capacity", "12", "--replay.insert-per-step", "5"),
        *("--replay.draw-per-step", "4", "--evaluation.every", "3", "--evaluation.samples", "2"),
        *("--evaluation.final-samples", "2", "--run.checkpoint-every", "2", "--run.keep-checkpoints", "3"),
        *("--run.threads", "1", "--run.no-report", "--run.rollouts-per-step", "16"),
        *("--distributed.timeout-seconds", str(timeout_seconds), "--distributed.stall-seconds", "3"),
    ]


def launch_words(restarts: int = RESTARTS) -> list[str]:
    """Return torchrun's own options: a local rendezvous on a free port, and frequent checks of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        *("--nnodes", "1", "--nproc-per-node", "2", "--max-restarts", str(restarts), "--monitor-interval", "0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"),
        *("-m", "benchmarks.faults.faulty_rank"),
    ]


def run_cell(launcher: Launcher, cell: Cell | None, root: Path, arguments: Arguments) -> Outcome:
    """Run one cell (None = the run without a fault) in its folder below `root`."""
    name = "whole" if cell is None else cell.name
    folder = root / name.replace("/", "-")
    (folder / "tmp").mkdir(parents=True)
    env = {"TMPDIR": str(folder / "tmp"), "GLOO_SOCKET_IFNAME": "lo"}
    once = folder / "struck"
    if cell is not None:
        fault = {"kind": cell.kind, "rank": cell.rank, "phase": cell.phase, "step": STRIKES_AT[cell.phase]}
        env["PACED_FAULT"] = json.dumps({**fault, "once": str(once)})
    words = [*launch_words(), *train_words(folder, arguments.timeout_seconds)]
    started = time.time()
    status = launcher.run(folder, words, env, arguments.limit_seconds)
    ended = time.time()
    left = left_behind(folder)
    struck = cell is None or once.exists()
    began = float(once.read_text()) if cell is not None and struck else started
    starts = (folder / "starts").read_text().count("0") if (folder / "starts").exists() else 1
    return Outcome(name, status, ended - began, starts, left=left, struck=struck)


def processes_in(folder: Path) -> list[Path]:
    """Return the processes whose working folder is `folder`, as paths in /proc."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                if Path(os.readlink(path / "cwd")).is_relative_to(folder):
                    found.append(path)
    return found


def left_behind(folder: Path, patience: float = 5.0) -> list[str]:
    """Return processes and temporary files left by a finished run; a helper process gets time to exit."""
    end = time.monotonic() + patience
    while processes_in(folder) and time.monotonic() < end:
        time.sleep(0.1)
    found = [f"process {path.name}" for path in processes_in(folder)]
    found += [str(p.name) for p in (folder / "tmp").iterdir() if not p.name.startswith("torchelastic_")]  # torchrun's
    run = folder / "run"
    words = (".tmp", ".partial", ".lock")
    paths = (path for path in run.rglob("*") if path != run / LOCK_NAME)  # the lock file is meant to stay
    found += [str(path.relative_to(folder)) for path in paths if any(word in path.name for word in words)]
    return found


def shared_memory_left(before: set[str], patience: float = 10.0) -> list[str]:
    """Return new shared-memory segments that no process has open.

    Segments that disappear within `patience` seconds belong to other programs on the machine.
    """
    end = time.monotonic() + patience
    while found := [name for name in set(os.listdir("/dev/shm")) - before if not _is_open(name)]:
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    return sorted(found)


def _is_open(name: str) -> bool:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                if f"/dev/shm/{name}" in (path / "maps").read_text(errors="replace"):
                    return True
    return False


def state_of(folder: Path) -> dict[str, str]:
    """Return digests of a run's last checkpoint, of its metrics without times, and of its rollouts."""
    run = folder / "run"
    last = run / "checkpoints" / f"step_{STEPS:06d}"
    found = {
        str(path.relative_to(last)): _digest(path)
        for path in sorted(last.rglob("*"))
        if path.is_file() and path.name not in ("state.json", "manifest.json")
    }
    if (last / "state.json").exists():
        found["state.json"] = json.dumps(_timeless(json.loads((last / "state.json").read_text())), sort_keys=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with contextlib.suppress(OSError):
            lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
            found[name] = json.dumps([_timeless(line) for line in lines], sort_keys=True)
    return found


def _digest(path: Path) -> str:
    """Digest a file's bytes, or the tensors in it, because the order of other header entries is arbitrary."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    times = ("seconds", "train_seconds", "tokens_per_second", "memory")
    return {key: _timeless(each) for key, each in value.items() if key not in times}


def prompts_of(folder: Path) -> list[tuple[int, Any]]:
    """Return step and prompt of every rollout of a run, without replayed ones."""
    lines = [json.loads(line) for line in (folder / "run" / "rollouts.jsonl").read_text().splitlines()]
    return [(line["step"], line["prompt"]) for line in lines if not line["replayed"]]


def takes_of(folder: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Return what was taken from the ranks' queues in a run with a fault, by attempt and queue."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in map(json.loads, (folder / "taken").read_text().splitlines()):
        found.setdefault((line["attempt"], line["queue"]), []).append(line)
    return found


def cells(only: tuple[str, ...] = ()) -> list[Cell]:
    """Return the cells, restricted to `only`; stopped ranks come first, because they take longest."""
    order = sorted(KINDS, key=lambda kind: kind != "stop")
    every = [Cell(kind, phase, rank) for kind in order for phase in PHASES for rank in (0, 1)]
    return [
        cell for cell in every if not only or any(set(part.split("/")) <= set(cell.name.split("/")) for part in only)
    ]


def measure(arguments: Arguments, json_path: Path | None = None) -> dict[str, Any]:
    """Run the cells and count; log one line per cell."""
    started, shared = time.monotonic(), set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        root = Path(name).resolve()
        (root / "rewards.py").write_text(_REWARD)
        launcher = Launcher()
        try:
            whole = run_cell(launcher, None, root, arguments)
            assert whole.status == 0, (root / "whole" / "log.txt").read_text(errors="replace")[-4000:]
            expected, ledger = state_of(root / "whole"), prompts_of(root / "whole")

            def work(cell: Cell) -> Outcome:
                outcome = run_cell(launcher, cell, root, arguments)
                folder = root / cell.name.replace("/", "-")
                if outcome.status == 0:
                    found = state_of(folder)
                    names = sorted(expected.keys() | found.keys())
                    outcome.differs = [key for key in names if expected.get(key) != found.get(key)]
                    if prompts_of(folder) != ledger:
                        outcome.differs.append("prompts")
                print(_line(outcome), flush=True)
                if not outcome.passed:
                    print((folder / "log.txt").read_text(errors="replace")[-3000:], flush=True)
                return outcome

            with ThreadPoolExecutor(arguments.parallel) as pool:
                outcomes = list(pool.map(work, cells(arguments.only)))
        finally:
            launcher.close()
    result = summary(outcomes, time.monotonic() - started, arguments)
    result["shared_memory_left"] = shared_memory_left(shared)
    return result


def summary(outcomes: list[Outcome], seconds: float, arguments: Arguments) -> dict[str, Any]:
    """Return the counts, and the longest recovery time per kind of fault."""
    slowest: dict[str, float] = {}
    for outcome in outcomes:
        kind = outcome.cell.split("/")[0]
        slowest[kind] = round(max(slowest.get(kind, 0.0), outcome.seconds), 1)
    result = {
        "cells": len(outcomes),
        "recovered_equal_and_clean": sum(outcome.passed for outcome in outcomes),
        "gave_up": sum(outcome.status is None for outcome in outcomes),
        "ended_with_an_error": sum(outcome.status not in (0, None) for outcome in outcomes),
        "different": sum(bool(outcome.differs) for outcome in outcomes),
        "left_something": sum(bool(outcome.left) for outcome in outcomes),
        "restarts_most": max((outcome.attempts - 1 for outcome in outcomes), default=0),
        "slowest_seconds": slowest,
        "timeout_seconds": arguments.timeout_seconds,
        "seconds": round(seconds, 1),
        "outcomes": [{**vars(outcome), "passed": outcome.passed} for outcome in outcomes],
    }
    print(
        f"{result['recovered_equal_and_clean']} of {len(outcomes)} recovered bit-equal and left nothing behind; "
        f"largest seconds from the fault to the end of the run: {slowest}; {seconds:.0f} s in all",
        flush=True,
    )
    return result


def _line(outcome: Outcome) -> str:
    verdict = "ok" if outcome.passed else "FAILED"
    words = [
        f"{outcome.cell:20} {verdict:7} status {outcome.status}, {outcome.seconds:5.1f} s, {outcome.attempts} starts"
    ]
    words += [f"differs: {', '.join(outcome.differs)}"] if outcome.differs else []
    words += [f"left behind: {', '.join(outcome.left)}"] if outcome.left else []
    words += [] if outcome.struck else ["the fault did not happen"]
    return "; ".join(words)

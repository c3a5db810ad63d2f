"""Run files: one JSON file for each run, written when the run ends, and never twice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, stale
from paced_fast.errors import InputError
from paced_fast.run.start.run_folder import RunLock

CODE = "benchmarks.training.efficiency.runs"
"""Module whose code, with everything it imports, decides whether two files can be compared."""
SWEEP_SEEDS = (100, 101)
"""Seeds of the sweep of learning rates; the comparison uses none of them."""


@dataclass(frozen=True, kw_only=True, order=True)
class Job:
    """One run."""

    suite: str
    arm: str
    rate: float
    seed: int

    def path(self, root: Path) -> Path:
        """Its file below the folder of results."""
        return root / self.suite / self.arm / f"lr-{self.rate:g}_seed-{self.seed}.json"

    def read(self, root: Path) -> dict[str, Any]:
        """Its file, or {} while there is none."""
        return environment.read_json(self.path(root))

    def __str__(self) -> str:
        """For messages."""
        return f"{self.suite} {self.arm}, learning rate {self.rate:g}, seed {self.seed}"


def write(job: Job, root: Path, result: dict[str, Any]) -> None:
    """Write the file of a run at once, numbers with six digits."""
    path = job.path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment.write_json(path, _rounded(result))


def read_all(root: Path, suite: str) -> list[dict[str, Any]]:
    """Return all run files of a suite, sorted by arm, rate and seed. Raises InputError if they do not go together."""
    paths = sorted((root / suite).glob("*/lr-*_seed-*.json"))
    found = [environment.read_json(path) for path in paths]
    found.sort(key=lambda run: (run["arm"], run["rate"], run["seed"]))
    check_alike(found)
    return found


def check_alike(runs: list[dict[str, Any]]) -> None:
    """Raises InputError when runs of one seed start from different policies, or runs have different prompts."""
    pairs = (("policy", "initial policies"), ("held_out", "held-out prompts"), ("table", "training prompts"))
    for key, words in pairs:
        seen: dict[Any, dict[str, Any]] = {}
        for run in runs:
            first = seen.setdefault((run["suite"], run["seed"] if key == "policy" else None), run)
            if run[key] != first[key]:
                names = " and ".join(f"{one['arm']} (lr {one['rate']:g}, seed {one['seed']})" for one in (first, run))
                raise InputError(
                    f"{run['suite']}: {names} have different {words} ({first[key]}, {run[key]}) and cannot be "
                    "compared: remove the files of one of them, and run it where the others ran"
                )


@functools.cache
def code_digest() -> str:
    """Sixteen hexadecimal digits of the code that a run executes, comments and docstrings aside."""
    found = hashlib.sha256()
    for name, meaning in stale.meanings(CODE):
        found.update(f"{name}\n{meaning}\n".encode())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def claimed(job: Job, root: Path) -> Iterator[bool]:
    """Hold the claim on a run, or get False while another process holds it.

    The claim is a lock of the file system, which ends with its process however that dies; no clock decides.
    """
    folder = root / job.suite / ".claims" / job.arm / job.path(root).stem
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock() as lock:
        try:
            lock.take(folder)
        except InputError:
            yield False
            return
        yield True


def _rounded(value: Any) -> Any:
    """Numbers with six significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value

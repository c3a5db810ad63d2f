"""What a run tells the outside world: numbers, the metrics file, the clock of each phase; the terminal is in `display`.

Pure functions turn counts into numbers, `MetricsWriter` appends them to `metrics.jsonl`, `Phases` measures where a
step's time goes. Nothing here needs a tensor library, so neither does a reader of run folders.

P = prompts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import nvtx
from numpy.typing import ArrayLike, NDArray

from paced_fast.errors import InputError
from paced_fast.run.record.journal import Journal
from paced_fast.run.record.loggers import Logger, require_sinks
from paced_fast.run.record.terminal import Progress, config_table, configure_logging, final_table, memory_plan_table

__all__ = [
    "MetricsWriter",
    "Phases",
    "Progress",
    "brier_score",
    "config_table",
    "configure_logging",
    "drop_steps",
    "expected_calibration_error",
    "final_table",
    "memory_plan_table",
    "mixed_group_share",
    "rank_correlation",
    "require_sinks",
    "write_json_atomic",
]


# Numbers


def brier_score(values: ArrayLike, accuracies: ArrayLike, group_size: ArrayLike = 1) -> float:
    """Mean squared error of `values` [P] against every single outcome, not against the group's accuracy.

    A group with accuracy a contributes a (1 - v)^2 + (1 - a) v^2, which is the mean over its 0/1 outcomes; hence a
    perfect forecaster scores a (1 - a), not 0. A scalar `group_size` has no effect; an array [P] weighs unequal groups
    by their outcomes. nan when P = 0.
    """
    v, a = _pair(values, accuracies)
    sizes = np.broadcast_to(np.asarray(group_size, dtype=np.float64), v.shape)
    return float(np.average(a * (1.0 - v) ** 2 + (1.0 - a) * v**2, weights=sizes)) if v.size else math.nan


def expected_calibration_error(values: ArrayLike, accuracies: ArrayLike, bins: int = 10) -> float:
    """Mean of |mean value - mean accuracy| over equal bins of the value, each weighted by its number of groups.

    A bin owns its lower edge; the last one owns 1.0 too. nan when P = 0 or a value is not finite.
    """
    v, a = _pair(values, accuracies)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not v.size or not np.all(np.isfinite(v)):
        return math.nan
    index = np.clip(np.floor(v * bins).astype(np.int64), 0, bins - 1)
    gap = np.bincount(index, weights=v, minlength=bins) - np.bincount(index, weights=a, minlength=bins)
    return float(np.abs(gap).sum() / v.size)


def rank_correlation(values: ArrayLike, accuracies: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties averaged; None when a side is constant or not finite, or P < 2."""
    v, a = _pair(values, accuracies)
    if v.size < 2 or not (np.all(np.isfinite(v)) and np.all(np.isfinite(a))) or np.ptp(v) == 0 or np.ptp(a) == 0:
        return None
    return float(np.corrcoef(_average_ranks(v), _average_ranks(a))[0, 1])


def mixed_group_share(accuracies: ArrayLike) -> float:
    """Share of the groups [P] that are neither all right nor all wrong, those that teach. nan when P = 0."""
    a = np.asarray(accuracies, dtype=np.float64)
    return _mean((a > 0.0) & (a < 1.0))


def _mean(x: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    return float(x.mean()) if x.size else math.nan


def _pair(values: ArrayLike, accuracies: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    v = np.asarray(values, dtype=np.float64).reshape(-1)
    a = np.asarray(accuracies, dtype=np.float64).reshape(-1)
    if v.shape != a.shape:
        raise ValueError(f"values and accuracies disagree on P: {v.size} vs {a.size}")
    return v, a


def _average_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


# Files

_KEPT_BYTES = 1 << 26


def write_json_atomic(path: str | Path, obj: object) -> None:
    """Replaces the file at `path` by `obj` as indented JSON; a reader sees the old file or the new one, never a part.

    Non-finite floats become null. Raises TypeError on what JSON cannot hold.
    """
    _replace(Path(path), json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def drop_steps(path: str | Path, first_step: int) -> int:
    """Removes the JSON lines with `step` >= `first_step`, and a torn last line, atomically; returns how many went.

    A resumed run calls this: what was logged after the checkpoint happens again. A missing file is an empty one.
    Raises InputError when a line other than the last is no JSON object with a step.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] < first_step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):  # a kill tears the last line only
                raise InputError(f"{path}:{number} is not a metrics record: {error}") from error
    if len(kept) < len(lines):
        _replace(path, "".join(kept))
    return len(lines) - len(kept)


class MetricsWriter:
    """Appends to `metrics.jsonl` and `rollouts.jsonl` of a run folder, and mirrors scalars to optional sinks.

    `sinks` names any of "wandb" and "tensorboard"; they are imported here and only when named.
    Raises InputError for an unknown sink, or naming the extra to install when a sink's package is missing.
    """

    def __init__(
        self, run_dir: str | Path, *, sinks: Sequence[str] = (), config: Mapping[str, object] | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self._sinks = [Logger(name, self.run_dir, _plain(config or {})) for name in sinks]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: Journal(self.run_dir / f"{name}.jsonl", keep_bytes=_KEPT_BYTES) for name in ("metrics", "rollouts")
        }
        for sink in self._sinks:
            sink.open()

    def write(self, record: Mapping[str, object]) -> None:
        """Appends one step's record at once; keys keep their order, non-finite floats become null.

        Neither a disk that takes no line nor a sink that fails ends the run: each is told of, and tried again.
        """
        plain = {str(key): _plain(value) for key, value in record.items()}
        step = plain.get("step")
        if not isinstance(step, int):
            raise ValueError(f"a metrics record needs an integer step, got {step!r}")
        self._append("metrics", [plain])
        scalars = dict(_scalars(plain))
        for sink in self._sinks:
            sink.log(scalars, step)

    def write_rollouts(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Appends sample rollouts: step, prompt, completion, reward, value, slice, replayed."""
        self._append("rollouts", [_plain(row) for row in rows])

    def drop_from(self, step: int) -> None:
        """Forgets every record of `step` and later, for a run that resumes there; each file changes atomically."""
        for file in self._files.values():
            drop_steps(file.path, step)

    def close(self) -> None:
        """Closes the files and the sinks; a second call does nothing."""
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _append(self, name: str, records: Sequence[object]) -> None:
        self._files[name].append([json.dumps(record, allow_nan=False) for record in records])


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(obj: object) -> object:
    """The same thing in JSON's own types; arrays and tensors become lists, non-finite floats null."""
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    to_list = getattr(obj, "tolist", None)
    if to_list is None:
        raise TypeError(f"{type(obj).__name__} does not go into JSON")
    return _plain(to_list())


def _scalars(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, float(value)


# Time


class Phases:
    """Seconds and peak memory by phase of a step; each phase is an NVTX range of the same name as well.

    A phase opened inside another stops the outer clock, so the phases of a step add up to the step. With the clock of
    the host, work a phase only launches is charged to the phase that waits for it; marks made on a device (see
    `elapsed`) charge it to the phase that launched it.
    """

    def __init__(
        self,
        clock: Callable[[], Any] = time.perf_counter,
        elapsed: Callable[[Any, Any], float] = lambda start, end: end - start,
        memory: Callable[[], int] | None = None,
    ) -> None:
        """`clock` makes a mark and `elapsed` gives the seconds between two; none is asked for before `take`.

        `memory` is called at the end of every stretch and gives the bytes held in it.
        """
        self._clock, self._elapsed, self._memory = clock, elapsed, memory
        self.peak_bytes: dict[str, int] = {}
        """Most bytes held in each phase of the step that `take` closed last; empty when nobody measures them."""
        self._peaks: dict[str, int] = {}
        self.listener: Callable[[str], object] = lambda name: None
        """Told the name of every stretch as it begins."""
        self._open: list[str] = []
        self._marks: list[tuple[Any, str]] = []  # a mark, and what began at it
        self._charge("other")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the body's time to `name`, also when it raises."""
        self._open.append(name)
        self._charge(name)
        try:
            with nvtx.annotate(name):
                yield
        finally:
            self._open.pop()
            self._charge(self._open[-1] if self._open else "other")

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, the rest of the time as `other`; starts the next step."""
        now = self._open[-1] if self._open else "other"
        self._charge(now)
        seconds: dict[str, float] = {}
        for (start, name), (end, _) in pairwise(self._marks):
            seconds[name] = seconds.get(name, 0.0) + self._elapsed(start, end)
        seconds.setdefault("other", 0.0)
        seconds["other"] = seconds.pop("other")  # last, as it is no phase
        self._marks = self._marks[-1:]
        self.peak_bytes, self._peaks = self._peaks, {}
        return seconds

    def _charge(self, name: str) -> None:
        if self._memory is not None and self._marks:
            ended = self._marks[-1][1]
            self._peaks[ended] = max(self._peaks.get(ended, 0), self._memory())
        self._marks.append((self._clock(), name))
        self.listener(name)

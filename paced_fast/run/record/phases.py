"""The clock and the memory of each phase of a step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import nvtx
import torch


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
        """Peak bytes in each phase of the step that `take` closed last; empty if memory is not measured."""
        self._peaks: dict[str, int] = {}
        self.listener: Callable[[str], object] = lambda name: None
        """Called with the name of every stretch as it begins."""
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


_STATM = Path("/proc/self/statm")


def probe(device: torch.device) -> Callable[[], int] | None:
    """Function that returns the peak bytes since its last call; None where memory cannot be measured.

    On a GPU the memory that torch has allocated, from the allocator's statistics, without waiting for the device. On a
    CPU the resident memory of the process at the time of the call.
    """
    if device.type == "cuda":

        def peak() -> int:
            found = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return found

        return peak
    if not _STATM.exists():
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return lambda: int(_STATM.read_bytes().split()[1]) * page


def clock_of(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """A clock for `Phases`: marks, and the seconds between two of them.

    On a GPU a mark is an event of the current stream, so that a phase is charged for the work it launched and for the
    time the GPU waited for the host. The seconds are asked for when the step's figures have come to the host.
    """
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return mark, elapsed

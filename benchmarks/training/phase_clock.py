"""Seconds, processor seconds and peak memory of the phases of one step, in the process that takes the step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.loss import memory_probe


class PhaseClock:
    """A phase opened inside another stops the outer one, so the phases of a step add up to the step."""

    def __init__(self, device: torch.device) -> None:
        """Memory is the allocator's on a GPU, else the resident memory above that of now."""
        self._on_gpu = device.type == "cuda"
        self._before = 0 if self._on_gpu else memory_probe.status_bytes("VmRSS")
        self.begin("other")

    def begin(self, name: str) -> None:
        """Start a step, whose time outside phases is charged to `name`."""
        self._open = [name]
        self._found: dict[str, dict[str, float]] = {}
        self._synchronise()
        self._reset_peak()
        self._mark = self._now()

    @property
    def current(self) -> str:
        """Name of the innermost open phase."""
        return self._open[-1]

    def enter(self, name: str) -> None:
        """Open the phase `name` inside the current one."""
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        """Close the innermost phase."""
        self._charge()
        self._open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the body to `name`, also when it raises."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def take(self) -> dict[str, dict[str, float]]:
        """Return `seconds`, `cpu_seconds` and `peak_bytes` by phase since `begin`."""
        self._charge()
        return self._found

    def _charge(self) -> None:
        self._synchronise()
        wall, cpu = self._now()
        phase = self._found.setdefault(self.current, {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0})
        phase["seconds"] += wall - self._mark[0]
        phase["cpu_seconds"] += cpu - self._mark[1]
        phase["peak_bytes"] = max(phase["peak_bytes"], self._peak())
        self._reset_peak()
        self._mark = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else memory_probe.status_bytes("VmHWM") - self._before

    def _reset_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            memory_probe.reset_high_water_mark()

    def _synchronise(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

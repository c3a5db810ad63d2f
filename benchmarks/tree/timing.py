"""Ways to time a short call: alone on the GPU in a captured graph, by events, as the caller sees it, until it returns.

B = elements of a call.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Clock, Failure, Timing, attempt, interleave, peak_bytes

REPLAYED = 100
"""Calls in one captured graph."""

MEASURES = ("graph", "event", "wall", "host")
"""GPU time in a graph (warm caches), between events (cold L2), until the result is there, until the call returns."""


class WallClock(Clock):
    """Time until the device is done, Python included."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call and of what it started."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)


class HostClock(Clock):
    """Time until the call returns, whatever the device still does."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call on the host."""
        self.synchronize()
        start = time.perf_counter()
        call()
        taken = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return taken


class GraphClock(Clock):
    """Milliseconds of one of the REPLAYED calls in a graph; the call is its replay."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call inside the graph, without a flush of the cache."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / REPLAYED


def count_waits(call: Callable[[], object]) -> int:
    """How often the host waits for the device in one call, as far as torch's debug mode sees it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def count_kernels(call: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that one call runs on the device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def capture(call: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    """A graph of REPLAYED calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(REPLAYED):
            call(turn)
    return graph


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of half a GiB on the device."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda _: target.copy_(source)}, Clock(device), repetitions=20)["copy"]
    assert isinstance(timing, Timing)
    return 2e3 * source.nbytes / timing.median_ms


def measure_calls(
    calls: Mapping[str, Callable[[int], object]],
    on_device: frozenset[str],
    device: torch.device,
    *,
    repetitions: int,
    seconds: float,
    starting: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """Every measure of every call, those of the same measure in turns.

    Args:
        calls: name -> function of a turn, which chooses the inputs.
        on_device: names whose work stays on the GPU; only these have GPU times.
        seconds: for all of it; 0 means no limit.
        starting: told a name before its first call.

    Returns:
        name -> {measure: Timing as a dictionary or {"failed": reason}, "waits", "kernels", "peak_bytes"}; a name whose
        first call failed has {"failed": reason} alone.
    """
    clock = WallClock(device)
    found: dict[str, dict[str, Any]] = {name: {} for name in calls}
    share = seconds / (len(MEASURES) if device.type == "cuda" else 1) if seconds else float("inf")

    def timed(measure: str, chosen: Mapping[str, Callable[[int], object]], own: Clock) -> None:
        timings = interleave(
            chosen, own, repetitions=repetitions, min_repetitions=min(3, repetitions), seconds=share, starting=starting
        )
        for name, result in timings.items():
            entry = {"failed": result.reason} if isinstance(result, Failure) else result.to_json()
            found[name] |= entry if measure == "wall" and "failed" in entry else {measure: entry}

    timed("wall", calls, clock)
    if device.type != "cuda":
        return found
    working = {name: call for name, call in calls.items() if "failed" not in found[name]}
    timed("host", working, HostClock(device))
    graphs: dict[str, Callable[[int], object]] = {}
    for name, call in working.items():
        starting(name)
        found[name]["waits"] = _value(attempt(functools.partial(count_waits, functools.partial(call, 0)), clock))
        if name not in on_device:
            continue
        first = functools.partial(call, 0)
        found[name]["kernels"] = _value(attempt(functools.partial(count_kernels, first, device), clock))
        found[name]["peak_bytes"] = _value(attempt(functools.partial(peak_bytes, first, device), clock))
        if found[name]["waits"] != 0:
            found[name]["graph"] = {"failed": "the host waits: cannot be captured"}
            continue
        graph = attempt(functools.partial(capture, call), clock)
        if isinstance(graph, Failure):
            found[name]["graph"] = {"failed": graph.reason}
        else:
            graphs[name] = functools.partial(_replay, graph)
    timed("event", {name: call for name, call in working.items() if name in on_device}, Clock(device))
    timed("graph", graphs, GraphClock(device))
    return found


def _replay(graph: torch.cuda.CUDAGraph, turn: int) -> None:
    del turn
    graph.replay()


def _value(result: Any) -> Any:
    return None if isinstance(result, Failure) else result

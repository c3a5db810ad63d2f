"""Timers for short calls: in a captured GPU graph, by GPU events, wall time to completion, host time until return.

B = elements per call.
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
"""Number of calls in one captured graph."""

MEASURES = ("graph", "event", "wall", "host")
"""GPU time in a graph (warm caches), between events (cold L2), wall time to the result, host time until return."""


class WallClock(Clock):
    """Timer until the device is done, including Python."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call and the work it started."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)


class HostClock(Clock):
    """Timer until the call returns, ignoring pending device work."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call on the host."""
        self.synchronize()
        start = time.perf_counter()
        call()
        taken = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return taken


class GraphClock(Clock):
    """Timer of a graph replay; returns the time of one of its REPLAYED calls."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call inside the graph, without flushing the cache."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / REPLAYED


def count_waits(call: Callable[[], object]) -> int:
    """Count host synchronisations in one call, as reported by torch's debug mode."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def count_kernels(call: Callable[[], object], device: torch.device) -> int:
    """Count kernels, copies and fills that one call runs on the device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def capture(call: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    """Capture a graph of REPLAYED calls."""
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
    """Return bytes per second (read + written) of a copy of half a GiB on the device."""
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
    """Take every measure of every call, interleaving the calls within a measure.

    Args:
        calls: name -> function of the turn, which selects the inputs.
        on_device: names whose work is entirely on the GPU; only these have GPU times.
        seconds: total time limit; 0 means no limit.
        starting: called with each name before its first call.

    Returns:
        name -> {measure: Timing as a dictionary or {"failed": reason}, "waits", "kernels", "peak_bytes"}; a name whose
        first call failed has only {"failed": reason}.
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

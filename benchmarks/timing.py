"""Measurement for kernel benchmarks: interleaved repetitions, cold L2 cache, medians, peak memory, state of the GPU.

Competitors alternate within every repetition, so a GPU that slows down slows all of them. If a competitor fails, its
reason is recorded and the others continue.
"""

from __future__ import annotations

import gc
import logging
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

LOG = logging.getLogger(__name__)
GPU_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")


class DeviceLostError(RuntimeError):
    """Raised if the GPU context is broken (e.g. illegal access): this process can measure nothing more."""


@dataclass(frozen=True)
class Failure:
    """Reason why a competitor has no result."""

    reason: str


@dataclass(frozen=True)
class Timing:
    """Time of one competitor in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repetitions: int

    def to_json(self) -> dict[str, Any]:
        """Return as a dictionary."""
        return asdict(self)


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile with linear interpolation between neighbours; quantile(values, 0.5) is the median."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarise(milliseconds: Sequence[float]) -> Timing:
    """Return median, 10th and 90th percentile."""
    return Timing(
        quantile(milliseconds, 0.5), quantile(milliseconds, 0.1), quantile(milliseconds, 0.9), len(milliseconds)
    )


def failure_of(error: BaseException) -> Failure:
    """Return one line: the type of the error and the start of its message."""
    said = " ".join(str(error).split())
    return Failure(f"{type(error).__name__}: {said}"[:200].rstrip(": "))


class Clock:
    """Timer of one call: CUDA events after flushing the L2 cache on a GPU, `perf_counter` elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            # Twice the cache and at least 128 MiB, to evict the data of the previous competitor.
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            size = max(2 * cache, 2**27)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_ms(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call."""
        if self._flush is None:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)


def attempt(call: Callable[[], Any], clock: Clock) -> Any:
    """Return the result of `call`, or a Failure after freeing memory; a lost device raises DeviceLostError."""
    try:
        result = call()
        clock.synchronize()
        return result
    except Exception as error:  # a competitor may fail in any way; its row records how
        failure = failure_of(error)
        LOG.warning("failed: %s", failure.reason)
    gc.collect()
    if clock.device.type == "cuda":
        try:
            torch.cuda.synchronize(clock.device)
        except RuntimeError as lost:
            raise DeviceLostError(failure.reason) from lost
        torch.cuda.empty_cache()
    return failure


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    clock: Clock,
    *,
    repetitions: int,
    min_repetitions: int = 5,
    seconds: float = math.inf,
    warm_ups: int = 1,
    favoured: frozenset[str] = frozenset(),
    starting: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | Failure]:
    """Time every call in turns: round 1 of all, round 2 of all, and so on.

    Args:
        calls: name -> function of the repetition number, which selects the input buffer.
        repetitions: per call; calls that exceed their share of `seconds` get fewer, but at least `min_repetitions`,
            spread evenly over the rounds.
        warm_ups: untimed calls before the first timed one, which only determines the affordable repetitions.
        favoured: names that get a triple share of the seconds.
        starting: called with the name of each call before its first run.
    """
    results: dict[str, Timing | Failure] = {}
    milliseconds: dict[str, list[float]] = {}
    quotas: dict[str, int] = {}
    shares = len(calls) + 2 * len(favoured & calls.keys())
    for name, call in calls.items():
        starting(name)

        def warm_up(call: Callable[[int], object] = call) -> float:
            for turn in range(warm_ups):
                call(turn)
            clock.synchronize()
            return clock.time_ms(lambda: call(warm_ups))

        first_ms = attempt(warm_up, clock)
        if isinstance(first_ms, Failure):
            results[name] = first_ms
            continue
        affordable = 1e3 * seconds * (3 if name in favoured else 1) / shares / max(first_ms, 1e-3)
        quotas[name] = int(max(min_repetitions, min(repetitions, affordable)))
        milliseconds[name] = []
    rounds = max(quotas.values(), default=0)
    for turn in range(rounds):
        for name, quota in quotas.items():
            if name in results or (turn + 1) * quota // rounds == turn * quota // rounds:
                continue
            taken = attempt(lambda call=calls[name], turn=turn: clock.time_ms(lambda: call(turn)), clock)
            if isinstance(taken, Failure):
                results[name] = taken
            else:
                milliseconds[name].append(taken)
    results |= {name: summarise(taken) for name, taken in milliseconds.items() if name not in results}
    return {name: results[name] for name in calls}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak CUDA memory of `call` above the previous allocation, including its results."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


class GpuMonitor:
    """Sampler of clock, power and temperature, twice per second in a separate process, if nvidia-smi exists."""

    def __init__(self, device: torch.device) -> None:
        self._file = tempfile.NamedTemporaryFile("r", suffix=".csv")  # noqa: SIM115 - closed by __exit__
        self._process: subprocess.Popen[bytes] | None = None
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            query = f"--query-gpu={','.join(GPU_FIELDS)}"
            command = [
                "nvidia-smi",
                query,
                "--format=csv,noheader,nounits",
                "-lms",
                "500",
                "-i",
                str(device.index or 0),
            ]
            with open(self._file.name, "wb") as sink:  # separate file position, unaffected by reading
                self._process = subprocess.Popen(command, stdout=sink, stderr=subprocess.DEVNULL)

    def __enter__(self) -> GpuMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._file.close()

    def read(self) -> dict[str, float] | None:
        """Return median and lowest clock (MHz), median power (W) and highest temperature (C) since the last call."""
        return summarise_gpu(self._file.read().splitlines())


def summarise_gpu(lines: Sequence[str]) -> dict[str, float] | None:
    """Return statistics of lines like "1980, 650.12, 61"; incomplete lines and [N/A] are left out."""
    samples = []
    for line in lines:
        try:
            sample = [float(word) for word in line.split(",")]
        except ValueError:
            continue
        if len(sample) == len(GPU_FIELDS):
            samples.append(sample)
    if not samples:
        return None
    clocks, powers, temperatures = zip(*samples, strict=True)
    return {
        "clock_mhz": quantile(clocks, 0.5),
        "lowest_clock_mhz": min(clocks),
        "power_w": quantile(powers, 0.5),
        "highest_temperature_c": max(temperatures),
        "samples": len(samples),
    }

"""Device-time profile of a step of our operations: kernels by name, and in order of execution.

python -m benchmarks.run phases
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment
from benchmarks.loss import report
from benchmarks.loss.methods import our_methods, run_step
from benchmarks.loss.problems import GPU_FIRST, MODES, TOY_SHAPE, Shape, make_batch, make_weight
from benchmarks.timing import Clock, Failure, attempt

STEPS = 3
LISTED = 60

FAMILIES = (
    ("projection", r"project_kernel"),
    ("our row kernels", r"target_logits|finish_rows|row_parts|row_probabilities|patch_targets|entropy_gradient"),
    ("library GEMM", r"gemm|cutlass|nvjet|cublas|xmma|aten::(add)?mm|splitk"),
    ("copies and fills", r"memcpy|memset|fill|copy"),
    ("elementwise and reductions", r"elementwise|reduce|scan|sort|index|gather|scatter|aten::"),
)
"""Families of kernels by name pattern; the first match counts."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Profile our operations."""

    device: str = "auto"
    """cuda, cpu, or auto."""
    shapes: tuple[str, ...] = ()
    """Shapes such as T16384-H4096-V151936; none means the headline and the smallest hidden size."""
    progress: str = ""
    """File that names the current measurement."""
    seconds: float = 0.0
    """Seconds after which no further step is profiled; 0 means no limit."""


def family(name: str) -> str:
    """Return the family of a kernel."""
    return next((kind for kind, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_step(call: Callable[[], object], clock: Clock) -> dict[str, Any]:
    """Return mean time per step by kernel, over a few steps; on a CPU by operator."""
    on_gpu = clock.device.type == "cuda"
    for _ in range(2):
        call()
    clock.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(STEPS):
            call()
        clock.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in trace.events() if event.device_type == wanted]
    return summarise_events([(event.name, event.time_range.start, _self_us(event, on_gpu)) for event in events], STEPS)


def _self_us(event: Any, on_gpu: bool) -> float:
    return float(event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)


def summarise_events(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Return ms per step by kernel and by family, from (name, start in us, duration in us) of `steps` steps."""
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    families: dict[str, float] = defaultdict(float)
    for name, _, duration in events:
        total[name] += duration / 1e3 / steps
        calls[name] += 1
        families[family(name)] += duration / 1e3 / steps
    ordered = sorted(events, key=lambda event: event[1])
    first = ordered[: len(ordered) // steps]
    kernels = [
        {"name": name[:160], "family": family(name), "calls": calls[name] / steps, "ms": spent}
        for name, spent in sorted(total.items(), key=lambda item: -item[1])
    ]
    return {
        "busy_ms": sum(total.values()),
        "families_ms": dict(sorted(families.items(), key=lambda item: -item[1])),
        "kernels": kernels[:LISTED],
        "first_step": [{"name": name[:80], "us": duration} for name, _, duration in first[:LISTED]],
    }


def phases_text(entry: dict[str, Any]) -> str:
    """Format the families and the longest kernels of one profile."""
    head = f"\n{entry['method']}, {entry['case']}, {entry['shape']}, {entry['mode']}"
    if "failed" in entry:
        return f"{head}: failed: {entry['failed']}"
    rows = [("kernel", "calls", "ms")]
    rows += [(kernel["name"][:70], f"{kernel['calls']:.3g}", f"{kernel['ms']:.3f}") for kernel in entry["kernels"][:8]]
    families = ", ".join(f"{name} {spent:.2f} ms" for name, spent in entry["families_ms"].items())
    return f"{head}: busy {entry['busy_ms']:.2f} ms: {families}\n{report.aligned(rows)}"


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Profile every (case, mode); `path` always holds the finished ones."""
    device = environment.choose_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clock = Clock(device)
    small = "T16384-H896-V151936"
    names = arguments.shapes or ((GPU_FIRST.name, small) if device.type == "cuda" else (TOY_SHAPE.name,))
    result: dict[str, Any] = {"settings": asdict(arguments), "device": environment.device(device), "profiles": []}
    started = time.perf_counter()
    for name in names:
        shape = Shape.parse(name)
        batch = make_batch(shape, make_weight(shape, device, dtype, 0), "peaked", 1)
        for case, modes in (("trajectory_balance", MODES), ("logprobs", ("full",))):
            shown = [m for m in our_methods(case, device, dtype) if m.name in ("ours", "ours, stage 1")]
            for method in shown:
                for mode in modes:
                    if arguments.seconds and time.perf_counter() - started > arguments.seconds:
                        continue
                    if arguments.progress:
                        Path(arguments.progress).write_text(f"{method.name} ({name}, {mode}, profile)")

                    def step(case: str = case, method: Any = method, mode: str = mode) -> object:
                        return run_step(case, method, batch, mode)  # noqa: B023 - runs before the next batch

                    found = attempt(lambda step=step: profile_step(step, clock), clock)
                    entry = {"case": case, "method": method.name, "shape": name, "mode": mode}
                    entry |= {"failed": found.reason} if isinstance(found, Failure) else found
                    result["profiles"].append(entry)
                    environment.write_json(path, environment.headed("phases", result))
                    print(phases_text(entry), flush=True)
    return result

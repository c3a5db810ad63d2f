"""What the machine of a visit is and does: versions, caches, what torch can do there, and rates and clocks under load.

python -m benchmarks.run visit_machine
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.loss import our_engines
from benchmarks.timing import Clock, Failure, GpuMonitor, attempt, summarise

SQUARE = 8192
"""Rows and columns of the products that the GPU is loaded with."""
TOY_SQUARE = 64
COPY_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Describe the machine and load its GPU for a moment."""

    device: str = "cuda"
    """cuda, or cpu (a toy load)."""
    load_seconds: float = 4.0
    """Seconds of products, whose clocks and rates are taken."""
    seconds: float = 0.0
    """Seconds after which the load does not start; 0 means no limit."""
    progress: str = ""
    """File that names the current measurement."""


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, and which ways torch has to multiply and to attend here."""
    found: dict[str, Any] = {"device": environment.device(device), "attention": attention_of(device)}
    found["nsight_compute"] = shutil.which("ncu")
    found["xdist"] = importlib.util.find_spec("xdist") is not None
    found["cores"] = os.cpu_count()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["l2_bytes"] = getattr(properties, "L2_cache_size", None)
        found["shared_bytes"] = getattr(properties, "shared_memory_per_block_optin", None)
        found["float32_products"] = our_engines.products_in_float32()
    return found


def attention_of(device: torch.device) -> dict[str, str | None]:
    """Kernels for packed rows by name, with the reason where one cannot be had; nothing without transformers."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    from paced_fast.policy.attention import lacking_here

    return lacking_here(device)


def load(device: torch.device, seconds: float) -> dict[str, Any]:
    """Multiply large matrices for `seconds`: rates at first and later, clocks and power meanwhile; rate of a copy."""
    on_gpu = device.type == "cuda"
    size, dtype = (SQUARE, torch.bfloat16) if on_gpu else (TOY_SQUARE, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out, clock = torch.empty(size, size, dtype=dtype, device=device), Clock(device)
    clock.time_ms(lambda: torch.mm(left, right, out=out))
    taken: list[float] = []
    ends = time.monotonic() + seconds
    with GpuMonitor(device) as monitor:
        while not taken or time.monotonic() < ends:
            taken.append(clock.time_ms(lambda: [torch.mm(left, right, out=out) for _ in range(8)]) / 8)
        gpu = monitor.read()
    last = taken[len(taken) // 2 :]  # the clock has settled
    source = torch.empty(COPY_BYTES if on_gpu else 2**16, dtype=torch.int8, device=device)
    copied = [clock.time_ms(source.clone) for _ in range(5)]
    return {
        "size": size,
        "first_tflops": 2e-9 * size**3 / taken[0],
        "tflops": 2e-9 * size**3 / summarise(last).median_ms,
        "copy_terabytes_per_second": 2e-9 * source.numel() / min(copied),
        "gpu": gpu,
    }


def text(found: dict[str, Any]) -> str:
    """Format facts and load as lines."""
    device, loaded = found["device"], found.get("load") or {}
    lines = [f"machine: {device.get('gpu') or 'a CPU'}, {found['cores']} cores"]
    if found.get("l2_bytes"):
        lines[0] += f", L2 {found['l2_bytes'] / 2**20:.0f} MiB, {device['multiprocessors']} multiprocessors"
    if found.get("float32_products"):
        can = [f"{name} {'takes' if yes else 'REFUSES'} out_dtype" for name, yes in found["float32_products"].items()]
        lines.append(f"bfloat16 products into float32: {', '.join(can)}")
    lines.append(f"Nsight Compute: {found['nsight_compute'] or 'not installed'}")
    for name, why in found["attention"].items():
        lines.append(f"attention {name}: {why or 'usable'}")
    if loaded:
        lines.append(
            f"products of {loaded['size']}^3: {loaded['tflops']:.3g} TFLOP/s under load ({loaded['first_tflops']:.3g} "
            f"at first), copies {loaded['copy_terabytes_per_second']:.2f} TB/s"
        )
    if loaded.get("gpu"):
        gpu = loaded["gpu"]
        lines.append(
            f"clock under load {gpu['clock_mhz']:.0f} MHz (lowest {gpu['lowest_clock_mhz']:.0f}), {gpu['power_w']:.0f} "
            f"W, {gpu['highest_temperature_c']:.0f} C"
        )
    return "\n".join(lines)


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Describe, write, then load."""
    device = environment.choose_device(arguments.device)
    result: dict[str, Any] = {"settings": asdict(arguments), **facts(device)}
    environment.write_json(path, environment.headed("visit_machine", result))
    if arguments.progress:
        Path(arguments.progress).write_text("load")
    loaded = attempt(lambda: load(device, arguments.load_seconds), Clock(device))
    result |= {"load_failed": loaded.reason} if isinstance(loaded, Failure) else {"load": loaded}
    print(text(result), flush=True)
    return result

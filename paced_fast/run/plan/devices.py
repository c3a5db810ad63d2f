"""Peak rates of chips, from data sheets or measured on a CPU, and detection of this machine's chip."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from paced_fast.errors import InputError

_MATMUL_SIZE = 1024
_COPY_BYTES = 1 << 26
_EXACT_SIZE = 256
_EXACT_ERROR = 1e-5
"""Relative to the largest element: sums of 256 products in float32 are off by 3e-7, of inputs in bfloat16 by 3e-3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Peaks of one chip: dense floating-point operations and bytes per second."""

    name: str
    bfloat16_flops: float
    float32_flops: float
    """Operations per second on float32 operands: TF32 on a GPU, if `model.matmul_precision` allows it."""
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    """Bytes per second to another chip of the node, one way."""
    network_bandwidth: float
    """Bytes per second to another node, one way, per chip."""
    capability: tuple[int, int] | None = None

    def flops(self, dtype: str) -> float:
        """Peak of products of that type."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


_GIB = 1 << 30
_T, _G = 1e12, 1e9

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="h100",
            bfloat16_flops=989 * _T,
            float32_flops=495 * _T,
            memory_bytes=79 * _GIB,
            memory_bandwidth=3350 * _G,
            link_bandwidth=450 * _G,
            network_bandwidth=50 * _G,
            capability=(9, 0),
        ),
        Device(
            name="h200",
            bfloat16_flops=989 * _T,
            float32_flops=495 * _T,
            memory_bytes=139 * _GIB,
            memory_bandwidth=4800 * _G,
            link_bandwidth=450 * _G,
            network_bandwidth=50 * _G,
            capability=(9, 0),
        ),
        Device(
            name="a100",
            bfloat16_flops=312 * _T,
            float32_flops=156 * _T,
            memory_bytes=79 * _GIB,
            memory_bandwidth=2039 * _G,
            link_bandwidth=300 * _G,
            network_bandwidth=25 * _G,
            capability=(8, 0),
        ),
        Device(
            name="l40s",
            bfloat16_flops=362 * _T,
            float32_flops=183 * _T,
            memory_bytes=44 * _GIB,
            memory_bandwidth=864 * _G,
            link_bandwidth=32 * _G,
            network_bandwidth=25 * _G,
            capability=(8, 9),
        ),
        Device(
            name="4090",
            bfloat16_flops=165 * _T,
            float32_flops=82.6 * _T,
            memory_bytes=23 * _GIB,
            memory_bandwidth=1008 * _G,
            link_bandwidth=32 * _G,
            network_bandwidth=1.25 * _G,
            capability=(8, 9),
        ),
    )
}
"""Chips by the name a user gives; memory is what a process sees of it."""


def device_named(name: str, dtype: str) -> Device:
    """A chip of the table, or `cpu`, measured with that type. Raises InputError naming the known ones."""
    if name == "cpu":
        return measured_cpu(dtype)
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}: choose from {', '.join(DEVICES)} and cpu")
    return DEVICES[name]


def device_here(kind: str, dtype: str) -> Device | None:
    """The chip of this machine, of kind `cuda` or `cpu`; None for a GPU that is not there or not in the table."""
    if kind == "cpu":
        return measured_cpu(dtype)
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().lower()
    return next((device for name, device in DEVICES.items() if name in words), None)


def measured_cpu(dtype: str) -> Device:
    """Measure this CPU by a product of two matrices of `dtype` and a copy, with torch's current threads and
    precision."""
    square = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=getattr(torch, dtype))
    peak = 2 * _MATMUL_SIZE**3 / _fastest(lambda: square @ square)
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    bandwidth = 2 * _COPY_BYTES / _fastest(lambda: target.copy_(source))
    return Device(
        name="cpu",
        bfloat16_flops=peak,
        float32_flops=peak,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_bandwidth=bandwidth,
        link_bandwidth=bandwidth / 2,
        network_bandwidth=1.25 * _G,
    )


def require_float32_products() -> None:
    """Multiply float32 matrices on this CPU in the ways that models do, and compare with float64.

    Raises InputError when they are rounded on the way, as oneDNN does where the environment or the program asks for it.
    """
    source = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_EXACT_SIZE, _EXACT_SIZE, generator=source) for _ in range(2))
    wanted = left.double() @ right.double()
    found = (torch.mm(left, right), torch.bmm(left[None], right[None])[0], torch.nn.functional.linear(left, right.T))
    error = max(float((product - wanted).abs().max() / wanted.abs().max()) for product in found)
    if not error < _EXACT_ERROR:
        raise InputError(
            f"float32 matrix products on this CPU have errors of {error:.0e}, as if rounded to bfloat16: unset "
            "ONEDNN_DEFAULT_FPMATH_MODE and DNNL_DEFAULT_FPMATH_MODE, or use --model.dtype bfloat16"
        )


def _fastest(work: Callable[[], object], repeats: int = 3) -> float:
    """Minimum seconds of a few runs, after a warm-up run."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)

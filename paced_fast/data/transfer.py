"""The only places where host and device meet during a step.

D1: indices of the drawn prompts and replayed completions come to the host, in one copy.
D2: what was sampled goes to the device, by copies from pinned memory that the host does not wait for.
D3: the figures of the step come to the host, in one copy.

Between D2 and D3 nothing reads a value from the device: no Python number, no shape that depends on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Tensor | Sequence[int] | Sequence[float] | Sequence[bool], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Copy host values to a tensor on `device`, without waiting."""
    host = pinned(torch.as_tensor(values, dtype=dtype), device)
    return host.to(device, non_blocking=True)


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """The host tensor in memory that `device` can read by itself, so that a copy does not have to wait."""
    return host.pin_memory() if device.type == "cuda" else host


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy all tensors to the host at once, and return Python numbers and flat lists; waits for the device.

    A tensor without dimensions becomes a number. Integers beyond 2^53 lose their last digits.
    """
    if not tensors:
        return {}
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors.values()]).tolist()
    result: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        part = flat[start : start + tensor.numel()]
        start += tensor.numel()
        if tensor.dtype == torch.bool:
            part = [value != 0.0 for value in part]
        elif not tensor.is_floating_point():
            part = [int(value) for value in part]
        result[name] = part if tensor.dim() else part[0]
    return result

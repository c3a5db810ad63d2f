"""Choice of the backend: Triton kernels, or PyTorch with products of its own or compiled ones."""

import importlib.util

import torch
from torch import Tensor

from . import _checks
from ._host_products import HAS_UNITS

HAS_TRITON = importlib.util.find_spec("triton") is not None
# An older package of another name has a module `cutlass` too.
HAS_CUTLASS = all(importlib.util.find_spec(name) is not None for name in ("nvidia_cutlass_dsl", "cutlass"))


def resolve_backend(backend: str, hidden: Tensor) -> str:
    """Return the backend that a call takes: one of `_checks.BACKENDS` without "auto".

    "auto" is Triton on CUDA devices for every dtype but float64, and compiled products for bfloat16 on a CPU that has
    units for it.

    Raises:
        ValueError: a backend was requested that is not available.
    """
    _checks.check_backend(backend)
    if backend == "reference":
        return backend
    is_float64 = hidden.dtype == torch.float64
    if backend == "auto":
        if HAS_TRITON and hidden.device.type == "cuda" and not is_float64:
            return "triton"
        return "compiled" if HAS_UNITS and _suits_compiled(hidden) else "reference"
    if backend == "compiled":
        _check_compiled(hidden)
        return backend
    if backend == "pingpong":
        _check_pingpong(hidden)
        return backend
    if not HAS_TRITON:
        raise ValueError('backend="triton" needs the package triton, which is not installed; use backend="auto"')
    if is_float64:
        raise ValueError('backend="triton" does not take torch.float64, the dtype of hidden; use backend="auto"')
    return backend


def is_torch(backend: str) -> bool:
    """Whether rows of a resolved backend are computed by PyTorch, a small chunk at a time."""
    return backend in ("reference", "compiled")


def _suits_compiled(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16


def _check_compiled(hidden: Tensor) -> None:
    if not _suits_compiled(hidden):
        raise ValueError(
            f'backend="compiled" needs torch.bfloat16 on a CPU, got {hidden.dtype} on {hidden.device}; use '
            'backend="auto"'
        )
    if not HAS_UNITS:
        raise ValueError(
            'backend="compiled" needs a processor with AVX512_BF16 and an install that found a C compiler; use '
            'backend="auto"'
        )


def _check_pingpong(hidden: Tensor) -> None:
    """Refuse what can be known without asking the device; the chip is checked where the engine is made."""
    if not HAS_CUTLASS or not HAS_TRITON:
        missing = "nvidia-cutlass-dsl" if HAS_TRITON else "triton"
        raise ValueError(f'backend="pingpong" needs the package {missing}, which is not installed; use backend="auto"')
    if hidden.device.type != "cuda" or hidden.dtype != torch.bfloat16:
        raise ValueError(
            f'backend="pingpong" needs torch.bfloat16 on a CUDA device, got {hidden.dtype} on {hidden.device}; use '
            'backend="auto"'
        )


def require_kernels(name: str, value: Tensor) -> None:
    """Refuse a tensor that Triton cannot reach: neither on CUDA nor under the interpreter."""
    # Imported here, because Triton reads environment variables on import and this package must not.
    from ._grid import is_interpreted

    if value.device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f'backend="triton" needs {name} on a CUDA device, got {value.device}; use backend="auto", or set '
            "TRITON_INTERPRET=1 before the first use to run the kernels in Triton's interpreter"
        )

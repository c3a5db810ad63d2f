"""Kernel launches, and whether Triton's interpreter runs them."""

import inspect
from collections.abc import Callable
from typing import Any

import triton

# What differs between the calls of one run. The launcher would compile a kernel again for a size that is 1 or a
# multiple of 16 and for an address that is not a multiple of 16 bytes: in the middle of the run, and on some ranks
# only. None of these is worth it: sizes bound a mask, and of a row or a draw a thread reads one number.
SIZES = ("num_rows", "vocab_start", "num_elements", "num_draws", "center_bits", "width_bits", "exploration_bits")
NARROW_POINTERS = (
    "token_ptr",
    "target_ptr",
    "reference_ptr",
    "live_ptr",
    "gate_ptr",
    "sums_ptr",
    "weighted_ptr",
    "maxima_ptr",
    "logprobs_ptr",
    "lse_ptr",
    "entropy_ptr",
    "patch_ptr",
    "log_factor_ptr",
    "coefficient_ptr",
    "entropy_coefficient_ptr",
    "lists_ptr",
    "counts_ptr",
    "idx_ptr",
    "weights_ptr",
    "q_ptr",
)


def batch_kernel(function: Callable[..., None]) -> Any:
    """Make a kernel that is compiled once for all batches of a model, whatever their lengths."""
    names = inspect.signature(function).parameters
    return triton.jit(  # pyright: ignore[reportCallIssue]
        function,  # pyright: ignore[reportArgumentType]
        do_not_specialize=[name for name in SIZES if name in names],
        do_not_specialize_on_alignment=[name for name in NARROW_POINTERS if name in names],
    )


@triton.jit
def _nothing_kernel():
    pass


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 when they were first imported."""
    return type(_nothing_kernel).__name__ == "InterpretedFunction"


def launch(kernel: Any, grid: tuple[int, ...], *, enable_fp_fusion: bool = True, **arguments: Any) -> None:
    """Launch the kernel, unless the grid is empty.

    Products are fused into sums unless a kernel asks for the bits of separate roundings: said by name in every launch,
    because versions of Triton differ in what they do without it, and environment variables change it.
    """
    if all(size > 0 for size in grid):
        kernel[grid](enable_fp_fusion=enable_fp_fusion, **arguments)

"""Kernel launches, and whether Triton's interpreter runs them."""

from typing import Any

import triton


@triton.jit
def _nothing_kernel():
    pass


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 when they were first imported."""
    return type(_nothing_kernel).__name__ == "InterpretedFunction"


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch the kernel, unless the grid is empty."""
    if all(size > 0 for size in grid):
        kernel[grid](**arguments)

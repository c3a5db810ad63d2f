"""Products of bfloat16 with float32 results on a CPU, compiled from `host_code`; PyTorch's results are bfloat16."""

from typing import Any

import torch
from torch import Tensor

try:
    from ._host import has_units  # pyright: ignore[reportMissingImports]
    from ._host import multiply as _multiply
except ImportError:
    _multiply: Any = None

    def has_units() -> bool:
        return False


HAS_UNITS: bool = has_units()
"""Whether the package was built with a C compiler, and the processor multiplies bfloat16 (AVX512_BF16)."""


def multiply(left: Tensor, right: Tensor, out: Tensor, *, scale: Tensor | None = None, begins: bool = False) -> None:
    """Add left @ (scale * right) to out; with `begins` write it there. Needs `HAS_UNITS`.

    Args:
        left: [m, k] bfloat16, or float32 that is rounded to it, times the scale; on the CPU, as are the others.
        right: [k, n], likewise.
        scale: [k] float32, for a float32 left; None = 1.
        out: [m, n] float32 whose rows are contiguous.
    """
    assert scale is None or (left.dtype == torch.float32 and scale.is_contiguous())
    (m, k), n = left.shape, right.shape[1]
    _multiply(
        *_operand(left, along_rows=False),
        *_operand(right, along_rows=True),
        0 if scale is None else scale.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        *(m, n, k),
        not begins,
        torch.get_num_threads(),
    )


def _operand(matrix: Tensor, *, along_rows: bool) -> tuple[int, bool, int, int]:
    """Return address, whether it is float32, and the strides along the summed dimension and along the other."""
    if 1 not in matrix.stride():
        matrix = matrix.contiguous()
    rows, columns = matrix.stride()
    depth, side = (rows, columns) if along_rows else (columns, rows)
    return matrix.data_ptr(), matrix.dtype == torch.float32, depth, side

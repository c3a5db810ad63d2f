"""Products with float32 results from low-precision operands, by the best method of this torch version and device.

Autocast does not apply to the operands: the operations that call this module disable it.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def _has_mm_out_dtype() -> bool:
    """Whether torch.mm takes out_dtype on this CUDA build; tried once on tiny operands."""
    tiny = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        torch.mm(tiny, tiny, out_dtype=torch.float32, out=torch.empty(16, 16, device="cuda"))
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _has_addmm_out_dtype() -> bool:
    """Whether torch.addmm can add bfloat16 products to a float32 matrix in place; early releases refuse."""
    tiny = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    total = torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, tiny, tiny, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def mm_float32(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """[M, N] float32 product of [M, K] and [K, N], accumulated in float32 and never rounded to the operands' dtype."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.device.type == "cuda" and _has_mm_out_dtype():
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def addmm_(total: Tensor, left: Tensor, right: Tensor, *, begins: bool = False) -> None:
    """total [M, N] += left [M, K] @ right [K, N], accumulated in float32 and rounded to the dtype of `total`.

    With `begins` total is the product, whatever it held before: nothing has to fill it with zeros or read those.
    """
    if begins:
        if total.dtype == left.dtype:
            torch.mm(left, right, out=total)
        else:
            mm_float32(left, right, out=total)
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.device.type != "cuda":
        total.add_(mm_float32(left, right))
    elif _has_addmm_out_dtype():
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(mm_float32(left, right))

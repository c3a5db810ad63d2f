"""Products of the plain PyTorch engine, by PyTorch or, for bfloat16 on a CPU with units for it, by compiled code.

PyTorch multiplies bfloat16 on a CPU into bfloat16 only, too coarse for logits. It is therefore given float32, at half
the speed of the units. The compiled products take bfloat16 as it is, and round exponentials (times the scale of their
rows) to bfloat16 as kernels on a GPU do; sums are float32 in either case.

R = rows, H = hidden size, V = vocabulary of this rank, v = some of its rows.
"""

import torch
from torch import Tensor

from .._host_products import multiply
from .head import Head

# Rows of a sum that is rounded at its end; with H = 576 they take 2 MiB in float32 until then.
ROUNDED_ROWS = 1024


class TorchProducts:
    """Products in the accumulation dtype; operands of another dtype are converted first."""

    def __init__(self, head: Head) -> None:
        self.head = head

    @property
    def converts(self) -> bool:
        """Whether blocks of the weight are converted before they are multiplied."""
        return self.head.weight.dtype != self.head.accumulate

    @property
    def whole_dtype(self) -> torch.dtype:
        """Dtype in which `add` writes a product that nothing is added to."""
        return self.head.accumulate

    def converted_rows(self, most_bytes: int) -> int:
        """Return how many rows of the weight are converted at a time within `most_bytes`; V if none has to be."""
        num_tokens, hidden_size = self.head.weight.shape
        return max(1, most_bytes // (hidden_size * self.head.accumulate.itemsize)) if self.converts else num_tokens

    def weight(self, rows: slice | Tensor) -> Tensor:
        """Return rows [v, H] of the weight as the products take them."""
        weight = self.head.weight
        picked = weight[rows] if isinstance(rows, slice) else weight.index_select(0, rows)
        return picked.to(self.head.accumulate)

    def states(self, hidden: Tensor) -> Tensor:
        """Return hidden states [R, H] as `project` takes them."""
        states = hidden.to(self.head.accumulate)
        return states if self.head.temperature == 1.0 else states / self.head.temperature

    def project(self, states: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write states weight^T / temperature to out [R, v]."""
        torch.mm(states, weight.T, out=out)

    def add(
        self, out: Tensor, left: Tensor, right: Tensor, *, scale: Tensor | None = None, begins: bool = False
    ) -> None:
        """Add left [m, k] @ (scale [k] * right [k, n]) to out; with `begins` write it there, whatever is in it."""
        if scale is not None:
            right = right * scale[:, None]
        out.addmm_(left, right, beta=0 if begins else 1)


class HostProducts(TorchProducts):
    """Products of bfloat16 with float32 sums; they run on as many threads as PyTorch's."""

    @property
    def converts(self) -> bool:
        return False

    @property
    def whole_dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def weight(self, rows: slice | Tensor) -> Tensor:
        weight = self.head.weight
        return weight[rows] if isinstance(rows, slice) else weight.index_select(0, rows)

    def states(self, hidden: Tensor) -> Tensor:
        return hidden

    def project(self, states: Tensor, weight: Tensor, out: Tensor) -> None:
        multiply(states, weight.T, out, begins=True)
        if self.head.temperature != 1.0:  # divided before, states would have to be rounded
            out.div_(self.head.temperature)

    def add(
        self, out: Tensor, left: Tensor, right: Tensor, *, scale: Tensor | None = None, begins: bool = False
    ) -> None:
        if right.shape[1] == 1 and right.dtype == torch.float32:  # a gradient of the bias, which is bound by memory
            super().add(out, left, right, scale=scale, begins=begins)
        elif out.dtype != torch.float32:
            assert begins
            part = left.new_empty(min(ROUNDED_ROWS, out.shape[0]), out.shape[1], dtype=torch.float32)
            for rows, out_rows in zip(left.split(ROUNDED_ROWS), out.split(ROUNDED_ROWS), strict=True):
                multiply(rows, right, part[: rows.shape[0]], scale=scale, begins=True)
                out_rows.copy_(part[: rows.shape[0]])
        else:
            multiply(left, right, out, scale=scale, begins=begins)

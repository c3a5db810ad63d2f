"""Gradients of the vocabulary projection from chunks of exponentials.

dloss/dz_v = scale E'_v: the gradient is E' times one number per row, so nothing of size [R, V] is written again:

    dhidden  = diag(scale / temperature) (E' W)
    dweight += E'^T (diag(scale / temperature) hidden)
    dbias   += E'^T scale

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .head import Head
from .torch_rows import Exponentials, RowStats, row_chunks


class RowEngine(Protocol):
    """Engine that turns rows into log-probs and exponentials; `torch_rows.TorchRows` documents the methods."""

    head: Head
    hidden: Tensor  # [T, H]
    token_ids: Tensor  # [T]
    with_entropy: bool

    @property
    def rows_per_chunk(self) -> int: ...
    @property
    def bytes_per_row(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def weight_gradient_dtype(self) -> torch.dtype: ...
    def score(self, rows: slice) -> RowStats: ...
    def exponentials(self, rows: slice, live: Tensor | None, known: RowStats | None = None) -> Exponentials: ...
    def entropy_gradient(
        self, chunk: Exponentials, rows: slice, coefficient: Tensor, entropy_coefficient: Tensor
    ) -> None: ...
    def choose(self, chunk: Exponentials, rows: slice, scale: Tensor, share: float) -> Any: ...
    def back_project(self, matrix: Tensor, kept: Any = None) -> Tensor: ...
    def add_outer(
        self,
        accumulator: Tensor,
        matrix: Tensor,
        rows: Tensor,
        *,
        scale: Tensor | None = None,
        begins: bool = False,
        kept: Any = None,
    ) -> None: ...


def score_rows(engine: RowEngine, rows: slice) -> RowStats:
    """Return `engine.score`; with a split vocabulary, in chunks that are the same for every size of shard."""
    if engine.head.group is None or rows.stop - rows.start <= engine.rows_per_chunk:
        return engine.score(rows)
    parts = [engine.score(chunk) for chunk in row_chunks(rows.start, rows.stop, engine.rows_per_chunk)]
    entropy = [part.entropy for part in parts if part.entropy is not None]
    return RowStats(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.lse for part in parts]),
        torch.cat(entropy) if entropy else None,
    )


class Wanted(NamedTuple):
    """Gradients that the caller requested."""

    hidden: bool
    weight: bool
    bias: bool


class WeightSum:
    """Sum of products of the size of the weight, which begins with the first: no zeros are written or read before."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._value = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._is_empty = True

    @property
    def value(self) -> Tensor:
        """[V, H], zeros if nothing was added."""
        if self._is_empty:
            self._value.zero_()
            self._is_empty = False
        return self._value

    def add_outer(
        self, engine: RowEngine, matrix: Tensor, rows: Tensor, scale: Tensor | None = None, kept: Any = None
    ) -> None:
        """Add matrix^T [V, R] @ (scale * rows [R, H]), of what `engine.choose` kept; scale is [R], None = 1."""
        engine.add_outer(self._value, matrix, rows, scale=scale, begins=self._is_empty, kept=kept)
        self._is_empty = False

    def add_scaled(self, other: "WeightSum", scale: Tensor) -> None:
        """Add another sum times a number."""
        if self._is_empty:
            torch.mul(other.value, scale, out=self._value)
            self._is_empty = False
        else:
            self._value.addcmul_(other.value, scale)


class Gradients:
    """Accumulators: rows of `hidden` are written once, in its dtype; `weight` and `bias` are sums in a wider dtype."""

    def __init__(
        self, engine: RowEngine, wanted: Wanted, skipped_share: float = 0.0, weight_dtype: torch.dtype | None = None
    ) -> None:
        """Make empty sums; `weight_dtype` is that of the weight's, None = the engine's."""
        hidden = engine.hidden
        self.skipped_share = skipped_share
        self.hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted.hidden else None
        self.weight_sum, self.bias = new_accumulators(engine.head, wanted, weight_dtype or engine.weight_gradient_dtype)

    @property
    def weight(self) -> Tensor | None:
        """[V, H], or None if not wanted."""
        return None if self.weight_sum is None else self.weight_sum.value

    def add(
        self,
        engine: RowEngine,
        chunk: Exponentials,
        rows: slice,
        coefficient: Tensor,  # [R], dloss / dlogprobs
        live: Tensor | None,  # [R] bool, as given to `engine.exponentials`
        entropy_coefficient: Tensor | None = None,  # [R], dloss / dentropy
        into: tuple[WeightSum | None, Tensor | None] | None = None,  # other accumulators of (weight, bias)
    ) -> None:
        """Add one chunk, overwriting its matrix. A row that is not live adds exactly 0, whatever its state is."""
        weight, bias = (self.weight_sum, self.bias) if into is None else into
        scale = -coefficient * chunk.factor
        if entropy_coefficient is not None:
            engine.entropy_gradient(chunk, rows, coefficient, entropy_coefficient)
            scale = torch.ones_like(scale)
        if live is not None:
            scale = torch.where(live, scale, 0.0)
        inner_scale = scale / engine.head.temperature
        kept = None
        # A gradient through the entropy is no row scale of E', so nothing is known of its sums.
        if self.skipped_share and entropy_coefficient is None and (self.hidden is not None or weight is not None):
            kept = engine.choose(chunk, rows, scale, self.skipped_share)
        if self.hidden is not None:
            torch.mul(engine.back_project(chunk.matrix, kept), inner_scale[:, None], out=self.hidden[rows])
        if weight is not None:
            hidden = engine.hidden[rows] if live is None else engine.hidden[rows].masked_fill(~live[:, None], 0.0)
            weight.add_outer(engine, chunk.matrix, hidden, inner_scale, kept)
        if bias is not None:
            engine.add_outer(bias[:, None], chunk.matrix, scale[:, None])


def new_accumulators(
    head: Head, wanted: Wanted, weight_dtype: torch.dtype | None = None
) -> tuple[WeightSum | None, Tensor | None]:
    """Return empty sums for the gradients of weight and bias; None if not wanted."""
    weight = WeightSum(head.weight, weight_dtype or head.accumulate) if wanted.weight else None
    bias = head.bias if wanted.bias else None
    return weight, None if bias is None else torch.zeros(bias.shape, dtype=head.accumulate, device=bias.device)

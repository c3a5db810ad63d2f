"""Rows of the vocabulary projection in plain PyTorch, a chunk at a time: the row engine of the reference.

For one row with logits z = h W^T / temperature + bias, target y, M = max z and E_v = exp(z_v - M):

    S' = sum of E_v over v != y        S = S' + E_y        log p_y = (z_y - M) - log S
    d log p_y / d z_v = -E'_v / S      with E'_v = E_v for v != y and E'_y = -S'

so 1 - p_y is never formed by subtraction, and a gradient is one factor per row times a matrix that is already in the
buffer. Only a chunk of R rows of logits exists at any time, in float32 (float64 for float64 inputs).

`fused_pass` and `gradients` call a row engine through `rows_per_chunk`, `score`, `exponentials`, `entropy_gradient`,
`choose`, `back_project` and `add_outer`. `triton_rows` holds the Triton engines.

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .column_scores import LOWEST_SHIFTED_LOGIT, score_by_columns
from .head import Head
from .products import TorchProducts
from .skipping import TILE_ROWS, Kept, choose_columns, gradient_masses

# Log-probs, head weight gradient and workspace together need less than a quarter of full logits at V = 49152.
DEFAULT_WORKSPACE_BYTES = 144 * 2**20
# Exponentials on a CPU that take no more than this are kept from the forward pass to the backward pass.
KEPT_BYTES = 512 * 2**20
# Elements processed at a time in elementwise work; they fit a CPU's second-level cache.
CACHED_ELEMENTS = 2**17


class RowStats(NamedTuple):
    """Statistics of each row over its whole vocabulary."""

    logprobs: Tensor  # [R]
    lse: Tensor  # [R], log-sum-exp of the logits
    entropy: Tensor | None  # [R]

    def narrow(self, start: int, stop: int) -> "RowStats":
        """Return views of rows start..stop-1."""
        entropy = None if self.entropy is None else self.entropy[start:stop]
        return RowStats(self.logprobs[start:stop], self.lse[start:stop], entropy)


class Exponentials(NamedTuple):
    """A chunk of logits after normalisation: p_v = factor E'_v for v != y, and 1 - p_y = -factor E'_y."""

    stats: RowStats
    matrix: Tensor  # [R, V], E'
    factor: Tensor  # [R]
    sums: Tensor | None = None  # [P, R] of E' over blocks of columns without the target, if an engine has them


def kept_bytes(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Return the workspace in which `TorchRows` has the exponentials of all rows at once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = num_rows * vocab_size * wide.itemsize
    return size if dtype == wide else -(-4 * size // 3)


def row_chunks(start: int, stop: int, num_rows: int) -> Iterator[slice]:
    """Yield slices of at most `num_rows` rows that cover start..stop-1."""
    for first in range(start, stop, num_rows):
        yield slice(first, min(first + num_rows, stop))


def _is_known_true(values: Tensor) -> bool:
    """Whether all are True, as far as the host knows: it does not wait for a GPU."""
    return values.device.type == "cpu" and bool(values.all())


class TorchRows:
    """Row engine in plain PyTorch, for any device and dtype."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        token_ids: Tensor,  # [T]
        with_entropy: bool,
        workspace_bytes: int,
        products: TorchProducts | None = None,  # None: by PyTorch
    ) -> None:
        self.head, self.hidden, self.token_ids = head, hidden, token_ids
        self.with_entropy, self.workspace_bytes = with_entropy, workspace_bytes
        self.products = products or TorchProducts(head)
        self._buffer: Tensor | None = None

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the workspace for logits; a quarter is reserved for blocks of a weight that is converted."""
        return self.workspace_bytes * 3 // 4 if self.products.converts else self.workspace_bytes

    @property
    def bytes_per_row(self) -> int:
        """Workspace of one row of a chunk."""
        return self.head.weight.shape[0] * self.head.accumulate.itemsize

    @property
    def rows_per_chunk(self) -> int:
        """Rows R such that an [R, V] buffer fits the workspace; at least one."""
        return max(1, self.chunk_bytes // self.bytes_per_row)

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """Dtype in which the gradient of the weight is summed."""
        return self.head.accumulate

    def score(self, rows: slice) -> RowStats:
        """Return log-probs and entropies of a range of rows, forward only: 2 R H V operations."""
        if self.hidden.device.type == "cpu":
            scores = score_by_columns(
                self.head,
                self.products,
                self.hidden[rows],
                self.token_ids[rows],
                with_entropy=self.with_entropy,
                workspace_bytes=self.workspace_bytes,
                buffer=self._buffer,
            )
            return RowStats(*scores)
        parts = [self.exponentials(chunk, None).stats for chunk in self._chunks(rows)]
        if not parts:
            none = self.hidden.new_empty(3, 0, dtype=self.head.accumulate)
            return RowStats(none[0].clone(), none[1].clone(), none[2].clone() if self.with_entropy else None)
        entropy = [part.entropy for part in parts if part.entropy is not None]
        return RowStats(
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.lse for part in parts]),
            torch.cat(entropy) if entropy else None,
        )

    def exponentials(
        self,
        rows: slice,
        live: Tensor | None,  # [R] bool; where False, the row of E' is 0 whatever its hidden state is
        known: RowStats | None = None,  # statistics of an earlier pass, which an engine may use
        *,
        keeps_numbers: bool = False,  # the row of E' is 0 where it would not be finite; the factor tells
    ) -> Exponentials:
        """Normalise a chunk; the matrix is valid until the next call."""
        del known
        logits = self._logits(self.hidden[rows])
        token_ids = self.token_ids[rows]
        target, is_owned = self.head.owned_targets(token_ids)
        top = None
        if self.head.group is not None:
            top = self.head.max_over_ranks(logits.amax(dim=1))
        pieces = [
            self._normalise_block(
                logits[block],
                target[block, None],
                is_owned[block, None],
                None if live is None else live[block],
                None if top is None else top[block],
                keeps_numbers=keeps_numbers,
            )
            for block in self._blocks(logits)
        ]
        top, others, target_shifted, weighted = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        for value in (others, target_shifted, weighted):
            self.head.sum_over_ranks(value)
        target_exponential = target_shifted.exp()
        total = others + target_exponential
        # log1p keeps the relative accuracy of a log-prob near 0.
        log_total = torch.where(target_shifted == 0, torch.log1p(others), torch.log(total))
        entropy = None
        if self.with_entropy:
            at_target = target_exponential * target_shifted.clamp(min=LOWEST_SHIFTED_LOGIT)
            entropy = log_total - (weighted + at_target) / total
        if keeps_numbers:
            live = others.isfinite()
        patch = -others if live is None else torch.where(live, -others, 0.0)
        kept = logits.gather(1, target[:, None])
        logits.scatter_(1, target[:, None], torch.where(is_owned[:, None], patch[:, None], kept))
        stats = RowStats(target_shifted - log_total, top + log_total, entropy)
        return Exponentials(stats, logits, total.reciprocal())

    def entropy_gradient(
        self,
        chunk: Exponentials,
        rows: slice,
        coefficient: Tensor,  # [R], dloss / dlogprobs
        entropy_coefficient: Tensor,  # [R], dloss / dentropy
    ) -> None:
        """Turn E' into dloss/dz = c (1[v = y] - p_v) - e p_v (log p_v + entropy), in place."""
        entropy = chunk.stats.entropy
        assert entropy is not None
        target, is_owned = self.head.owned_targets(self.token_ids[rows])
        logprobs = chunk.stats.logprobs
        at_target = -coefficient * torch.expm1(logprobs) - entropy_coefficient * logprobs.exp() * (logprobs + entropy)
        live = (coefficient != 0) | (entropy_coefficient != 0)
        for block in self._blocks(chunk.matrix):
            piece = chunk.matrix[block].mul_(chunk.factor[block, None])
            products = torch.special.entr(piece).addcmul_(piece, entropy[block, None], value=-1)
            piece.mul_(-coefficient[block, None]).addcmul_(products, entropy_coefficient[block, None])
            where = target[block, None]
            piece.scatter_(1, where, torch.where(is_owned[block, None], at_target[block, None], piece.gather(1, where)))
            if not _is_known_true(live[block]):
                piece.masked_fill_(~live[block, None], 0.0)

    def choose(self, chunk: Exponentials, rows: slice, scale: Tensor, share: float) -> list[Kept] | None:
        """Return what the products of a chunk take if they may leave out `share` of its gradient; None for all.

        `scale` [R] makes dloss / dz of E'. A choice needs numbers on the host: on a GPU everything is kept.
        """
        if chunk.matrix.device.type != "cpu":
            return None
        masses = gradient_masses(scale, chunk.factor, chunk.stats.logprobs)
        target, is_owned = self.head.owned_targets(self.token_ids[rows])
        share = share / self.head.num_ranks  # what ranks leave out adds up
        return [
            Kept(
                part,
                *choose_columns(chunk.matrix[part], scale[part], masses[part], target[part], is_owned[part], share),
            )
            for part in row_chunks(0, scale.shape[0], TILE_ROWS)
        ]

    def back_project(self, matrix: Tensor, kept: list[Kept] | None = None) -> Tensor:
        """Return [R, H] matrix @ weight in the accumulation dtype, summed over the ranks of a split vocabulary; with
        `kept`, what `choose` returned, of those columns only."""
        out = matrix.new_zeros(matrix.shape[0], self.hidden.shape[1])
        if kept is None:
            self._add_product(out, matrix)
        for part in kept or []:
            rows, out_rows = matrix[part.rows], out[part.rows]
            if part.columns is None:
                self._add_product(out_rows, rows)
                continue
            for columns in part.columns.split(self._gathered_columns(rows)):
                self.products.add(out_rows, rows.index_select(1, columns), self.products.weight(columns))
            mean = out.new_zeros(1, out.shape[1])
            self._add_product(mean, part.stand_in[None])
            out_rows.addr_(part.left_out, mean[0])
        return self.head.sum_over_ranks(out)

    def _add_product(self, out: Tensor, matrix: Tensor) -> None:
        """Add matrix [r, V] @ weight to out [r, H]."""
        for columns, block in self._vocab_blocks():
            self.products.add(out, matrix[:, columns], block)

    def add_outer(
        self,
        accumulator: Tensor,  # [V, N]
        matrix: Tensor,  # [R, V]
        rows: Tensor,  # [R, N]
        *,
        scale: Tensor | None = None,  # [R], multiplies rows; None = 1
        begins: bool = False,
        kept: list[Kept] | None = None,
    ) -> None:
        """Add matrix^T @ (scale * rows) to the accumulator, or write it there if the sum begins with it; with `kept`,
        what `choose` returned, from those columns only."""
        if kept is None:
            self.products.add(accumulator, matrix.T, rows, scale=scale, begins=begins)
            return
        if begins:
            accumulator.zero_()
        for part in kept:
            tile, tile_rows = matrix[part.rows], rows[part.rows]
            tile_scale = None if scale is None else scale[part.rows]
            if part.columns is None:
                self.products.add(accumulator, tile.T, tile_rows, scale=tile_scale)
                continue
            for columns in part.columns.split(self._gathered_columns(tile)):
                product = accumulator.new_empty(columns.shape[0], accumulator.shape[1])
                taken = tile.index_select(1, columns)
                self.products.add(product, taken.T, tile_rows, scale=tile_scale, begins=True)
                accumulator.index_add_(0, columns, product)

    def _gathered_columns(self, matrix: Tensor) -> int:
        """Return how many columns of a tile [r, V] are gathered at a time, within a quarter of the workspace."""
        bytes_per_column = (matrix.shape[0] + 2 * self.hidden.shape[1]) * matrix.element_size()
        return max(1, self.workspace_bytes // (4 * bytes_per_column))

    def _chunks(self, rows: slice) -> Iterator[slice]:
        return row_chunks(rows.start, rows.stop, self.rows_per_chunk)

    def _blocks(self, logits: Tensor) -> Iterator[slice]:
        num_rows = max(1, logits.shape[0])
        if logits.device.type == "cpu":  # also keeps temporaries a small part of the workspace
            num_elements = min(CACHED_ELEMENTS, self.chunk_bytes // (8 * logits.element_size()))
            num_rows = max(1, num_elements // logits.shape[1])
        return row_chunks(0, max(1, logits.shape[0]), num_rows)  # with no rows: one empty block

    def _vocab_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight as the products take it: one view, or converted blocks within a quarter of the workspace."""
        num_tokens = self.head.weight.shape[0]
        for rows in row_chunks(0, num_tokens, self.products.converted_rows(self.workspace_bytes // 4)):
            yield rows, self.products.weight(rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] logits of a chunk of rows, in the shared buffer."""
        states = self.products.states(hidden)
        if self._buffer is None or self._buffer.shape[0] < hidden.shape[0]:
            self._buffer = None  # free the old buffer before allocating the new one
            size = hidden.shape[0], self.head.weight.shape[0]
            self._buffer = torch.empty(size, dtype=self.head.accumulate, device=hidden.device)
        out = self._buffer[: hidden.shape[0]]
        for columns, block in self._vocab_blocks():
            self.products.project(states, block, out[:, columns])
        return out if self.head.bias is None else out.add_(self.head.bias)

    def _normalise_block(
        self,
        logits: Tensor,  # [r, V]: becomes E, 0 at the target
        target: Tensor,  # [r, 1]
        is_owned: Tensor,  # [r, 1]
        live: Tensor | None,  # [r]
        top: Tensor | None,  # [r], the largest logit of all ranks
        *,
        keeps_numbers: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return largest logit, sum of E without target, shifted target logit, sum of E * shifted logits: all [r]."""
        top = logits.amax(dim=1) if top is None else top
        shifted = logits.sub_(top[:, None])
        target_shifted = torch.where(is_owned, shifted.gather(1, target), 0.0)  # 0 when the target is the largest
        products = shifted.clamp(min=LOWEST_SHIFTED_LOGIT) if self.with_entropy else None
        exponentials = shifted.exp_()
        exponentials.scatter_(1, target, torch.where(is_owned, 0.0, exponentials.gather(1, target)))
        others = exponentials.sum(dim=1)
        weighted = torch.zeros_like(others) if products is None else products.mul_(exponentials).sum(dim=1)
        if keeps_numbers:
            live = others.isfinite()
        if live is not None and not _is_known_true(live):
            exponentials.masked_fill_(~live[:, None], 0.0)
        return top, others, target_shifted.squeeze(1), weighted

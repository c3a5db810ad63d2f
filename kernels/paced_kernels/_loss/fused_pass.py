"""Fused trajectory-balance loss over a row engine: gradients in the forward pass, over sequence-aligned chunks.

The gradient with respect to log p of a token is one number per sequence, c_i = w_i beta residual_i / denominator, known
once all rows of the sequence are. A group of whole sequences that fits a chunk therefore takes one pass: three GEMMs,
6 T H V floating-point operations. For longer groups there are two methods:

* streamed, for one sequence: its chunks are accumulated separately with c = 1, then scaled by c_i and added; 6 T H V
  operations and a second [V, H] float32 accumulator.
* two passes: log-probs first, then the exponentials again with c known; 8 T H V operations and no memory of size
  [V, H]. Used when the offsets are on a device, where the host must not read them, and when the accumulator does not
  fit the workspace.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary of this rank, R = rows of a group or chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .gradients import Gradients, RowEngine, Wanted, new_accumulators, score_rows
from .sequences import SequenceTerms, reduce_segments, segment_lengths, sequence_of_row
from .torch_rows import RowStats, row_chunks

# Fewest rows per chunk of a streamed sequence: with fewer, adding up [V, H] dominates the time.
MIN_STREAMED_ROWS = 128


class SequenceGroup(NamedTuple):
    """Consecutive sequences whose rows are processed together."""

    sequences: slice
    rows: slice


def plan_groups(cu_seqlens: Tensor, num_rows: int, rows_per_chunk: int) -> list[SequenceGroup]:
    """Pack whole sequences into groups of at most `rows_per_chunk` rows; a longer sequence is a group of its own.

    Offsets on a device are not read: all sequences then form one group.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    if cu_seqlens.device.type != "cpu":
        return [SequenceGroup(slice(0, num_sequences), slice(0, num_rows))]
    offsets = [int(offset) for offset in cu_seqlens]
    groups = []
    first = 0
    for last in range(1, num_sequences + 1):
        is_end = last == num_sequences
        if is_end or offsets[last + 1] - offsets[first] > rows_per_chunk:
            groups.append(SequenceGroup(slice(first, last), slice(offsets[first], offsets[last])))
            first = last
    return groups


def streamed_rows(engine: RowEngine, wanted: Wanted, is_budget_firm: bool) -> int:
    """Rows per chunk that fit beside the extra accumulator of a streamed sequence; 0 if the workspace is too small."""
    if not wanted.weight or not is_budget_firm:
        return engine.rows_per_chunk
    hidden_size, wide = engine.hidden.shape[1], engine.head.accumulate.itemsize
    if engine.head.group is None:
        accumulator_bytes = engine.head.weight.numel() * wide
        num_rows = (engine.chunk_bytes - accumulator_bytes) // engine.bytes_per_row
    else:  # must be equal on every rank, so it cannot depend on this shard
        num_rows = engine.rows_per_chunk - hidden_size * wide // engine.hidden.dtype.itemsize
    return num_rows if num_rows >= MIN_STREAMED_ROWS else 0


class FusedOptions(NamedTuple):
    """Constants of one call of the fused loss."""

    reduction: str
    entropy_bonus: float
    wanted: Wanted
    is_budget_firm: bool  # the workspace also has to hold the accumulator of a streamed sequence
    skipped_share: float = 0.0  # of the gradient of the logits, see `skipping`


class FusedPass:
    """One forward pass of the fused loss over all groups; the gradients are those of the loss itself."""

    def __init__(
        self,
        engine: RowEngine,
        cu_seqlens: Tensor,  # [B + 1], on the device of the rows
        terms: SequenceTerms,
        options: FusedOptions,
    ) -> None:
        num_rows, num_sequences = engine.hidden.shape[0], cu_seqlens.shape[0] - 1
        device = engine.hidden.device
        self.engine, self.cu_seqlens, self.terms, self.options = engine, cu_seqlens, terms, options
        self.gradients = Gradients(engine, options.wanted, options.skipped_share)
        self.entropy = None
        if engine.with_entropy:
            self.entropy = torch.empty(num_rows, dtype=engine.head.accumulate, device=device)
        # Per sequence: loss, residual, log-prob, dloss / dlog-prob.
        self.per_sequence = torch.zeros(4, num_sequences, dtype=torch.float64, device=device)
        self.entropy_sum = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def loss(self) -> Tensor:
        """Total loss in float64."""
        losses = self.per_sequence[0].sum()
        return losses - self._bonus_per_row * self.entropy_sum if self.options.entropy_bonus else losses

    @property
    def _bonus_per_row(self) -> float:
        return self.options.entropy_bonus / max(self.engine.hidden.shape[0], 1)

    def run(self, groups: list[SequenceGroup]) -> None:
        """Process every group; only log-probs are computed if no gradient of rows is wanted."""
        rows_per_stream = streamed_rows(self.engine, self.options.wanted, self.options.is_budget_firm)
        for group in groups:
            num_rows = group.rows.stop - group.rows.start
            is_sequence = group.sequences.stop - group.sequences.start == 1
            if not any(self.options.wanted):
                stats = score_rows(self.engine, group.rows)
                self._finish(group, stats)
            elif num_rows <= self.engine.rows_per_chunk:
                self._one_pass(group)
            elif is_sequence and rows_per_stream and not self.options.entropy_bonus:
                self._stream(group, rows_per_stream)
            else:
                self._two_passes(group)

    def _one_pass(self, group: SequenceGroup) -> None:
        live = self._live_rows(group)
        chunk = self.engine.exponentials(group.rows, live)
        coefficient = self._finish(group, chunk.stats)
        bonus = self._entropy_coefficient(coefficient, live)
        self.gradients.add(self.engine, chunk, group.rows, coefficient, live, bonus)

    def _two_passes(self, group: SequenceGroup) -> None:
        stats = score_rows(self.engine, group.rows)
        coefficient = self._finish(group, stats)
        live = self._live_rows(group)
        bonus = self._entropy_coefficient(coefficient, live)
        for rows in row_chunks(group.rows.start, group.rows.stop, self.engine.rows_per_chunk):
            local = slice(rows.start - group.rows.start, rows.stop - group.rows.start)
            live_part = None if live is None else live[local]
            chunk = self.engine.exponentials(rows, live_part, stats.narrow(local.start, local.stop))
            bonus_part = None if bonus is None else bonus[local]
            self.gradients.add(self.engine, chunk, rows, coefficient[local], live_part, bonus_part)

    def _stream(self, group: SequenceGroup, num_rows: int) -> None:
        """Process one long sequence: accumulate gradients of its log-prob, then scale them by c_i once it is known."""
        live = self._live_rows(group)
        own = new_accumulators(self.engine.head, self.options.wanted)
        found = []
        for rows in row_chunks(group.rows.start, group.rows.stop, num_rows):
            local = slice(rows.start - group.rows.start, rows.stop - group.rows.start)
            live_part = None if live is None else live[local]
            chunk = self.engine.exponentials(rows, live_part)
            found.append(chunk.stats)
            one = torch.ones_like(chunk.factor)
            self.gradients.add(self.engine, chunk, rows, one, live_part, into=own)
        entropy = [stats.entropy for stats in found if stats.entropy is not None]
        logprobs = torch.cat([stats.logprobs for stats in found])
        stats = RowStats(logprobs, logprobs, torch.cat(entropy) if entropy else None)
        coefficient = self._finish(group, stats)[0]
        if self.gradients.hidden is not None:
            self.gradients.hidden[group.rows].mul_(coefficient)
        own_weight, own_bias = own
        if self.gradients.weight_sum is not None and own_weight is not None:
            self.gradients.weight_sum.add_scaled(own_weight, coefficient)
        if self.gradients.bias is not None and own_bias is not None:
            self.gradients.bias.addcmul_(own_bias, coefficient)

    def _live_rows(self, group: SequenceGroup) -> Tensor | None:
        """Return [R], False in rows of sequences of weight 0; None if the caller gave no weights."""
        if not self.terms.has_weights:
            return None
        offsets = self._offsets(group)
        owner = sequence_of_row(offsets, group.rows.stop - group.rows.start)
        return (self.terms.weights[group.sequences] != 0)[owner]

    def _entropy_coefficient(self, coefficient: Tensor, live: Tensor | None) -> Tensor | None:
        if not self.options.entropy_bonus:
            return None
        bonus = torch.full_like(coefficient, -self._bonus_per_row)
        return bonus if live is None else torch.where(live, bonus, 0.0)

    def _offsets(self, group: SequenceGroup) -> Tensor:
        return self.cu_seqlens[group.sequences.start : group.sequences.stop + 1] - group.rows.start

    def _finish(self, group: SequenceGroup, stats: RowStats) -> Tensor:
        """Fill the outputs of the group's sequences; return dloss / dlogprobs [R] of its rows."""
        sequences, offsets = group.sequences, self._offsets(group)
        seq_logprobs = reduce_segments(stats.logprobs, offsets, self.options.reduction)
        losses, residual, coefficient = self.terms.narrow(sequences.start, sequences.stop).evaluate(seq_logprobs)
        for row, values in zip(self.per_sequence, (losses, residual, seq_logprobs, coefficient), strict=True):
            row[sequences] = values
        if self.entropy is not None and stats.entropy is not None:
            self.entropy[group.rows] = stats.entropy
            if self.options.entropy_bonus:
                live = self._live_rows(group)
                entropy = stats.entropy if live is None else torch.where(live, stats.entropy, 0.0)
                self.entropy_sum += entropy.sum(dtype=torch.float64)
        if self.options.reduction == "mean":
            coefficient = coefficient / segment_lengths(offsets)
        owner = sequence_of_row(offsets, stats.logprobs.shape[0])
        return coefficient[owner].to(self.engine.head.accumulate)

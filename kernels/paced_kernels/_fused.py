"""The fused trajectory-balance loss in plain PyTorch: gradients in the forward pass, over sequence-aligned chunks.

The gradient with respect to log p of a token is one number a sequence, c_i = 2 w_i residual_i / denominator, known as
soon as all rows of the sequence are. Chunks therefore hold whole sequences and one pass suffices: three GEMMs,
6 T H V floating-point operations. Only a sequence longer than a chunk, or offsets that live on another device and
that the host must not read, cost a second pass over the logits, 8 T H V.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary, R = rows of a group or chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._rows import Gradients, Head, row_chunks, score_rows, softmax_parts
from ._sequences import SequenceTerms, reduce_segments, segment_lengths, sequence_of_row


def scale_gradient(gradient: Tensor | None, grad_output: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Multiply in the accumulation dtype, then round once to the dtype of the input."""
    if gradient is None:
        return None
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, grad_output, out=out)


class Group(NamedTuple):
    """Consecutive sequences whose rows are processed together."""

    sequences: slice
    rows: slice


def plan_groups(cu_seqlens: Tensor, num_rows: int, rows_per_chunk: int) -> list[Group]:
    """Pack whole sequences into groups of at most `rows_per_chunk` rows; a longer sequence is a group of its own.

    Offsets on a device are not read: all sequences then form one group.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    if cu_seqlens.device.type != "cpu":
        return [Group(slice(0, num_sequences), slice(0, num_rows))]
    offsets = [int(offset) for offset in cu_seqlens]
    groups = []
    first = 0
    for last in range(1, num_sequences + 1):
        is_end = last == num_sequences
        if is_end or offsets[last + 1] - offsets[first] > rows_per_chunk:
            groups.append(Group(slice(first, last), slice(offsets[first], offsets[last])))
            first = last
    return groups


class FusedOptions(NamedTuple):
    """Constants of one call of the fused loss."""

    temperature: float
    reduction: str
    with_entropy: bool
    workspace_bytes: int
    wanted: tuple[bool, bool, bool]  # gradients of (hidden, head_weight, bias)


class FusedPass:
    """One forward pass of the fused loss over all groups; the gradients are those of the loss itself."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        token_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [B + 1], on the device of hidden
        terms: SequenceTerms,
        options: FusedOptions,
    ) -> None:
        num_sequences = cu_seqlens.shape[0] - 1
        self.head, self.hidden, self.token_ids = head, hidden, token_ids
        self.cu_seqlens, self.terms, self.options = cu_seqlens, terms, options
        self.gradients = Gradients.zeros(head, hidden, options.wanted)
        self.entropy = None
        if options.with_entropy:
            self.entropy = torch.empty(hidden.shape[0], dtype=head.accumulate, device=hidden.device)
        per_sequence = {"dtype": torch.float64, "device": hidden.device}
        self.losses = torch.zeros(num_sequences, **per_sequence)
        self.residual = torch.zeros(num_sequences, **per_sequence)
        self.seq_logprobs = torch.zeros(num_sequences, **per_sequence)
        self.coefficient = torch.zeros(num_sequences, **per_sequence)  # dL / ds

    def run(self, groups: list[Group], rows_per_chunk: int) -> None:
        """Process every group; with no row gradient wanted only log-probs are computed."""
        for group in groups:
            if any(self.options.wanted) and group.rows.stop - group.rows.start <= rows_per_chunk:
                self._one_pass(group)
                continue
            logprobs, entropy = score_rows(
                self.head, self.hidden, self.token_ids, self.options.with_entropy, group.rows
            )
            row_coefficient = self._finish_sequences(group, logprobs, entropy)
            if any(self.options.wanted):
                self._second_pass(group, row_coefficient, rows_per_chunk)

    def _one_pass(self, group: Group) -> None:
        rows = group.rows
        logits = self.head.logits(self.hidden[rows])
        parts = softmax_parts(logits, self.token_ids[rows], self.options.with_entropy)
        row_coefficient = self._finish_sequences(group, parts.logprobs, parts.entropy)
        self.gradients.add_rows(self.head, self.hidden, rows, parts, row_coefficient)

    def _second_pass(self, group: Group, row_coefficient: Tensor, rows_per_chunk: int) -> None:
        for rows in row_chunks(group.rows.start, group.rows.stop, rows_per_chunk):
            parts = softmax_parts(self.head.logits(self.hidden[rows]), self.token_ids[rows], False)
            local = slice(rows.start - group.rows.start, rows.stop - group.rows.start)
            self.gradients.add_rows(self.head, self.hidden, rows, parts, row_coefficient[local])
            del parts  # its buffer must be free before the next chunk allocates

    def _finish_sequences(self, group: Group, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
        """Fill the outputs of the group's sequences; return dL / dlogprobs [R] of its rows."""
        sequences = group.sequences
        offsets = self.cu_seqlens[sequences.start : sequences.stop + 1] - group.rows.start
        seq_logprobs = reduce_segments(logprobs, offsets, self.options.reduction)
        losses, residual, coefficient = self.terms.narrow(sequences.start, sequences.stop).evaluate(seq_logprobs)
        self.losses[sequences] = losses
        self.residual[sequences] = residual
        self.seq_logprobs[sequences] = seq_logprobs
        self.coefficient[sequences] = coefficient
        if self.entropy is not None and entropy is not None:
            self.entropy[group.rows] = entropy
        if self.options.reduction == "mean":
            coefficient = coefficient / segment_lengths(offsets)
        owner = sequence_of_row(offsets, logprobs.shape[0])
        return coefficient[owner].to(self.head.accumulate)


class FusedTrajectoryBalance(torch.autograd.Function):
    """The fused loss: gradients are computed by the forward pass and scaled by the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        intercept: Tensor,  # [B] f64
        token_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [B + 1], on the CPU or on the device of hidden
        terms: SequenceTerms,
        options: FusedOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        head = Head(weight, bias, options.temperature, options.workspace_bytes)
        rows_per_chunk = head.rows_per_chunk(2 if options.with_entropy else 1)
        groups = plan_groups(cu_seqlens, hidden.shape[0], rows_per_chunk)
        fused = FusedPass(head, hidden, token_ids, cu_seqlens.to(hidden.device, torch.int64), terms, options)
        fused.run(groups, rows_per_chunk)
        gradients = fused.gradients
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, fused.coefficient)
        ctx.input_dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        residual = fused.residual.to(head.accumulate)
        seq_logprobs = fused.seq_logprobs.to(head.accumulate)
        # One call only: a second one would replace the first.
        detached = [residual, seq_logprobs] if fused.entropy is None else [residual, seq_logprobs, fused.entropy]
        ctx.mark_non_differentiable(*detached)
        return fused.losses.sum().to(head.accumulate), residual, seq_logprobs, fused.entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * 8
        *rows, coefficient = ctx.saved_tensors
        scaled = [scale_gradient(gradient, grad_loss, ctx.input_dtype) for gradient in rows]
        return (*scaled, coefficient * grad_loss, None, None, None, None)

"""Rows of the vocabulary projection, a chunk at a time: logits, log-softmax parts and gradients.

For one row with logits z = h W^T / temperature + bias, target y and E_v = exp(z_v - max z):

    S' = sum of E_v over v != y        S = S' + E_y        log p_y = (z_y - max z) - log S
    d log p_y / d z_v = -E'_v / S      with E'_v = E_v for v != y and E'_y = -S'

so 1 - p_y is never formed by subtraction, and a gradient is one row scale times a matrix that is already in the
buffer. Only a chunk of R rows of logits exists at any time, in float32 (float64 for float64 inputs).

T = packed tokens, H = hidden size, V = vocabulary, R = rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_WORKSPACE_BYTES = 128 * 2**20
# Below this shifted logit exp() is 0 in every dtype; the clamp keeps 0 * -inf out of the entropy.
LOWEST_SHIFTED_LOGIT = -1e4


@dataclass(frozen=True, slots=True)
class Head:
    """The projection to the vocabulary, with the memory it may use."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    workspace_bytes: int

    @property
    def accumulate(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def rows_per_chunk(self, num_buffers: int) -> int:
        """Rows R such that `num_buffers` [R, V] buffers and the upcast block of the weight fit the workspace."""
        budget = self.workspace_bytes if self.weight.dtype == self.accumulate else self.workspace_bytes * 3 // 4
        return max(1, budget // (num_buffers * self.weight.shape[0] * self.accumulate.itemsize))

    def vocab_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the accumulation dtype: one view, or upcast copies of at most a quarter of the workspace."""
        num_tokens, hidden_size = self.weight.shape
        if self.weight.dtype == self.accumulate:
            yield slice(0, num_tokens), self.weight
            return
        step = max(1, self.workspace_bytes // (4 * hidden_size * self.accumulate.itemsize))
        for start in range(0, num_tokens, step):
            yield slice(start, start + step), self.weight[start : start + step].to(self.accumulate)

    def scale(self, hidden: Tensor) -> Tensor:
        """[R, H] rows in the accumulation dtype, divided by the temperature."""
        return hidden.to(self.accumulate) / self.temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] logits of a chunk of rows."""
        scaled = self.scale(hidden)
        out = scaled.new_empty(hidden.shape[0], self.weight.shape[0])
        for columns, block in self.vocab_blocks():
            # Products with out= and in-place ones stay in this dtype under autocast too.
            torch.mm(scaled, block.T, out=out[:, columns])
        return out if self.bias is None else out.add_(self.bias)


class SoftmaxParts(NamedTuple):
    """What one chunk of logits turns into; `exponentials` and `weighted` are the two [R, V] buffers."""

    logprobs: Tensor  # [R]
    exponentials: Tensor  # [R, V], E'
    total: Tensor  # [R, 1], S
    entropy: Tensor | None  # [R]
    weighted: Tensor | None  # [R, V], E_v * (log p_v + entropy)


def softmax_parts(logits: Tensor, token_ids: Tensor, with_entropy: bool) -> SoftmaxParts:
    """Normalise a chunk in place: `logits` [R, V] becomes E'."""
    target = token_ids.long()[:, None]  # [R, 1]
    shifted = logits.sub_(logits.amax(dim=1, keepdim=True))
    target_shifted = shifted.gather(1, target)  # [R, 1], 0 when the target is the largest
    weighted = shifted.clamp(min=LOWEST_SHIFTED_LOGIT) if with_entropy else None
    exponentials = shifted.exp_().scatter_(1, target, 0.0)
    others = exponentials.sum(dim=1, keepdim=True)  # [R, 1], S'
    target_exponential = target_shifted.exp()
    total = others + target_exponential
    # log1p keeps the relative accuracy of a log-prob near 0.
    log_total = torch.where(target_shifted == 0, torch.log1p(others), torch.log(total))
    entropy = None
    if weighted is not None:
        exponentials.scatter_(1, target, target_exponential)
        weighted.mul_(exponentials)
        entropy = log_total - weighted.sum(dim=1, keepdim=True) / total  # [R, 1]
        weighted.addcmul_(exponentials, entropy - log_total)
        entropy = entropy.squeeze(1)
    exponentials.scatter_(1, target, -others)
    return SoftmaxParts((target_shifted - log_total).squeeze(1), exponentials, total, entropy, weighted)


@dataclass(slots=True)
class Gradients:
    """Accumulators in the accumulation dtype; None where no gradient is wanted."""

    hidden: Tensor | None  # [T, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]

    @staticmethod
    def zeros(head: Head, hidden: Tensor, wanted: tuple[bool, bool, bool]) -> "Gradients":
        """Zeroed accumulators for (hidden, weight, bias)."""

        def like(value: Tensor | None, want: bool) -> Tensor | None:
            if value is None or not want:
                return None
            return torch.zeros(value.shape, dtype=head.accumulate, device=value.device)

        return Gradients(like(hidden, wanted[0]), like(head.weight, wanted[1]), like(head.bias, wanted[2]))

    def add_rows(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        rows: slice,
        parts: SoftmaxParts,
        coefficient: Tensor,  # [R], dL / dlogprobs
        entropy_coefficient: Tensor | None = None,  # [R], dL / dentropy
    ) -> None:
        """Add one chunk. A row whose coefficients are exactly 0 adds exactly 0, whatever its hidden state holds."""
        dead = coefficient[:, None] == 0
        grad_logits = parts.exponentials.mul_(-coefficient[:, None] / parts.total)  # [R, V]
        if parts.weighted is not None and entropy_coefficient is not None:
            dead = dead & (entropy_coefficient[:, None] == 0)
            grad_logits.addcmul_(parts.weighted, -entropy_coefficient[:, None] / parts.total)
        grad_logits.masked_fill_(dead, 0.0)
        if self.hidden is not None:
            out = self.hidden[rows]
            for columns, block in head.vocab_blocks():
                out.addmm_(grad_logits[:, columns], block)
            out.div_(head.temperature)
        if self.weight is not None:
            self.weight.addmm_(grad_logits.T, head.scale(hidden[rows]).masked_fill_(dead, 0.0))
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=0))


def row_chunks(start: int, stop: int, num_rows: int) -> Iterator[slice]:
    """Slices of at most `num_rows` rows that cover start..stop-1."""
    for first in range(start, stop, num_rows):
        yield slice(first, min(first + num_rows, stop))


def score_rows(
    head: Head, hidden: Tensor, token_ids: Tensor, with_entropy: bool, rows: slice | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [R] and entropies [R] of a range of rows, forward only: 2 R H V operations."""
    start, stop = (0, hidden.shape[0]) if rows is None else (rows.start, rows.stop)
    logprobs = torch.empty(stop - start, dtype=head.accumulate, device=hidden.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    for chunk in row_chunks(start, stop, head.rows_per_chunk(2 if with_entropy else 1)):
        parts = softmax_parts(head.logits(hidden[chunk]), token_ids[chunk], with_entropy)
        local = slice(chunk.start - start, chunk.stop - start)
        logprobs[local] = parts.logprobs
        if entropy is not None and parts.entropy is not None:
            entropy[local] = parts.entropy
        del parts  # its buffers must be free before the next chunk allocates
    return logprobs, entropy


class LinearLogprobs(torch.autograd.Function):
    """Log-probs (and entropies) whose backward recomputes the logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        token_ids: Tensor,  # [T]
        temperature: float,
        with_entropy: bool,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head(weight, bias, temperature, workspace_bytes)
        ctx.save_for_backward(hidden, weight, bias, token_ids)
        ctx.options = (temperature, with_entropy, workspace_bytes)
        return score_rows(head, hidden, token_ids, with_entropy)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grad_outputs
        hidden, weight, bias, token_ids = ctx.saved_tensors
        temperature, with_entropy, workspace_bytes = ctx.options
        head = Head(weight, bias, temperature, workspace_bytes)
        gradients = Gradients.zeros(head, hidden, ctx.needs_input_grad[:3])
        num_rows = head.rows_per_chunk(2 if with_entropy else 1)
        for rows in row_chunks(0, hidden.shape[0], num_rows):
            parts = softmax_parts(head.logits(hidden[rows]), token_ids[rows], with_entropy)
            entropy_rows = None if grad_entropy is None else grad_entropy[rows]
            gradients.add_rows(head, hidden, rows, parts, grad_logprobs[rows], entropy_rows)
            del parts  # its buffers must be free before the next chunk allocates
        outputs = (gradients.hidden, gradients.weight, gradients.bias)
        return (*(None if out is None else out.to(hidden.dtype) for out in outputs), None, None, None, None)

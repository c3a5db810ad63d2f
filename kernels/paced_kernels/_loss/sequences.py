"""Per-sequence arithmetic of the trajectory-balance loss: segment sums, residuals, importance weights, coefficients.

All of it runs in float64, because a sum of ten thousand log-probs loses 4e-3 nats in float32 and the residual does not
divide that sum by anything; on [B]-sized tensors the cost is negligible. No function here makes the host wait.

T = packed tokens, B = sequences.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(80) = 5.5e34 is the largest importance weight without a cap: finite in float32, as is its gradient.
MAX_LOG_WEIGHT = 80.0


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum a packed tensor over each sequence, in float64, without a host sync.

    In torch: ``torch.stack([values[a:b].double().sum() for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])])``.
    The order of additions is fixed, so two runs agree bit for bit; NaN stays inside its own sequence; an empty
    sequence sums to 0. Differentiable in `values`.

    Args:
        values: [T] floating point, per-token values (nats for log-probs).
        cu_seqlens: [B + 1] integer prefix sums of the lengths, on the device of `values`.

    Returns:
        [B], float64 if `values` is float64, else float32.
    """
    sums = segment_sum_f64(values, cu_seqlens)
    return sums if values.dtype == torch.float64 else sums.float()


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_sum` divided by the length of each sequence; the mean of an empty sequence is 0."""
    means = reduce_segments(values, cu_seqlens, "mean")
    return means if values.dtype == torch.float64 else means.float()


def segment_sum_f64(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_sum` with a float64 result, whatever the dtype of `values`."""
    # unsafe=True skips a validation that reads the offsets on the host.
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True, initial=0.0)  # [B]


def segment_lengths(cu_seqlens: Tensor) -> Tensor:
    """Return [B] float64 lengths, with 1 instead of 0 so that they can be divisors."""
    return (cu_seqlens[1:] - cu_seqlens[:-1]).clamp(min=1).double()


def reduce_segments(values: Tensor, cu_seqlens: Tensor, reduction: str) -> Tensor:
    """Return the float64 sum or mean of each sequence."""
    sums = segment_sum_f64(values, cu_seqlens)
    return sums / segment_lengths(cu_seqlens) if reduction == "mean" else sums


def sequence_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Return [T], the index of the sequence that owns each row; empty sequences own none."""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


@dataclass(frozen=True, slots=True)
class SequenceTerms:
    """Per-sequence terms that do not depend on the policy in training. All float64."""

    intercept: Tensor  # [B], log_z - s_ref - rewards / beta; differentiable in log_z
    weights: Tensor  # [B], the caller's weights times beta / 2
    behavior: Tensor | None  # [B], log-probs under the policy that sampled
    max_log_weight: float
    denominator: float | Tensor
    has_weights: bool  # the caller gave weights, so some may be 0

    def narrow(self, start: int, stop: int) -> "SequenceTerms":
        """Return the terms of sequences start..stop-1; the denominator stays that of the whole batch."""
        behavior = None if self.behavior is None else self.behavior[start:stop]
        return SequenceTerms(
            self.intercept[start:stop],
            self.weights[start:stop],
            behavior,
            self.max_log_weight,
            self.denominator,
            self.has_weights,
        )

    def evaluate(self, seq_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses, residuals and coefficients dL/ds per sequence, all [B] float64.

        A sequence of weight exactly 0 is masked, not multiplied by 0: 0 * inf would be NaN.
        """
        residual = self.intercept + seq_logprobs  # [B]
        weights = self.weights
        if self.behavior is not None:
            # min(exp(x), cap) = exp(min(x, log cap)): clamping in log space avoids overflow.
            log_weight = (seq_logprobs.detach() - self.behavior).clamp(max=self.max_log_weight)
            weights = torch.where(weights == 0, weights, weights * log_weight.exp())
        live_residual = torch.where(weights == 0, 0.0, residual)
        losses = weights * live_residual.square() / self.denominator  # w u^2 / (2 beta), u = beta * residual
        return losses, residual, 2.0 * weights * live_residual.detach() / self.denominator


def make_terms(
    cu_seqlens: Tensor,  # [B + 1]
    num_rows: int,
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    ref_logprobs: Tensor | None,  # [T] or [B]
    weights: Tensor | None,  # [B]
    behavior_logprobs: Tensor | None,  # [T] or [B]
    importance_cap: float | None,
    reduction: str,
    denominator: float | Tensor | None,
) -> SequenceTerms:
    """Convert every constant to one float64 number per sequence. Only log_z keeps its gradient."""

    def per_sequence(values: Tensor) -> Tensor:
        values = values.detach()
        return reduce_segments(values, cu_seqlens, reduction) if values.shape[0] == num_rows else values.double()

    num_sequences = cu_seqlens.shape[0] - 1
    intercept = log_z.double() - rewards.detach().double() / beta
    if ref_logprobs is not None:
        intercept = intercept - per_sequence(ref_logprobs)
    if denominator is None:
        denominator = float(max(num_sequences, 1))
    elif isinstance(denominator, Tensor):
        denominator = denominator.detach().to(device=intercept.device, dtype=torch.float64)
    return SequenceTerms(
        intercept=intercept,
        weights=_loss_weights(weights, intercept, beta),
        behavior=None if behavior_logprobs is None else per_sequence(behavior_logprobs),
        max_log_weight=MAX_LOG_WEIGHT if importance_cap is None else min(math.log(importance_cap), MAX_LOG_WEIGHT),
        denominator=denominator,
        has_weights=weights is not None,
    )


def _loss_weights(weights: Tensor | None, intercept: Tensor, beta: float) -> Tensor:
    """Return [B] float64, beta / 2 times the caller's weights, rounded in their dtype or in float32 if that is finer.

    The factor turns squared nats into w u^2 / (2 beta) with u = beta * residual in reward units.
    """
    if weights is None:
        return torch.full_like(intercept.detach(), beta / 2)
    weights = weights.detach()
    return (weights.to(torch.promote_types(weights.dtype, torch.float32)) * (beta / 2)).double()

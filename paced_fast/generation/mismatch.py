"""The gap between the engine that sampled and the trainer that learns: raw figures, and weights that correct for it.

Both engines hold the same weights, yet round differently, so a sampled token's log-prob differs a little between them.
The trainer's gradient is that of samples of its own policy only when each sequence is weighted by pi_trainer /
pi_generator. Thresholds follow common practice: truncated importance sampling and masking, at token or sequence level.

B = sequences, T = packed completion tokens. Nothing here waits for the device: no value is read on the host and no
shape depends on one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paced_fast.config import MismatchConfig
from paced_kernels import segment_sum

_MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond any cap, and far from overflow in float32


def sequence_weights(
    generator_logprobs: Tensor,  # f32[T]
    old_logprobs: Tensor,  # f32[T]
    cu_seqlens: Tensor,  # i32[B + 1]
    config: MismatchConfig,
) -> Tensor:
    """Constant weights f32[B], one per sequence, that correct for the engine's rounding; ones when the mode is `off`.

    With d_t = old - generator of a token (nats), d = sum of a sequence's d_t held in [-20, 20], and c = `config.cap`:

    * `sequence_truncate`: min(exp(d), c)
    * `sequence_mask`: exp(d) where 1/c <= exp(d) <= c, else 0
    * `token_truncate`: exp of the sum of the d_t, each held in [-log c, log c]
    * `token_mask`: exp(d) where every d_t lies in [-log c, log c], else 0

    A sequence without tokens weighs 1. A NaN log-prob gives its sequence NaN in the truncating modes, which the update
    skips and counts, and 0 in the masking ones.
    """
    ones = torch.ones(len(cu_seqlens) - 1, dtype=torch.float32, device=old_logprobs.device)
    if config.mode == "off":
        return ones
    bound = math.log(config.cap)
    delta = (old_logprobs.detach() - generator_logprobs.detach()).double()
    if config.mode == "token_truncate":
        return _ratio(segment_sum(delta.clamp(-bound, bound), cu_seqlens)).float()
    log_ratio = segment_sum(delta, cu_seqlens)
    ratio = _ratio(log_ratio)
    if config.mode == "sequence_truncate":
        return ratio.clamp(max=config.cap).float()
    if config.mode == "sequence_mask":
        inside = log_ratio.abs() <= bound
    else:
        inside = segment_sum(_outside(delta, bound), cu_seqlens) == 0
    return torch.where(inside, ratio.float(), torch.zeros_like(ones))


def mismatch_metrics(
    generator_logprobs: Tensor,  # f32[T]
    old_logprobs: Tensor,  # f32[T]
    cu_seqlens: Tensor,  # i32[B + 1]
    *,
    cap: float,
) -> dict[str, Tensor]:
    """Figures of the uncorrected gap, each a scalar f32[] on the device of the log-probs.

    * `mean`, `max`: of the absolute difference of a token's two log-probs (nats)
    * `token_ratio`: mean of exp(|difference|); 1.00 when the engines agree, above 1.05 something is wrong
    * `sequence_ratio`: mean over sequences of exp(sum of differences); 1 in expectation for the right policy, and well
      below 1 when the generator's log-probs are renormalised by a sampling filter. It may overflow to infinity.
    * `outside_share`: share of tokens whose ratio lies outside [1 / cap, cap]

    Without tokens all are 0, the ratios 1.
    """
    delta = (old_logprobs.detach() - generator_logprobs.detach()).double()
    count = max(1, delta.numel())
    size = delta.abs()
    sums = segment_sum(delta, cu_seqlens)
    figures = {
        "mean": size.sum() / count,
        "max": torch.cat([size, size.new_zeros(1)]).max(),
        "token_ratio": (size.exp().sum() + (delta.numel() == 0)) / count,
        "sequence_ratio": (sums.exp().sum() + (sums.numel() == 0)) / max(1, sums.numel()),
        "outside_share": _outside(delta, math.log(cap)).sum() / count,
    }
    return {name: value.float() for name, value in figures.items()}


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _outside(delta: Tensor, bound: float) -> Tensor:
    """1.0 where a log-ratio is outside the band or NaN, else 0.0."""
    return (~(delta.abs() <= bound)).to(delta.dtype)

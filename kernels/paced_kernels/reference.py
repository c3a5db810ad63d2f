"""The specification: every fused operation in plain PyTorch, and the path that runs on a CPU.

Arguments and results are those of the public functions of the same name, without the checks: `logprobs` and
`trajectory_balance` document them. `_rows` holds the chunked projection and its gradients, `_fused` the loss over
sequence-aligned chunks, `_sequences` the arithmetic of one number a sequence.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._fused import FusedOptions, FusedTrajectoryBalance
from ._rows import DEFAULT_WORKSPACE_BYTES, LinearLogprobs
from ._sequences import make_terms, reduce_segments, segment_mean, segment_sum

__all__ = [
    "TBOutput",
    "linear_logprobs",
    "segment_mean",
    "segment_sum",
    "trajectory_balance_from_logprobs",
    "trajectory_balance_loss",
]


class TBOutput(NamedTuple):
    """Result of the trajectory-balance loss; only `loss` carries a gradient. Float64 where the inputs are."""

    loss: Tensor  # [] f32
    residual: Tensor  # [B] f32, log_z + s - s_ref - rewards / beta, in nats
    seq_logprobs: Tensor  # [B] f32, s: sum (or mean) of the log-probs of each sequence, in nats
    entropy: Tensor | None  # [T] f32, entropy of the policy at each token, in nats


def linear_logprobs(
    hidden: Tensor,  # [T, H]
    head_weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs [T] of the chosen tokens, and entropies [T] if asked for; both differentiable."""
    logprobs, entropy = LinearLogprobs.apply(
        hidden,
        head_weight,
        bias,
        token_ids,
        temperature,
        return_entropy,
        DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
    )
    return (logprobs, entropy) if return_entropy else logprobs


def trajectory_balance_loss(
    hidden: Tensor,  # [T, H]
    head_weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    ref_logprobs: Tensor | None = None,  # [T] or [B]
    weights: Tensor | None = None,  # [B]
    behavior_logprobs: Tensor | None = None,  # [T] or [B]
    importance_cap: float | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    reduction: str = "sum",
    denominator: float | Tensor | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
) -> TBOutput:
    """Trajectory-balance loss straight from hidden states; gradients are computed by the forward pass."""
    terms = make_terms(
        cu_seqlens.to(hidden.device, torch.int64, non_blocking=True),
        hidden.shape[0],
        rewards=rewards,
        log_z=log_z,
        beta=beta,
        ref_logprobs=ref_logprobs,
        weights=weights,
        behavior_logprobs=behavior_logprobs,
        importance_cap=importance_cap,
        reduction=reduction,
        denominator=denominator,
    )

    def wanted(value: Tensor | None) -> bool:
        return torch.is_grad_enabled() and value is not None and value.requires_grad

    options = FusedOptions(
        temperature=temperature,
        reduction=reduction,
        with_entropy=return_entropy,
        workspace_bytes=DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        wanted=(wanted(hidden), wanted(head_weight), wanted(bias)),
    )
    return TBOutput(
        *FusedTrajectoryBalance.apply(hidden, head_weight, bias, terms.intercept, token_ids, cu_seqlens, terms, options)
    )


def trajectory_balance_from_logprobs(
    logprobs: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    ref_logprobs: Tensor | None = None,  # [T] or [B]
    weights: Tensor | None = None,  # [B]
    behavior_logprobs: Tensor | None = None,  # [T] or [B]
    importance_cap: float | None = None,
    reduction: str = "sum",
    denominator: float | Tensor | None = None,
) -> TBOutput:
    """The same loss from log-probs that exist already, by ordinary autograd."""
    cu_seqlens = cu_seqlens.to(logprobs.device, torch.int64, non_blocking=True)
    terms = make_terms(
        cu_seqlens,
        logprobs.shape[0],
        rewards=rewards,
        log_z=log_z,
        beta=beta,
        ref_logprobs=ref_logprobs,
        weights=weights,
        behavior_logprobs=behavior_logprobs,
        importance_cap=importance_cap,
        reduction=reduction,
        denominator=denominator,
    )
    seq_logprobs = reduce_segments(logprobs, cu_seqlens, reduction)
    losses, residual, _ = terms.evaluate(seq_logprobs)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return TBOutput(losses.sum().to(dtype), residual.detach().to(dtype), seq_logprobs.detach().to(dtype), None)

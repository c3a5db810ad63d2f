"""Specification: every fused operation in plain PyTorch, which is also the path for CPUs.

Arguments and results are those of the public functions of the same name (documented in `logprobs` and
`trajectory_balance`), without checks of shapes and dtypes. In `_loss`, `torch_rows` holds the chunked projection,
`gradients` the gradients of a chunk, `fused_pass` the loss over sequence-aligned chunks, and `sequences` the
per-sequence arithmetic.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._loss.calls import compute_linear_logprobs, compute_trajectory_balance
from ._loss.sequences import make_terms, reduce_segments, segment_mean, segment_sum
from ._shard import VocabShard

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
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probs [T] of the chosen tokens, and entropies [T] if requested; both differentiable."""
    logprobs, entropy = compute_linear_logprobs(
        hidden,
        head_weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        return_entropy=return_entropy,
        workspace_bytes=workspace_bytes,
        backend="reference",
        shard=shard,
        skipped_share=skipped_share,
    )
    return logprobs if entropy is None else (logprobs, entropy)


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
    entropy_bonus: float = 0.0,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> TBOutput:
    """Trajectory-balance loss directly from hidden states; the forward pass computes the gradients."""
    return TBOutput(
        *compute_trajectory_balance(
            hidden,
            head_weight,
            token_ids,
            cu_seqlens,
            rewards=rewards,
            log_z=log_z,
            beta=beta,
            ref_logprobs=ref_logprobs,
            weights=weights,
            behavior_logprobs=behavior_logprobs,
            importance_cap=importance_cap,
            bias=bias,
            temperature=temperature,
            reduction=reduction,
            denominator=denominator,
            entropy_bonus=entropy_bonus,
            return_entropy=return_entropy,
            workspace_bytes=workspace_bytes,
            backend="reference",
            shard=shard,
            skipped_share=skipped_share,
        )
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
    """The same loss from given log-probs, by ordinary autograd."""
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

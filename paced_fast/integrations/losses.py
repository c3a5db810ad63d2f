"""What every adapter shares: trajectory balance from log-probs or hidden states, and the group's estimate of log Z.

The loss is that of `paced_fast` (arXiv:2602.12642 in reward units)::

    u_i  = value_i + beta * (s_i - s_ref_i) - reward_i,      value = beta * log Z
    loss = sum_i w_i * min(exp(s_i - s_old_i), cap) * u_i^2 / (2 beta) / denominator

with s the sum of a completion's log-probs. The old policy is the reference unless another is given. The denominator is
always the caller's: the number of sequences that the *optimiser step* trains on, divided by what the host multiplies or
averages away (data-parallel ranks, micro-batches), so that no split of a batch changes its gradient.

B = sequences, L = padded length, T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paced_fast.errors import InputError
from paced_kernels import linear_logprobs, segment_sum, trajectory_balance_from_logprobs, trajectory_balance_loss


class Balance(NamedTuple):
    """The loss, and what to log about each sequence; all but the loss are detached."""

    loss: Tensor  # f32[]
    residual: Tensor  # f32[B], u_i in reward units
    log_ratio: Tensor  # f32[B], s - s_old
    weight: Tensor  # f32[B], importance weight, that of the caller included
    entropy: Tensor | None  # f32[T]


def group_log_z(
    targets: Tensor,  # [B]
    groups: Sequence[Hashable],
    *,
    group_size: int | None = None,
    scored: Tensor | None = None,  # bool[B]
) -> Tensor:
    """The log Z of each sequence's prompt that leaves its group the least squared residual: the mean of the targets.

    Args:
        targets: [B] reward / beta - (s_old - s_ref), in nats; reward / beta where the old policy is the reference.
        groups: B names of prompts; equal names are one group.
        group_size: completions every group must have here; None takes any number but one.
        scored: which sequences have a reward; None = all. The others enter no mean.

    Returns:
        [B] log Z, 0 for a group without a reward.

    Raises:
        InputError: a group is split: its mean over a part of it is another loss.
    """
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    if len(groups) != len(targets):
        raise InputError(f"groups: {len(groups)} names for {len(targets)} sequences; give one a sequence")
    for name, found in members.items():
        if group_size is None and len(found) == 1:
            raise InputError(
                f"group {name!r} has one completion in this batch, and its log Z would cancel its reward: keep the "
                "completions of a prompt together, two at least"
            )
        if group_size is not None and len(found) != group_size:
            raise InputError(
                f"group {name!r} has {len(found)} of {group_size} completions in this batch: estimate log Z before "
                "the batch is split, or keep the completions of a prompt together"
            )
    order = {name: k for k, name in enumerate(members)}
    index = torch.tensor([order[name] for name in groups], device=targets.device, dtype=torch.int64)
    known = torch.ones_like(targets) if scored is None else scored.to(targets.dtype)
    zeros = targets.new_zeros(len(members))
    sums = zeros.index_add(0, index, torch.where(known > 0, targets, 0.0))
    counts = zeros.index_add(0, index, known)
    return (sums / counts.clamp(min=1.0))[index]


def packed(values: Tensor, mask: Tensor) -> Tensor:
    """[B, L] (or [B, L, H]) to [T] (or [T, H]): the entries where `mask` [B, L] is not 0, row by row."""
    return values[mask.bool()]


def offsets(mask: Tensor) -> Tensor:
    """i64[B + 1] on the CPU: where each row of `mask` [B, L] begins and ends among the packed tokens."""
    return torch.nn.functional.pad(mask.bool().sum(1).cumsum(0), (1, 0)).cpu()


def one_a_row(name: str, values: Tensor, mask: Tensor, remedy: str) -> Tensor:
    """The one value [B] of each row of `values` [B, L] under `mask`; InputError where tokens have their own."""
    shown = mask.bool()
    row = torch.where(shown, values, -torch.inf).amax(1)
    row = torch.where(shown.any(1), row, 0.0)
    spread = torch.where(shown, (values - row[:, None]).abs(), 0.0)
    if bool((spread > 1e-5 * (1 + row.abs()[:, None])).any()):
        raise InputError(f"{name} differ between tokens of a completion: set {remedy}")
    return row


def loss_from_logprobs(
    logprobs: Tensor,  # [T] or [B, L]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    denominator: float | Tensor,
    mask: Tensor | None = None,  # [B, L]
    cu_seqlens: Tensor | None = None,  # [B + 1]
    old_logprobs: Tensor | None = None,  # as logprobs
    ref_logprobs: Tensor | None = None,  # as logprobs
    weights: Tensor | None = None,  # [B]
    importance_cap: float = 1.28,
    reduction: str = "sum",
) -> Balance:
    """Trajectory balance for a trainer that has log-probs: padded with `mask`, or packed with `cu_seqlens`.

    Args:
        logprobs: log-probs of the completion tokens under the policy in training; gradients flow here.
        rewards: raw rewards, neither centred nor scaled.
        log_z: in nats; gradients flow here too.
        beta: reward units per nat.
        denominator: what the sum over sequences is divided by; see above.
        old_logprobs: of the policy at the start of the step; None = the policy in training, which is right for the
            first and only optimiser step on a batch.
        ref_logprobs: of another reference; None = `old_logprobs`.
        weights: constant factors; 0 leaves a sequence out, whatever else it holds.
        importance_cap: upper bound of exp(s - s_old).
        reduction: of the residual's log-probs: "sum", or "mean" (FlowRL). Importance weights are of sums.
    """
    if (mask is None) == (cu_seqlens is None):
        raise InputError("give mask with padded log-probs, or cu_seqlens with packed ones, and not both")
    if mask is not None:
        if logprobs.shape != mask.shape:
            raise InputError(
                f"mask has shape {tuple(mask.shape)}, the log-probs {tuple(logprobs.shape)}: make them one"
            )
        cu_seqlens = offsets(mask)
        logprobs = packed(logprobs, mask)
        old_logprobs = None if old_logprobs is None else packed(old_logprobs, mask)
        ref_logprobs = None if ref_logprobs is None else packed(ref_logprobs, mask)
    assert cu_seqlens is not None
    here = cu_seqlens.to(logprobs.device)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = segment_sum((logprobs - old).detach(), here).float()
    weight = _importance(log_ratio, weights, importance_cap)
    out = trajectory_balance_from_logprobs(
        logprobs,
        here,
        rewards=rewards,
        log_z=log_z,
        beta=beta,
        # Of tokens, never of sequences: with as many sequences as tokens, some empty, the op could not tell them apart.
        ref_logprobs=(old if ref_logprobs is None else ref_logprobs).detach(),
        weights=weight * (beta / 2),
        reduction=reduction,
        denominator=denominator,
    )
    return Balance(out.loss, out.residual * beta, log_ratio, weight, None)


def loss_from_hidden(
    hidden: Tensor,  # [T, H]
    head_weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    denominator: float | Tensor,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    old_logprobs: Tensor | None = None,  # [T]
    weights: Tensor | None = None,  # [B]
    importance_cap: float = 1.28,
    **options: Any,
) -> Balance:
    """`loss_from_logprobs` from the states that predict the packed tokens and the output layer; no logits are built.

    With `old_logprobs` the loss and its gradients come out of one fused op; without them the policy is its own
    reference, which takes the log-probs first.
    """
    if old_logprobs is None or options:
        logprobs, entropy = linear_logprobs(
            hidden, head_weight, token_ids, bias=bias, temperature=temperature, return_entropy=True
        )
        out = loss_from_logprobs(
            logprobs,
            cu_seqlens=cu_seqlens,
            rewards=rewards,
            log_z=log_z,
            beta=beta,
            denominator=denominator,
            old_logprobs=old_logprobs,
            weights=weights,
            importance_cap=importance_cap,
            **options,
        )
        return out._replace(entropy=entropy.detach())
    old = segment_sum(old_logprobs.detach(), cu_seqlens.to(hidden.device))
    out = trajectory_balance_loss(
        hidden,
        head_weight,
        token_ids,
        cu_seqlens,
        rewards=rewards,
        log_z=log_z,
        beta=beta,
        ref_logprobs=old_logprobs,
        weights=(torch.ones_like(rewards) if weights is None else weights) * (beta / 2),
        behavior_logprobs=old_logprobs,
        importance_cap=importance_cap,
        bias=bias,
        temperature=temperature,
        denominator=denominator,
        return_entropy=True,
    )
    log_ratio = (out.seq_logprobs - old).float()
    return Balance(
        out.loss, out.residual * beta, log_ratio, _importance(log_ratio, weights, importance_cap), out.entropy
    )


def _importance(log_ratio: Tensor, weights: Tensor | None, cap: float) -> Tensor:
    importance = log_ratio.clamp(max=math.log(cap)).exp()
    return importance if weights is None else torch.where(weights == 0, 0.0, weights * importance)

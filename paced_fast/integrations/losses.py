"""Shared code of the adapters: trajectory balance from log-probs or hidden states, and the group estimate of log Z.

The loss equals that of `paced_fast` (arXiv:2602.12642 in reward units)::

    u_i  = value_i + beta * (s_i - s_ref_i) - reward_i,      value = beta * log Z
    loss = sum_i w_i * min(exp(s_i - s_old_i), cap) * u_i^2 / (2 beta) / denominator

with s the sum of a completion's log-probs. The old policy is the reference unless another is given. The caller always
supplies the denominator: the number of sequences in the *optimiser step*, divided by any factor that the host's own
averaging introduces (data-parallel ranks, micro-batches), so that splitting a batch does not change its gradient.

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
    """The loss, and per-sequence numbers to log; all but the loss are detached."""

    loss: Tensor  # f32[]
    residual: Tensor  # f32[B], u_i in reward units
    log_ratio: Tensor  # f32[B], s - s_old
    weight: Tensor  # f32[B], importance weight times the caller's weight
    entropy: Tensor | None  # f32[T]


def sums_to_log(
    balance: Balance,
    trained: Tensor,  # bool[B]
) -> Tensor:
    """Return f32[6], sums to add up over processes: over the trained sequences their number, squared residuals, log
    ratios and weights; over all tokens their number and entropies."""
    assert balance.entropy is not None
    zero = torch.zeros((), device=trained.device)
    return torch.stack(
        [
            trained.float().sum(),
            torch.where(trained, balance.residual.float().square(), zero).sum(),
            torch.where(trained, balance.log_ratio, zero).sum(),
            torch.where(trained, balance.weight, zero).sum(),
            torch.full_like(zero, float(balance.entropy.numel())),
            balance.entropy.float().sum(),
        ]
    )


def group_log_z(
    targets: Tensor,  # [B]
    groups: Sequence[Hashable],
    *,
    group_size: int | None = None,
    scored: Tensor | None = None,  # bool[B]
) -> Tensor:
    """Return log Z per sequence, the least-squares estimate over the sequence's group: the mean of the targets.

    Args:
        targets: [B] reward / beta - (s_old - s_ref), in nats; reward / beta if the old policy is the reference.
        groups: B names of prompts; equal names form a group.
        group_size: required completions per group; None allows any number above 1.
        scored: whether each sequence has a reward; None = all do. Unscored sequences are excluded from the mean.

    Returns:
        [B] log Z, 0 for a group without a reward.

    Raises:
        InputError: a group is incomplete; its mean over a part would give a different loss.
    """
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    if len(groups) != len(targets):
        raise InputError(f"groups: {len(groups)} names for {len(targets)} sequences: give one per sequence")
    for name, found in members.items():
        if group_size is None and len(found) == 1:
            raise InputError(
                f"group {name!r} has only one completion in this batch, so its log Z would cancel its reward: keep the "
                "completions of a prompt together, at least two"
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
    """Pack [B, L] (or [B, L, H]) to [T] (or [T, H]): the entries where `mask` [B, L] is not 0, row by row."""
    return values[mask.bool()]


def offsets(mask: Tensor) -> Tensor:
    """Return i64[B + 1] on the CPU: offsets of the rows of `mask` [B, L] among the packed tokens."""
    return torch.nn.functional.pad(mask.bool().sum(1).cumsum(0), (1, 0)).cpu()


def one_a_row(name: str, values: Tensor, mask: Tensor, remedy: str) -> Tensor:
    """Return [B], the common value of each row of `values` [B, L] under `mask`; InputError if a row's tokens differ."""
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
    """Trajectory balance from log-probs, either padded (with `mask`) or packed (with `cu_seqlens`).

    Args:
        logprobs: log-probs of the completion tokens under the policy in training; gradients flow here.
        rewards: raw rewards, neither centred nor scaled.
        log_z: log Z in nats; gradients flow here too.
        beta: reward units per nat.
        denominator: divisor of the sum over sequences; see the module docstring.
        old_logprobs: log-probs under the policy at the start of the step; None = the policy in training, correct if
            the batch is used for a single optimiser step.
        ref_logprobs: log-probs under another reference; None = `old_logprobs`.
        weights: constant factors; 0 excludes a sequence, whatever its other values are.
        importance_cap: upper bound of exp(s - s_old).
        reduction: of the log-probs in the residual: "sum", or "mean" (FlowRL). Importance weights always use sums.
    """
    if (mask is None) == (cu_seqlens is None):
        raise InputError("give either mask, with padded log-probs, or cu_seqlens, with packed ones")
    if mask is not None:
        if logprobs.shape != mask.shape:
            raise InputError(
                f"mask has shape {tuple(mask.shape)} and the log-probs {tuple(logprobs.shape)}: make them the same"
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
        # Always per token: with B = T (some sequences empty) the op could not tell per-token from per-sequence.
        ref_logprobs=(old if ref_logprobs is None else ref_logprobs).detach(),
        weights=weight,
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
    """`loss_from_logprobs` from the output layer and the states that predict the packed tokens; no logits are stored.

    With `old_logprobs`, one fused op computes the loss and its gradients. Without them the policy is its own
    reference, so the log-probs are computed first.
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
        weights=weights,
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

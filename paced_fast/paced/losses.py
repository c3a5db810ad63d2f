"""Losses of the policy: trajectory balance, FlowRL's, GRPO's.

B = sequences, T = packed completion tokens, s = sum of a sequence's log-probs, b = beta.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from paced_fast.config import Config
from paced_fast.data import packing
from paced_fast.data.records import Rollouts, Targets
from paced_fast.data.transfer import pinned
from paced_fast.policy import Policy, linear_options
from paced_kernels import segment_sum, trajectory_balance_from_logprobs, trajectory_balance_loss


class MicroOutput(NamedTuple):
    """Loss of one micro-batch; per sequence, the log-ratio to the old policy and the weight, both detached."""

    loss: Tensor  # f32[]
    log_ratio: Tensor  # f32[b]
    weight: Tensor  # f32[b]


class PolicyLoss(Protocol):
    """Loss of the states `hidden` [T, H]; `known` are their log-probs f32[T] where the update has them already."""

    def __call__(
        self,
        hidden: Tensor,
        policy: Policy,
        micro: Rollouts,
        targets: Targets,
        config: Config,
        denominator: int,
        known: Tensor | None = None,
    ) -> MicroOutput:
        """`denominator` is the number of sequences of the whole minibatch."""
        ...


def token_logprobs(
    hidden: Tensor, policy: Policy, micro: Rollouts, config: Config, known: Tensor | None = None
) -> Tensor:
    """Log-probs f32[T] at the temperature of sampling, whose gradient may leave out what the settings allow; `known`
    itself where it is given."""
    if known is not None:
        return known
    share = config.loss.skipped_share
    return policy.token_logprobs(hidden, micro.token_ids, config.generation.temperature, skipped_share=share)


def trajectory_balance(
    hidden: Tensor,
    policy: Policy,
    micro: Rollouts,
    targets: Targets,
    config: Config,
    denominator: int,
    known: Tensor | None = None,
) -> MicroOutput:
    """mean_i w_i u_i^2 / (2 b), u = value + b (s - s_old) - reward, w = weight min(exp(s - s_old), cap) detached."""
    beta = config.loss.beta
    old = segment_sum(targets.old_logprobs, micro.cu_seqlens)
    # With offsets on the host the op can plan its chunks; with offsets on the device it would have to project twice.
    host = torch.device("cpu")
    offsets = pinned(packing.cu_seqlens(micro.lengths, host, torch.int64), policy.device)
    terms: dict[str, Any] = {
        "rewards": targets.signal,
        "log_z": targets.intercept / beta,
        "beta": beta,
        "ref_logprobs": targets.ref_logprobs,
        "weights": targets.weights,
        "behavior_logprobs": targets.old_logprobs,
        "importance_cap": config.loss.importance_cap,
        "denominator": denominator,
    }
    # The fused op assumes logits that are linear in the states; bounded ones are not.
    if known is not None or policy.family.cap is not None:
        logprobs = token_logprobs(hidden, policy, micro, config, known)
        out = trajectory_balance_from_logprobs(logprobs, micro.cu_seqlens, **terms)
    else:
        weight, bias = policy.head
        out = trajectory_balance_loss(
            hidden,
            weight,
            micro.token_ids,
            offsets,
            skipped_share=config.loss.skipped_share,
            **linear_options(bias, config.generation.temperature),
            **terms,
        )
    log_ratio = out.seq_logprobs - old
    importance = log_ratio.clamp(max=math.log(config.loss.importance_cap)).exp()
    return MicroOutput(out.loss, log_ratio, targets.weights * importance)


def flowrl(
    hidden: Tensor,
    policy: Policy,
    micro: Rollouts,
    targets: Targets,
    config: Config,
    denominator: int,
    known: Tensor | None = None,
) -> MicroOutput:
    """mean_i w_i (log Z + mean log pi - scale * advantage - mean log pi_ref)^2, w as in `trajectory_balance`.

    arXiv 2509.15207 as its code has it: means inside the residual, a sum inside the weight.
    """
    logprobs = token_logprobs(hidden, policy, micro, config, known)
    log_ratio = segment_sum(logprobs.detach() - targets.old_logprobs, micro.cu_seqlens)
    cap = math.log(config.loss.flowrl_importance_cap)
    importance = targets.weights * log_ratio.clamp(max=cap).exp()
    out = trajectory_balance_from_logprobs(
        logprobs,
        micro.cu_seqlens,
        rewards=targets.signal,
        log_z=targets.intercept,
        beta=1.0,
        ref_logprobs=targets.ref_logprobs,
        weights=importance * 2,  # the op halves the square, FlowRL does not
        reduction="mean",
        denominator=denominator,
    )
    return MicroOutput(out.loss, log_ratio, importance)


def grpo(
    hidden: Tensor,
    policy: Policy,
    micro: Rollouts,
    targets: Targets,
    config: Config,
    denominator: int,
    known: Tensor | None = None,
) -> MicroOutput:
    """-mean_i w_i mean_t min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(log pi - log pi_old); arXiv 2402.03300,
    eq. 3 without its KL term."""
    logprobs = token_logprobs(hidden, policy, micro, config, known)
    lengths = micro.cu_seqlens.diff().long()
    advantage = targets.signal.repeat_interleave(lengths, output_size=micro.num_tokens)
    ratio = (logprobs - targets.old_logprobs).exp()
    clipped = ratio.clamp(1 - config.loss.grpo_clip, 1 + config.loss.grpo_clip)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    means = segment_sum(surrogate, micro.cu_seqlens) / lengths.clamp(min=1)
    loss = -(targets.weights * means).sum() / denominator
    log_ratio = segment_sum(logprobs.detach() - targets.old_logprobs, micro.cu_seqlens)
    return MicroOutput(loss, log_ratio, targets.weights)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "paced": trajectory_balance,
    "paced_paper": trajectory_balance,
    "tb": trajectory_balance,
    "tb_group": trajectory_balance,
    "flowrl": flowrl,
    "grpo": grpo,
}

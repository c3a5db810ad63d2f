"""Trajectory balance in verl: loaded through the entry point group `verl.plugins`, selected in the configuration.

::

    algorithm.adv_estimator=paced_tb                      # raw reward minus the mean of the prompt's group
    actor_rollout_ref.actor.policy_loss.loss_mode=paced_tb
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum
    actor_rollout_ref.actor.policy_loss.dro_beta=0.05     # reward units per nat; default 0.05
    actor_rollout_ref.actor.clip_ratio_high=0.28          # caps the weight exp(log pi - log pi_old) at 1.28
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0

With the old policy as reference, the group's estimate of beta * log Z is its mean reward, so the advantage is all that
the loss needs: residual = beta * log ratio - advantage. For a frozen reference add
`algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl algorithm.kl_ctrl.kl_coef=0.05` (the same beta). The rewards
then become reward - beta * (log pi_old - log pi_ref), and their group mean is beta * log Z under that reference.

FlowRL's settings (arXiv:2509.15207: scale 15, means in the residual, weights up to 10) on verl 0.9.1, where its own
recipe no longer imports (`verl.workers.actor.dp_actor` is gone)::

    algorithm.adv_estimator=grpo                          # divided by the standard deviation, as in FlowRL
    algorithm.norm_adv_by_std_in_grpo=True
    algorithm.use_kl_in_reward=False
    actor_rollout_ref.actor.policy_loss.loss_mode=paced_flowrl
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.rollout.n=8
    data.train_batch_size=512
    data.max_prompt_length=2048
    data.max_response_length=8192

The reference is then the old policy. `flowrl_loss` uses the paper's frozen reference, as a loss of the engine worker.
No configuration selects it, because `engine_workers.py` builds its own loss: a custom worker must call `set_loss_fn`.

Written against verl 0.9.1. Its engines pass log-probs to a loss and never hidden states (`prepare_model_outputs` in
workers/engine/fsdp/transformer_impl.py returns `log_probs` and `entropy`). `verl_fused` puts the fused op into the
model's forward, where verl has the hidden states. B = sequences, L = longest response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paced_fast.errors import InputError, pip_install
from paced_fast.integrations.losses import Balance, group_log_z, loss_from_logprobs, one_a_row

try:
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.verl needs verl ({error}): {pip_install('verl')}") from error

_REDUCTIONS = {"seq-mean-token-sum": "sum", "seq-mean-token-mean": "mean"}
_FLOWRL_SCALE = 15.0
_FLOWRL_CAP = 10.0


@register_adv_est("paced_tb")
def group_advantage(
    token_level_rewards: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    index: Any = None,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return raw reward minus the mean of the prompt's group, on every response token; `index` names the groups."""
    if index is None:
        raise InputError("adv_estimator=paced_tb needs the batch's uid, which names the group of each response")
    rewards = token_level_rewards.sum(1)
    advantages = (rewards - group_log_z(rewards, list(index)))[:, None] * response_mask
    return advantages, advantages


@register_policy_loss("paced_tb")
def policy_loss(
    old_log_prob: Tensor,  # [B, L]
    log_prob: Tensor,  # [B, L]
    advantages: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # [B, L]
) -> tuple[Tensor, dict[str, Any]]:
    """mean_i w_i (beta * log ratio_i - advantage_i)^2 / (2 beta), log ratios summed or averaged over the tokens."""
    if loss_agg_mode not in _REDUCTIONS:
        raise InputError(
            f"loss_agg_mode={loss_agg_mode} weights tokens, but trajectory balance has one residual per response: "
            f"use {' or '.join(_REDUCTIONS)}"
        )
    _no_further_terms("paced_tb", config)
    beta = config.policy_loss.get("dro_beta")
    out = loss_from_logprobs(
        log_prob,
        mask=response_mask,
        rewards=one_a_row("advantages", advantages, response_mask, "adv_estimator=paced_tb"),
        log_z=torch.zeros_like(advantages[:, 0]),
        beta=0.05 if beta is None else beta,
        denominator=_denominator(config, response_mask),
        old_logprobs=old_log_prob,
        weights=_weights(response_mask, rollout_is_weights),
        importance_cap=1.0 + config.clip_ratio_high,
        reduction=_REDUCTIONS[loss_agg_mode],
    )
    return out.loss, _metrics(out)


@register_policy_loss("paced_flowrl")
def flowrl_policy_loss(
    old_log_prob: Tensor,  # [B, L]
    log_prob: Tensor,  # [B, L]
    advantages: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # [B, L]
) -> tuple[Tensor, dict[str, Any]]:
    """FlowRL's residual and weights with the old policy as reference, for which the group's log Z is 0."""
    if loss_agg_mode != "seq-mean-token-mean":
        raise InputError(f"loss_agg_mode={loss_agg_mode}: FlowRL averages over tokens: set seq-mean-token-mean")
    _no_further_terms("paced_flowrl", config)
    signal = one_a_row("advantages", advantages, response_mask, "adv_estimator=grpo")
    return _flowrl(
        log_prob, old_log_prob, None, torch.zeros_like(signal), signal, response_mask, rollout_is_weights, config
    )


def flowrl_loss(
    config: Any, model_output: Any, data: Any, dp_group: Any = None, *, group_size: int
) -> tuple[Tensor, dict[str, Any]]:
    """FlowRL with its frozen reference, for the engine worker: `worker.set_loss_fn(partial(flowrl_loss, ...))`.

    `partial` sets `config` (the actor's) and `group_size` (responses per prompt). log Z is estimated per group, so
    every micro-batch must hold whole groups: set `use_dynamic_bsz=False`, `ppo_micro_batch_size_per_gpu` to a multiple
    of `group_size`, and `trainer.balance_batch=False`; a split group is an InputError. `use_kl_loss=True` makes verl
    compute the reference's log-probs; its KL term is not added.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    if "ref_log_prob" not in data:
        raise InputError("flowrl_loss needs ref_log_prob: set actor_rollout_ref.actor.use_kl_loss=True")
    prompts = [tuple(row.tolist()) for row in data["prompts"].unbind()]
    config.global_batch_info["dp_size"] = data["dp_size"]
    config.global_batch_info["global_batch_size"] = data["global_batch_size"]
    names = ["response_mask", "old_log_probs", "ref_log_prob", "advantages"]
    names += ["rollout_is_weights"] if "rollout_is_weights" in data else []
    padded = data.select(*names).to_padded_tensor()
    mask = padded["response_mask"].bool()
    old, ref = padded["old_log_probs"], padded["ref_log_prob"]
    signal = one_a_row("advantages", padded["advantages"], mask, "adv_estimator=grpo")
    drift = ((old - ref) * mask).sum(1) / mask.sum(1).clamp(min=1)
    log_z = group_log_z(_FLOWRL_SCALE * signal - drift, prompts, group_size=group_size)
    return _flowrl(log_prob, old, ref, log_z, signal, mask, padded.get("rollout_is_weights", None), config)


def _flowrl(
    log_prob: Tensor,
    old: Tensor,
    ref: Tensor | None,
    log_z: Tensor,
    signal: Tensor,
    mask: Tensor,
    rollout_is_weights: Tensor | None,
    config: Any,
) -> tuple[Tensor, dict[str, Any]]:
    beta = 1.0 / _FLOWRL_SCALE
    out = loss_from_logprobs(
        log_prob,
        mask=mask,
        rewards=signal,
        log_z=log_z,
        beta=beta,
        denominator=_denominator(config, mask),
        old_logprobs=old,
        ref_logprobs=ref,
        weights=_weights(mask, rollout_is_weights),
        importance_cap=_FLOWRL_CAP,
        reduction="mean",
    )
    return out.loss * (2.0 / beta), _metrics(out)  # FlowRL squares the residual in nats, without the factor 1/2


def _no_further_terms(name: str, config: Any) -> None:
    """Refuse entropy and KL terms, which verl would add to this loss."""
    if config.entropy_coeff or config.use_kl_loss:
        raise InputError(f"loss_mode={name} takes no further loss terms: set use_kl_loss=False and entropy_coeff=0")


def _denominator(config: Any, mask: Tensor) -> float | Tensor:
    """Return the divisor for a mean over the mini-batch: verl averages over `dp_size` ranks and adds micro-batches."""
    info = config.global_batch_info
    total = info.get("global_batch_size")
    if total is None:
        if info.get("dp_size", 1) > 1:
            raise InputError("global_batch_size is required with more than one data-parallel rank")
        return mask.any(1).sum().clamp(min=1)
    return total / info.get("dp_size", 1)


def _weights(mask: Tensor, rollout_is_weights: Tensor | None) -> Tensor:
    has_tokens = mask.any(1).float()
    if rollout_is_weights is None:
        return has_tokens
    return has_tokens * one_a_row(
        "rollout_is_weights", rollout_is_weights, mask, "rollout_correction.rollout_is=sequence"
    )


def _metrics(out: Balance) -> dict[str, Any]:
    kept = (out.weight > 0).float()
    count = kept.sum().clamp(min=1)
    return {
        "actor/tb_residual_rms": ((out.residual.square() * kept).sum() / count).sqrt().item(),
        "actor/ppo_kl": -(out.log_ratio * kept).sum().item() / count.item(),
        "actor/tb_importance_weight": (out.weight.sum() / count).item(),
    }

"""Regression targets of each algorithm: signal and intercept of the policy's loss, and the target of log Z.

P = prompts drawn, G = completions per prompt, B = sequences trained on, replayed ones included, N = prompts in the
table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.config import Config
from paced_fast.data import packing
from paced_fast.data.distributed import ALONE, World
from paced_fast.data.records import Fresh, Rollouts, Targets, UpdateResult
from paced_fast.generation.mismatch import sequence_weights
from paced_fast.paced.log_z import LogZ
from paced_fast.paced.update import minibatches, old_logprobs
from paced_fast.policy import Policy
from paced_kernels import segment_sum


@dataclass(frozen=True, slots=True)
class Regression:
    """Functions from the batch to f32[B], one set per algorithm."""

    signal: Callable[[Config, Rollouts, Fresh], Tensor]
    """Signal of the policy's loss: the reward or the advantage."""
    intercept: Callable[[Config, Rollouts, Fresh, Tensor | None], Tensor]
    """Estimate of the log partition function; the last argument is the value f32[N] of each prompt."""
    head_target: Callable[[Config, Rollouts, Targets, UpdateResult], tuple[Tensor, Tensor | float]]
    """Target of log Z, and a weight per sequence that is multiplied with that of its verdict."""


def make_targets(
    config: Config,
    policy: Policy,
    initial: Policy | None,
    rollouts: Rollouts,
    fresh: Fresh,
    values: Tensor | None,
    world: World = ALONE,
    *,
    step: int,
    generator_is_policy: bool = False,
) -> Targets:
    """Targets of the policy's loss for `rollouts`, whose first sequences are the `fresh` ones, in step number `step`.

    Old log-probs of the first optimiser step's sequences are left to that step, which has them anyway. With
    `generator_is_policy` those of the other fresh ones are the generator's: both agree to rounding, as the first step
    goes on measuring. Only what remains takes a pass, and everything where differences are to be corrected.
    """
    regression, temperature = REGRESSIONS[config.algorithm], config.generation.temperature
    count = fresh.rollouts.num_sequences
    first = next(iter(minibatches(rollouts, config, step=step, epoch=0)), [])
    unscored = frozenset(first)
    trusts = generator_is_policy and config.mismatch.mode == "off"
    taken = frozenset(range(count) if trusts else ()) - unscored
    others = [i for i in range(rollouts.num_sequences) if i not in unscored and i not in taken]
    old = old_logprobs(policy, rollouts, others, temperature, world)
    if taken:
        tokens = packing.token_positions(rollouts, sorted(taken))
        old.index_copy_(0, tokens, rollouts.generator_logprobs[tokens])
    everything = range(rollouts.num_sequences)
    weights = torch.ones_like(rollouts.rewards)
    if config.mismatch.mode != "off":
        sampled, own = fresh.rollouts, old[: fresh.rollouts.num_tokens]
        weights[:count] = sequence_weights(sampled.generator_logprobs, own, sampled.cu_seqlens, config.mismatch)
    return Targets(
        signal=regression.signal(config, rollouts, fresh),
        intercept=regression.intercept(config, rollouts, fresh, values),
        old_logprobs=old,
        ref_logprobs=old if initial is None else old_logprobs(initial, rollouts, everything, temperature, world),
        weights=weights,
        unscored=unscored,
        from_generator=taken,
        num_sampled=count,
    )


def fit_log_z(
    log_z: LogZ,
    config: Config,
    rollouts: Rollouts,
    fresh: Fresh,
    targets: Targets,
    update: UpdateResult,
) -> tuple[Tensor, Tensor]:
    """Train log Z on the correctness of the scored fresh sequences; returns its loss and gradient norm, f32[].

    Replayed ones are correct without exception, and would bias it upwards.
    """
    count = fresh.rollouts.num_sequences
    scored = fresh.scored.float() / fresh.scored.float().mean()
    target, weight = REGRESSIONS[config.algorithm].head_target(config, rollouts, targets, update)
    known = fresh.scored.float().view(-1, config.generation.group_size)
    samples = known.sum(1)
    means = (target[:count].view_as(known) * known).sum(1) / samples.clamp(min=1)
    log_z.observe(fresh.prompt_index, fresh.accuracy * samples, samples, means)
    return log_z.fit(rollouts.prompt_index[:count], target[:count], scored * weight, groups=len(samples))


def reward(config: Config, rollouts: Rollouts, fresh: Fresh) -> Tensor:
    """Raw reward plus shaping."""
    del config, fresh
    return rollouts.rewards + rollouts.shaping


def advantage(config: Config, rollouts: Rollouts, fresh: Fresh) -> Tensor:
    """Reward normalised within its group."""
    return group_advantage(rollouts.rewards + rollouts.shaping, fresh.scored, config.generation.group_size)


def scaled_advantage(config: Config, rollouts: Rollouts, fresh: Fresh) -> Tensor:
    """FlowRL's advantage: the normalised reward times its scale."""
    return config.loss.flowrl_reward_scale * advantage(config, rollouts, fresh)


def value_or_group_mean(config: Config, rollouts: Rollouts, fresh: Fresh, values: Tensor | None) -> Tensor:
    """beta * log Z of the prompt, or its group's accuracy by `loss.intercept`.

    Replayed sequences come without their group, so they use the head's value.
    """
    intercept = no_intercept(config, rollouts, fresh, None) if values is None else values[rollouts.prompt_index].clone()
    if config.loss.intercept == "group_mean":
        means = fresh.accuracy.repeat_interleave(config.generation.group_size)
        intercept[: fresh.rollouts.num_sequences] = means
    return intercept


def no_intercept(config: Config, rollouts: Rollouts, fresh: Fresh, values: Tensor | None) -> Tensor:
    """Zeros, for a loss without an intercept."""
    del config, fresh, values
    return torch.zeros_like(rollouts.rewards)


def reward_less_drift(
    config: Config, rollouts: Rollouts, targets: Targets, update: UpdateResult
) -> tuple[Tensor, float]:
    """The value at which trajectory balance's residual vanishes; with `log_z.loss` bce the reward itself."""
    del targets
    if config.log_z.loss != "tb":
        return rollouts.rewards, 1.0
    return rollouts.rewards - config.loss.beta * update.log_ratio, 1.0


def flowrl_log_z(
    config: Config, rollouts: Rollouts, targets: Targets, update: UpdateResult
) -> tuple[Tensor, Tensor | float]:
    """The log Z at which FlowRL's residual vanishes, weighed as its loss weighs a sequence."""
    del config
    drift = segment_sum(targets.old_logprobs - targets.ref_logprobs, rollouts.cu_seqlens)
    lengths = rollouts.cu_seqlens.diff().clamp(min=1)
    return targets.signal - (drift + update.log_ratio) / lengths, update.weight


def group_accuracy(rewards: Tensor, scored: Tensor, group_size: int) -> Tensor:
    """Mean reward f32[P] of the scored completions (bool[B]) in consecutive groups of `group_size`; 0 without any."""
    return _group_means(rewards.view(-1, group_size), scored.view(-1, group_size))[:, 0]


def group_advantage(rewards: Tensor, scored: Tensor, group_size: int) -> Tensor:
    """GRPO's (reward - group mean) / (group std + 1e-6), f32[B]; arXiv 2402.03300, section 4.1.1.

    Mean and deviation are those of the scored completions, bool[B]; the others get 0.
    """
    groups, known = rewards.view(-1, group_size), scored.view(-1, group_size)
    centred = (groups - _group_means(groups, known)) * known
    degrees = (known.sum(1, keepdim=True) - 1).clamp(min=1)
    deviation = (centred.square().sum(1, keepdim=True) / degrees).sqrt()
    return (centred / (deviation + 1e-6)).flatten()


def _group_means(groups: Tensor, known: Tensor) -> Tensor:
    return (groups * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)


_BALANCE = Regression(reward, value_or_group_mean, reward_less_drift)
REGRESSIONS = {
    "paced": _BALANCE,
    "paced_paper": _BALANCE,
    "tb": _BALANCE,
    "tb_group": _BALANCE,
    "flowrl": Regression(scaled_advantage, value_or_group_mean, flowrl_log_z),
    "grpo": Regression(advantage, no_intercept, reward_less_drift),
}

"""One step's optimiser updates: from rollouts and their intercepts to new parameters.

Every algorithm is a policy loss on packed hidden states; what differs is one function each.
B = sequences, T = packed completion tokens, s = sum of a sequence's log-probs, b = beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from paced_fast.config import Config, OptimizerConfig, stream_seed
from paced_fast.data import packing
from paced_fast.data.records import Rollouts
from paced_fast.data.transfer import pinned, to_device
from paced_fast.distributed import ALONE, World
from paced_fast.policy import Policy
from paced_fast.policy.optimizer import PolicyOptimizer
from paced_kernels import segment_sum, trajectory_balance_from_logprobs, trajectory_balance_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What the policy loss compares the current log-probs with."""

    signal: Tensor  # f32[B]: raw reward (tb family), group-normalised advantage (grpo), scaled advantage (flowrl)
    intercept: Tensor  # f32[B]: beta * log Z (tb family), log Z (flowrl), unused by grpo
    old_logprobs: Tensor  # f32[T], the policy at the start of the step
    ref_logprobs: Tensor  # f32[T], old_logprobs, or the initial policy's for flowrl
    weights: Tensor  # f32[B], constant factor of each sequence: 1, or what corrects for the policy that sampled it


class MicroOutput(NamedTuple):
    """Loss of one micro-batch, and per sequence the log-ratio to the old policy and the weight, detached."""

    loss: Tensor  # f32[]
    log_ratio: Tensor  # f32[b]
    weight: Tensor  # f32[b]


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What happened in `update_policy`; tensors are in the order of the rollouts."""

    loss: Tensor  # f32[], mean over the optimiser steps
    grad_norm: Tensor  # f32[], likewise, before clipping
    log_ratio: Tensor  # f32[B], sum of log pi - log pi_old at the last time the sequence was trained on
    weight: Tensor  # f32[B], importance weight at that time, 0 for a sequence left out
    skipped: Tensor  # i64[], optimiser steps left out for a non-finite loss or gradient
    taken: Tensor  # i64[], optimiser steps made


PolicyLoss = Callable[[Tensor, Policy, Rollouts, Targets, Config, int], MicroOutput]


def trajectory_balance(
    hidden: Tensor, policy: Policy, micro: Rollouts, targets: Targets, config: Config, denominator: int
) -> MicroOutput:
    """mean_i w_i u_i^2 / (2 b), u = value + b (s - s_old) - reward, w = weight min(exp(s - s_old), cap) detached."""
    beta = config.loss.beta
    old = segment_sum(targets.old_logprobs, micro.cu_seqlens)
    # On the host the offsets are the plan of the chunks too; on the device the op would have to project twice.
    host = torch.device("cpu")
    offsets = pinned(packing.cu_seqlens(micro.lengths, host, torch.int64), policy.device)
    terms: dict[str, Any] = {
        "rewards": targets.signal,
        "log_z": targets.intercept / beta,
        "beta": beta,
        "ref_logprobs": targets.ref_logprobs,
        "weights": targets.weights * (beta / 2),  # residual = u / b, so this is u^2 / (2 b)
        "behavior_logprobs": targets.old_logprobs,
        "importance_cap": config.loss.importance_cap,
        "denominator": denominator,
    }
    temperature = config.generation.temperature
    if policy.family.cap is not None:  # bounded logits are not linear in the states, as the fused op has it
        logprobs = policy.token_logprobs(hidden, micro.token_ids, temperature)
        out = trajectory_balance_from_logprobs(logprobs, micro.cu_seqlens, **terms)
    else:
        weight, bias = policy.head
        out = trajectory_balance_loss(
            hidden, weight, micro.token_ids, offsets, bias=bias, temperature=temperature, **terms
        )
    log_ratio = out.seq_logprobs - old
    importance = log_ratio.clamp(max=math.log(config.loss.importance_cap)).exp()
    return MicroOutput(out.loss, log_ratio, targets.weights * importance)


def flowrl(
    hidden: Tensor, policy: Policy, micro: Rollouts, targets: Targets, config: Config, denominator: int
) -> MicroOutput:
    """mean_i w_i (log Z + mean log pi - scale * advantage - mean log pi_ref)^2, w as in `trajectory_balance`.

    arXiv 2509.15207 as its code has it: means inside the residual, a sum inside the weight.
    """
    logprobs = policy.token_logprobs(hidden, micro.token_ids, config.generation.temperature)
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
        weights=importance,
        reduction="mean",
        denominator=denominator,
    )
    return MicroOutput(out.loss, log_ratio, importance)


def grpo(
    hidden: Tensor, policy: Policy, micro: Rollouts, targets: Targets, config: Config, denominator: int
) -> MicroOutput:
    """-mean_i w_i mean_t min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(log pi - log pi_old); arXiv 2402.03300,
    eq. 3 without its KL term."""
    logprobs = policy.token_logprobs(hidden, micro.token_ids, config.generation.temperature)
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
    "tb": trajectory_balance,
    "tb_group": trajectory_balance,
    "flowrl": flowrl,
    "grpo": grpo,
}


def make_optimizer(policy: Policy, config: OptimizerConfig, mesh: DeviceMesh | None = None) -> PolicyOptimizer:
    """AdamW on the policy's parameters, with the settings of the run; `mesh` are the ranks that each hold all."""
    return PolicyOptimizer(
        policy.named_parameters(),
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        mesh=mesh,
    )


def learning_rate(config: OptimizerConfig, num_updates: Tensor) -> Tensor:
    """Learning rate of the next update, after `num_updates` of them: a linear rise over `warmup_steps` steps."""
    per_step = config.minibatches * config.epochs
    warmup = max(config.warmup_steps * per_step, 1)
    return config.learning_rate * ((num_updates + 1).double() / warmup).clamp(max=1.0)


def old_logprobs(policy: Policy, rollouts: Rollouts, temperature: float, world: World = ALONE) -> Tensor:
    """Log-probs f32[T] of the packed tokens under the current parameters; each rank computes those of its part."""
    if world.size == 1 and not policy.lockstep:
        return policy.logprobs(rollouts, temperature)
    result = torch.zeros(rollouts.num_tokens, dtype=torch.float32, device=policy.device)
    for chosen, counts in passes(policy, rollouts, range(rollouts.num_sequences), policy.max_tokens, world):
        part = packing.part(rollouts, chosen)
        values = policy.pass_logprobs(part.rollouts, temperature)
        if counts:
            result.index_copy_(0, part.tokens, values)
    world.sum_(result)  # the others have zeros there
    return result


def passes(
    policy: Policy, rollouts: Rollouts, sequences: Sequence[int], max_tokens: int, world: World
) -> Iterator[tuple[list[int], bool]]:
    """This rank's micro-batches of `sequences`, of at most `max_tokens` tokens, and whether each counts.

    Where ranks must call the model alike (`policy.lockstep`), one that has fewer repeats a sequence that does not.
    """
    dealt = packing.deal(rollouts, sequences, world.size, max_tokens)
    if not policy.lockstep:
        yield from ((chosen, True) for chosen in policy.micro_batches(rollouts, dealt[world.rank], max_tokens))
        return
    batches = [policy.micro_batches(rollouts, part, max_tokens) for part in dealt]
    own = batches[world.rank]
    yield from ((chosen, True) for chosen in own)
    for _ in range(max(map(len, batches)) - len(own)):
        yield list(sequences[:1]), False


def update_policy(
    policy: Policy,
    optimizer: PolicyOptimizer,
    rollouts: Rollouts,
    targets: Targets,
    config: Config,
    *,
    step: int,
    num_updates: int,
    world: World = ALONE,
) -> UpdateResult:
    """Make `epochs * minibatches` optimiser steps; one with a non-finite loss or gradient changes nothing.

    Minibatches keep the sequences of a prompt together, and leave out those without a verdict. Each divides by its own
    number of sequences, whatever the split into micro-batches and over ranks. A step left out does not advance the
    learning-rate schedule. Whether one was left out is decided on the device, alike on every rank, and the host does
    not ask.
    """
    log_ratio = torch.zeros_like(targets.signal)
    weight = torch.zeros_like(targets.signal)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    taken = torch.zeros((), dtype=torch.int64, device=policy.device)
    for epoch in range(config.optimizer.epochs):
        seed = stream_seed(config.seed, step, f"minibatches/{epoch}")
        for sequences in _minibatches(rollouts, config.optimizer.minibatches, seed):
            optimizer.zero_grad()
            loss = torch.zeros((), device=policy.device)
            own = torch.zeros(2, len(log_ratio), device=policy.device)  # log ratios and weights of this rank's part
            mine = list(passes(policy, rollouts, sequences, config.optimizer.micro_batch_tokens, world))
            for k, (chosen, counts) in enumerate(mine, start=1):
                part = packing.part(rollouts, chosen)
                goal = _select(targets, part)
                out = policy.run(partial(_micro_loss, policy, part.rollouts, goal, config, len(sequences)))
                optimizer.before_backward(is_last=k == len(mine))
                (out.loss if counts else out.loss * 0.0).backward()
                if counts:
                    loss += out.loss.detach()
                    own.index_copy_(1, part.sequences, torch.stack([out.log_ratio, out.weight]))
            optimizer.learning_rate.copy_(learning_rate(config.optimizer, num_updates + taken))
            made = optimizer.clip_and_step(loss, config.optimizer.max_grad_norm)
            world.sum_(own)
            index = to_device(sequences, torch.int64, policy.device)
            log_ratio.index_copy_(0, index, own[0, index])
            weight.index_copy_(0, index, own[1, index])
            taken += made.taken
            losses.append(made.loss)
            norms.append(made.grad_norm)
    skipped = len(losses) - taken
    return UpdateResult(torch.stack(losses).mean(), torch.stack(norms).mean(), log_ratio, weight, skipped, taken)


def _micro_loss(policy: Policy, micro: Rollouts, targets: Targets, config: Config, denominator: int) -> MicroOutput:
    """Forward pass and loss, in one call because sharded parameters are gathered around it."""
    return POLICY_LOSSES[config.algorithm](policy.hidden(micro), policy, micro, targets, config, denominator)


def _select(targets: Targets, part: packing.Part) -> Targets:
    return Targets(
        signal=targets.signal[part.sequences],
        intercept=targets.intercept[part.sequences],
        old_logprobs=targets.old_logprobs[part.tokens],
        ref_logprobs=targets.ref_logprobs[part.tokens],
        weights=targets.weights[part.sequences],
    )


def _minibatches(rollouts: Rollouts, count: int, seed: int) -> list[list[int]]:
    """Deal the prompts, in random order, to `count` lists of about as many scored sequences each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(rollouts.prompt_ids):
        if rollouts.scored[i]:
            groups.setdefault(prompt, []).append(i)
    members = list(groups.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    dealt: list[list[int]] = [[] for _ in range(count)]
    for g in order:
        min(dealt, key=len).extend(members[g])
    return [sequences for sequences in dealt if sequences]

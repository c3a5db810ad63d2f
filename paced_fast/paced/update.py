"""Optimiser updates of one step: from rollouts and their targets to new parameters.

Every algorithm is a policy loss on packed hidden states, one function each. B = sequences, T = packed completion
tokens, s = sum of a sequence's log-probs, b = beta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from paced_fast.config import Config, OptimizerConfig, stream_seed
from paced_fast.data import packing
from paced_fast.data.distributed import ALONE, World
from paced_fast.data.records import Rollouts, Targets, UpdateResult
from paced_fast.data.transfer import to_device
from paced_fast.generation.mismatch import sequence_weights
from paced_fast.paced.losses import POLICY_LOSSES, MicroOutput, token_logprobs
from paced_fast.policy import Policy, micro_batches
from paced_fast.policy.optimizer import PolicyOptimizer


def make_optimizer(
    policy: Policy, config: OptimizerConfig, mesh: DeviceMesh | None = None, *, split_gradients: bool = False
) -> PolicyOptimizer:
    """Make AdamW on the policy's parameters with the settings of the run; `mesh` are the ranks that each hold all of
    them, and with `split_gradients` a part of the gradients only."""
    return PolicyOptimizer(
        policy.named_parameters(),
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        mesh=mesh,
        split_gradients=split_gradients,
    )


def learning_rate(config: OptimizerConfig, num_updates: Tensor, *, steps: int) -> Tensor:
    """Learning rate f64[] of the next update, after `num_updates` of them, in a run of `steps` steps: a linear rise
    over `warmup_steps` steps, and with `decay` linear then a linear fall that would reach 0 one update after the last.
    """
    per_step = config.minibatches * config.epochs
    warmup = max(config.warmup_steps * per_step, 1)
    share = ((num_updates + 1).double() / warmup).clamp(max=1.0)
    if config.decay == "linear":
        falling = max(steps * per_step - warmup + 1, 1)
        share = share.minimum((steps * per_step - num_updates).double() / falling).clamp(min=0.0)
    return config.learning_rate * share


def rate_note(config: Config, done: int) -> str:
    """What to say of the learning rate of a run that begins after `done` steps; empty for one that needs no word."""
    settings, steps = config.optimizer, config.steps
    notes = []
    if done < settings.warmup_steps and 2 * settings.warmup_steps > steps:
        reached = settings.learning_rate * min(steps / settings.warmup_steps, 1.0)
        notes.append(
            f"the learning rate reaches {reached:g}: its warm-up takes {settings.warmup_steps} steps, and the run has "
            f"{steps}; --optimizer.warmup-steps shortens it"
        )
    if done and settings.decay == "linear" and done < steps:
        taken = torch.tensor(done * settings.minibatches * settings.epochs)
        now = float(learning_rate(settings, taken, steps=steps))
        notes.append(f"the learning rate is {now:.3g} now and falls to 0 at step {steps}")
    return "; ".join(notes)


def old_logprobs(
    policy: Policy, rollouts: Rollouts, sequences: Sequence[int], temperature: float, world: World = ALONE
) -> Tensor:
    """Log-probs f32[T] of the tokens of `sequences` under the current parameters, 0 elsewhere; each rank computes
    those of its part."""
    result = torch.zeros(rollouts.num_tokens, dtype=torch.float32, device=policy.device)
    if not sequences:
        return result
    for chosen, counts in passes(policy, rollouts, sequences, policy.max_tokens, world):
        part = packing.part(rollouts, chosen)
        values = policy.pass_logprobs(part.rollouts, temperature)
        if counts:
            result.index_copy_(0, part.tokens, values)
    world.sum_(result)  # zeros from the other ranks
    return result


def passes(
    policy: Policy, rollouts: Rollouts, sequences: Sequence[int], max_tokens: int, world: World
) -> Iterator[tuple[list[int], bool]]:
    """This rank's micro-batches of `sequences`, of at most `max_tokens` tokens, and whether each counts.

    Where all ranks must call the model equally often (`policy.lockstep`), a rank with fewer micro-batches repeats a
    sequence that does not count.
    """
    dealt = micro_batches.deal(rollouts, sequences, world.size, max_tokens)
    if not policy.lockstep:
        yield from ((chosen, True) for chosen in policy.micro_batches(rollouts, dealt[world.rank], max_tokens))
        return
    batches = [policy.micro_batches(rollouts, part, max_tokens) for part in dealt]
    own = batches[world.rank]
    yield from ((chosen, True) for chosen in own)
    for _ in range(max(map(len, batches)) - len(own)):
        yield list(sequences[:1]), False


def _most_passes(policy: Policy, rollouts: Rollouts, sequences: Sequence[int], config: Config, world: World) -> int:
    """Backward passes of the rank that makes most of them."""
    tokens = config.optimizer.micro_batch_tokens
    dealt = micro_batches.deal(rollouts, sequences, world.size, tokens)
    return max(len(policy.micro_batches(rollouts, part, tokens)) for part in dealt)


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

    Minibatches keep the sequences of a prompt together, and leave out those without a verdict. Each is averaged over
    its own number of sequences, independent of the split into micro-batches and over ranks. A skipped step does not
    advance the learning-rate schedule; skipping is decided on the device, identically on every rank, without waiting
    for the host.

    Before the first optimiser step the policy is the old one, so the old log-probs of its sequences, where `targets`
    leaves them unscored, come from its own states; they and the weights that depend on them are written into `targets`.
    """
    log_ratio = torch.zeros_like(targets.signal)
    weight = torch.zeros_like(targets.signal)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    taken = torch.zeros((), dtype=torch.int64, device=policy.device)
    for epoch in range(config.optimizer.epochs):
        for sequences in minibatches(rollouts, config, step=step, epoch=epoch):
            found = torch.zeros_like(targets.old_logprobs) if targets.unscored and not losses else None
            optimizer.zero_grad()
            loss = torch.zeros((), device=policy.device)
            own = torch.zeros(2, len(log_ratio), device=policy.device)  # log ratios and weights of this rank's part
            mine = list(passes(policy, rollouts, sequences, config.optimizer.micro_batch_tokens, world))
            for k, (chosen, counts) in enumerate(mine, start=1):
                part = packing.part(rollouts, chosen)
                goal = _select(targets, part)
                compute = partial(_micro_loss, policy, part.rollouts, goal, config, len(sequences))
                out, old = policy.run(
                    partial(compute, sampled=part.sequences < targets.num_sampled, scores=found is not None)
                )
                optimizer.before_backward(is_last=k == len(mine))
                (out.loss if counts else out.loss * 0.0).backward()
                if counts:
                    loss += out.loss.detach()
                    own.index_copy_(1, part.sequences, torch.stack([out.log_ratio, out.weight]))
                    if found is not None and old is not None:
                        found.index_copy_(0, part.tokens, old)
            if optimizer.split_gradients:
                for _ in range(_most_passes(policy, rollouts, sequences, config, world) - len(mine)):
                    optimizer.skip_backward()
            optimizer.learning_rate.copy_(learning_rate(config.optimizer, num_updates + taken, steps=config.steps))
            made = optimizer.clip_and_step(loss, config.optimizer.max_grad_norm)
            world.sum_(own)
            if found is not None:
                world.sum_(found)
                _fill_in(targets, rollouts, found, sequences, config)
            index = to_device(sequences, torch.int64, policy.device)
            log_ratio.index_copy_(0, index, own[0, index])
            weight.index_copy_(0, index, own[1, index])
            taken += made.taken
            losses.append(made.loss)
            norms.append(made.grad_norm)
    skipped = len(losses) - taken
    return UpdateResult(torch.stack(losses).mean(), torch.stack(norms).mean(), log_ratio, weight, skipped, taken)


def _micro_loss(
    policy: Policy,
    micro: Rollouts,
    targets: Targets,
    config: Config,
    denominator: int,
    *,
    sampled: Tensor,
    scores: bool,
) -> tuple[MicroOutput, Tensor | None]:
    """Forward pass and loss, in one call because sharded parameters are gathered around it.

    With `scores` the policy is the old one: its log-probs of these states are the old ones, returned too, and give the
    weights of the sequences that were `sampled` (bool[b]) in this step. The loss takes them over with their gradient.
    """
    hidden, known, old = policy.hidden(micro), None, None
    if scores:
        known = token_logprobs(hidden, policy, micro, config)
        old = known.detach()
        targets = dataclasses.replace(
            targets,
            old_logprobs=old,
            ref_logprobs=targets.ref_logprobs if config.traits.keeps_initial_policy else old,
            weights=torch.where(sampled, _mismatch_weights(micro, old, config), targets.weights),
        )
    return POLICY_LOSSES[config.algorithm](hidden, policy, micro, targets, config, denominator, known), old


def _mismatch_weights(rollouts: Rollouts, old: Tensor, config: Config) -> Tensor:
    return sequence_weights(rollouts.generator_logprobs, old, rollouts.cu_seqlens, config.mismatch)


def _fill_in(targets: Targets, rollouts: Rollouts, found: Tensor, sequences: Sequence[int], config: Config) -> None:
    """Write old log-probs `found` f32[T] of the first minibatch, and the weights that follow, into `targets`."""
    part = packing.part(rollouts, sequences)
    old = found[part.tokens]
    targets.old_logprobs.index_copy_(0, part.tokens, old)
    if not config.traits.keeps_initial_policy:
        targets.ref_logprobs.index_copy_(0, part.tokens, old)
    sampled = part.sequences < targets.num_sampled
    corrected = torch.where(sampled, _mismatch_weights(part.rollouts, old, config), targets.weights[part.sequences])
    targets.weights.index_copy_(0, part.sequences, corrected)


def _select(targets: Targets, part: packing.Part) -> Targets:
    return Targets(
        signal=targets.signal[part.sequences],
        intercept=targets.intercept[part.sequences],
        old_logprobs=targets.old_logprobs[part.tokens],
        ref_logprobs=targets.ref_logprobs[part.tokens],
        weights=targets.weights[part.sequences],
    )


def minibatches(rollouts: Rollouts, config: Config, *, step: int, epoch: int) -> list[list[int]]:
    """The sequences of each optimiser step of an epoch; those without a verdict are in none."""
    seed = stream_seed(config.seed, step, f"minibatches/{epoch}")
    return _minibatches(rollouts, config.optimizer.minibatches, seed)


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

"""One step of PACED-RL (arXiv 2602.12642).

    draw prompts -> sample, reward, pack -> old log-probs -> update policy -> fit log Z -> observe, insert

Between packing and the end of the step everything is a tensor on the policy's device, and the host never waits for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from paced_fast.config import Config, stream_seed
from paced_fast.config.paced import RULES
from paced_fast.data import packing
from paced_fast.data.distributed import ALONE, World
from paced_fast.data.records import Fresh, Group, Rollouts, StepResult
from paced_fast.data.transfer import to_host
from paced_fast.errors import TrainingError
from paced_fast.paced.collect import Collector
from paced_fast.paced.log_z import LogZ
from paced_fast.paced.replay import ReplayBuffer
from paced_fast.paced.scheduler import PromptScheduler
from paced_fast.paced.targets import fit_log_z, make_targets
from paced_fast.paced.update import make_optimizer, update_policy
from paced_fast.policy import Policy
from paced_fast.policy.sharding import replicas_mesh


class Trainer:
    """Components of the method, and the training step."""

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        initial: Policy | None,
        collector: Collector,
        embeddings: Tensor | None,
        world: World = ALONE,
        split_gradients: bool = False,
    ) -> None:
        """`initial` is the policy before training, for algorithms that keep it as their reference; `embeddings`
        f32[N, H] are the prompts' embeddings, for algorithms that learn log Z. `split_gradients`: a rank keeps its part
        of replicated parameters' gradients only.
        """
        self.config, self.policy, self.initial, self.world = config, policy, initial, world
        self.collector, self.phase = collector, collector.phase
        num_prompts, device = len(collector.table), policy.device
        mesh = None if policy.lockstep else replicas_mesh(world, device)  # sharded parameters know theirs
        self.optimizer = make_optimizer(policy, config.optimizer, mesh, split_gradients=split_gradients)
        self.now = torch.zeros((), dtype=torch.int64, device=device)  # the step, for everything on the device
        self.scheduler = PromptScheduler(num_prompts, config.scheduler, seed=config.seed, device=device)
        self.log_z: LogZ | None = None
        if config.uses_head:
            assert embeddings is not None
            head_seed = stream_seed(config.seed, 0, "log Z")
            self.log_z = LogZ(embeddings, config.log_z, seed=head_seed, bounded=config.value_is_accuracy)
        self.replay: ReplayBuffer | None = None
        if config.replay.mode == "on":
            self.replay = ReplayBuffer(
                config.replay,
                max_completion_tokens=config.generation.max_completion_tokens,
                seed=config.seed,
                device=device,
            )

    def step(self, step: int, num_updates: int, collected: Callable[[], None] = lambda: None) -> StepResult:
        """Train step number `step`, counted from 1; `num_updates` optimiser steps were made before it.

        `collected` is called after the batch is complete and before the update. Raises TrainingError, or the InputError
        of a reward function, with all state unchanged, if no batch can be formed.
        """
        config = self.config
        self.now.fill_(step)
        with self._undone_by_errors():
            with self.phase("head"):
                values = self._values()
            fresh, replayed = self._collect(step, values)
            collected()
        rollouts = fresh.rollouts if replayed is None else packing.concat(fresh.rollouts, replayed)
        with self.phase("head"):
            self._rescore(rollouts.prompt_index)
        with self.phase("old_logprobs"):
            targets = make_targets(
                config,
                self.policy,
                self.initial,
                rollouts,
                fresh,
                values,
                self.world,
                step=step,
                generator_is_policy=self.collector.samples_exactly(self.policy.model),
            )
        with self.phase("update"):
            update = update_policy(
                self.policy,
                self.optimizer,
                rollouts,
                targets,
                config,
                step=step,
                num_updates=num_updates,
                world=self.world,
            )
        with self.phase("head"):
            head = fit_log_z(self.log_z, config, rollouts, fresh, targets, update) if self.log_z is not None else None
        with self.phase("schedule"):
            scored = fresh.scored.view(-1, config.generation.group_size).sum(1)
            self.scheduler.observe(fresh.prompt_index, fresh.accuracy, scored)
        with self.phase("replay"):
            if self.replay is not None and values is not None:
                accuracy = fresh.accuracy.repeat_interleave(config.generation.group_size)
                self.replay.insert(fresh.rollouts, values, accuracy)
        return StepResult(
            fresh=fresh,
            rollouts=rollouts,
            replayed=replayed,
            targets=targets,
            update=update,
            learning_rate=self.optimizer.learning_rate,
            visits=self.scheduler.visits,
            values=values,
            head=head,
        )

    @contextlib.contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        """Context of the part before the update: an error puts back what a draw changes and the next one depends on."""
        changed = [self.scheduler.epoch_draws] if self.config.scheduler.max_visits else []
        if self.log_z is not None and self.log_z.is_windowed:  # else the next draw computes them all anew
            changed += [self.log_z.values, self.log_z.cursor]
        before = [tensor.clone() for tensor in changed]
        try:
            yield
        except BaseException:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(old)
            raise

    def _values(self) -> Tensor | None:
        """beta * log Z of every prompt, f32[N], broadcast so that choices that depend on them are bit-equal on all
        ranks."""
        if self.log_z is None:
            return None
        values = self.log_z.score()
        self.world.broadcast_(values)
        return values

    def _rescore(self, prompt_index: Tensor) -> None:
        """Recompute the values of prompts i64[K] with the current head where the table's may be of an older one."""
        if self.log_z is not None and self.log_z.is_windowed:
            self.log_z.rescore(prompt_index)
            self.world.broadcast_(self.log_z.values)

    def _collect(self, step: int, values: Tensor | None) -> tuple[Fresh, Rollouts | None]:
        """Draw prompts and sample their groups; a rule may take mixed ones only and draw until the batch is full."""
        size, mixed_only = self.config.generation.prompts_per_step, RULES[self.config.scheduler.rule].mixed_groups_only
        kept: list[Group] = []
        dropped: list[Group] = []
        replayed = None
        for round_ in range(self.config.scheduler.max_resamples if mixed_only else 1):
            drawn, chosen = self._draw(step, values, round_)
            replayed = replayed if chosen is None else chosen
            for group in self.collector.groups(drawn, step, round_):
                (kept if group.is_mixed or not mixed_only else dropped).append(group)
            if len(kept) >= size:
                break
        sampled = kept + dropped
        return self.collector.pack(sampled[:size], sampled[size:], step), replayed

    def _draw(self, step: int, values: Tensor | None, round_: int) -> tuple[list[int], Rollouts | None]:
        """Draw the prompts of a round, and in the first round the replayed completions; both reach the host in one
        copy."""
        wanted: dict[str, Tensor] = {}
        if round_ == 0 and self.replay is not None and values is not None:
            with self.phase("replay"):
                wanted["slots"], wanted["lengths"], wanted["prompts"] = self.replay.choose(len(values), self.now)
        with self.phase("schedule"):
            size = self.config.generation.prompts_per_step
            wanted["drawn"] = self.scheduler.draw(size, self.now, values, round_, self._rescore)
            host = to_host(wanted)
        if min(host["drawn"]) < 0:
            raise TrainingError(
                f"step {step} has too few prompts to draw from, because the values of the others are NaN: "
                "lower --log-z.learning-rate, or check the rewards"
            )
        if self.replay is None or "slots" not in host:
            return host["drawn"], None
        with self.phase("replay"):
            return host["drawn"], self.replay.take(
                host["slots"], host["lengths"], host["prompts"], self.collector.table
            )

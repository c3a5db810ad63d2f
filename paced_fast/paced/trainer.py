"""One training step, and everything it touches.

    draw prompts -> generate -> reward -> pack -> old log-probs -> update policy -> fit log Z -> observe, insert

Between packing and metrics all of it is tensors on the policy's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paced_fast.config import Config, stream_seed
from paced_fast.data import packing, prompts
from paced_fast.data.records import (
    Completion,
    Group,
    PromptRow,
    PromptTable,
    Rollouts,
    score_sampled,
    without_unknown_ids,
)
from paced_fast.data.transfer import clock_of, to_device, to_host
from paced_fast.distributed import ALONE, World
from paced_fast.errors import TrainingError
from paced_fast.generation import Generator
from paced_fast.generation.mismatch import sequence_weights
from paced_fast.generation.parity import ParityGuard
from paced_fast.paced.log_z import LogZ, group_accuracy, group_advantage
from paced_fast.paced.replay import ReplayBuffer, importance_weights
from paced_fast.paced.scheduler import PromptScheduler
from paced_fast.paced.update import Targets, UpdateResult, make_optimizer, old_logprobs, update_policy
from paced_fast.policy import Policy
from paced_fast.policy.sharding import replicas_mesh
from paced_fast.rewards import Scorer, Shaper
from paced_fast.rewards.shaping import centred
from paced_fast.run.checkpoint import below, load_optimizer_tensors, optimizer_tensors, prefixed
from paced_fast.run.plan import memory
from paced_fast.run.record import writer
from paced_fast.run.record.guards import Guards
from paced_fast.run.record.rollouts_file import GroupSource
from paced_fast.run.record.step_record import Fresh, StepResult, fetch, shown_rollouts, step_record, value_record
from paced_fast.sharing import Scores, gather_scores, summed_counts, together
from paced_kernels import segment_sum


@dataclass(slots=True)
class Counters:
    """What a run has done so far; part of every checkpoint."""

    step: int = 0
    rollouts: int = 0
    train_seconds: float = 0.0
    num_updates: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0


class Trainer:
    """The parts of a run and the step that moves them. `initial` is the policy as it was before training."""

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        initial: Policy | None,
        generator: Generator,
        scorer: Scorer,
        shaper: Shaper,
        decode: prompts.Decoder,
        table: PromptTable,
        embeddings: Tensor | None,
        guard: ParityGuard | None = None,
        world: World = ALONE,
    ) -> None:
        """`initial` is needed by `flowrl` only, `embeddings` f32[N, H] by algorithms that learn log Z, `guard` by an
        engine. With several ranks `generator` gives all of them the whole batch (`sharing.SharedGenerator`).
        """
        self.guard, self.world = guard, world
        self.recorded: GroupSource | None = None  # gives the groups of a step, where nothing is to be sampled
        self.config, self.policy, self.initial = config, policy, initial
        self.generator, self.scorer, self.shaper = generator, scorer, shaper
        self.decode, self.table = decode, table
        self.vocabulary = min(prompts.num_ids(decode.tokenizer), policy.head[0].shape[0])
        mesh = None if policy.lockstep else replicas_mesh(world, policy.device)  # sharded parameters know theirs
        self.optimizer = make_optimizer(policy, config.optimizer, mesh)
        self.counters, self.guards = Counters(), Guards(config.guard, speaks=world.is_lead)
        device = policy.device
        self.phases = writer.Phases(*clock_of(device), memory.probe(device))
        self.now = torch.zeros((), dtype=torch.int64, device=device)  # the step, for everything on the device
        self.scheduler = PromptScheduler(len(table), config.scheduler, seed=config.seed, device=device)
        self.log_z: LogZ | None = None
        if config.uses_head:
            assert embeddings is not None
            head_seed = stream_seed(config.seed, 0, "log Z")
            self.log_z = LogZ(embeddings, config.log_z, seed=head_seed, bounded=config.value_is_accuracy)
        self.replay: ReplayBuffer | None = None
        if config.replay.mode == "on":
            self.replay = ReplayBuffer(
                config.replay,
                group_size=config.generation.group_size,
                max_completion_tokens=config.generation.max_completion_tokens,
                seed=config.seed,
                device=device,
            )

    def step(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Do one step; its metrics record and a few rollouts to show.

        Raises TrainingError after `max_consecutive_skips` steps without a finite loss and gradient.
        """
        self.counters.step += 1
        self.now.fill_(self.counters.step)
        self.phases.take()
        with self.phases.phase("head"):
            values = self.log_z.score() if self.log_z is not None else None
            if values is not None:
                self.world.lead_(values)  # every choice that hangs on them is then alike, to the bit
        try:
            fresh, replayed = self._sample(values)
        except TrainingError:
            self.counters.step -= 1  # nothing was trained on, so there was no step
            raise
        self.sampled = fresh.groups, fresh.dropped  # for who keeps them
        checked = self.guard is not None and self.guard.due(self.counters.step)
        if self.guard is not None and checked:
            with self.phases.phase("parity"):
                together(self.world, self.guard.prime)
        with self.phases.phase("sync"):
            self.generator.before_training()
        result = self._learn(fresh, replayed, values)
        with self.phases.phase("metrics"):
            replay = self.replay if values is not None and self.config.value_is_accuracy else None
            host = fetch(result, replay, mismatch_cap=self.config.mismatch.cap)
        self._count(result.fresh, host)
        with self.phases.phase("sync"):
            sync = self.generator.after_update()
        parity: dict[str, float] = {}
        if self.guard is not None and checked:
            with self.phases.phase("parity"):
                parity = self.check_parity()
        seconds = self.phases.take()
        total = sum(seconds.values())
        counters = self.counters
        counters.train_seconds += total
        record: dict[str, Any] = {
            "step": counters.step,
            "rollouts": counters.rollouts,
            "train_seconds": counters.train_seconds,
            **step_record(result, host),
            "skipped_steps": counters.skipped_steps,
            "verdicts": summed_counts(self.world, self.scorer.take_counts()),
            "seconds": seconds,
            "memory": self.phases.peak_bytes,
            "tokens_per_second": fresh.num_tokens / total,
        }
        if self.config.value_is_accuracy and values is not None:
            record |= value_record(result, host, counters.step)
        record |= {name: figures for name, figures in (("weight_sync", sync), ("parity", parity)) if figures}
        record["warnings"] = self.guards.check(record)
        values_shown = host.get("values_fresh") if self.config.value_is_accuracy else None
        return record, shown_rollouts(
            result,
            host,
            values_shown,
            self.table,
            step=counters.step,
            limit=self.config.run.rollouts_per_step,
            decode=self.decode,
        )

    def check_parity(self) -> dict[str, float]:
        """Figures of the agreement between this rank's engine and the trainer; empty without an engine of its own."""
        guard = self.guard
        if guard is None:
            return {}
        asked = together(self.world, lambda: guard.ask(self.counters.step))
        return together(self.world, lambda: guard.judge(self.counters.step, *asked))

    def _learn(self, fresh: Fresh, replayed: Rollouts | None, values: Tensor | None) -> StepResult:
        """From what was sampled to new parameters, a new head, and statistics for the next draw; never waits."""
        counters = self.counters
        rollouts = fresh.rollouts if replayed is None else packing.concat(fresh.rollouts, replayed)
        if self.log_z is not None:
            with self.phases.phase("head"):
                self.log_z.rescore(rollouts.prompt_index)
                self.world.lead_(self.log_z.values)
        with self.phases.phase("old_logprobs"):
            targets = self._targets(rollouts, fresh, values)
        with self.phases.phase("update"):
            update = update_policy(
                self.policy,
                self.optimizer,
                rollouts,
                targets,
                self.config,
                step=counters.step,
                num_updates=counters.num_updates,
                world=self.world,
            )
        with self.phases.phase("head"):
            head = self._fit_head(rollouts, fresh, targets, update)
        with self.phases.phase("schedule"):
            known = fresh.scored.view(-1, self.config.generation.group_size).any(1)
            self.scheduler.observe(fresh.prompt_index, fresh.accuracy, self.now, known)
        with self.phases.phase("replay"):
            if self.replay is not None and values is not None:
                accuracy = fresh.accuracy.repeat_interleave(self.config.generation.group_size)
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

    def _sample(self, values: Tensor | None) -> tuple[Fresh, Rollouts | None]:
        """Draw prompts and sample their groups; `dynamic` goes on until the batch holds mixed groups only.

        With the first prompts the choice of what is replayed comes to the host.
        """
        config, step = self.config.generation, self.counters.step
        dynamic = self.config.scheduler.rule == "dynamic"
        rounds = self.config.scheduler.max_resamples if dynamic else 1
        kept: list[Group] = []
        dropped: list[Group] = []
        replayed = None
        for round_ in range(rounds):
            wanted: dict[str, Tensor] = {}
            if round_ == 0 and self.replay is not None and values is not None:
                with self.phases.phase("replay"):
                    wanted["slots"], wanted["lengths"], wanted["prompts"] = self.replay.choose(values, self.now)
            with self.phases.phase("schedule"):
                wanted["drawn"] = self.scheduler.draw(config.prompts_per_step, self.now, values, round_)
                host = to_host(wanted)
            if min(host["drawn"]) < 0:
                raise TrainingError(
                    f"the schedule of step {step} has too few prompts to draw from: the values of the others are not "
                    "numbers; lower --log-z.learning-rate, or look at the rewards"
                )
            if self.replay is not None and "slots" in host:
                with self.phases.phase("replay"):
                    replayed = self.replay.take(host["slots"], host["lengths"], host["prompts"], self.table)
            seed, own = stream_seed(self.config.seed, step, f"generate/{round_}"), self.recorded
            for group in self._groups(host["drawn"], seed) if own is None else own.groups(step, round_):
                (kept if group.is_mixed or not dynamic else dropped).append(group)
            if len(kept) >= config.prompts_per_step:
                break
        sampled = kept + dropped
        with self.phases.phase("pack"):
            return self._pack(sampled[: config.prompts_per_step], sampled[config.prompts_per_step :]), replayed

    def _pack(self, groups: list[Group], dropped: list[Group]) -> Fresh:
        size, device = self.config.generation.group_size, self.policy.device
        index = [group.prompt_index for group in groups]
        each = [i for i in index for _ in range(size)]
        completions = [completion for group in groups for completion in group.completions]
        rewards = [reward for group in groups for reward in group.rewards]
        if all(reward is None for reward in rewards):
            raise TrainingError(f"no completion of step {self.counters.step} has a verdict: look at the warnings above")
        shaping = [x for g in groups if g.shaping for x in centred(g.shaping, [r is not None for r in g.rewards])]
        prompt_ids = [self.table.rows[i].token_ids for i in each]
        rollouts = packing.pack(completions, prompt_ids, each, rewards, self.counters.step, device, shaping)
        scored = to_device(list(rollouts.scored), torch.bool, device)
        return Fresh(
            rollouts=rollouts,
            groups=groups,
            dropped=dropped,
            prompt_index=to_device(index, torch.int64, device),
            accuracy=group_accuracy(rollouts.rewards, scored, size),
            scored=scored,
        )

    def _groups(self, prompt_index: Sequence[int], seed: int) -> list[Group]:
        """Sample and score a group for each prompt."""
        config, size = self.config.generation, self.config.generation.group_size
        rows = self.table.select(prompt_index)
        with self.phases.phase("generate"):
            completions = self.generator.generate(
                [row.token_ids for row in rows],
                group_size=size,
                max_completion_tokens=config.max_completion_tokens,
                temperature=config.temperature,
                seed=seed,
            )
            completions = without_unknown_ids(completions, self.vocabulary)
        with self.phases.phase("reward"):
            part = self.world.share(len(completions))
            own = slice(part.start, part.stop)
            each = [row for row in rows for _ in range(size)]
            rewards, shaping = together(self.world, lambda: self._judge(each[own], completions[own]))
            rewards = gather_scores(self.world, rewards)
            shaping = [x or 0.0 for x in gather_scores(self.world, [*shaping])]
        cuts = [slice(k * size, (k + 1) * size) for k in range(len(rows))]
        return [
            Group(i, completions[cut], rewards[cut], shaping[cut]) for i, cut in zip(prompt_index, cuts, strict=True)
        ]

    def _judge(self, rows: Sequence[PromptRow], completions: Sequence[Completion]) -> tuple[Scores, list[float]]:
        """Rewards of this rank's part, and what shaping adds to each, empty without any."""
        texts = [self.decode(completion.token_ids) for completion in completions]
        rewards = score_sampled(self.scorer.score, rows, texts, completions)
        self.scorer.check_failures()
        limit = self.config.generation.max_completion_tokens
        return rewards, self.shaper.shape(rows, texts, completions, limit) if self.shaper else []

    def _targets(self, rollouts: Rollouts, fresh: Fresh, values: Tensor | None) -> Targets:
        config = self.config
        temperature, count = config.generation.temperature, fresh.rollouts.num_sequences
        old = ref = old_logprobs(self.policy, rollouts, temperature, self.world)
        weights = torch.ones_like(rollouts.rewards)
        if config.mismatch.mode != "off":
            sampled, own = fresh.rollouts, old[: fresh.rollouts.num_tokens]
            weights[:count] = sequence_weights(sampled.generator_logprobs, own, sampled.cu_seqlens, config.mismatch)
        if config.algorithm == "flowrl":
            assert self.initial is not None
            assert values is not None
            advantage = group_advantage(rollouts.rewards + rollouts.shaping, fresh.scored, config.generation.group_size)
            signal, intercept = config.loss.flowrl_reward_scale * advantage, values[rollouts.prompt_index]
            ref = old_logprobs(self.initial, rollouts, temperature, self.world)
        elif config.algorithm == "grpo":
            signal = group_advantage(rollouts.rewards + rollouts.shaping, fresh.scored, config.generation.group_size)
            intercept = torch.zeros_like(signal)
        else:
            signal = rollouts.rewards + rollouts.shaping
            intercept = torch.zeros_like(signal) if values is None else values[rollouts.prompt_index].clone()
            if config.loss.intercept == "group_mean":
                # Replayed sequences come without their group, so for them the head's value stands in.
                intercept[:count] = fresh.accuracy.repeat_interleave(config.generation.group_size)
            if config.replay.importance and rollouts.num_sequences > count:
                replayed = packing.part(rollouts, range(count, rollouts.num_sequences))
                weights[count:] = importance_weights(replayed.rollouts, old[replayed.tokens])
        return Targets(signal=signal, intercept=intercept, old_logprobs=old, ref_logprobs=ref, weights=weights)

    def _fit_head(
        self, rollouts: Rollouts, fresh: Fresh, targets: Targets, update: UpdateResult
    ) -> tuple[Tensor, Tensor] | None:
        """Train log Z on the correctness of the fresh sequences that have a verdict.

        Replayed successes would bias it upwards. With `trains_log_z` it learns from all, the replayed ones by their
        importance.
        """
        if self.log_z is None:
            return None
        log_ratio, count = update.log_ratio, fresh.rollouts.num_sequences
        scored = fresh.scored.float() / fresh.scored.float().mean()
        if self.config.algorithm == "flowrl":
            drift = segment_sum(targets.old_logprobs - targets.ref_logprobs, rollouts.cu_seqlens)
            lengths = rollouts.cu_seqlens.diff().clamp(min=1)
            target = targets.signal - (drift + log_ratio) / lengths
            return self.log_z.fit(rollouts.prompt_index, target, update.weight * scored)
        target = rollouts.rewards
        if self.config.log_z.loss == "tb":
            target = target - self.config.loss.beta * log_ratio
        if self.config.replay.trains_log_z:
            weights = targets.weights.clone()
            weights[:count] = scored
            return self.log_z.fit(rollouts.prompt_index, target, weights)
        return self.log_z.fit(rollouts.prompt_index[:count], target[:count], scored)

    def _count(self, fresh: Fresh, host: dict[str, Any]) -> None:
        counters = self.counters
        counters.rollouts += fresh.num_sampled
        counters.num_updates += host["taken"]
        counters.skipped_steps += host["skipped"]
        counters.consecutive_skips = 0 if host["taken"] else counters.consecutive_skips + 1
        if counters.consecutive_skips >= self.config.optimizer.max_consecutive_skips:
            raise TrainingError(
                f"non-finite loss or gradient in {counters.consecutive_skips} steps in a row, up to step "
                f"{counters.step} (loss {host['loss']}, gradient norm {host['grad_norm']}): no parameter was changed "
                "by them; lower --optimizer.learning-rate, or look at the rewards"
            )

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs."""
        tensors = self.spread_tensors() | prefixed("scheduler", self.scheduler.state_dict())
        tensors |= prefixed("guards", self.guards.state_dict())
        if self.log_z is not None:
            tensors |= prefixed("log_z.head", self.log_z.state_dict())
            tensors |= prefixed("log_z.optimizer", optimizer_tensors(self.log_z.optimizer))
        if self.replay is not None:
            tensors |= prefixed("replay", self.replay.state_dict())
        return tensors

    def spread_tensors(self) -> dict[str, Tensor]:
        """Those that may be spread over ranks; filled in place when a run is resumed."""
        return self.optimizer.named_state()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_tensors()`, those of `spread_tensors` being filled already."""
        self.optimizer.publish()
        self.scheduler.load_state_dict(below("scheduler", tensors))
        self.guards.load_state_dict(below("guards", tensors))
        if self.log_z is not None:
            self.log_z.load_state_dict(below("log_z.head", tensors))
            load_optimizer_tensors(self.log_z.optimizer, below("log_z.optimizer", tensors))
        if self.replay is not None:
            self.replay.load_state_dict(below("replay", tensors))

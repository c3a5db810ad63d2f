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
from transformers import PreTrainedTokenizerBase

from paced_fast import metrics, pack, prompts
from paced_fast.batch import Completion, PromptTable, Rollouts
from paced_fast.checkpoint import below, load_optimizer_tensors, optimizer_tensors, prefixed
from paced_fast.config import Config, stream_seed
from paced_fast.errors import TrainingError
from paced_fast.generate import Generator
from paced_fast.log_z import LogZ, group_accuracy, group_advantage
from paced_fast.parity import ParityGuard
from paced_fast.policy import Policy
from paced_fast.replay import ReplayBuffer
from paced_fast.rewards import Scorer
from paced_fast.scheduler import PromptScheduler
from paced_fast.update import Targets, UpdateResult, make_optimizer, update_policy
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


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt, as text and with their rewards."""

    prompt_index: int
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]


@dataclass(frozen=True, slots=True)
class Fresh:
    """The groups sampled in this step. P groups of G, B = P * G."""

    rollouts: Rollouts
    completions: list[Completion]
    texts: list[str]
    prompt_index: Tensor  # i64[P]
    accuracy: Tensor  # f32[P]
    sampled_accuracy: Tensor  # f32[Q], of all groups sampled, dropped ones included
    num_sampled: int  # completions sampled, dropped groups included
    num_tokens: int  # tokens sampled, dropped groups included


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
        tokenizer: PreTrainedTokenizerBase,
        table: PromptTable,
        embeddings: Tensor | None,
        guard: ParityGuard | None = None,
    ) -> None:
        """`initial` is needed by `flowrl` only, `embeddings` f32[N, H] by algorithms that learn log Z.

        `guard` checks a generator that has its own engine.
        """
        self.guard = guard
        self.config, self.policy, self.initial = config, policy, initial
        self.generator, self.scorer, self.tokenizer, self.table = generator, scorer, tokenizer, table
        self.optimizer = make_optimizer(policy, config.optimizer)
        self.counters = Counters()
        self.phases = metrics.Phases()
        device = policy.device
        self.scheduler = PromptScheduler(len(table), config.scheduler, seed=config.seed, device=device)
        self.log_z: LogZ | None = None
        if config.uses_head:
            assert embeddings is not None
            head_seed = stream_seed(config.seed, 0, "log Z")
            self.log_z = LogZ(embeddings, config.log_z, seed=head_seed, bounded=config.value_is_accuracy)
        self.replay: ReplayBuffer | None = None
        if config.replay.mode == "on":
            limit = config.generation.max_completion_tokens
            self.replay = ReplayBuffer(config.replay, max_completion_tokens=limit, seed=config.seed, device=device)

    def step(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Do one step; its metrics record and a few rollouts to show.

        Raises TrainingError after `max_consecutive_skips` steps without a finite loss and gradient.
        """
        counters = self.counters
        counters.step += 1
        self.phases.take()
        with self.phases.phase("schedule"):
            values = self.log_z.all_values() if self.log_z is not None else None
        replayed = None
        chosen: list[list[int]] = []
        with self.phases.phase("replay"):
            if self.replay is not None and values is not None:
                chosen = self.replay.choose(values, counters.step).tolist()  # to the host with the prompts
        try:
            fresh = self._sample(values)
        except TrainingError:
            counters.step -= 1  # nothing was sampled, so there was no step
            raise
        checked = self.guard is not None and self.guard.due(counters.step)
        if self.guard is not None and checked:
            with self.phases.phase("parity"):
                self.guard.prime()
        with self.phases.phase("sync"):
            self.generator.before_training()
        with self.phases.phase("replay"):
            if self.replay is not None and values is not None:
                replayed = self.replay.take(chosen, self.table)
        rollouts = fresh.rollouts if replayed is None else pack.concat(fresh.rollouts, replayed)
        with self.phases.phase("old_logprobs"):
            targets = self._targets(rollouts, fresh, values)
        with self.phases.phase("update"):
            result = update_policy(
                self.policy,
                self.optimizer,
                rollouts,
                targets,
                self.config,
                step=counters.step,
                num_updates=counters.num_updates,
            )
        with self.phases.phase("sync"):
            sync = self.generator.after_update()
        parity: dict[str, float] = {}
        if self.guard is not None and checked:
            with self.phases.phase("parity"):
                parity = self.guard.check(counters.step)
        with self.phases.phase("head"):
            head_loss = self._fit_head(fresh, targets, result)
        with self.phases.phase("schedule"):
            self.scheduler.observe(fresh.prompt_index, fresh.accuracy)
        with self.phases.phase("replay"):
            if self.replay is not None and values is not None:
                accuracy = fresh.accuracy.repeat_interleave(self.config.generation.group_size)
                priority = (accuracy - values[fresh.rollouts.prompt_index]).abs()
                self.replay.insert(fresh.rollouts, priority, accuracy)
        self._count(fresh, result)
        record = self._record(fresh, rollouts, targets, result, values, head_loss)
        record |= {name: figures for name, figures in (("weight_sync", sync), ("parity", parity)) if figures}
        return record, self._shown(fresh, replayed, values)

    def _sample(self, values: Tensor | None) -> Fresh:
        """Draw prompts and sample their groups; `dynamic` goes on until the batch holds mixed groups only."""
        config, step = self.config.generation, self.counters.step
        dynamic = self.config.scheduler.rule == "dynamic"
        rounds = self.config.scheduler.max_resamples if dynamic else 1
        kept: list[Group] = []
        dropped: list[Group] = []
        for round_ in range(rounds):
            with self.phases.phase("schedule"):
                index = self.scheduler.draw(config.prompts_per_step, step, values, round_).tolist()
            for group in self._groups(index, stream_seed(self.config.seed, step, f"generate/{round_}")):
                mixed = min(group.rewards) < max(group.rewards)
                (kept if mixed or not dynamic else dropped).append(group)
            if len(kept) >= config.prompts_per_step:
                break
        sampled = kept + dropped
        batch = (kept + dropped)[: config.prompts_per_step]
        index = [group.prompt_index for group in batch]
        each = [i for i in index for _ in range(config.group_size)]
        completions = [completion for group in batch for completion in group.completions]
        group_rewards = [reward for group in batch for reward in group.rewards]
        device = self.policy.device
        prompt_ids = [self.table.rows[i].token_ids for i in each]
        rollouts = pack.pack(completions, prompt_ids, each, group_rewards, step, device)
        return Fresh(
            rollouts=rollouts,
            completions=completions,
            texts=[text for group in batch for text in group.texts],
            prompt_index=torch.tensor(index, device=device),
            accuracy=group_accuracy(rollouts.rewards, config.group_size),
            sampled_accuracy=torch.tensor([sum(group.rewards) / config.group_size for group in sampled]),
            num_sampled=len(sampled) * config.group_size,
            num_tokens=sum(len(completion.token_ids) for group in sampled for completion in group.completions),
        )

    def _groups(self, prompt_index: Sequence[int], seed: int) -> list[Group]:
        """Sample and score a group for each prompt."""
        config = self.config.generation
        size = config.group_size
        rows = self.table.select(prompt_index)
        with self.phases.phase("generate"):
            completions = self.generator.generate(
                [row.token_ids for row in rows],
                group_size=size,
                max_completion_tokens=config.max_completion_tokens,
                temperature=config.temperature,
                seed=seed,
            )
        with self.phases.phase("reward"):
            texts = [prompts.decode(self.tokenizer, completion.token_ids) for completion in completions]
            scores = self.scorer.score([row for row in rows for _ in range(size)], texts)
        cuts = [slice(k * size, (k + 1) * size) for k in range(len(rows))]
        return [Group(i, completions[cut], texts[cut], scores[cut]) for i, cut in zip(prompt_index, cuts, strict=True)]

    def _targets(self, rollouts: Rollouts, fresh: Fresh, values: Tensor | None) -> Targets:
        config = self.config
        temperature = config.generation.temperature
        old = self.policy.logprobs(rollouts, temperature)
        if config.algorithm == "flowrl":
            assert self.initial is not None
            assert values is not None
            advantage = group_advantage(rollouts.rewards, config.generation.group_size)
            return Targets(
                signal=config.loss.flowrl_reward_scale * advantage,
                intercept=values[rollouts.prompt_index],
                old_logprobs=old,
                ref_logprobs=self.initial.logprobs(rollouts, temperature),
            )
        if config.algorithm == "grpo":
            signal = group_advantage(rollouts.rewards, config.generation.group_size)
            return Targets(signal=signal, intercept=torch.zeros_like(signal), old_logprobs=old, ref_logprobs=old)
        intercept = torch.zeros_like(rollouts.rewards) if values is None else values[rollouts.prompt_index].clone()
        if config.loss.intercept == "group_mean":
            # Replayed sequences come without their group, so for them the head's value stands in.
            mean = fresh.accuracy.repeat_interleave(config.generation.group_size)
            intercept[: fresh.rollouts.num_sequences] = mean
        return Targets(signal=rollouts.rewards, intercept=intercept, old_logprobs=old, ref_logprobs=old)

    def _fit_head(self, fresh: Fresh, targets: Targets, result: UpdateResult) -> tuple[float, float] | None:
        """Train log Z on the fresh groups only: replayed successes would bias it upwards."""
        if self.log_z is None:
            return None
        count = fresh.rollouts.num_sequences
        log_ratio = result.log_ratio[:count]
        if self.config.algorithm == "flowrl":
            drift = segment_sum(targets.old_logprobs - targets.ref_logprobs, fresh.rollouts.cu_seqlens)
            lengths = fresh.rollouts.cu_seqlens.diff().clamp(min=1)
            target = targets.signal - (drift + log_ratio) / lengths
            return self.log_z.fit(fresh.rollouts.prompt_index, target, result.weight)
        target = fresh.rollouts.rewards
        if self.config.log_z.loss == "tb":
            target = target - self.config.loss.beta * log_ratio
        return self.log_z.fit(fresh.rollouts.prompt_index, target)

    def _count(self, fresh: Fresh, result: UpdateResult) -> None:
        counters = self.counters
        counters.rollouts += fresh.num_sampled
        counters.num_updates += result.taken
        counters.skipped_steps += result.skipped
        counters.consecutive_skips = 0 if result.taken else counters.consecutive_skips + 1
        if counters.consecutive_skips >= self.config.optimizer.max_consecutive_skips:
            raise TrainingError(
                f"non-finite loss or gradient in {counters.consecutive_skips} steps in a row, up to step "
                f"{counters.step} (loss {result.loss}, gradient norm {result.grad_norm}): no parameter was changed by "
                "them; lower --optimizer.learning-rate, or look at the rewards"
            )

    def _record(
        self,
        fresh: Fresh,
        rollouts: Rollouts,
        targets: Targets,
        result: UpdateResult,
        values: Tensor | None,
        head_loss: tuple[float, float] | None,
    ) -> dict[str, Any]:
        counters, count = self.counters, fresh.rollouts.num_tokens
        mismatch = (targets.old_logprobs[:count] - fresh.rollouts.generator_logprobs).abs()
        log_ratio = result.log_ratio[: fresh.rollouts.num_sequences]
        seconds = self.phases.take()
        total = sum(seconds.values())
        counters.train_seconds += total
        weight = result.weight
        record: dict[str, Any] = {
            "step": counters.step,
            "rollouts": counters.rollouts,
            "train_seconds": counters.train_seconds,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "reward_mean": float(fresh.rollouts.rewards.mean()),
            "mixed_group_share": metrics.mixed_group_share(fresh.sampled_accuracy),
            "trained_sequences": rollouts.num_sequences,
            "prompts_visited_share": float((self.scheduler.visits > 0).float().mean()),
            "entropy": -float(fresh.rollouts.generator_logprobs.mean()),
            "mean_length": count / max(1, fresh.rollouts.num_sequences),
            "truncated_share": sum(not c.stopped for c in fresh.completions) / len(fresh.completions),
            "log_ratio_mean": float(log_ratio.mean()),
            "kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
            "effective_sample_share": float(weight.sum().square() / weight.square().sum() / len(weight)),
            "generator_mismatch_mean": float(mismatch.mean()) if count else 0.0,
            "generator_mismatch_max": float(mismatch.max()) if count else 0.0,
            "skipped_steps": counters.skipped_steps,
            "seconds": seconds,
            "tokens_per_second": fresh.num_tokens / total,
        }
        if head_loss is not None:
            record["head_loss"], record["head_grad_norm"] = head_loss
        if self.config.value_is_accuracy and values is not None:
            record.update(self._value_record(fresh, values))
        return record

    def _value_record(self, fresh: Fresh, values: Tensor) -> dict[str, Any]:
        """How well the value foretold this step's groups, before either was trained on the other."""
        predicted, accuracy = values[fresh.prompt_index].tolist(), fresh.accuracy.tolist()
        record: dict[str, Any] = {
            "value_mean": float(values.mean()),
            "value_brier": metrics.brier_score(predicted, accuracy),
            "value_ece": metrics.expected_calibration_error(predicted, accuracy),
            "value_rank_correlation": metrics.rank_correlation(predicted, accuracy),
            "value_fresh": predicted,
            "accuracy_fresh": accuracy,
            "value_histogram": torch.histc(values.float().cpu(), bins=20, min=0.0, max=1.0).tolist(),
        }
        if self.replay is not None:
            filled = self.replay.policy_version >= 0
            age = self.counters.step - self.replay.policy_version[filled]
            record["replay_size"] = int(filled.sum())
            record["replay_age_mean"] = float(age.float().mean()) if len(age) else None
            record["replay_priorities"] = self.replay.priorities(values)[filled].tolist()
        return record

    def _shown(self, fresh: Fresh, replayed: Rollouts | None, values: Tensor | None) -> list[dict[str, Any]]:
        """A few rollouts of the step, spread over its groups, and one replayed when there is one."""
        limit, count = self.config.run.rollouts_per_step, fresh.rollouts.num_sequences
        number = min(limit, count)
        chosen = [(k * count) // number for k in range(number)]
        shown = [
            (int(fresh.rollouts.prompt_index[i]), fresh.texts[i], float(fresh.rollouts.rewards[i]), False)
            for i in chosen
        ]
        if replayed is not None and limit > 0:
            ids = replayed.token_ids[: replayed.lengths[0]].tolist()
            text = prompts.decode(self.tokenizer, ids)
            shown.append((int(replayed.prompt_index[0]), text, float(replayed.rewards[0]), True))
        return [
            {
                "step": self.counters.step,
                "prompt": self.table.rows[i].prompt,
                "completion": text,
                "reward": reward,
                "value": float(values[i]) if values is not None and self.config.value_is_accuracy else None,
                "slice": self.table.rows[i].slice,
                "replayed": is_replayed,
            }
            for i, text, reward, is_replayed in shown
        ]

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, the policy's parameters apart."""
        tensors = prefixed("optimizer", optimizer_tensors(self.optimizer))
        tensors |= prefixed("scheduler", self.scheduler.state_dict())
        if self.log_z is not None:
            tensors |= prefixed("log_z.mlp", self.log_z.mlp.state_dict())
            tensors |= prefixed("log_z.optimizer", optimizer_tensors(self.log_z.optimizer))
        if self.replay is not None:
            tensors |= prefixed("replay", self.replay.state_dict())
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_tensors()`."""
        load_optimizer_tensors(self.optimizer, below("optimizer", tensors))
        self.scheduler.load_state_dict(below("scheduler", tensors))
        if self.log_z is not None:
            self.log_z.mlp.load_state_dict(below("log_z.mlp", tensors))
            load_optimizer_tensors(self.log_z.optimizer, below("log_z.optimizer", tensors))
        if self.replay is not None:
            self.replay.load_state_dict(below("replay", tensors))

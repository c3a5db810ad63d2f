"""One step of a run: the method's step, with counters, engine sleep and wake-up, parity checks and the step's
record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from paced_fast.data.records import StepResult
from paced_fast.data.step_record import ABSENT, StepRecord
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation.parity import ParityGuard
from paced_fast.paced.trainer import Trainer
from paced_fast.rewards.over_ranks import summed_counts
from paced_fast.run import checkpoint
from paced_fast.run.checkpoint import state
from paced_fast.run.record.guards import Guards
from paced_fast.run.record.phases import Phases
from paced_fast.run.record.shown_rollouts import shown_rollouts
from paced_fast.run.record.step_figures import fetch, step_record


@dataclass(slots=True)
class Counters:
    """Counters of a run; part of every checkpoint."""

    step: int = 0
    rollouts: int = 0
    train_seconds: float = 0.0
    num_updates: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0


class Stepped(NamedTuple):
    """Result of a step of a run."""

    record: StepRecord  # its line of metrics.jsonl
    shown: list[dict[str, Any]]  # a few rollouts to read
    result: StepResult


class Stepper:
    """Runs the steps one after the other, and counts them."""

    def __init__(self, trainer: Trainer, phases: Phases, parity: ParityGuard | None = None) -> None:
        """`phases` is the clock whose `phase` the trainer enters; `parity` checks an engine."""
        self.trainer, self.phases, self.parity = trainer, phases, parity
        self.config, self.world = trainer.config, trainer.world
        self.counters = Counters()
        has_groups = trainer.config.generation.group_size > 1
        self.guards = Guards(trainer.config.guard, speaks=trainer.world.is_rank0, has_groups=has_groups)

    def step(self) -> Stepped:
        """Run the next step.

        Raises TrainingError if no batch can be formed, and after `max_consecutive_skips` steps without a finite loss
        and gradient; InputError for what is wrong with a reward function. When no batch could be formed, the state is
        that after the step before, to the bit, and may be saved.
        """
        counters, generator = self.counters, self.trainer.collector.generator
        counters.step += 1
        is_checked = self.parity is not None and self.parity.due(counters.step)
        self.phases.take()
        ambient = checkpoint.random_state()  # a reward function may draw from these generators
        try:
            result = self.trainer.step(counters.step, counters.num_updates, lambda: self._before_training(is_checked))
        except (TrainingError, InputError):
            counters.step -= 1  # nothing was trained, so the step does not count
            checkpoint.restore_random_state(ambient)
            raise
        with self.phases.phase("metrics"):  # the host waits here, before an engine wakes
            with_replay = result.values is not None and self.config.value_is_accuracy
            replay = self.trainer.replay if with_replay else None
            host = fetch(result, replay, mismatch_cap=self.config.mismatch.cap)
        self._count(result, host)
        with self.phases.phase("sync"):
            sync = generator.after_update()
        parity: dict[str, float] = {}
        if is_checked:
            with self.phases.phase("parity"):
                parity = self.check_parity()
        return Stepped(self._record(result, host, sync, parity), self._shown(result, host), result)

    def check_parity(self) -> dict[str, float]:
        """Check that this rank's engine agrees with the trainer; returns the figures, empty without an engine."""
        guard = self.parity
        if guard is None:
            return {}
        with self.world.agreement():
            asked = guard.ask(self.counters.step)
        with self.world.agreement():
            figures = guard.judge(self.counters.step, *asked)
        return figures

    def state_tensors(self) -> dict[str, Tensor]:
        """All state tensors of the run."""
        return state.state_tensors(self.trainer, self.guards)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore `state_tensors()`, after those that may be spread over ranks were filled in place."""
        state.load_state_tensors(self.trainer, self.guards, tensors)

    def _before_training(self, is_checked: bool) -> None:
        if self.parity is not None and is_checked:
            with self.phases.phase("parity"), self.world.agreement():
                self.parity.prime()
        with self.phases.phase("sync"):
            self.trainer.collector.generator.before_training()

    def _count(self, result: StepResult, host: dict[str, Any]) -> None:
        counters = self.counters
        counters.rollouts += result.fresh.num_sampled
        counters.num_updates += host["taken"]
        counters.skipped_steps += host["skipped"]
        counters.consecutive_skips = 0 if host["taken"] else counters.consecutive_skips + 1
        if counters.consecutive_skips >= self.config.optimizer.max_consecutive_skips:
            raise TrainingError(
                f"non-finite loss or gradient in {counters.consecutive_skips} consecutive steps, up to step "
                f"{counters.step} "
                f"(loss {host['loss']}, gradient norm {host['grad_norm']}), which changed no parameter: "
                "lower --optimizer.learning-rate, or check the rewards"
            )

    def _record(
        self, result: StepResult, host: dict[str, Any], sync: dict[str, float], parity: dict[str, float]
    ) -> StepRecord:
        seconds, counters = self.phases.take(), self.counters
        counters.train_seconds += sum(seconds.values())
        record = step_record(
            result,
            host,
            step=counters.step,
            rollouts=counters.rollouts,
            train_seconds=counters.train_seconds,
            skipped_steps=counters.skipped_steps,
            seconds=seconds,
            memory=self.phases.peak_bytes,
            verdicts=summed_counts(self.world, self.trainer.collector.scorer.take_counts()),
            with_value=self.config.value_is_accuracy,
        )
        return dataclasses.replace(
            record, weight_sync=sync or ABSENT, parity=parity or ABSENT, warnings=self.guards.check(record)
        )

    def _shown(self, result: StepResult, host: dict[str, Any]) -> list[dict[str, Any]]:
        return shown_rollouts(
            result,
            host,
            host.get("values_fresh") if self.config.value_is_accuracy else None,
            self.trainer.collector.table,
            step=self.counters.step,
            limit=self.config.run.rollouts_per_step,
            decode=self.trainer.collector.decode,
        )

"""One run of the comparison: train an arm until its budgets are used up, and measure it on the way."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.training.efficiency import arms, checks, oracle, suites, value, warm
from benchmarks.training.efficiency.files import SWEEP_SEEDS, Job
from paced_fast.errors import TrainingError
from paced_fast.evaluation.held_out import Evaluation
from paced_fast.run.start.build import PreparedRun, build


def train(job: Job, *, cache: Path, seconds: float) -> dict[str, Any]:
    """Train one arm until the rollout budget and `seconds` of training are used up; return its figures.

    A run that fails has the field `failed`, and what was measured before. A run of the sweep is measured before and
    after training only, as a rate is chosen by nothing else. `cache` holds the initial policies.
    """
    suite = suites.find(job.suite)
    settings = arms.arm_config(suite, job.arm, rate=job.rate, seed=job.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = warm.from_folder(settings, warm.initial_policy(suite, job.seed, cache))
        run = build(dataclasses.replace(config, run_dir=f"{folder}/run"), Console(quiet=True))
        started = {
            "settings": arms.changed_settings(suite, settings),
            "policy": warm.policy_digest(run.trainer.policy.model),
            "held_out": run.identity["held-out prompts"],
            "table": run.identity["training prompts"],
            "clock": "wall" if _clock(run) is time.perf_counter else "processor",
        }
        course = Course(run, suite, by_oracle=arms.ARMS[job.arm].by_oracle, is_sweep=job.seed in SWEEP_SEEDS)
        try:
            course.train(seconds)
        except TrainingError as error:
            started["failed"] = str(error)
        return {**started, **course.figures()}


class Course:
    """The course of one run: points of its curve, and the figures at its budgets."""

    def __init__(
        self, run: PreparedRun, suite: suites.Suite, *, by_oracle: bool = False, is_sweep: bool = False
    ) -> None:
        """Measure the policy before training; with `by_oracle` the whole table too."""
        self.run, self.suite, self.is_sweep = run, suite, is_sweep
        self.clock, self.seconds = _clock(run), 0.0
        self.watch = checks.StateWatch(run.trainer)
        self.oracle = oracle.install(run, suite.oracle_samples) if by_oracle else None
        self.tokens, self.values = 0, None
        self.mixed: list[float] = []
        self.drawn: list[float] = []  # measured accuracies of groups, after the warm-up of the schedule
        self.value: dict[str, Any] = {"held_out": {}, "table": {}}
        self.is_past_middle = False
        self.at_budget: dict[str, Any] | None = None
        self.at_seconds: dict[str, Any] | None = None
        self.points = [self._point("start", run.config.evaluation.final_samples, at="start")]

    def train(self, seconds: float) -> None:
        """Train until the rollout budget and `seconds` are used up. Raises TrainingError when a step cannot be made."""
        counters, config, budget = self.run.stepper.counters, self.run.config, self.suite.rollouts
        interval = self.suite.eval_every * config.rollouts_per_step
        final = config.evaluation.final_samples
        while counters.rollouts < budget or self.seconds < seconds:
            self._step()
            if self.at_budget is None and counters.rollouts >= budget:
                self.at_budget = self._point("budget", final, at="end")
                self.points.append(self.at_budget)
            elif not self.is_sweep and counters.rollouts >= self.points[-1]["rollouts"] + interval:
                at = "middle" if not self.is_past_middle and 2 * counters.rollouts >= budget else None
                self.is_past_middle = self.is_past_middle or at is not None
                name = f"{counters.rollouts // interval} intervals"
                self.points.append(self._point(name, config.evaluation.samples, at=at))
            if seconds and self.at_seconds is None and self.seconds >= seconds:
                last = self.points[-1]
                is_there = last["rollouts"] == counters.rollouts and last["samples"] == final
                self.at_seconds = last if is_there else self._point("seconds", final)

    def figures(self) -> dict[str, Any]:
        """Return everything for the run's file."""
        warnings = [
            *checks.estimate_ranks(self.value["table"].get("end")),
            *checks.draws_near_tau(self.run, self.drawn),
            *checks.tables_apart(self.run),
            *self.watch.warnings(),
        ]
        counters = self.run.stepper.counters
        return {
            "curve": self.points,
            "at_budget": self.at_budget,
            "at_seconds": self.at_seconds,
            "value": self.value,
            "mixed_group_share": statistics.fmean(self.mixed) if self.mixed else None,
            "drawn_accuracy": statistics.fmean(self.drawn) if self.drawn else None,
            "steps": counters.step,
            "skipped_steps": counters.skipped_steps,
            "warnings": warnings,
        }

    def _step(self) -> None:
        stepper, config = self.run.stepper, self.run.config.scheduler
        if self.oracle is not None and stepper.counters.step and stepper.counters.step % self.suite.oracle_every == 0:
            with self.watch:
                self.oracle.measure()
        started = self.clock()
        stepped = stepper.step()
        self.seconds += self.clock() - started
        fresh, self.values = stepped.result.fresh, stepped.result.values
        self.tokens += fresh.num_tokens
        if stepper.counters.step > config.warmup_steps:
            self.mixed.append(stepped.record.mixed_group_share)
            groups = (*fresh.groups, *fresh.dropped)
            self.drawn += [group.accuracy for group in groups if group.accuracy is not None]

    def _point(self, draw: str, samples: int, *, at: str | None = None) -> dict[str, Any]:
        """Evaluate on the held-out prompts; `at` names a moment at which the value is measured as well."""
        run, counters = self.run, self.run.stepper.counters
        with self.watch:
            evaluation = value.sampled(run, run.eval_table, samples, draw)
            if at is not None and not self.is_sweep:
                self._measure_value(evaluation, at)
        overall = evaluation.overall
        return {
            "rollouts": counters.rollouts,
            "tokens": self.tokens,
            "train_seconds": self.seconds,
            "samples": samples,
            "accuracy": overall.accuracy,
            "pass_at_8": overall.pass_at_8,
            "distinct_correct": overall.distinct_correct,
            "slices": {name: figures.accuracy for name, figures in evaluation.slices.items()},
        }

    def _measure_value(self, evaluation: Evaluation, at: str) -> None:
        suite = self.suite
        held_out = value.on_held_out(self.run, evaluation)
        if held_out is not None:
            self.value["held_out"][at] = held_out
        if at in suite.table_at:
            draw, count = f"table/{at}", suite.table_prompts
            table = value.on_table(self.run, self.values, prompts=count, samples=suite.table_samples, draw=draw)
            if table is not None:
                self.value["table"][at] = table


def _clock(run: PreparedRun) -> Callable[[], float]:
    """Clock of the training time, in seconds: on a CPU that of the processor, because other work on the machine would
    count otherwise."""
    return time.process_time if run.trainer.policy.device.type == "cpu" else time.perf_counter

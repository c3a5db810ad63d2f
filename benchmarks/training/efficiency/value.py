"""How well a schedule's estimate of the accuracy agrees with the measured accuracy, prompt by prompt.

N = prompts in the training table, M = prompts of the sample on which it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paced_fast.config import stream_seed
from paced_fast.data.records import PromptTable
from paced_fast.evaluation import calibration
from paced_fast.evaluation.held_out import Evaluation, evaluate
from paced_fast.generation import Sampling
from paced_fast.run.start.build import PreparedRun

BAND = (0.06, 0.94)
"""Measured accuracies of the prompts that can be learned from; of 16 samples 1 to 15 are right."""


def sampled(run: PreparedRun, table: PromptTable, samples: int, draw: str) -> Evaluation:
    """Evaluate the policy on `table`; the random numbers depend on the run's seed and the name `draw` alone, so that
    every arm of a seed has the same."""
    config = run.config
    held_out = table is run.eval_table
    return evaluate(
        run.collector.generator,
        table,
        score=run.collector.scorer.score,
        take_counts=run.collector.scorer.take_counts,
        decode=run.collector.decode,
        sampling=Sampling(
            samples=samples,
            max_completion_tokens=config.evaluation.max_completion_tokens or config.generation.max_completion_tokens,
            temperature=config.evaluation.temperature if held_out else config.generation.temperature,
            top_p=config.evaluation.top_p if held_out else 1.0,
            seed=stream_seed(config.seed, 0, f"benchmark/{draw}"),
        ),
        headline=config.data.headline if held_out else (),
        vocabulary=run.collector.vocabulary,
    )


def sample_of_table(num_prompts: int, count: int) -> list[int]:
    """Positions of the `count` training prompts, at most, on which values are measured: the same in every run."""
    source = torch.Generator().manual_seed(stream_seed(0, num_prompts, "benchmark table"))
    return sorted(torch.randperm(num_prompts, generator=source)[:count].tolist())


def estimates(run: PreparedRun, used: Tensor | None) -> Tensor | None:
    """Accuracies f32[N] that the schedule believes; None for one without an estimate. `used` are the values of the last
    step, as the schedule read them."""
    trainer = run.trainer
    if trainer.log_z is not None:
        if not run.config.value_is_accuracy:
            return None
        return trainer.log_z.all_values() if used is None else used
    if trainer.scheduler.posterior is not None:
        return trainer.scheduler.posterior.mean
    return trainer.scheduler.last_accuracy if run.config.scheduler.rule == "history" else None


def errors(values: Sequence[float], accuracies: Sequence[float | None]) -> dict[str, Any]:
    """Brier score, calibration error and rank correlation on the prompts that have a verdict, and on those in the
    band."""
    kept = [(value, accuracy) for value, accuracy in zip(values, accuracies, strict=True) if accuracy is not None]
    v, a = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    inside = (a >= BAND[0]) & (a <= BAND[1])
    return {name: _figures(v[where], a[where]) for name, where in (("whole", a == a), ("band", inside))}


def _figures(values: np.ndarray, accuracies: np.ndarray) -> dict[str, Any]:
    return {
        "prompts": int(values.size),
        "brier": calibration.brier_score(values, accuracies),
        "ece": calibration.expected_calibration_error(values, accuracies),
        "rank": calibration.rank_correlation(values, accuracies),
    }


def on_held_out(run: PreparedRun, evaluation: Evaluation) -> dict[str, Any] | None:
    """Errors of the value on the held-out prompts, which it was never trained on; None without a value for them."""
    log_z = run.trainer.log_z
    if log_z is None or not run.config.value_is_accuracy or run.eval_embeddings is None:
        return None
    return errors(log_z.value_of(run.eval_embeddings).tolist(), evaluation.prompt_accuracy)


def on_table(run: PreparedRun, used: Tensor | None, *, prompts: int, samples: int, draw: str) -> dict[str, Any] | None:
    """Errors of the estimate on the fixed sample of the training table; None for a schedule without an estimate."""
    believed = estimates(run, used)
    if believed is None:
        return None
    table = run.collector.table
    index = sample_of_table(len(table), prompts)
    measured = sampled(run, PromptTable(rows=tuple(table.select(index))), samples, draw).prompt_accuracy
    return errors(believed[index].tolist(), measured)

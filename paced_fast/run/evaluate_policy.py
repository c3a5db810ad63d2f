"""Evaluations of the policy while it trains."""

from __future__ import annotations

from typing import Any

from paced_fast.config import stream_seed
from paced_fast.evaluation import calibration
from paced_fast.evaluation.held_out import Evaluation, evaluate
from paced_fast.generation import Sampling
from paced_fast.rewards.over_ranks import shared_judge, summed_counts
from paced_fast.run.start.build import PreparedRun


def evaluate_now(run: PreparedRun, samples: int) -> Evaluation | None:
    """Evaluate the current policy on the held-out prompts; None without held-out prompts or when rollouts are
    replayed."""
    config = run.config
    if not run.eval_table.rows or run.collector.recorded is not None:
        return None
    sampling = Sampling(
        samples=samples,
        max_completion_tokens=config.evaluation.max_completion_tokens or config.generation.max_completion_tokens,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        seed=stream_seed(config.seed, run.stepper.counters.step, "evaluate"),
    )
    with run.stepper.phases.phase("evaluate"):
        return evaluate(
            run.collector.generator,
            run.eval_table,
            score=shared_judge(run.world, run.collector.scorer.score),
            take_counts=lambda: summed_counts(run.world, run.collector.scorer.take_counts()),
            decode=run.collector.decode,
            sampling=sampling,
            headline=config.data.headline,
            vocabulary=run.collector.vocabulary,
        )


def evaluation_due(run: PreparedRun, step: int) -> dict[str, Any]:
    """Evaluation fields of a step's record; after the last step also the error of the value's forecast.

    The head was never trained on these prompts.
    """
    settings = run.config.evaluation
    if step != run.config.steps:
        if not settings.every or step % settings.every:
            return {}
        evaluation = evaluate_now(run, settings.samples)
        return {"eval": None if evaluation is None else evaluation.record()}
    evaluation = evaluate_now(run, settings.final_samples)
    if evaluation is None:
        return {}
    value = value_on_held_out(run, evaluation)
    return {"eval": evaluation.record()} | ({} if value is None else {"eval_value": value})


def value_on_held_out(run: PreparedRun, evaluation: Evaluation) -> dict[str, Any] | None:
    """Forecast of the accuracies of `evaluation` by the value, with its errors; None if the value is not an
    accuracy."""
    if run.trainer.log_z is None or not run.config.value_is_accuracy or run.eval_embeddings is None:
        return None
    predicted = zip(run.trainer.log_z.value_of(run.eval_embeddings).tolist(), evaluation.prompt_accuracy, strict=True)
    scored = [(value, accuracy) for value, accuracy in predicted if accuracy is not None]
    values, accuracy = [value for value, _ in scored], [accuracy for _, accuracy in scored]
    return {
        "brier": calibration.brier_score(values, accuracy),
        "ece": calibration.expected_calibration_error(values, accuracy),
        "rank_correlation": calibration.rank_correlation(values, accuracy),
        "values": values,
        "accuracies": accuracy,
    }

"""The summary of a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paced_fast.config import Config
from paced_fast.evaluation.forgetting import fallen_slices
from paced_fast.run.record.files import write_json_atomic

logger = logging.getLogger(__name__)

_COMPARED = (
    *("accuracy", "accuracy_interval", "pass_at_8", "pass_at_k", "pass_at_k_interval", "maj_at_k"),
    *("distinct_correct", "truncated_share", "tokens_mean", "unscored"),
)
"""Figures of the evaluations before and after training that the summary sets side by side."""


def write_summary(folder: Path, config: Config) -> dict[str, Any]:
    """Write and return the summary of a finished run; empty if metrics.jsonl or summary.json cannot be used."""
    try:
        summary = summarise(folder, config)
        write_json_atomic(folder / "summary.json", summary)
        return summary
    except (OSError, ValueError, LookupError) as error:
        logger.warning("summary.json was not written (%r): the checkpoints are complete", error)
        return {}


def past_evaluations(folder: Path, last_step: int) -> list[Mapping[str, Any]]:
    """Evaluations with an accuracy up to `last_step` in a run's metrics, in order; a broken line is left out."""
    found: list[Mapping[str, Any]] = []
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        if '"eval"' in line:
            with contextlib.suppress(ValueError, LookupError, TypeError):
                record = json.loads(line)
                if record["step"] <= last_step and isinstance(record["eval"]["accuracy"], float):
                    found.append(record["eval"])
    return found


def summarise(folder: Path, config: Config) -> dict[str, Any]:
    """Content of summary.json, from the metrics of a finished run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"] > 0]
    evaluations = [record["eval"] for record in records if record.get("eval")]
    before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    last = records[-1]
    value = last.get("eval_value") or {}
    shares = [record["mixed_group_share"] for record in steps if record["step"] > config.scheduler.warmup_steps]
    return {
        "preset": config.preset,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "steps": last["step"],
        "rollouts": last.get("rollouts", 0),
        "train_seconds": last.get("train_seconds", 0.0),
        **{f"{name}_before": before.get(name) for name in _COMPARED},
        **{f"{name}_after": after.get(name) for name in _COMPARED},
        "forgetting": [dataclasses.asdict(fall) for fall in fallen_slices(before, after)] if before else [],
        "value_brier": value.get("brier"),
        "value_ece": value.get("ece"),
        "value_rank_correlation": value.get("rank_correlation"),
        "mixed_group_share": sum(shares) / len(shares) if shares else None,
        "skipped_steps": last.get("skipped_steps", 0),
        "warnings": dict(Counter(name for record in steps for name in record.get("warnings", ()))),
        "curve": [
            {"rollouts": r["rollouts"], "train_seconds": r["train_seconds"], "accuracy": r["eval"]["accuracy"]}
            for r in records
            if r.get("eval")
        ],
        "run_dir": str(folder),
    }

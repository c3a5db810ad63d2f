"""Learning curves of a suite as a picture: at most six arms, each with a colour and a dash of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training.efficiency import statistics
from benchmarks.training.efficiency.arms import ARMS
from paced_fast.report.charts import renderer
from paced_fast.report.charts.chart import NUMBER, PERCENT, TIME, Axis, Chart, Line

SHOWN = ("grpo", "groups_of_4", "selection", "mopps", "pcl", "paced_paper")
"""Arms with a curve, where they were run; others follow while there is room."""
DASHES: tuple[tuple[int, ...], ...] = ((), (9, 4), (2, 3), (9, 3, 2, 3), (5, 2), (14, 4))
"""Dashes of the curves, in their order."""
_AXES = (("rollouts", "rollouts", NUMBER), ("tokens", "tokens sampled", NUMBER), ("train_seconds", "training", TIME))


def chosen(names: Sequence[str]) -> list[str]:
    """Return at most as many arms as can be told apart."""
    first = [name for name in SHOWN if name in names]
    return [*first, *(name for name in names if name not in first)][: len(DASHES)]


def charts(runs: Mapping[str, list[dict[str, Any]]]) -> list[Chart]:
    """Mean accuracy over seeds against rollouts, tokens and training time, with a band of one standard error."""
    names = chosen(list(runs))
    found = []
    for axis, label, unit in _AXES:
        lines = []
        for k, name in enumerate(names):
            members = runs[name]
            grid = np.linspace(0, min(run["curve"][-1][axis] for run in members), 40)
            each = np.stack([statistics.at(run, axis, grid) for run in members])
            mean = each.mean(0)
            error = each.std(0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.zeros_like(mean)
            ends = {"low": mean - error, "high": mean + error}
            title = ARMS[name].title if name in ARMS else name
            lines.append(Line(name=title, x=grid, y=mean, color=k, dash=DASHES[k], **ends))
        found.append(
            Chart(
                name=axis,
                title="Held-out accuracy",
                words="",
                x=Axis(label=label, low=0.0, unit=unit),
                y=Axis(label="accuracy", unit=PERCENT),
                lines=lines,
                legend=[(line.name, line.color) for line in lines],
            )
        )
    return found


def draw(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw `charts` side by side as a PNG."""
    path.write_bytes(renderer.draw([], {"curves": charts(runs)})[1]["curves"])

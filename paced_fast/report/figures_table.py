"""Table of the figures of runs: differences, intervals, and accuracy paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from paced_fast.evaluation.calibration import brier_score, expected_calibration_error
from paced_fast.report.charts.chart import compact, percent, seconds
from paced_fast.report.charts.held_out import interval, largest_k, measured
from paced_fast.report.charts.value import forecasts
from paced_fast.report.html import part
from paced_fast.report.read_run import Floats, Record, Run, number, series
from paced_fast.report.seeds import FEWEST, SeedGroup, t_error


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    of: Callable[[Run], float | None]
    text: Callable[[float], str]
    key: str = ""  # name in the last evaluation, for its interval


def _last(run: Run) -> Record:
    return run.evaluations[-1].figures if run.evaluations else {}


def _mean_of(key: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        found = number(run.summary.get(key))
        y = series(run.records, key)[1]
        return found if found is not None else float(y.mean()) if y.size else None

    return of


def _calibration(score: Callable[[Floats, Floats], float]) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        pairs = forecasts(run.records)
        late = pairs[-max(1, len(pairs) // 3) :]
        return score(*(np.concatenate(side) for side in zip(*late, strict=True))) if late else None

    return of


def _evaluated(name: str, key: str, text: Callable[[float], str] = percent) -> _Figure:
    return _Figure(name, lambda run: measured(_last(run), key), text, key)


_EVALUATED = (
    _Figure(
        "held-out accuracy before",
        lambda run: number(run.evaluations[0].figures.get("accuracy")) if run.evaluations else None,
        percent,
    ),
    _evaluated("held-out accuracy", "accuracy"),
    _evaluated("held-out pass@8", "pass_at_8"),
)
_ROWS = (
    _evaluated("distinct correct completions", "distinct_correct", compact),
    _Figure("mixed groups", _mean_of("mixed_group_share"), percent),
    _Figure("Brier score, last third", _calibration(brier_score), lambda x: f"{x:.3f}"),
    _Figure("calibration error, last third", _calibration(expected_calibration_error), lambda x: f"{x:.3f}"),
    _Figure("steps", lambda run: float(run.last_step), compact),
    _Figure("rollouts", lambda run: number(run.records[-1].get("rollouts")), lambda x: f"{x:,.0f}"),
    _Figure("training time", lambda run: number(run.records[-1].get("train_seconds")), seconds),
    _Figure("skipped steps", lambda run: number(run.records[-1].get("skipped_steps")), compact),
)


def figures_table(groups: Sequence[SeedGroup]) -> Markup:
    """Return the table as HTML."""
    k = largest_k([_last(run) for group in groups for run in group.runs], "maj_at_k")
    votes = (_evaluated(f"held-out maj@{k}", f"maj_at_k/{k}"),) if k else ()
    rows = [cells for figure in (*_EVALUATED, *votes, *_ROWS) if (cells := _row(figure, groups))]
    pairs = [paired(groups[0], group) for group in groups[1:]]
    if any(pairs):
        rows.insert(2, ["accuracy on the same prompts, minus the first", "", *pairs])
    return part("card", part("table", ["", *(group.name for group in groups)], rows), tall=True)


def _row(figure: _Figure, groups: Sequence[SeedGroup]) -> list[str]:
    """Return the cells of a row; empty if no run has the figure."""
    found = [[v for run in group.runs if (v := figure.of(run)) is not None] for group in groups]
    if not any(found):
        return []
    ends = [_ends(figure, group, values) for group, values in zip(groups, found, strict=True)]
    cells = [figure.name]
    for i, values in enumerate(found):
        if not values:
            cells.append("-")
            continue
        mean = float(np.mean(values))
        text = figure.text(mean)
        if math.isfinite(sum(ends[i])):
            text += f" [{figure.text(ends[i][0])}, {figure.text(ends[i][1])}]"
        # The number of distinct correct answers grows with the number of samples.
        alike = figure.key != "distinct_correct" or _samples(groups[0]) == _samples(groups[i])
        if i and found[0] and alike:
            text += f"  ({_difference(mean - float(np.mean(found[0])), figure.text)}{_overlap(ends[0], ends[i])})"
        elif i and found[0]:
            text += "  (not comparable: different number of completions)"
        cells.append(text)
    return cells


def _samples(group: SeedGroup) -> float | None:
    return number(_last(group.runs[0]).get("samples"))


def _ends(figure: _Figure, group: SeedGroup, values: Sequence[float]) -> tuple[float, float]:
    """Interval of a figure: of the mean over seeds if there are enough, or the one that a single run recorded."""
    if len(values) >= FEWEST:
        mean, error = float(np.mean(values)), float(t_error(np.array(values, np.float64)))
        return mean - error, mean + error
    return interval(_last(group.runs[0]), figure.key) if figure.key and len(group.runs) == 1 else (math.nan, math.nan)


def _difference(x: float, text: Callable[[float], str]) -> str:
    size = f"{100 * abs(x):.1f} points" if text is percent else text(abs(x))
    return ("+" if x >= 0 else "-") + size


def _overlap(first: tuple[float, float], other: tuple[float, float]) -> str:
    if not math.isfinite(sum(first) + sum(other)):
        return ""
    apart = first[1] < other[0] or other[1] < first[0]
    return ", intervals do not overlap" if apart else ", intervals overlap"


def paired(first: SeedGroup, other: SeedGroup) -> str:
    """Mean difference over headline prompts scored by both, with 95 % interval; "" if prompts have no ids."""
    a, b = (_prompt_accuracy(group) for group in (first, other))
    delta = np.array([b[name] - a[name] for name in a if name in b], np.float64)
    if delta.size < 2:
        return ""
    mean, error = 100 * float(delta.mean()), 100 * float(t_error(delta))
    return f"{mean:+.1f} points [{mean - error:+.1f}, {mean + error:+.1f}] over {delta.size:,} prompts"


def _prompt_accuracy(group: SeedGroup) -> dict[str, float]:
    """Return final accuracy by prompt id, averaged over the seeds, for prompts that every run scored."""
    runs = [_marks(run) for run in group.runs]
    names = [name for name in runs[0] if all(name in marks for marks in runs)]
    return {name: float(np.mean([marks[name] for marks in runs])) for name in names}


def _marks(run: Run) -> dict[str, float]:
    figures = [e.figures for e in run.evaluations]
    table = next((f for f in figures if isinstance(f.get("prompt_ids"), list)), {})
    ids, slices, marks = (
        found if isinstance(found, list) else []
        for found in (table.get("prompt_ids"), table.get("prompt_slices"), _last(run).get("prompt_accuracy"))
    )
    if not len(ids) == len(slices) == len(marks):
        return {}
    headline = run.config.get("data.headline")
    headline = headline if isinstance(headline, list) else []
    known: dict[str, list[float]] = {}
    for name, of, mark in zip(ids, slices, marks, strict=True):
        if (accuracy := number(mark)) is not None and (not headline or of in headline):
            known.setdefault(str(name), []).append(accuracy)
    return {name: float(np.mean(values)) for name, values in known.items()}

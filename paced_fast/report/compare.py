"""Several runs on one page: curves over each other, figures side by side, and the settings that differ.

Runs that differ in nothing but the seed are one group: its curve is the mean of theirs where each has been evaluated,
its band one standard error of that mean.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paced_fast.errors import InputError
from paced_fast.metrics import brier_score, expected_calibration_error
from paced_fast.report.charts import Chart, curve_table, seconds
from paced_fast.report.heldout import ROLLOUTS, SECONDS, SHARE, evaluation_line, interval
from paced_fast.report.heldout import over_k as pass_curve
from paced_fast.report.learning import forecasts
from paced_fast.report.page import Section, document, figures, shown, table
from paced_fast.report.records import Floats, Record, Run, number, read_run, series
from paced_fast.report.svg import Axis, Line, compact, line_chart, percent

__all__ = ["Group", "compare", "grouped", "mean_line"]

_PLACES = ("run_dir", "resume", "warm_start.cache_dir", "run.")
"""Settings, or beginnings of their names, that say where a run lies and what it keeps, not what it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in the seed alone, under a name no other group has."""

    name: str
    runs: Sequence[Run]


def compare(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes one page that compares run folders, and returns its path: `out`, or compare.html beside the first run.

    Raises InputError when a folder is no run folder, or is named twice.
    """
    paths = [Path(folder) for folder in folders]
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise InputError(f"{path} is named twice: give different run folders")
    runs = [read_run(path) for path in paths]
    target = Path(out) if out is not None else paths[0].resolve().parent / "compare.html"
    if target.is_dir():
        raise InputError(f"--out {target} is a folder: give the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page_of(runs), encoding="utf-8")
    return target


def page_of(runs: Sequence[Run]) -> str:
    """The comparison as HTML."""
    groups = grouped(runs)
    parts = [
        ("learning", "Learning", "Measured on prompts that training never sees.", figures(_learning(groups))),
        ("training", "Training", "On the prompts each run drew; running means.", figures(_training(groups))),
        ("figures", "Figures", _FIGURES_LEAD, _figures(groups)),
        ("settings", "Settings", "Only what differs.", _settings(groups)),
        ("runs", "Runs", "", _runs(groups)),
    ]
    sections = [Section(name=name, title=title, lead=lead, body=body) for name, title, lead, body in parts if body]
    state = "".join(
        f'<span><i class="key k{i % 8}"></i>{html.escape(_titled(group))}</span>' for i, group in enumerate(groups)
    )
    return document(title=f"{len(runs)} runs compared", state=state, top="", sections=sections)


def _titled(group: Group) -> str:
    return f"{group.name} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.name


_FIGURES_LEAD = (
    "Differences are to the first. An interval is the one the evaluation records; for several seeds, two standard "
    "errors of their mean either way."
)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in the seed alone together, in the order of their first."""
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        same = {key: value for key, value in run.config.items() if key != "seed" and not key.startswith(_PLACES)}
        groups.setdefault(repr(sorted(same.items(), key=str)) if same else f"unknown {i}", []).append(run)
    names: list[str] = []
    for members in groups.values():
        name = members[0].name if len(members) == 1 else _common(members)
        names.append(name if name not in names else f"{name} ({members[0].folder})")
    return [Group(name=name, runs=members) for name, members in zip(names, groups.values(), strict=True)]


def _common(runs: Sequence[Run]) -> str:
    """What the names of seeds have in common at their beginning, else the first of them."""
    first, *others = (run.name for run in runs)
    length = next((i for i, char in enumerate(first) if any(o[i : i + 1] != char for o in others)), len(first))
    return first[:length].rstrip("-_. ") or first


def mean_line(lines: Sequence[Line], *, name: str, color: int) -> Line | None:
    """The mean of curves, with one standard error either way where there are several; each is read between its points.

    A curve is drawn as far as every run has come.
    """
    lines = [line for line in lines if line.x.size]
    if not lines:
        return None
    if len(lines) == 1:
        (one,) = lines
        dots = one.x.size < 40
        return Line(name=name, x=one.x, y=one.y, low=one.low, high=one.high, color=color, style="thick", dots=dots)
    start, end = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    x = np.unique(np.concatenate([line.x for line in lines]))
    x = x[(x >= start) & (x <= end)]
    if not x.size:
        return None
    found = np.stack([np.interp(x, line.x, line.y) for line in lines])
    error = found.std(axis=0, ddof=1) / math.sqrt(len(lines))
    mean = found.mean(axis=0)
    low, high, dots = mean - error, mean + error, x.size < 40
    return Line(name=name, x=x, y=mean, low=low, high=high, color=color, style="thick", dots=dots)


def _overlay(
    groups: Sequence[Group], name: str, title: str, axes: tuple[Axis, Axis], line_of: Callable[[Run], Line | None]
) -> list[Chart]:
    lines = []
    for i, group in enumerate(groups):
        members = [line for run in group.runs if (line := line_of(run)) is not None]
        line = mean_line(members, name=group.name, color=i % 8)
        lines += [] if line is None else [line]
    if not lines:
        return []
    label = f"{title}: " + ", ".join(f"{line.name} ends at {axes[1].write(float(line.y[-1]))}" for line in lines)
    return [
        Chart(
            name=name,
            title=title,
            svg=line_chart(lines, *axes, label),
            legend=[(line.name, line.color) for line in lines],
            table=curve_table(lines, *axes),
        )
    ]


def _learning(groups: Sequence[Group]) -> list[Chart]:
    charts = []
    for clock, axis, words in ((False, ROLLOUTS, "rollouts"), (True, SECONDS, "training time")):
        charts += _overlay(
            groups,
            f"accuracy_{'time' if clock else 'rollouts'}",
            f"Held-out accuracy against {words}",
            (axis, SHARE),
            lambda run, clock=clock: evaluation_line(run.evaluations, "accuracy", clock=clock, name="", color=0),
        )
    last = [
        (group.name, run.evaluations[-1].figures)
        for group in groups
        if (run := next((r for r in group.runs if r.evaluations), None)) is not None
    ]
    seeds = any(len(group.runs) > 1 for group in groups)
    for chart in pass_curve(last):
        caption = "At the end of each run" + (", of several seeds the first." if seeds else ".")
        charts.append(
            Chart(
                name=chart.name,
                title=chart.title,
                svg=chart.svg,
                caption=caption,
                legend=chart.legend,
                table=chart.table,
            )
        )
    return charts + _overlay(
        groups,
        "pass_at_8",
        "Held-out pass@8 against rollouts",
        (ROLLOUTS, SHARE),
        lambda run: evaluation_line(run.evaluations, "pass_at_8", clock=False, name="", color=0),
    )


def _training(groups: Sequence[Group]) -> list[Chart]:
    charts = []
    for key, title, axis in (
        ("reward_mean", "Mean reward of fresh rollouts", Axis()),
        ("mixed_group_share", "Mixed groups", Axis(low=0.0, high=1.0, text=percent)),
        ("value_brier", "Brier score of the value", Axis(low=0.0)),
        ("value_ece", "Expected calibration error of the value", Axis(low=0.0)),
        ("entropy", "Entropy (nats a token)", Axis(low=0.0)),
        ("tokens_per_second", "Tokens sampled a second", Axis(low=0.0, text=compact)),
    ):
        charts += _overlay(groups, key, title, (ROLLOUTS, axis), lambda run, key=key: _smooth(run, key))
    return charts


def _smooth(run: Run, key: str) -> Line | None:
    """A running mean over a fifteenth of the run, against rollouts."""
    x, y = series(run.records, key, x="rollouts")
    if not x.size:
        return None
    ones = np.ones(max(1, x.size // 15))
    mean = np.convolve(y, ones, mode="same") / np.convolve(np.ones_like(y), ones, mode="same")
    return Line(name=key, x=x, y=mean)


# Figures side by side


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    of: Callable[[Run], float | None]
    text: Callable[[float], str]
    key: str = ""  # in the last evaluation, for its interval


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


def _of_evaluation(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(_last(run).get(key))


_ROWS = (
    _Figure(
        "held-out accuracy before",
        lambda run: number(run.evaluations[0].figures.get("accuracy")) if run.evaluations else None,
        percent,
    ),
    _Figure("held-out accuracy", _of_evaluation("accuracy"), percent, "accuracy"),
    _Figure("held-out pass@8", _of_evaluation("pass_at_8"), percent, "pass_at_8"),
    _Figure("majority vote", _of_evaluation("maj_at_k"), percent, "maj_at_k"),
    _Figure("distinct correct completions", _of_evaluation("distinct_correct"), compact),
    _Figure("mixed groups", _mean_of("mixed_group_share"), percent),
    _Figure("Brier score, last third", _calibration(brier_score), lambda x: f"{x:.3f}"),
    _Figure("calibration error, last third", _calibration(expected_calibration_error), lambda x: f"{x:.3f}"),
    _Figure("steps", lambda run: float(run.last_step), compact),
    _Figure("rollouts", lambda run: number(run.records[-1].get("rollouts")), lambda x: f"{x:,.0f}"),
    _Figure("training time", lambda run: number(run.records[-1].get("train_seconds")), seconds),
    _Figure("skipped steps", lambda run: number(run.records[-1].get("skipped_steps")), compact),
)


def _figures(groups: Sequence[Group]) -> str:
    rows = []
    for figure in _ROWS:
        found = [[v for run in group.runs if (v := figure.of(run)) is not None] for group in groups]
        if not any(found):
            continue
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
            if i and found[0]:
                text += f"  ({_difference(mean - float(np.mean(found[0])), figure.text)}{_overlap(ends[0], ends[i])})"
            cells.append(text)
        rows.append(cells)
    paired = [_paired(groups[0], group) for group in groups[1:]]
    if any(paired):
        rows.append(["accuracy, prompt by prompt", "", *paired])
    return f'<div class="card scroll tall">{table(["", *(group.name for group in groups)], rows)}</div>'


def _ends(figure: _Figure, group: Group, values: Sequence[float]) -> tuple[float, float]:
    """An interval around a figure: two standard errors of the seeds' mean, or what a single run recorded."""
    if len(set(values)) > 1:
        error = 2 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return float(np.mean(values)) - error, float(np.mean(values)) + error
    return interval(_last(group.runs[0]), figure.key) if figure.key and len(group.runs) == 1 else (math.nan, math.nan)


def _difference(x: float, text: Callable[[float], str]) -> str:
    size = f"{100 * abs(x):.1f} points" if text is percent else text(abs(x))
    return ("+" if x >= 0 else "-") + size


def _overlap(first: tuple[float, float], other: tuple[float, float]) -> str:
    if not math.isfinite(sum(first) + sum(other)):
        return ""
    apart = first[1] < other[0] or other[1] < first[0]
    return ", intervals apart" if apart else ", intervals overlap"


def _paired(first: Group, other: Group) -> str:
    """Mean difference over the same held-out prompts, with its standard error; "" where they are not recorded.

    Prompts are told by their place: the held-out sources of both must be the same.
    """
    a, b = (_prompt_accuracy(group) for group in (first, other))
    same = first.runs[0].config.get("data.eval") == other.runs[0].config.get("data.eval")
    if not same or a.size < 2 or a.size != b.size:
        return ""
    delta = b - a
    error = float(delta.std(ddof=1)) / math.sqrt(delta.size)
    return f"{_difference(float(delta.mean()), percent)} +- {percent(error)} over {delta.size:,} prompts, paired"


def _prompt_accuracy(group: Group) -> Floats:
    """Accuracy of each held-out prompt at the end, mean over the seeds; empty unless every run recorded it."""
    found = []
    for run in group.runs:
        pairs = [r.get("eval_value") for r in run.records if isinstance(r.get("eval_value"), Mapping)]
        values = pairs[-1].get("accuracies") if pairs and isinstance(pairs[-1], Mapping) else None
        if not isinstance(values, list) or any(number(v) is None for v in values):
            return np.zeros(0)
        found.append(np.array(values, np.float64))
    return np.mean(found, axis=0) if len({v.size for v in found}) == 1 else np.zeros(0)


# Settings


def _settings(groups: Sequence[Group]) -> str:
    configs = [group.runs[0].config for group in groups]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    missing = [group.name for group, config in zip(groups, configs, strict=True) if not config]
    rows = [
        [key, *(shown(config[key]) if key in config else "not set" for config in configs)]
        for key in keys
        if key != "seed" and not key.startswith(_PLACES) and len({repr(config.get(key)) for config in configs}) > 1
    ]
    parts = [f'<p class="none">no config.json: {html.escape(", ".join(missing))}</p>'] if missing else []
    if rows:
        parts.append(f'<div class="card scroll">{table(["setting", *(g.name for g in groups)], rows)}</div>')
    elif not missing:
        parts.append('<p class="none">none: the runs differ in their seeds and folders alone</p>')
    return "".join(parts)


def _runs(groups: Sequence[Group]) -> str:
    rows = [
        [
            group.name,
            str(run.folder),
            shown(run.config.get("seed")),
            f"{run.last_step:,}{'' if run.summary else ' (not finished)'}",
        ]
        for group in groups
        for run in group.runs
    ]
    return f'<div class="card scroll">{table(["", "folder", "seed", "steps"], rows)}</div>'

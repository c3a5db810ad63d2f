"""Held-out evaluations on a page: curves over training, pass@k and maj@k over k, and what was not scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paced_fast.report.charts.chart import Chart, curve_table, seconds
from paced_fast.report.charts.svg import Axis, Line, line_chart, percent
from paced_fast.report.read_run import Evaluated, Record, Run, mapping, number, numbers

__all__ = [
    "BAND",
    "ROLLOUTS",
    "SECONDS",
    "SHARE",
    "chart_over_k",
    "evaluation_line",
    "interval",
    "largest_k",
    "learning_charts",
    "learning_lead",
    "line_over_k",
    "measured",
    "over_k",
    "scored_prompts",
    "unscored_notes",
]

ROLLOUTS = Axis(label="rollouts", low=0.0)
SECONDS = Axis(label="training time", low=0.0, text=seconds)
SHARE = Axis(label="share", text=percent)
BAND = "Band: 95 % interval over held-out prompts."


def learning_lead(run: Run) -> str:
    """On which prompts was measured; that training never sees them is said only where it was counted."""
    overlap = next((found for r in run.records if (found := mapping(r.get("overlap")))), {})
    repeated, prompts = number(overlap.get("repeated")), number(overlap.get("training_prompts"))
    if repeated is None or prompts is None:
        return "Measured on the held-out prompts."
    if not repeated:
        return "Measured on prompts that training never sees."
    verb = "repeats" if repeated == 1 else "repeat"
    return f"Measured on the held-out prompts; {repeated:,.0f} of {prompts:,.0f} training prompts {verb} one."


def measured(figures: Record, key: str) -> float | None:
    """A figure of an evaluation by name, `pass_at_8`, or by name and k, `maj_at_k/16`."""
    name, _, k = key.partition("/")
    return number(mapping(figures.get(name)).get(k) if k else figures.get(name))


def interval(figures: Record, key: str) -> tuple[float, float]:
    """The recorded interval of a figure; nan where there is none."""
    name, _, k = "pass_at_k/8".partition("/") if key == "pass_at_8" else key.partition("/")
    found = figures.get(f"{name}_interval")
    ends = numbers(mapping(found).get(k) if k else found)
    return (float(ends[0]), float(ends[1])) if ends.size == 2 else (np.nan, np.nan)


def largest_k(evaluated: Sequence[Record], name: str) -> int:
    """The largest k, above 1, for which every evaluation that has this figure at all has a number; 0 without one."""
    known = [
        {int(k) for k, value in found.items() if k.isdecimal() and int(k) > 1 and number(value) is not None}
        for figures in evaluated
        if (found := mapping(figures.get(name)))
    ]
    return max(set.intersection(*known), default=0) if known else 0


def evaluation_line(
    evaluations: Sequence[Evaluated], key: str, *, clock: bool, name: str, color: int, style: str = "thick"
) -> Line | None:
    """A figure of the evaluations against rollouts or seconds, with its intervals where any is recorded."""
    points = [
        (e.seconds if clock else e.rollouts, y, *interval(e.figures, key))
        for e in evaluations
        if (y := measured(e.figures, key)) is not None
    ]
    if not points:
        return None
    x, y, low, high = (np.array(column, np.float64) for column in zip(*points, strict=True))
    known = bool(np.isfinite(low).any())
    return Line(
        name=name,
        x=x,
        y=y,
        low=low if known else None,
        high=high if known else None,
        color=color,
        style="thick" if style == "thick" else "thin",
        dots=True,
    )


def learning_charts(run: Run) -> list[Chart]:
    """Held-out accuracy against rollouts and against time, by slice, and pass@k and maj@k before and after."""
    charts: list[Chart] = []
    evaluations = run.evaluations
    names = sorted({name for e in evaluations for name in mapping(e.figures.get("slices"))})
    names = names if len(names) > 1 else []
    for clock, axis in ((False, ROLLOUTS), (True, SECONDS)):
        lines = [evaluation_line(evaluations, "accuracy", clock=clock, name="headline", color=0)]
        for i, name in enumerate(names):
            parts = [
                Evaluated(e.step, e.rollouts, e.seconds, mapping(mapping(e.figures.get("slices")).get(name)))
                for e in evaluations
            ]
            line = evaluation_line(parts, "accuracy", clock=clock, name=name, color=1 + i % 7, style="thin")
            # A band around every slice would hide them all.
            lines.append(None if line is None else Line(name=name, x=line.x, y=line.y, color=line.color, style="thin"))
        found = [line for line in lines if line is not None]
        if not found:
            continue
        where = "time" if clock else "rollouts"
        words = ["Thick: the headline slices." if found[0].name == "headline" else ""]
        words += [BAND if found[0].low is not None else "", "Thin: every slice." if names else ""]
        charts.append(
            Chart(
                name=f"learning_{where}",
                title=f"Held-out accuracy against {'training time' if clock else 'rollouts'}",
                caption=" ".join(word for word in words if word),
                svg=line_chart(found, axis, _named("accuracy"), _course(found[0], axis)),
                legend=[(line.name, line.color) for line in found],
                table=curve_table(found, axis, SHARE),
            )
        )
    ends = [("before", evaluations[0].figures), ("after", evaluations[-1].figures)] if evaluations else []
    return [*charts, *over_k(ends), *over_k(ends, "maj_at_k"), *_over_time(evaluations)]


def _named(label: str) -> Axis:
    return Axis(label=label, text=percent)


def _course(line: Line, axis: Axis) -> str:
    return (
        f"Held-out accuracy of the {line.name} slices against {axis.label}: {percent(float(line.y[0]))} at "
        f"{axis.write(float(line.x[0]))}, {percent(float(line.y[-1]))} at {axis.write(float(line.x[-1]))}"
    )


_OVER_K = {
    "pass_at_k": (
        "pass@k",
        "Chance that at least one of k completions is right, unbiased. Where the curve after training falls below the "
        "one before, training traded diversity for accuracy.",
    ),
    "maj_at_k": ("maj@k", "Chance that the most frequent answer of k completions is right, ties split."),
}


def over_k(evaluated: Sequence[tuple[str, Record]], key: str = "pass_at_k") -> list[Chart]:
    """pass@k or maj@k of evaluations against k, one curve each."""
    lines = [line for i, (name, e) in enumerate(evaluated) if (line := line_over_k(e, key, name=name, color=i % 8))]
    if len(lines) == 2 and np.array_equal(lines[0].y, lines[1].y):
        lines = lines[:1]
    words = BAND if any(line.low is not None for line in lines) else ""
    return chart_over_k(lines, key, f"{_OVER_K[key][1]} {words}".rstrip())


def line_over_k(figures: Record, key: str, *, name: str, color: int) -> Line | None:
    """The curve of one evaluation, over the binary logarithm of k; None with fewer than two points."""
    found = {int(k): measured(figures, f"{key}/{k}") for k in mapping(figures.get(key)) if k.isdecimal() and int(k)}
    low_high = {k: interval(figures, f"{key}/{k}") for k in found}
    if key == "pass_at_k":
        for k, single in ((1, "accuracy"), (8, "pass_at_8")):
            if found.get(k) is None:
                found[k], low_high[k] = measured(figures, single), interval(figures, single)
    ks = sorted(k for k, value in found.items() if value is not None)
    if len(ks) < 2:
        return None
    low, high = (np.array([low_high[k][end] for k in ks]) for end in (0, 1))
    known = bool(np.isfinite(low).any())
    return Line(
        name=name,
        x=np.log2(np.array(ks, np.float64)),
        y=np.array([found[k] for k in ks], np.float64),
        low=low if known else None,
        high=high if known else None,
        color=color,
        dots=True,
        style="thick",
    )


def chart_over_k(lines: Sequence[Line], key: str, caption: str) -> list[Chart]:
    """The chart of curves over k; none without a curve."""
    if not lines:
        return []
    name = _OVER_K[key][0]
    axis, y = Axis(label="k", text=lambda x: f"{2**x:.3g}", whole=True), _named(name)
    label = f"{name}: " + "; ".join(
        f"{line.name} {percent(float(line.y[0]))} to {percent(float(line.y[-1]))}" for line in lines
    )
    return [
        Chart(
            name=key,
            title=f"{name} on held-out prompts",
            caption=caption,
            svg=line_chart(lines, axis, y, label),
            legend=[(line.name, line.color) for line in lines if line.style != "thin"],
            table=curve_table(lines, axis, SHARE),
        )
    ]


def _over_time(evaluations: Sequence[Evaluated]) -> list[Chart]:
    k = largest_k([e.figures for e in evaluations], "maj_at_k")
    keys = {"pass_at_8": "pass@8"} | ({f"maj_at_k/{k}": f"maj@{k}"} if k else {})
    lines = [
        line
        for color, (key, name) in enumerate(keys.items())
        if (line := evaluation_line(evaluations, key, clock=False, name=name, color=color)) is not None
    ]
    if not lines or max(line.x.size for line in lines) < 2:
        return []
    banded = any(line.low is not None for line in lines)
    return [
        Chart(
            name="pass_at_8",
            title=" and ".join(line.name for line in lines) + " against rollouts",
            caption="On the headline slices." + (f" {BAND}" if banded else ""),
            svg=line_chart(lines, ROLLOUTS, SHARE, _course(lines[0], ROLLOUTS)),
            legend=[(line.name, line.color) for line in lines],
            table=curve_table(lines, ROLLOUTS, SHARE),
        )
    ]


def scored_prompts(figures: Record) -> object:
    """Which prompts an evaluation scored, or how many, to be compared with those of another of the same run."""
    marks = figures.get("prompt_accuracy")
    if isinstance(marks, list):
        return tuple(number(mark) is not None for mark in marks)
    return (number(figures.get("prompts")) or 0.0) - (number(figures.get("unscored_prompts")) or 0.0)


def unscored_notes(run: Run) -> list[str]:
    """What the evaluations before and after could not score."""
    evaluations = run.evaluations
    places = [("before training", evaluations[0]), ("in the newest evaluation", evaluations[-1])] if evaluations else []
    lines = []
    for where, e in places[: 2 if len(evaluations) > 1 else 1]:
        missing, prompts = number(e.figures.get("unscored_prompts")), number(e.figures.get("prompts"))
        samples, unscored = number(e.figures.get("samples")), number(e.figures.get("unscored"))
        if missing and prompts:
            lines.append(f"{missing:,.0f} of {prompts:,.0f} held-out prompts had no scored sample {where}.")
        elif unscored and prompts and samples:
            lines.append(f"{unscored:,.0f} of {prompts * samples:,.0f} held-out samples got no verdict {where}.")
    return lines

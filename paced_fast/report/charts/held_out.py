"""Charts of held-out evaluations: curves over training, pass@k and maj@k over k, and notes on unscored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from paced_fast.report.charts.chart import PERCENT, TIME, Axis, Chart, Line, Unit, percent
from paced_fast.report.read_run import Evaluated, Record, Run, mapping, number, numbers

ROLLOUTS = Axis(label="rollouts", low=0.0)
SECONDS = Axis(label="training time", low=0.0, unit=TIME)
HELD_OUT = "held-out"
"""Name of the curve over all prompts that held-out figures are taken over."""
BAND = "Band: 95% interval over held-out prompts."


def learning_lead(run: Run) -> str:
    """Describe the evaluated prompts; claims that training never sees them only if the overlap was counted."""
    overlap = next((found for r in run.records if (found := mapping(r.get("overlap")))), {})
    repeated, prompts = number(overlap.get("repeated")), number(overlap.get("training_prompts"))
    if repeated is None or prompts is None:
        return "Measured on the held-out prompts."
    if not repeated:
        return "Measured on prompts that training never sees."
    count = f"{repeated:,.0f} of {prompts:,.0f} training prompts"
    slices = {str(name): int(found) for name, n in mapping(overlap.get("slices")).items() if (found := number(n))}
    if not slices:
        are = "is one of them" if repeated == 1 else "are among them"
        return f"Measured on the held-out prompts; {count} {are}."
    names = ", ".join(f"{name} ({n:,})" if len(slices) > 1 else name for name, n in sorted(slices.items()))
    of = f"held-out prompts of {'slice' if len(slices) == 1 else 'slices'} {names}"
    headline = next((e.figures.get("headline") for e in run.evaluations), None)
    if isinstance(headline, list) and headline and slices.keys().isdisjoint(map(str, headline)):
        return (
            f"Held-out accuracy is measured on prompts that training never sees. {count} are also {of}, which it "
            "leaves out: this is no contamination."
        )
    return (
        f"Measured on the held-out prompts; {count} are also {of}, so this accuracy is not that of unseen prompts. "
        "--data.overlap drop leaves them out of training."
    )


def measured(figures: Record, key: str) -> float | None:
    """Return a figure of an evaluation by name (`pass_at_8`) or by name and k (`maj_at_k/16`)."""
    name, _, k = key.partition("/")
    return number(mapping(figures.get(name)).get(k) if k else figures.get(name))


def interval(figures: Record, key: str) -> tuple[float, float]:
    """Return the recorded interval of a figure; nan if there is none."""
    name, _, k = "pass_at_k/8".partition("/") if key == "pass_at_8" else key.partition("/")
    found = figures.get(f"{name}_interval")
    ends = numbers(mapping(found).get(k) if k else found)
    return (float(ends[0]), float(ends[1])) if ends.size == 2 else (np.nan, np.nan)


def largest_k(evaluated: Sequence[Record], name: str) -> int:
    """Largest k above 1 for which every evaluation with this figure has a number; 0 if there is none."""
    known = [
        {int(k) for k, value in found.items() if k.isdecimal() and int(k) > 1 and number(value) is not None}
        for figures in evaluated
        if (found := mapping(figures.get(name)))
    ]
    return max(set.intersection(*known), default=0) if known else 0


def evaluation_line(evaluations: Sequence[Evaluated], key: str, *, clock: bool, name: str, color: int) -> Line | None:
    """Curve of a figure against rollouts or seconds, with intervals if any are recorded."""
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
        style="thick",
        dots=True,
    )


def after_step(evaluation: Evaluated) -> str:
    """When an evaluation was made; the run may go on after it."""
    return f"after step {evaluation.step:,.0f}"


def learning_charts(run: Run) -> list[Chart]:
    """Charts of held-out accuracy against rollouts and time, by slice, and of pass@k and maj@k before and after."""
    evaluations = run.evaluations
    ends: list[tuple[str, Record]] = []
    if evaluations:
        ends = [("before", evaluations[0].figures), (after_step(evaluations[-1]), evaluations[-1].figures)]
    return [
        *_accuracy(evaluations, "learning_rollouts", ROLLOUTS),
        *_accuracy(evaluations, "learning_time", SECONDS),
        *over_k(ends),
        *over_k(ends, "maj_at_k"),
        *_over_time(evaluations),
    ]


def _accuracy(evaluations: Sequence[Evaluated], name: str, axis: Axis) -> list[Chart]:
    """Charts of held-out accuracy, and of accuracy on every slice if there are several."""
    clock = axis is SECONDS
    headline = evaluation_line(evaluations, "accuracy", clock=clock, name=HELD_OUT, color=0)
    slices = _slices(evaluations, "accuracy", clock=clock)
    if headline is None and not slices:
        return []
    words = [f"{'Thick:' if slices else 'On'} {_covered(evaluations)}."] if headline is not None else []
    words += [BAND] if headline is not None and headline.low is not None else []
    words += ["Thin: every slice."] if slices else []
    lines = [*([headline] if headline is not None else []), *slices]
    return [_course(lines, axis, name, f"Held-out accuracy against {axis.label}", "accuracy", " ".join(words))]


def _covered(evaluations: Sequence[Evaluated]) -> str:
    """The prompts over which held-out figures are taken."""
    headline = evaluations[0].figures.get("headline")
    names = [str(name) for name in headline] if isinstance(headline, list) else []
    if not names:
        return "all held-out prompts"
    return f"the held-out prompts of slice{'' if len(names) == 1 else 's'} {', '.join(names)}"


def _slices(evaluations: Sequence[Evaluated], key: str, *, clock: bool) -> list[Line]:
    """Curves of a figure per slice, if there are several; without bands, which would hide the curves."""
    names = sorted({name for e in evaluations for name in mapping(e.figures.get("slices"))})
    lines = []
    for i, name in enumerate(names if len(names) > 1 else []):
        parts = [replace(e, figures=mapping(mapping(e.figures.get("slices")).get(name))) for e in evaluations]
        line = evaluation_line(parts, key, clock=clock, name=name, color=1 + i % 7)
        lines += [] if line is None else [replace(line, low=None, high=None, style="thin", dots=False)]
    return lines


def _course(lines: Sequence[Line], axis: Axis, name: str, title: str, label: str, caption: str) -> Chart:
    """Chart of held-out curves; its text alternative describes the first."""
    first = lines[0]
    ends = " to ".join(f"{percent(float(first.y[i]))} at {axis.write(float(first.x[i]))}" for i in (0, -1))
    return Chart(
        name=name,
        title=title,
        caption=caption,
        x=axis,
        y=Axis(label=label, unit=PERCENT),
        words=f"{title}, {first.name}: {ends}",
        lines=lines,
        legend=[(line.name, line.color) for line in lines],
    )


_OVER_K = {
    "pass_at_k": (
        "pass@k",
        "Unbiased estimate of the chance that at least one of k completions is right. Where the curve after training "
        "is below the one before, training traded diversity for accuracy.",
    ),
    "maj_at_k": ("maj@k", "Chance that the most frequent answer of k completions is right; ties are shared equally."),
}


def over_k(evaluated: Sequence[tuple[str, Record]], key: str = "pass_at_k") -> list[Chart]:
    """Chart of pass@k or maj@k against k, one curve per evaluation."""
    lines = [line for i, (name, e) in enumerate(evaluated) if (line := line_over_k(e, key, name=name, color=i % 8))]
    if len(lines) == 2 and np.array_equal(lines[0].y, lines[1].y):
        lines = lines[:1]
    words = BAND if any(line.low is not None for line in lines) else ""
    return chart_over_k(lines, key, f"{_OVER_K[key][1]} {words}".rstrip())


def line_over_k(figures: Record, key: str, *, name: str, color: int) -> Line | None:
    """Curve of one evaluation over log2(k); None with fewer than two points."""
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
    """Chart of curves over k; no chart without a curve."""
    if not lines:
        return []
    name = _OVER_K[key][0]
    ends = (f"{line.name} {percent(float(line.y[0]))} to {percent(float(line.y[-1]))}" for line in lines)
    return [
        Chart(
            name=key,
            title=f"{name} on held-out prompts",
            caption=caption,
            x=Axis(label="k", unit=_POWER, whole=True),
            y=Axis(label=name, unit=PERCENT),
            words=f"{name}: {'; '.join(ends)}",
            lines=lines,
            legend=[(line.name, line.color) for line in lines if line.style != "thin"],
        )
    ]


_POWER = Unit(text=lambda x: f"{2**x:.3g}", tick="pow(2, datum.value)")


def _over_time(evaluations: Sequence[Evaluated]) -> list[Chart]:
    figures = [e.figures for e in evaluations]
    k = largest_k(figures, "maj_at_k")
    of_all = largest_k(figures, "pass_at_k")
    # Evaluations during training may have fewer completions per prompt than the first and the last one.
    passed = 8 if not of_all or all(measured(e, "pass_at_8") is not None for e in figures) else of_all
    key = "pass_at_8" if passed == 8 else f"pass_at_k/{passed}"
    slices = _slices(evaluations, key, clock=False)
    keys = {key: f"pass@{passed}"} | ({f"maj_at_k/{k}": f"maj@{k}"} if k else {})
    lines = [
        line
        for color, (key, name) in zip((0, 7 if slices else 1), keys.items(), strict=False)
        if (line := evaluation_line(evaluations, key, clock=False, name=name, color=color)) is not None
    ]
    if not lines or max(line.x.size for line in lines) < 2:
        return []
    words = [f"On {_covered(evaluations)}.", *([BAND] if any(line.low is not None for line in lines) else [])]
    words += [f"Thin: pass@{passed} of every slice."] if slices else []
    title = " and ".join(line.name for line in lines) + " against rollouts"
    return [_course([*lines, *slices], ROLLOUTS, "pass_at_8", title, "share", " ".join(words))]


def scored_prompts(figures: Record) -> object:
    """Ids or number of the prompts an evaluation scored, for comparison with another evaluation of the same run."""
    marks = figures.get("prompt_accuracy")
    if isinstance(marks, list):
        return tuple(number(mark) is not None for mark in marks)
    return (number(figures.get("prompts")) or 0.0) - (number(figures.get("unscored_prompts")) or 0.0)


def unscored_notes(run: Run) -> list[str]:
    """Notes on samples that the evaluations before and after training could not score."""
    evaluations = run.evaluations
    places = [("before training", evaluations[0]), ("in the newest evaluation", evaluations[-1])] if evaluations else []
    lines = []
    for where, e in places[: 2 if len(evaluations) > 1 else 1]:
        missing, prompts = number(e.figures.get("unscored_prompts")), number(e.figures.get("prompts"))
        samples, unscored = number(e.figures.get("samples")), number(e.figures.get("unscored"))
        if missing and prompts:
            lines.append(f"{missing:,.0f} of {prompts:,.0f} held-out prompts had no scored completion {where}.")
        elif unscored and prompts and samples:
            lines.append(f"{unscored:,.0f} of {prompts * samples:,.0f} held-out completions are unscored {where}.")
    return lines

"""Charts of the value (log Z head): its calibration, the difficulties the scheduler draws, the replay buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from paced_fast.evaluation.calibration import brier_score, expected_calibration_error
from paced_fast.report.charts.chart import PERCENT, Axis, Chart, Heat, Line, percent, share, single
from paced_fast.report.read_run import Floats, Record, Run, mapping, number, numbers

STEP = Axis(label="step", whole=True)
VALUE = Axis(label="value (predicted accuracy)", low=0.0, high=1.0, unit=PERCENT)
SQUARE, HEAT = 380, 250
"""Heights of charts in pixels."""


def forecasts(records: Sequence[Record]) -> list[tuple[Floats, Floats]]:
    """Return value and measured accuracy of fresh groups per step; groups that lack one of them are left out."""
    found = []
    for record in records:
        value, accuracy = numbers(record.get("value_fresh")), numbers(record.get("accuracy_fresh"))
        if value.size and value.size == accuracy.size:
            known = np.isfinite(value) & np.isfinite(accuracy)
            found.append((np.clip(value[known], 0, 1), np.clip(accuracy[known], 0, 1)))
    return [pair for pair in found if pair[0].size]


def calibration_bins(value: Floats, accuracy: Floats) -> list[tuple[float, float, float, int]]:
    """Return (mean value, mean accuracy, standard error, groups) for each non-empty tenth of the value's range."""
    index = np.clip(np.floor(value * 10), 0, 9).astype(int)
    return [
        (float(value[m].mean()), float(accuracy[m].mean()), float(accuracy[m].std() / np.sqrt(m.sum())), int(m.sum()))
        for i in range(10)
        if (m := index == i).any()
    ]


def value_charts(run: Run) -> list[Chart]:
    """Calibration charts of the value early, late and on held-out prompts, and its scores over the steps."""
    steps = forecasts(run.records)
    third = len(steps) // 3
    words = "step" if third == 1 else f"{third} steps"
    parts: list[tuple[str, str, Floats, Floats]] = []
    for name, title, part in (
        ("first", f"Calibration, first {words}", steps[:third]),
        ("last", f"Calibration, last {words}", steps[len(steps) - third :] if third else []),
        ("all", "Calibration, all steps", [] if third else steps),
    ):
        if part:
            value, accuracy = (np.concatenate(column) for column in zip(*part, strict=True))
            parts.append((name, title, value, accuracy))
    held = next((h for r in reversed(run.records) if (h := mapping(r.get("eval_value")))), {})
    pairs = forecasts([{"value_fresh": held.get("values"), "accuracy_fresh": held.get("accuracies")}])
    parts += [("held_out", "Calibration on held-out prompts", *pair) for pair in pairs]
    charts = [_reliability(*part) for part in parts]
    r = run.records
    return [
        *charts,
        *single(r, "value_brier", title="Brier score of the value", ends=(0.0, None)),
        *single(r, "value_ece", title="Expected calibration error", ends=(0.0, None)),
        *single(r, "value_rank_correlation", title="Rank correlation", ends=(None, 1.0)),
    ]


def _reliability(name: str, title: str, value: Floats, accuracy: Floats) -> Chart:
    """Chart of measured against predicted accuracy; bubble areas and the bars below show numbers of groups."""
    bins = calibration_bins(value, accuracy)
    brier, ece = brier_score(value, accuracy), expected_calibration_error(value, accuracy)
    scores = f"Brier {brier:.3f}, ECE {ece:.3f}, {value.size:,} group{'' if value.size == 1 else 's'}"
    predicted, measured, error, groups = np.array(bins).T
    counts = groups / groups.max()
    bars, floor = np.minimum(np.floor(predicted * 10), 9) / 10 + 0.05, np.full_like(counts, -_STRIP)
    y = Axis(label="measured accuracy", low=-_STRIP, high=1.0, unit=PERCENT, ticks=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    errors = [percent(e) if n > 1 else "-" for _, _, e, n in bins]  # one group has no spread
    texts = [f"{percent(a)} +- {e}, {n:,} groups" for (_, a, _, n), e in zip(bins, errors, strict=True)]
    ends = np.array([0.0, 1.0])
    return Chart(
        name=f"calibration_{name}",
        title=title,
        caption=f"{scores}. Dashed: a value that predicts accuracy exactly. Bars through points: one standard error. "
        "Bars at the bottom: number of groups.",
        x=VALUE,
        y=y,
        words=f"{title}: {scores}",
        lines=[
            Line(name="exact", x=ends, y=ends, style="dashed"),
            Line(name="groups", x=bars, y=floor, low=floor, high=floor + 0.8 * _STRIP * counts, style="bars"),
            Line(
                name="measured accuracy",
                x=predicted,
                y=measured,
                low=np.maximum(0.0, measured - error),
                high=np.minimum(1.0, measured + error),
                style="bubbles",
                sizes=counts,
                texts=texts,
            ),
        ],
        table=(
            ["value", "measured accuracy", "standard error", "groups"],
            [[percent(v), percent(a), e, f"{n:,}"] for (v, a, _, n), e in zip(bins, errors, strict=True)],
        ),
        third=True,
        height=SQUARE,
    )


_STRIP = 0.12
"""Height of the strip of counts below 0 in a calibration chart, in units of its y axis."""


def _histograms(records: Sequence[Record]) -> list[tuple[float, Floats, Floats]]:
    """Return (step, share of all prompts by value, share of drawn prompts) for the steps that record them."""
    found = []
    for record in records:
        step, counts = number(record.get("step")), np.nan_to_num(numbers(record.get("value_histogram")))
        drawn = numbers(record.get("value_fresh"))
        drawn = drawn[np.isfinite(drawn)]
        if step and counts.sum() > 0 and drawn.size:
            chosen = np.histogram(np.clip(drawn, 0, 1), bins=counts.size, range=(0, 1))[0] / drawn.size
            found.append((step, counts / counts.sum(), chosen))
    return [row for row in found if row[1].size == found[0][1].size]


def schedule_charts(run: Run) -> list[Chart]:
    """Charts of available and drawn difficulties, and of the share of groups that give a training signal."""
    return [
        *_difficulties(_histograms(run.records)),
        *single(
            run.records,
            "mixed_group_share",
            name="mixed_groups",
            title="Mixed groups",
            caption="Share of groups with both right and wrong completions; only those give a training signal.",
            unit=PERCENT,
            ends=(0.0, 1.0),
        ),
        *single(
            run.records,
            "reward_mean",
            name="train_reward",
            title="Mean reward of fresh rollouts",
            caption="On the drawn prompts, so not a measure of progress: a schedule may hold it near its target.",
        ),
        *share(run.records, "prompts_visited_share", title="Prompts drawn at least once"),
    ]


def _heat(x: Floats, shares: Floats, mean: Floats, y: Axis, *, name: str, title: str, caption: str) -> Chart:
    """Heat map of shares over the steps, with a curve of the mean."""
    return Chart(
        name=name,
        title=title,
        caption=f"{caption} The line is the mean.",
        x=STEP,
        y=y,
        words=f"{title}: mean {y.write(float(mean[0]))} first, {y.write(float(mean[-1]))} last",
        heat=Heat(x=x, shares=shares),
        lines=[Line(name="mean", x=x, y=mean, color=1)],
        third=True,
        height=HEAT,
    )


def _difficulties(rows: Sequence[tuple[float, Floats, Floats]]) -> list[Chart]:
    if not rows:
        return []
    x = np.array([step for step, *_ in rows])
    there, drawn = (np.stack([row[i] for row in rows]) for i in (1, 2))
    y = Axis(label="value", low=0.0, high=1.0, unit=PERCENT)
    centers = (np.arange(there.shape[1]) + 0.5) / there.shape[1]
    charts = []
    for name, title, shares, caption in (
        ("value_histogram", "Difficulty of all training prompts", there, "Predicted accuracy of all prompts"),
        ("selection", "Difficulty of the drawn prompts", drawn, "Predicted accuracy of the drawn prompts"),
    ):
        ends = [[f"{centers[j]:.3f}", *(percent(float(shares[i, j])) for i in (0, -1))] for j in range(centers.size)]
        caption += ", from value 0 (never solved) at the bottom to 1 at the top."
        chart = _heat(x, shares, shares @ centers, y, name=name, title=title, caption=caption)
        charts.append(replace(chart, table=(["value", f"step {x[0]:.0f}", f"step {x[-1]:.0f}"], ends)))
    half = len(rows) // 2
    lines = [
        Line(name="all prompts", x=centers, y=there[half:].mean(axis=0), color=0, style="thick"),
        Line(name="drawn prompts", x=centers, y=drawn[half:].mean(axis=0), color=1, style="thick"),
    ]
    drawn_against = Chart(
        name="selection_share",
        title="Drawn prompts against all prompts",
        caption="Second half of the run. Prompts near the target accuracy should have a larger share of the draws.",
        x=VALUE,
        y=Axis(label="share of prompts", low=0.0, unit=PERCENT),
        words="Share of all prompts and of the drawn prompts by value",
        lines=lines,
        legend=[(line.name, line.color) for line in lines],
        third=True,
        height=HEAT,
    )
    return [*charts, drawn_against]


def replay_charts(run: Run) -> list[Chart]:
    """Charts of the replay buffer: heat maps of error and age, and its size."""
    r = run.records
    charts = [
        *_held(
            r,
            "replay_priorities",
            title="Priority of completions in replay",
            caption="Priority by default: |group accuracy - value|.",
        ),
        *_held(
            r, "replay_ages", title="Age of completions in replay", caption="Steps since it was sampled.", whole=True
        ),
    ]
    if not any(chart.name == "replay_ages" for chart in charts):
        title = "Mean age in replay (steps)"
        charts += single(r, "replay_age_mean", title=title, ends=(0.0, None), height=HEAT)
    if charts:
        title = "Sequences trained on per step"
        charts += single(r, "trained_sequences", title=title, ends=(0.0, None), height=HEAT)
    return charts


def _held(records: Sequence[Record], key: str, *, title: str, caption: str, whole: bool = False) -> list[Chart]:
    """Heat map of the numbers recorded in each step; each of the `whole` numbers has its own row."""
    steps = [
        (step, known)
        for r in records
        if (step := number(r.get("step"))) and (known := (v := numbers(r.get(key)))[np.isfinite(v)]).size
    ]
    if not steps:
        return []
    most = max(float(v.max()) for _, v in steps)
    low, top, bins = 0.0, max(1.0, most), 20
    if whole:  # rows of equally many whole numbers, centred on them
        rows = int(min(most, 1e6)) + 1
        width = -(-rows // 24)
        bins = -(-rows // width)
        low, top = -0.5, bins * width - 0.5
    shares = np.stack([np.histogram(v, bins=bins, range=(low, top))[0] / v.size for _, v in steps])
    x, mean = np.array([s for s, _ in steps]), np.array([v.mean() for _, v in steps])
    y = Axis(label="steps" if whole else "priority", low=low, high=top, whole=whole)
    return [_heat(x, shares, mean, y, name=key, title=title, caption=caption)]

"""The value of the log Z head on a run's page: how well it predicts, what the schedule draws, what replay holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paced_fast.evaluation.calibration import brier_score, expected_calibration_error
from paced_fast.report.charts.chart import Chart, curve_table, share, single
from paced_fast.report.charts.svg import Axis, Line, Size, line_chart, percent
from paced_fast.report.charts.svg_maps import heat_map, reliability, shade_limit
from paced_fast.report.read_run import Floats, Record, Run, mapping, number, numbers, series

__all__ = ["calibration_bins", "forecasts", "replay_charts", "schedule_charts", "value_charts"]

SQUARE = Size(width=360, height=380, left=46, right=18, top=10, bottom=40)
HEAT = Size(width=360, height=250, left=44, right=10, top=8, bottom=38)


def forecasts(records: Sequence[Record]) -> list[tuple[Floats, Floats]]:
    """Value and measured accuracy of the fresh groups, step by step, groups without either left out."""
    found = []
    for record in records:
        value, accuracy = numbers(record.get("value_fresh")), numbers(record.get("accuracy_fresh"))
        if value.size and value.size == accuracy.size:
            known = np.isfinite(value) & np.isfinite(accuracy)
            found.append((np.clip(value[known], 0, 1), np.clip(accuracy[known], 0, 1)))
    return [pair for pair in found if pair[0].size]


def calibration_bins(value: Floats, accuracy: Floats) -> list[tuple[float, float, float, int]]:
    """(mean value, mean accuracy, standard error, groups) of each tenth of the value's range that holds any."""
    index = np.clip(np.floor(value * 10), 0, 9).astype(int)
    return [
        (float(value[m].mean()), float(accuracy[m].mean()), float(accuracy[m].std() / np.sqrt(m.sum())), int(m.sum()))
        for i in range(10)
        if (m := index == i).any()
    ]


def value_charts(run: Run) -> list[Chart]:
    """Reliability of the value early, late and on held-out prompts, and its scores over the steps."""
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
        *single(r, "value_brier", name="value_brier", title="Brier score of the value", ends=(0.0, None)),
        *single(r, "value_ece", name="value_ece", title="Expected calibration error", ends=(0.0, None)),
        *single(r, "value_rank_correlation", name="value_rank_correlation", title="Rank correlation", ends=(None, 1.0)),
    ]


def _reliability(name: str, title: str, value: Floats, accuracy: Floats) -> Chart:
    bins = calibration_bins(value, accuracy)
    brier, ece = brier_score(value, accuracy), expected_calibration_error(value, accuracy)
    scores = f"Brier {brier:.3f}, ECE {ece:.3f}, {value.size:,} group{'' if value.size == 1 else 's'}"
    axes = Axis(label="value (predicted accuracy)", text=percent), Axis(label="measured accuracy", text=percent)
    rows = [[percent(v), percent(a), percent(e), f"{n:,}"] for v, a, e, n in bins]
    return Chart(
        name=f"calibration_{name}",
        title=title,
        caption=f"{scores}. On the dashed line the value predicts accuracy exactly; bars through points are one "
        "standard error, those below numbers of groups.",
        svg=reliability(bins, axes, f"{title}: {scores}", size=SQUARE),
        table=(["value", "measured accuracy", "standard error", "groups"], rows),
        third=True,
    )


def _histograms(records: Sequence[Record]) -> list[tuple[float, Floats, Floats]]:
    """(step, share of all prompts by value, share of the drawn ones) of the steps that tell."""
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
    """Which difficulties there were and which were drawn, and how many groups could teach."""
    return [
        *_difficulties(_histograms(run.records)),
        *_mixed(run.records),
        *single(
            run.records,
            "reward_mean",
            name="train_reward",
            title="Mean reward of fresh rollouts",
            caption="On the prompts drawn, hence no measure of progress: a schedule holds it near its target.",
        ),
        *share(run.records, "prompts_visited_share", name="prompts_visited_share", title="Prompts drawn at least once"),
    ]


def _difficulties(rows: Sequence[tuple[float, Floats, Floats]]) -> list[Chart]:
    if not rows:
        return []
    x = np.array([step for step, *_ in rows])
    there, drawn = (np.stack([row[i] for row in rows]) for i in (1, 2))
    axes = Axis(label="step"), Axis(label="value", low=0.0, high=1.0, text=percent)
    centers = (np.arange(there.shape[1]) + 0.5) / there.shape[1]
    charts = []
    for name, title, columns, caption in (
        ("value_histogram", "Difficulty of all training prompts", there, "Where the head places the prompts"),
        ("selection", "Difficulty of the prompts drawn", drawn, "What the schedule takes of them"),
    ):
        mean = Line(name="mean", x=x, y=columns @ centers, color=1)
        label = f"{title}: mean value {percent(float(mean.y[0]))} first, {percent(float(mean.y[-1]))} last"
        ends = [[percent(float(columns[i, j])) for i in (0, -1)] for j in range(centers.size)]
        charts.append(
            Chart(
                name=name,
                title=title,
                caption=f"{caption}, from value 0 (never solved) at the bottom to 1 at the top. The line is the mean.",
                svg=heat_map(x, columns, axes, label, size=HEAT, line=mean),
                shades=percent(shade_limit(columns)),
                table=(
                    ["value", f"step {x[0]:.0f}", f"step {x[-1]:.0f}"],
                    [[f"{center:.3f}", *pair] for center, pair in zip(centers.tolist(), ends, strict=True)],
                ),
                third=True,
            )
        )
    half = len(rows) // 2
    lines = [
        Line(name="all prompts", x=centers, y=there[half:].mean(axis=0), color=0, style="thick"),
        Line(name="drawn prompts", x=centers, y=drawn[half:].mean(axis=0), color=1, style="thick"),
    ]
    ax, ay = (
        Axis(label="value (predicted accuracy)", low=0.0, high=1.0, text=percent),
        Axis(label="share of prompts", low=0.0, text=percent),
    )
    drawn_against = Chart(
        name="selection_share",
        title="Drawn against available",
        caption="Second half of the run. Prompts near the target accuracy should be drawn more often than they occur.",
        svg=line_chart(lines, ax, ay, "Share of all prompts and of the drawn prompts by value", size=HEAT),
        legend=[(line.name, line.color) for line in lines],
        table=curve_table(lines, ax, ay),
        third=True,
    )
    return [*charts, drawn_against]


def _mixed(records: Sequence[Record]) -> list[Chart]:
    _, uniform = series(records, "mixed_group_share_uniform")
    more = f" Uniform prompts would give {percent(float(uniform[0]))}." if uniform.size else ""
    return single(
        records,
        "mixed_group_share",
        name="mixed_groups",
        title="Mixed groups",
        caption=f"Share of groups with right and wrong completions. Only those teach.{more}",
        text=percent,
        ends=(0.0, 1.0),
    )


def replay_charts(run: Run) -> list[Chart]:
    """What replay holds: its error and age as heat maps, and how much of it there is."""
    r = run.records
    charts = [
        *_held(
            r,
            "replay_priorities",
            title="Error of what replay holds",
            caption="Priority of each completion: |group accuracy - value| unless set otherwise.",
        ),
        *_held(r, "replay_ages", title="Age of what replay holds", caption="Steps since each was sampled.", whole=True),
    ]
    if not any(chart.name == "replay_ages" for chart in charts):
        title = "Mean age in replay (steps)"
        charts += single(r, "replay_age_mean", name="replay_age_mean", title=title, ends=(0.0, None), size=HEAT)
    if charts:
        title = "Sequences trained on in a step"
        charts += single(r, "trained_sequences", name="trained_sequences", title=title, ends=(0.0, None), size=HEAT)
    return charts


def _held(records: Sequence[Record], key: str, *, title: str, caption: str, whole: bool = False) -> list[Chart]:
    """A heat map of the numbers recorded in each step; `whole` numbers have a row each."""
    steps = [
        (step, known)
        for r in records
        if (step := number(r.get("step"))) and (known := (v := numbers(r.get(key)))[np.isfinite(v)]).size
    ]
    if not steps:
        return []
    most = max(float(v.max()) for _, v in steps)
    low, top, bins = 0.0, max(1.0, most), 20
    if whole:  # rows of as many whole numbers each, around their middle
        rows = int(min(most, 1e6)) + 1
        width = -(-rows // 24)
        bins = -(-rows // width)
        low, top = -0.5, bins * width - 0.5
    columns = np.stack([np.histogram(v, bins=bins, range=(low, top))[0] / v.size for _, v in steps])
    x, mean = np.array([s for s, _ in steps]), np.array([v.mean() for _, v in steps])
    axes = Axis(label="step"), Axis(label="steps" if whole else "priority", low=low, high=top, whole=whole)
    line = Line(name="mean", x=x, y=mean, color=1)
    label = f"{title}: mean {mean[0]:.3g} first, {mean[-1]:.3g} last"
    return [
        Chart(
            name=key,
            title=title,
            caption=f"{caption} The line is the mean.",
            svg=heat_map(x, columns, axes, label, size=HEAT, line=line),
            shades=percent(shade_limit(columns)),
            table=curve_table([Line(name="mean", x=x, y=mean)], axes[0], Axis()),
            third=True,
        )
    ]

"""The charts of what a run is about: held-out learning curves, and the value that predicts, schedules and replays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paced_fast.metrics import brier_score, expected_calibration_error
from paced_fast.report.charts import Chart, curve_table, seconds, share, single
from paced_fast.report.records import Evaluated, Floats, Record, Run, mapping, number, numbers, series
from paced_fast.report.svg import Axis, Line, Size, heat_map, line_chart, percent, reliability

__all__ = ["interval", "learning_charts", "pass_curve", "replay_charts", "schedule_charts", "value_charts"]

SQUARE = Size(width=360, height=372, left=46, right=18, top=10, bottom=40)
HEAT = Size(width=360, height=250, left=44, right=10, top=8, bottom=38)
ROLLOUTS = Axis(label="rollouts", low=0.0)
SECONDS = Axis(label="training time", low=0.0, text=seconds)
SHARE = Axis(text=percent)


def interval(figures: Record, key: str) -> tuple[float, float]:
    """The recorded interval of a figure; nan where there is none."""
    found = numbers(figures.get(f"{key}_interval"))
    return (float(found[0]), float(found[1])) if found.size == 2 else (np.nan, np.nan)


def evaluation_line(
    evaluations: Sequence[Evaluated], key: str, *, clock: bool, name: str, color: int, style: str = "thick"
) -> Line | None:
    """A figure of the evaluations against rollouts or seconds, with its intervals where any is recorded."""
    points = [
        (e.seconds if clock else e.rollouts, y, *interval(e.figures, key))
        for e in evaluations
        if (y := number(e.figures.get(key))) is not None
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
    """Held-out accuracy against rollouts and against time, by slice, and pass@k before and after."""
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
        banded = found[0].low is not None
        charts.append(
            Chart(
                name=f"learning_{where}",
                title=f"Held-out accuracy against {'training time' if clock else 'rollouts'}",
                caption="Thick: the headline slices"
                + (", with the 95 % interval its record gives" if banded else "")
                + (". Thin: every slice." if names else "."),
                svg=line_chart(found, axis, SHARE, _course(found[0], axis)),
                legend=[(line.name, line.color) for line in found],
                table=curve_table(found, axis, SHARE),
            )
        )
    chart = pass_curve([("before", evaluations[0].figures), ("after", evaluations[-1].figures)] if evaluations else [])
    return charts + chart + _over_time(evaluations)


def _course(line: Line, axis: Axis) -> str:
    return (
        f"Held-out accuracy of the {line.name} slices against {axis.label}: {percent(float(line.y[0]))} at "
        f"{axis.write(float(line.x[0]))}, {percent(float(line.y[-1]))} at {axis.write(float(line.x[-1]))}"
    )


def pass_curve(evaluated: Sequence[tuple[str, Record]]) -> list[Chart]:
    """pass@k of evaluations against k, one curve each."""
    lines = []
    for color, (name, figures) in enumerate(evaluated):
        found = {1: number(figures.get("accuracy")), 8: number(figures.get("pass_at_8"))}
        low_high = {1: interval(figures, "accuracy")}
        for key, value in mapping(figures.get("pass_at_k")).items():
            if key.isdecimal():
                found[int(key)] = number(value)
                ends = numbers(mapping(figures.get("pass_at_k_interval")).get(key))
                low_high[int(key)] = (float(ends[0]), float(ends[1])) if ends.size == 2 else (np.nan, np.nan)
        ks = sorted(k for k, value in found.items() if value is not None)
        if len(ks) < 2:
            continue
        low, high = (np.array([low_high.get(k, (np.nan, np.nan))[end] for k in ks]) for end in (0, 1))
        known = bool(np.isfinite(low).any())
        lines.append(
            Line(
                name=name,
                x=np.log2(np.array(ks, np.float64)),
                y=np.array([found[k] for k in ks], np.float64),
                low=low if known else None,
                high=high if known else None,
                color=color,
                dots=True,
                style="thick",
            )
        )
    if not lines or (len(lines) == 2 and np.array_equal(lines[0].y, lines[1].y)):
        lines = lines[:1]
    if not lines:
        return []
    axis = Axis(label="k", text=lambda x: f"{2**x:.3g}")
    label = "pass@k: " + "; ".join(
        f"{line.name} {percent(float(line.y[0]))} to {percent(float(line.y[-1]))}" for line in lines
    )
    return [
        Chart(
            name="pass_at_k",
            title="pass@k on held-out prompts",
            caption="Chance that at least one of k completions is right, unbiased. Where the curve after training "
            "falls below the one before, training traded diversity for accuracy.",
            svg=line_chart(lines, axis, SHARE, label),
            legend=[(line.name, line.color) for line in lines],
            table=curve_table(lines, axis, SHARE),
        )
    ]


def _over_time(evaluations: Sequence[Evaluated]) -> list[Chart]:
    keys = {"pass_at_8": "pass@8", "maj_at_k": "majority vote"}
    lines = [
        line
        for color, (key, name) in enumerate(keys.items())
        if (line := evaluation_line(evaluations, key, clock=False, name=name, color=color)) is not None
    ]
    if not lines or max(line.x.size for line in lines) < 2:
        return []
    return [
        Chart(
            name="pass_at_8",
            title=" and ".join(line.name for line in lines) + " against rollouts",
            caption="On the headline slices.",
            svg=line_chart(lines, ROLLOUTS, SHARE, _course(lines[0], ROLLOUTS)),
            legend=[(line.name, line.color) for line in lines],
            table=curve_table(lines, ROLLOUTS, SHARE),
        )
    ]


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
    parts: list[tuple[str, str, Floats, Floats]] = []
    for name, title, part in (
        ("first", f"Calibration, first {third} steps", steps[:third]),
        ("last", f"Calibration, last {third} steps", steps[len(steps) - third :] if third else []),
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
    scores = f"Brier {brier:.3f}, ECE {ece:.3f}, {value.size:,} groups"
    axes = Axis(label="value (predicted accuracy)", text=percent), Axis(label="measured accuracy", text=percent)
    rows = [[percent(v), percent(a), percent(e), f"{n:,}"] for v, a, e, n in bins]
    return Chart(
        name=f"calibration_{name}",
        title=title,
        caption=f"{scores}. On the dashed line the value predicts accuracy exactly; bars below are numbers of groups.",
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
    ax, ay = Axis(label="value (predicted accuracy)", low=0.0, high=1.0, text=percent), Axis(low=0.0, text=percent)
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
    top, bins = (most + 1, int(min(24, most + 1))) if whole else (max(1.0, most), 20)
    columns = np.stack([np.histogram(v, bins=bins, range=(0, top))[0] / v.size for _, v in steps])
    x, mean = np.array([s for s, _ in steps]), np.array([v.mean() for _, v in steps])
    axes = Axis(label="step"), Axis(label=key, low=0.0, high=float(top))
    line = Line(name="mean", x=x, y=mean + 0.5 if whole else mean, color=1)
    label = f"{title}: mean {mean[0]:.3g} first, {mean[-1]:.3g} last"
    return [
        Chart(
            name=key,
            title=title,
            caption=f"{caption} The line is the mean.",
            svg=heat_map(x, columns, axes, label, size=HEAT, line=line),
            table=curve_table([Line(name="mean", x=x, y=mean)], axes[0], Axis()),
            third=True,
        )
    ]

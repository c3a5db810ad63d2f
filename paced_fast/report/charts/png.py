"""The figures of a run as pictures for a slide or a paper, drawn from its metrics records.

Each function takes the records (dicts, in order of step) and returns a figure, or None when the run has nothing to
show: no learned value, no replay, no evaluation yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from paced_fast.report.read_run import Record, mapping, number, numbers, series

__all__ = ["PLOTS"]

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#0b6e99", "#d9730d", "#4d8f3a", "#ad1a72", "#6940a5", "#b8860b", "#9f5b3f", "#5f6b7a")


def learning_curve(records: Sequence[Record]) -> Figure | None:
    """Held-out accuracy (headline and slices) and pass@8 against rollouts."""
    rows = [(number(r.get("rollouts")) or 0.0, r["eval"]) for r in records if isinstance(r.get("eval"), Mapping)]
    evals = [(x, e) for x, e in rows if isinstance(e, Mapping)]
    if not evals:
        return None
    end = max(1.0, *(x for x, _ in evals))
    slices = sorted({name for _, e in evals for name in mapping(e.get("slices"))})
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, key, title in zip(
        panels, ("accuracy", "pass_at_8"), ("Held-out accuracy", "Held-out pass@8"), strict=True
    ):
        _dress(axes, title, "rollouts")
        for color, name in zip(_cycle(len(slices), start=1), slices, strict=True):
            points = [(x, number(mapping(mapping(e.get("slices")).get(name)).get(key))) for x, e in evals]
            _line(axes, points, color=color, linewidth=1.2, marker=".", markersize=4, alpha=0.85, label=_text(name))
        points = [(x, number(e.get(key))) for x, e in evals]
        _line(axes, points, color=COLORS[0], linewidth=2.6, marker="o", markersize=5, label="headline")
        _share_axis(axes)
        axes.set_xlim(-0.03 * end, 1.03 * end)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, labelcolor=INK)
    return figure


def train_reward(records: Sequence[Record]) -> Figure | None:
    """Mean reward of the freshly sampled completions, step by step."""
    return _noisy_line(records, "reward_mean", "Mean reward of fresh rollouts", share=False)


def mixed_groups(records: Sequence[Record]) -> Figure | None:
    """Share of groups neither all right nor all wrong, with the share under uniform prompts where a run knows it."""
    figure = _noisy_line(records, "mixed_group_share", "Share of mixed groups", share=True)
    baseline = next((b for r in records if (b := number(r.get("mixed_group_share_uniform"))) is not None), None)
    if figure is not None and baseline is not None:
        axes = figure.axes[0]
        axes.axhline(baseline, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            f"uniform prompts: {baseline:.0%}",
            (1, baseline),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=INK,
            backgroundcolor="#ffffffcc",
        )
    return figure


def calibration(records: Sequence[Record]) -> Figure | None:
    """Value predicted before a prompt was sampled against the accuracy then measured, early and late in training."""
    steps = []
    for r in records:
        values, accuracies = numbers(r.get("value_fresh")), numbers(r.get("accuracy_fresh"))
        if values.size == accuracies.size and (known := np.isfinite(values) & np.isfinite(accuracies)).any():
            steps.append((values[known], accuracies[known]))
    if not steps:
        return None
    third = len(steps) // 3
    words = "step" if third == 1 else f"{third} steps"
    parts = {f"first {words}": steps[:third], f"last {words}": steps[-third:]} if third else {}
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (title, part) in zip(
        np.atleast_1d(figure.subplots(1, max(1, len(parts)), sharey=True)),
        (parts or {"all steps": steps}).items(),
        strict=True,
    ):
        values, accuracies = (np.concatenate(column) for column in zip(*part, strict=True))
        _dress(
            axes,
            f"{title}: {values.size:,} group{'' if values.size == 1 else 's'}",
            "value (predicted accuracy)",
            "measured accuracy",
        )
        _calibration_points(axes, values, accuracies)
        axes.label_outer()
    return figure


def _calibration_points(axes: Axes, values: NDArray[np.float64], accuracies: NDArray[np.float64]) -> None:
    index = np.clip(np.floor(values * 10).astype(np.int64), 0, 9)
    filled = [i for i in range(10) if np.any(index == i)]
    x = [values[index == i].mean() for i in filled]
    y = [accuracies[index == i].mean() for i in filled]
    counts = np.array([np.sum(index == i) for i in filled])
    spread = [accuracies[index == i].std() / np.sqrt(n) for i, n in zip(filled, counts, strict=True)]
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
    axes.plot(values, accuracies, ".", color=COLORS[0], alpha=0.3, markersize=4, markeredgewidth=0)
    axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=COLORS[0], elinewidth=1.2)
    axes.scatter(x, y, s=20 + 380 * counts / counts.max(), color=COLORS[0], alpha=0.85, edgecolor="white", zorder=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
    axes.set_aspect("equal")


def value_quality(records: Sequence[Record]) -> Figure | None:
    """Brier score, calibration error and rank correlation of the value, measured before each update."""
    names = {
        "value_brier": "Brier score",
        "value_ece": "calibration error",
        "value_rank_correlation": "rank correlation",
    }
    return _small_multiples(records, names, columns=3)


def value_histogram(records: Sequence[Record]) -> Figure | None:
    """Distribution of the value over all training prompts, one column a step."""
    steps = [(s, h) for r in records if (s := number(r.get("step"))) and (h := numbers(r.get("value_histogram"))).sum()]
    columns = [h / h.sum() for _, h in steps if h.size == steps[0][1].size]
    return _heat_map([s for s, _ in steps], columns, "Value of all training prompts", "value", top=1.0)


def replay_priorities(records: Sequence[Record]) -> Figure | None:
    """Distribution of the priorities held in replay, one column a step."""
    steps = [
        (s, p[np.isfinite(p)])
        for r in records
        if (s := number(r.get("step"))) and np.isfinite(p := numbers(r.get("replay_priorities"))).any()
    ]
    top = max([1.0, *(float(p.max()) for _, p in steps)])
    columns = [np.histogram(p, bins=20, range=(0.0, top))[0] / p.size for _, p in steps]
    return _heat_map([s for s, _ in steps], columns, "Priorities in replay", "priority", top=top)


def seconds_by_phase(records: Sequence[Record]) -> Figure | None:
    """Seconds of each step by phase, stacked."""
    steps = [(s, mapping(r["seconds"])) for r in records if (s := number(r.get("step"))) and "seconds" in r]
    names = list(dict.fromkeys(name for _, seconds in steps for name in seconds))
    layers = {name: np.array([number(seconds.get(name)) or 0.0 for _, seconds in steps]) for name in names}
    layers = {name: layer for name, layer in layers.items() if layer.sum() > 0}
    if not layers:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _dress(axes, "Seconds a step", "step", "seconds")
    total = sum(layers.values())
    labels = [f"{name}  {layer.sum() / np.sum(total):.0%}" for name, layer in layers.items()]
    order = np.array([s for s, _ in steps])
    bottom = np.zeros_like(order)
    for color, label, layer in zip(_cycle(len(layers)), labels, layers.values(), strict=True):
        axes.bar(order, layer, bottom=bottom, width=1.0, color=color, label=_text(label), linewidth=0)
        bottom = bottom + layer
    axes.set_xlim(order[0] - 0.5, order[-1] + 0.5)
    axes.set_ylim(0, 1.1 * float(np.quantile(total, 0.98)))  # a slow first step must not flatten the rest
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], texts[::-1], loc="outside right center", frameon=False, labelcolor=INK)
    return figure


def health(records: Sequence[Record]) -> Figure | None:
    """The numbers to look at first when a run goes wrong."""
    names = {
        "loss": "loss",
        "grad_norm": "gradient norm",
        "entropy": "entropy",
        "mean_length": "tokens a completion",
        "truncated_share": "share of cut completions",
        "log_ratio_mean": "mean log-ratio",
        "kl": "KL to the old policy",
        "generator_mismatch_max": "largest generator mismatch",
        "tokens_per_second": "tokens a second",
    }
    return _small_multiples(records, names, columns=3)


PLOTS: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    draw.__name__: draw
    for draw in (
        learning_curve,
        calibration,
        value_histogram,
        mixed_groups,
        train_reward,
        value_quality,
        replay_priorities,
        seconds_by_phase,
        health,
    )
}
"""By the name of the file without its ending."""


def _noisy_line(records: Sequence[Record], key: str, title: str, *, share: bool) -> Figure | None:
    x, y = series(records, key)
    if not x.size:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _dress(axes, title, "step")
    _draw_smoothed(axes, x, y)
    if share:
        _share_axis(axes)
    return figure


def _small_multiples(records: Sequence[Record], names: Mapping[str, str], *, columns: int) -> Figure | None:
    found = {title: xy for key, title in names.items() if (xy := series(records, key))[0].size}
    if not found:
        return None
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(10, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for i, (axes, (title, (x, y))) in enumerate(zip(panels, found.items(), strict=False)):
        _dress(axes, title, "step" if i + columns >= len(found) else "")
        _draw_smoothed(axes, x, y)
    for axes in list(figure.axes)[len(found) :]:
        axes.set_axis_off()
    return figure


def _heat_map(
    steps: Sequence[float], columns: Sequence[NDArray[np.float64]], title: str, label: str, *, top: float
) -> Figure | None:
    if not columns:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _dress(axes, title, "step", label)
    axes.grid(visible=False)
    image = np.stack(columns, axis=1)
    edges = np.append(np.asarray(steps[: len(columns)]) - 0.5, steps[len(columns) - 1] + 0.5)
    limit = float(np.quantile(image, 0.99)) or float(image.max())  # one full bin must not bleach the others
    norm = PowerNorm(0.5, vmin=0.0, vmax=limit)  # the few prompts between the extremes are the ones of interest
    mesh = axes.pcolormesh(edges, np.linspace(0.0, top, image.shape[0] + 1), image, cmap="GnBu", norm=norm)
    bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(1.0, decimals=0), extend="max", pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]  # the stub types it as a callable
    bar.ax.tick_params(color=MUTED, labelcolor=MUTED)
    return figure


def _draw_smoothed(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    axes.plot(x, y, color=COLORS[0], alpha=0.3, linewidth=1, marker="." if x.size < 3 else None)
    width = max(1, x.size // 15)
    ones = np.ones(width)
    smooth = np.convolve(y, ones, mode="same") / np.convolve(np.ones_like(y), ones, mode="same")
    axes.plot(x, smooth, color=COLORS[0], linewidth=2)


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.tick_params(color=GRID, labelcolor=MUTED)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=not xlabel.startswith("value")))


def _text(label: str) -> str:
    """A label without half characters, which no font can draw, and without a meaning for matplotlib."""
    text = label.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _line(axes: Axes, points: Sequence[tuple[float, float | None]], **style: object) -> None:
    known = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], **style)  # type: ignore[arg-type]


def _cycle(count: int, *, start: int = 0) -> list[str]:
    return [COLORS[(start + i) % len(COLORS)] for i in range(count)]

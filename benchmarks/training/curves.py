"""Statistics and plots of learning curves: means with standard errors, rollouts to reach a level."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paced_fast.report.charts import renderer
from paced_fast.report.charts.chart import COLORS, NUMBER, PERCENT, TIME, Axis, Chart, Line

Floats = NDArray[np.float64]

COLUMNS = (
    "arm",
    "accuracy",
    "paired gain over GRPO",
    "wins",
    "rollouts to GRPO's final",
    "accuracy at equal time",
    "pass@8",
    "distinct",
    "trivial",
    "mixed groups",
    "seconds",
)


def isotonic(values: Floats) -> Floats:
    """Return the non-decreasing sequence closest to `values` [n] in squared error (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, few), (high, many) = blocks[-2], blocks[-1]
            blocks[-2:] = [((low * few + high * many) / (few + many), few + many)]
    return np.concatenate([np.full(count, mean) for mean, count in blocks])


def share_to_reach(grid: Floats, curve: Floats, level: float) -> float | None:
    """Return where the isotonic fit of `curve` on `grid` first reaches `level`, as a share of grid[-1], or None."""
    fitted = isotonic(curve)
    if fitted[-1] < level:
        return None
    k = int(np.argmax(fitted >= level))
    if k == 0:
        return float(grid[0] / grid[-1])
    low, high = fitted[k - 1], fitted[k]
    return float((grid[k - 1] + (level - low) / (high - low) * (grid[k] - grid[k - 1])) / grid[-1])


def at(run: dict[str, Any], axis: str, where: Floats) -> Floats:
    """Interpolate a run's accuracy linearly at the points `where` of `axis` (rollouts or train_seconds)."""
    points = run["curve"]
    return np.interp(where, [point[axis] for point in points], [point["accuracy"] for point in points])


def summarise(name: str, runs: dict[str, list[dict[str, Any]]], budget: int, seconds: float) -> dict[str, Any]:
    """Return one row: means over seeds with standard errors, at the rollout budget unless the key says otherwise."""
    mine, base = runs[name], runs["grpo"]
    grid = np.linspace(0, budget, 25)
    curves = np.stack([at(run, "rollouts", grid) for run in mine])
    base_curves = np.stack([at(run, "rollouts", grid) for run in base])
    final = [run["at_budget"] for run in mine]
    gains = np.array([m["at_budget"]["accuracy"] - b["at_budget"]["accuracy"] for m, b in zip(mine, base, strict=True)])
    low, high = _bootstrap_share(grid, curves, base_curves)
    row: dict[str, Any] = {
        "arm": name,
        "seeds": len(mine),
        "accuracy": _mean(point["accuracy"] for point in final),
        "gain": _mean(gains),
        "wins": int((gains > 0).sum()),
        "share": share_to_reach(grid, curves.mean(0), float(isotonic(base_curves.mean(0))[-1])),
        "share_low": low,
        "share_high": high,
        "accuracy_at_seconds": _mean(at(run, "train_seconds", np.array([seconds]))[0] for run in mine),
        "start": _mean(run["start"]["accuracy"] for run in mine),
        "mixed_group_share": _mean(run["mixed_group_share"] for run in mine),
        "train_seconds": _mean(point["train_seconds"] for point in final),
        "mean_curve": {"rollouts": grid.tolist(), "accuracy": curves.mean(0).tolist()},
    }
    keys = ("pass_at_8", "distinct_correct", "trivial", "value_brier", "value_ece", "value_rank_correlation")
    for key in keys:
        values = [point[key] for point in final if point.get(key) is not None]
        row[key] = _mean(values) if values else None
    return row


def _mean(values: Any) -> dict[str, float | None]:
    """Return mean and standard error over seeds (None with a single seed)."""
    array = np.array(list(values), dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "error": error}


def _bootstrap_share(
    grid: Floats, curves: Floats, base: Floats, rounds: int = 2000
) -> tuple[float | None, float | None]:
    """Return the 5 % and 95 % quantiles of `share_to_reach` over resampled seeds; None if not reached."""
    source = np.random.default_rng(0)
    found = []
    for _ in range(rounds):
        chosen = source.integers(0, len(curves), len(curves))
        share = share_to_reach(grid, curves[chosen].mean(0), float(isotonic(base[chosen].mean(0))[-1]))
        found.append(math.inf if share is None else share)
    low, high = np.quantile(found, [0.05, 0.95], method="nearest")
    return (None if math.isinf(low) else float(low)), (None if math.isinf(high) else float(high))


def cells(row: dict[str, Any]) -> list[str]:
    """Format a row of `summarise` as the `COLUMNS` after the first."""

    def shown(key: str, spec: str = ".3f") -> str:
        value = row[key]
        if value is None:
            return "-"
        error = "" if value["error"] is None else f" +- {value['error']:{spec}}"
        return f"{value['mean']:{spec}}{error}"

    if row["arm"] == "grpo":
        share = "1"
    elif row["share"] is None:
        share = "not reached"
    else:
        low, high = (f"{row[key]:.2f}" if row[key] is not None else "never" for key in ("share_low", "share_high"))
        share = f"{row['share']:.2f} [{low}, {high}]"
    is_base = row["arm"] == "grpo"
    return [
        shown("accuracy"),
        "" if is_base else shown("gain", "+.3f").replace("+- +", "+- "),
        "" if is_base else f"{row['wins']}/{row['seeds']}",
        share,
        shown("accuracy_at_seconds"),
        shown("pass_at_8"),
        shown("distinct_correct", ".2f"),
        shown("trivial"),
        shown("mixed_group_share", ".2f"),
        shown("train_seconds", ".1f"),
    ]


def draw(runs: dict[str, list[dict[str, Any]]], titles: dict[str, str], path: Path) -> None:
    """Plot mean accuracy with a band of one standard error, against rollouts and seconds, as a PNG."""
    charts = []
    for axis, label, unit in (("rollouts", "rollouts", NUMBER), ("train_seconds", "training time", TIME)):
        lines = []
        for k, (name, members) in enumerate(runs.items()):
            end = min(run["curve"][-1][axis] for run in members)
            grid = np.linspace(0, end, 40)
            curves = np.stack([at(run, axis, grid) for run in members])
            mean = curves.mean(0)
            error = curves.std(0, ddof=1) / math.sqrt(len(curves)) if len(curves) > 1 else np.zeros_like(mean)
            look = {"color": k % COLORS, "style": "thick" if k < COLORS else "thin"}  # a colour serves at most two
            lines.append(Line(name=titles[name], x=grid, y=mean, low=mean - error, high=mean + error, **look))
        charts.append(
            Chart(
                name=axis,
                title="Held-out accuracy, medium problems",
                words="",
                x=Axis(label=label, low=0.0, unit=unit),
                y=Axis(label="accuracy", unit=PERCENT),
                lines=lines,
                legend=[(line.name, line.color) for line in lines],
            )
        )
    path.write_bytes(renderer.draw([], {"curves": charts})[1]["curves"])

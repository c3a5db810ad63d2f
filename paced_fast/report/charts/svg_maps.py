"""Charts of shares as SVG text: heat maps, and reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paced_fast.report.charts.svg import (
    Axis,
    Frame,
    Line,
    Size,
    column_width,
    draw_axes,
    draw_curve,
    merged,
    path_of,
    picture,
    with_label,
)
from paced_fast.report.read_run import Floats

__all__ = ["LEVELS", "heat_map", "reliability", "shade_limit"]

LEVELS = 9
"""Shades of a heat map."""
_COLUMNS = 48
"""Columns of a heat map, so that each is an average of enough."""


def shade_limit(columns: Floats) -> float:
    """The share at which a heat map is darkest."""
    return float(np.quantile(columns, 0.99)) or float(columns.max()) or 1.0


def heat_map(
    x: Floats, columns: Floats, axes: tuple[Axis, Axis], label: str, *, size: Size, line: Line | None = None
) -> str:
    """Shares as shades, `columns[i]` over `x[i]` from the bottom up; the darkest is the share that 1 in 100 exceed."""
    x, columns = merged(x, columns, _COLUMNS)
    width = column_width(x)
    low, high = axes[1].low or 0.0, axes[1].high if axes[1].high is not None else 1.0
    size = with_label(size, axes[1])
    frame = Frame(size, (float(x[0]) - width / 2, float(x[-1]) + width / 2), (low, high))
    limit = shade_limit(columns)
    # The square root, so that the few between the extremes, the ones of interest, can be seen.
    levels = np.ceil(LEVELS * np.sqrt(np.clip(columns / limit, 0, 1))).astype(int)
    edges = np.concatenate([[x[0] - width / 2], (x[1:] + x[:-1]) / 2, [x[-1] + width / 2]])
    steps = np.linspace(low, high, columns.shape[1] + 1)
    paths: dict[int, list[str]] = {}
    for i, j in np.argwhere(levels > 0):
        left, right, top, bottom = (
            *(frame.px(float(edges[i + k])) for k in (0, 1)),
            *(frame.py(float(steps[j + k])) for k in (1, 0)),
        )
        cell = f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}"
        paths.setdefault(int(levels[i, j]), []).append(cell)
    body = "".join(f'<path class="h{level}" d="{"".join(cells)}"/>' for level, cells in sorted(paths.items()))
    curve = "" if line is None else draw_curve(frame, line)
    hover = {
        "x": axes[0].label,
        "g": {
            "x": [[frame.px(float(a)), axes[0].write(float(a))] for a in x],
            "y": [[frame.py(float(b)), _row(axes[1], b, t)] for b, t in _pairs(steps)],
            "v": [[round(float(v), 4) for v in column] for column in columns],
        },
    }
    return picture(size, draw_axes(frame, axes[0], axes[1], grid=False) + body + curve, label, hover)


def reliability(
    bins: Sequence[tuple[float, float, float, int]], axes: tuple[Axis, Axis], label: str, *, size: Size
) -> str:
    """Measured against predicted: (mean prediction, mean outcome, standard error, count) of each filled bin.

    A circle's area is the count, its bar one standard error; counts stand below as bars as well.
    """
    strip = 34  # of its own for the bars of the counts, below the points
    size = with_label(size, axes[1])
    plot = Size(size.width, size.height - strip, size.left, size.right, size.top, size.bottom)
    frame = Frame(plot, (0.0, 1.0), (0.0, 1.0))
    most = max(count for *_, count in bins)
    floor, bar = size.height - size.bottom, (frame.px(1.0) - frame.px(0.0)) / 10
    body = [f'<path class="dashed muted" d="{path_of([(frame.px(0), frame.py(0)), (frame.px(1), frame.py(1))])}"/>']
    points = []
    for mean, outcome, error, count in bins:
        a, b = frame.px(mean), frame.py(outcome)
        high, low = frame.py(min(1.0, outcome + error)), frame.py(max(0.0, outcome - error))
        body.append(f'<path class="plain s0" d="M{a:g} {high:g}V{low:g}"/>')
        body.append(f'<circle class="bubble f0" cx="{a:g}" cy="{b:g}" r="{3 + 9 * math.sqrt(count / most):.1f}"/>')
        height = round((strip - 8) * count / most, 1)
        left = frame.px(min(0.9, math.floor(mean * 10) / 10)) + 1.5
        body.append(
            f'<rect class="layer f0" x="{left:g}" y="{floor - height:g}" width="{bar - 3:.1f}" height="{height:g}"/>'
        )
        text = f"{axes[1].write(outcome)} +- {axes[1].write(error)}, {count:,} groups"
        points.append([a, b, axes[0].write(mean), text])
    hover = {"x": axes[0].label, "s": [{"n": axes[1].label, "c": 0, "p": points}]}
    grid = draw_axes(frame, Axis(text=lambda _: ""), axes[1], grid=True)
    below = Frame(size, (0.0, 1.0), (0.0, 1.0))
    labels = draw_axes(below, axes[0], Axis(text=lambda _: ""), grid=False)
    return picture(size, grid + labels + "".join(body), label, hover)


def _row(axis: Axis, low: float, high: float) -> str:
    if not axis.whole:
        return f"{axis.write(low)} to {axis.write(high)}"
    first, last = math.ceil(low), math.floor(high)
    return axis.write(first) if first == last else f"{axis.write(first)} to {axis.write(last)}"


def _pairs(edges: Floats) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))

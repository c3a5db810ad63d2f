"""Charts as SVG text: axes, lines with bands, heat maps, stacks and reliability diagrams.

Colours are classes of the page's style sheet, so a chart follows the reader's light or dark setting. What the pointer
shows is JSON in `data-hover`; without scripts the chart is complete without it. Sizes are in the chart's own units,
about a pixel each.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paced_fast.report.records import Floats

__all__ = [
    "LEVELS",
    "MAX_POINTS",
    "Axis",
    "Line",
    "Size",
    "compact",
    "heat_map",
    "line_chart",
    "percent",
    "reliability",
    "sparkline",
    "stack_chart",
    "stack_top",
]

MAX_POINTS = 240
"""Points of a curve, and columns of a stack, that are drawn; more are averaged."""
LEVELS = 9
"""Shades of a heat map."""


@dataclass(frozen=True, slots=True)
class Size:
    """Outer size of a chart and the room for its axes."""

    width: int = 480
    height: int = 270
    left: int = 46
    right: int = 12
    top: int = 10
    bottom: int = 40


WIDE = Size()
_COLUMNS = 48
"""Columns of a heat map, so that each is an average of enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A direction of a chart; without ends, those of the data."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    text: Callable[[float], str] | None = None
    """How a number is written; `compact` without one."""
    whole: bool = False
    """Ticks at whole numbers alone."""

    def write(self, x: float) -> str:
        """The number as text."""
        return (self.text or compact)(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A curve: points in order of x, with an interval around each where `low` and `high` are given."""

    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    color: int = 0
    style: Literal["thick", "plain", "thin", "raw", "dashed"] = "plain"
    dots: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where data lie in a chart."""

    size: Size
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        inner = self.size.width - self.size.left - self.size.right
        return round(self.size.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * inner, 1)

    def py(self, y: float) -> float:
        inner = self.size.height - self.size.top - self.size.bottom
        return round(self.size.top + (self.y[1] - y) / (self.y[1] - self.y[0]) * inner, 1)


def compact(x: float) -> str:
    """Three digits, with k, M or G for large numbers."""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else "-"
    for scale, least, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e5, "k")):
        if abs(x) >= least:
            return f"{x / scale:.3g}{suffix}"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.1e}".replace(".0e", "e").replace("e-0", "e-")


def percent(x: float) -> str:
    """A share in per cent, with digits behind the point where they tell."""
    if not math.isfinite(x):
        return "-"
    digits = 1 if abs(x) >= 0.01 or x == 0 else 2
    text = f"{100 * x:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.')}%"


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, label: str, *, size: Size = WIDE, marks: str = "") -> str:
    """Curves over a common x. `marks` is SVG drawn behind them (see `_Frame`); `label` says the chart in words."""
    lines = [_thinned(line) for line in lines]
    frame = _Frame(size, _range(x, [line.x for line in lines], pad=0.0), _range(y, _extents(lines), pad=0.06))
    body = [_axes(frame, x, y), marks]
    for line in sorted(lines, key=lambda line: line.style == "thick"):
        body.append(_curve(frame, line))
    hover = [
        {
            "n": line.name,
            "c": line.color,
            "p": [
                [frame.px(a), frame.py(b), x.write(a), y.write(b) + _interval(line, i, y)]
                for i, (a, b) in enumerate(zip(line.x, line.y, strict=True))
            ],
        }
        for line in lines
        if line.style != "raw"
    ]
    return _svg(size, "".join(body), label, {"x": x.label, "s": hover})


def _interval(line: Line, i: int, y: Axis) -> str:
    if line.low is None or line.high is None or not math.isfinite(line.low[i] + line.high[i]):
        return ""
    return f" [{y.write(float(line.low[i]))}, {y.write(float(line.high[i]))}]"


def _curve(frame: _Frame, line: Line) -> str:
    points = [(frame.px(a), frame.py(b)) for a, b in zip(line.x, line.y, strict=True)]
    out = ""
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.low) & np.isfinite(line.high)
        xs = line.x[known]
        upper = [(frame.px(a), frame.py(b)) for a, b in zip(xs, line.high[known], strict=True)]
        lower = [(frame.px(a), frame.py(b)) for a, b in zip(xs, line.low[known], strict=True)]
        if len(xs) > 1:
            out += f'<path class="band f{line.color}" d="{_path([*upper, *lower[::-1]])}Z"/>'
        elif len(xs) == 1:
            out += f'<path class="thin s{line.color}" d="{_path([upper[0], lower[0]])}"/>'
    out += f'<path class="{line.style} s{line.color}" d="{_path(points)}"/>' if len(points) > 1 else ""
    if line.dots or len(points) == 1:
        radius = {"thick": 3.4, "plain": 2.8}.get(line.style, 2)
        out += "".join(f'<circle class="dot f{line.color}" cx="{a:g}" cy="{b:g}" r="{radius}"/>' for a, b in points)
    return out


def stack_top(total: Floats) -> float:
    """Upper end of a stack: of all columns, unless a few are so high that they would flatten the others."""
    high = float(np.quantile(total, 0.97))
    most = float(total.max())
    return 1.05 * (most if most <= 1.5 * high else high) or 1.0


def stack_chart(
    x: Floats, layers: Sequence[tuple[str, Floats]], axes: tuple[Axis, Axis], label: str, *, size: Size = WIDE
) -> str:
    """Layers on top of each other, a column for each x. The highest columns may leave the chart at its upper end."""
    x, columns = _merged(x, np.stack([layer for _, layer in layers], axis=1))
    total = columns.sum(axis=1)
    width = _column_width(x)
    top = axes[1].high if axes[1].high is not None else stack_top(total)
    frame = _Frame(size, (float(x[0]) - width / 2, float(x[-1]) + width / 2), (0.0, top))
    # As steps: flat over a column, with a point at each of its edges.
    edges = np.concatenate([[x[0] - width / 2], (x[1:] + x[:-1]) / 2, [x[-1] + width / 2]])
    across = np.repeat(edges, 2)[1:-1]
    bottom, body = np.zeros_like(total), []
    for index, (_, layer) in enumerate(zip(layers, columns.T, strict=True)):
        lower, upper = (np.repeat(np.minimum(level, top), 2) for level in (bottom, bottom + layer))
        ring = [(frame.px(a), frame.py(b)) for a, b in zip(across, upper, strict=True)]
        ring += [(frame.px(a), frame.py(b)) for a, b in zip(across[::-1], lower[::-1], strict=True)]
        body.append(f'<path class="layer f{index % 8}" d="{_path(ring)}Z"/>')
        bottom = bottom + layer
    hover = [
        {
            "n": name,
            "c": index % 8,
            "p": [
                [frame.px(a), frame.py(min(top, float(b))), axes[0].write(float(a)), axes[1].write(float(v))]
                for a, b, v in zip(x, columns[:, : index + 1].sum(axis=1), columns[:, index], strict=True)
            ],
        }
        for index, (name, _) in reversed(list(enumerate(layers)))
    ]
    ticks = _axes(frame, axes[0], axes[1])
    return _svg(size, ticks + "".join(body), label, {"x": axes[0].label, "s": hover})


def shade_limit(columns: Floats) -> float:
    """The share at which a heat map is darkest."""
    return float(np.quantile(columns, 0.99)) or float(columns.max()) or 1.0


def heat_map(
    x: Floats, columns: Floats, axes: tuple[Axis, Axis], label: str, *, size: Size = WIDE, line: Line | None = None
) -> str:
    """Shares as shades, `columns[i]` over `x[i]` from the bottom up; the darkest is the share that 1 in 100 exceed."""
    x, columns = _merged(x, columns, _COLUMNS)
    width = _column_width(x)
    low, high = axes[1].low or 0.0, axes[1].high if axes[1].high is not None else 1.0
    frame = _Frame(size, (float(x[0]) - width / 2, float(x[-1]) + width / 2), (low, high))
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
    curve = "" if line is None else _curve(frame, line)
    hover = {
        "x": axes[0].label,
        "g": {
            "x": [[frame.px(float(a)), axes[0].write(float(a))] for a in x],
            "y": [
                [frame.py(float(b)), f"{axes[1].write(float(b))} to {axes[1].write(float(t))}"]
                for b, t in _pairs(steps)
            ],
            "v": [[round(float(v), 4) for v in column] for column in columns],
        },
    }
    return _svg(size, _axes(frame, axes[0], axes[1], grid=False) + body + curve, label, hover)


def reliability(
    bins: Sequence[tuple[float, float, float, int]], axes: tuple[Axis, Axis], label: str, *, size: Size
) -> str:
    """Measured against predicted: (mean prediction, mean outcome, standard error, count) of each filled bin.

    A circle's area is the count, its bar one standard error; counts stand below as bars as well.
    """
    strip = 34  # the bars of the counts
    plot = Size(size.width, size.height - strip, size.left, size.right, size.top, size.bottom - 28)
    frame = _Frame(plot, (0.0, 1.0), (0.0, 1.0))
    most = max(count for *_, count in bins)
    floor, bar = size.height - size.bottom, (frame.px(1.0) - frame.px(0.0)) / 10
    body = [f'<path class="dashed muted" d="{_path([(frame.px(0), frame.py(0)), (frame.px(1), frame.py(1))])}"/>']
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
    grid = _axes(frame, Axis(text=lambda _: ""), axes[1], grid=True)
    below = _Frame(size, (0.0, 1.0), (0.0, 1.0))
    labels = _axes(below, axes[0], Axis(text=lambda _: ""), grid=False)
    return _svg(size, grid + labels + "".join(body), label, hover)


def sparkline(y: Floats) -> str:
    """The course of a figure without axes, for a tile."""
    known = y[np.isfinite(y)]
    if known.size < 3:
        return ""
    _, column = _merged(np.arange(known.size, dtype=np.float64), known[:, None], 40)
    values, spread = column[:, 0], float(np.ptp(column)) or 1.0
    points = [
        (round(2 + 96 * i / (values.size - 1), 1), round(22 - 18 * (float(v) - float(values.min())) / spread, 1))
        for i, v in enumerate(values)
    ]
    return (
        f'<svg class="spark" viewBox="0 0 100 26" aria-hidden="true"><path class="plain s0" d="{_path(points)}"/></svg>'
    )


def _svg(size: Size, body: str, label: str, hover: object) -> str:
    data = html.escape(json.dumps(hover, separators=(",", ":"), ensure_ascii=True))
    return (
        f'<svg class="chart" viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{html.escape(label)}" '
        f'data-hover="{data}">{body}<path class="cross" d=""/></svg>'
    )


def _axes(frame: _Frame, x: Axis, y: Axis, *, grid: bool = True) -> str:
    size = frame.size
    bottom, right = size.height - size.bottom, size.width - size.right
    out = []
    for tick in _ticks(*frame.y, count=5):
        at = frame.py(tick)
        line = f'<path class="grid" d="M{size.left} {at:g}H{right}"/>' if grid else ""
        text = html.escape(y.write(tick))
        out.append(f'{line}<text class="t e" x="{size.left - 7}" y="{at + 4:g}">{text}</text>' if text else line)
    for tick in _ticks(*frame.x, count=5, whole=x.whole or x.label == "step"):
        at, text = frame.px(tick), html.escape(x.write(tick))
        out.append(f'<text class="t m" x="{at:g}" y="{bottom + 16}">{text}</text>' if text else "")
    out.append(f'<path class="axis" d="M{size.left} {bottom}H{right}"/>' if x.text is None or x.label else "")
    middle = (size.left + right) / 2
    out.append(f'<text class="t m" x="{middle:g}" y="{size.height - 5}">{html.escape(x.label)}</text>')
    return "".join(out)


def _ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(axis: Axis, values: Sequence[Floats], *, pad: float) -> tuple[float, float]:
    """The ends of an axis: those given, else those of the finite data and a little more."""
    known = np.concatenate([v[np.isfinite(v)] for v in values] or [np.zeros(1)])
    known = known if known.size else np.zeros(1)
    low, high = float(known.min()), float(known.max())
    room = pad * (high - low)
    low = axis.low if axis.low is not None else low - room
    high = axis.high if axis.high is not None else high + room
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):  # a point, or a constant
        room = 0.1 * abs(low) or 1.0
        low, high = (low if axis.low is not None else low - room), max(low, high) + room
    return low, high


def _extents(lines: Sequence[Line]) -> list[Floats]:
    """What must be in sight: the curves and their intervals; of raw points only what is not far outside."""
    found = []
    for line in lines:
        if line.style == "raw" and line.y.size > 20:
            found.append(np.quantile(line.y, [0.01, 0.99]))
            continue
        found += [part for part in (line.y, line.low, line.high) if part is not None]
    return found


def _thinned(line: Line) -> Line:
    if line.x.size <= MAX_POINTS:
        return line
    parts = [line.y, *(part for part in (line.low, line.high) if part is not None)]
    x, merged = _merged(line.x, np.stack(parts, axis=1))
    low, high = (merged[:, 1], merged[:, 2]) if len(parts) == 3 else (None, None)
    return Line(
        name=line.name, x=x, y=merged[:, 0], low=low, high=high, color=line.color, style=line.style, dots=line.dots
    )


def _merged(x: Floats, columns: Floats, most: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """Means over neighbours, so that at most `most` are left."""
    if x.size <= most:
        return x, columns
    starts = np.linspace(0, x.size, most + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(columns, starts, axis=0) / counts[:, None]


def _column_width(x: Floats) -> float:
    """Of columns at `x`: a step recorded twice, or out of order, must not leave them without any."""
    gaps = np.diff(x)
    gaps = gaps[gaps > 0]
    return float(gaps.min()) if gaps.size else 1.0


def _pairs(edges: Floats) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points)

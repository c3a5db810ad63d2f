"""Charts as SVG text: axes, lines with bands and stacks; `maps` has heat maps and reliability diagrams.

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

from paced_fast.report.read_run import Floats

__all__ = [
    "MAX_POINTS",
    "Axis",
    "Frame",
    "Line",
    "Size",
    "column_width",
    "compact",
    "draw_axes",
    "draw_curve",
    "line_chart",
    "merged",
    "path_of",
    "percent",
    "picture",
    "sparkline",
    "stack_chart",
    "stack_top",
    "with_label",
]

MAX_POINTS = 240
"""Points of a curve, and columns of a stack, that are drawn; more are averaged."""


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
class Frame:
    """Where data lie in a chart."""

    size: Size
    x: tuple[float, float]
    y: tuple[float, float]
    only: float | None = None
    """The one x there is, which then stands in the middle."""

    def px(self, x: float) -> float:
        """Of an x, from the left."""
        inner = self.size.width - self.size.left - self.size.right
        return round(self.size.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * inner, 1)

    def py(self, y: float) -> float:
        """Of a y, from the top."""
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
    """Curves over a common x. `marks` is SVG drawn behind them (see `Frame`); `label` says the chart in words."""
    lines = [_thinned(line) for line in lines]
    places = {float(at) for line in lines for at in line.x}
    only = places.pop() if len(places) == 1 else None
    across = _range(x, [line.x for line in lines], pad=0.0) if only is None else (only - 1.0, only + 1.0)
    size = with_label(size, y)
    frame = Frame(size, across, _range(y, _extents(lines), pad=0.06), only)
    body = [draw_axes(frame, x, y), marks]
    for line in sorted(lines, key=lambda line: line.style == "thick"):
        body.append(draw_curve(frame, line))
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
    return picture(size, "".join(body), label, {"x": x.label, "s": hover})


def _interval(line: Line, i: int, y: Axis) -> str:
    if line.low is None or line.high is None or not math.isfinite(line.low[i] + line.high[i]):
        return ""
    return f" [{y.write(float(line.low[i]))}, {y.write(float(line.high[i]))}]"


def draw_curve(frame: Frame, line: Line) -> str:
    """A curve with its band and its dots."""
    points = [(frame.px(a), frame.py(b)) for a, b in zip(line.x, line.y, strict=True)]
    out = ""
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.low) & np.isfinite(line.high)
        xs = line.x[known]
        upper = [(frame.px(a), frame.py(b)) for a, b in zip(xs, line.high[known], strict=True)]
        lower = [(frame.px(a), frame.py(b)) for a, b in zip(xs, line.low[known], strict=True)]
        if len(xs) > 1:
            out += f'<path class="band f{line.color}" d="{path_of([*upper, *lower[::-1]])}Z"/>'
        elif len(xs) == 1:
            out += f'<path class="thin s{line.color}" d="{path_of([upper[0], lower[0]])}"/>'
    out += f'<path class="{line.style} s{line.color}" d="{path_of(points)}"/>' if len(points) > 1 else ""
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
    x, columns = merged(x, np.stack([layer for _, layer in layers], axis=1))
    total = columns.sum(axis=1)
    width = column_width(x)
    top = axes[1].high if axes[1].high is not None else stack_top(total)
    size = with_label(size, axes[1])
    frame = Frame(size, (float(x[0]) - width / 2, float(x[-1]) + width / 2), (0.0, top))
    # As steps: flat over a column, with a point at each of its edges.
    edges = np.concatenate([[x[0] - width / 2], (x[1:] + x[:-1]) / 2, [x[-1] + width / 2]])
    across = np.repeat(edges, 2)[1:-1]
    bottom, body = np.zeros_like(total), []
    for index, (_, layer) in enumerate(zip(layers, columns.T, strict=True)):
        lower, upper = (np.repeat(np.minimum(level, top), 2) for level in (bottom, bottom + layer))
        ring = [(frame.px(a), frame.py(b)) for a, b in zip(across, upper, strict=True)]
        ring += [(frame.px(a), frame.py(b)) for a, b in zip(across[::-1], lower[::-1], strict=True)]
        body.append(f'<path class="layer f{index % 8}" d="{path_of(ring)}Z"/>')
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
    ticks = draw_axes(frame, axes[0], axes[1])
    return picture(size, ticks + "".join(body), label, {"x": axes[0].label, "s": hover})


def sparkline(y: Floats) -> str:
    """The course of a figure without axes, for a tile."""
    known = y[np.isfinite(y)]
    if known.size < 3:
        return ""
    _, column = merged(np.arange(known.size, dtype=np.float64), known[:, None], 40)
    values, spread = column[:, 0], float(np.ptp(column)) or 1.0
    points = [
        (round(2 + 96 * i / (values.size - 1), 1), round(22 - 18 * (float(v) - float(values.min())) / spread, 1))
        for i, v in enumerate(values)
    ]
    path = f'<path class="plain s0" d="{path_of(points)}"/>'
    return f'<svg class="spark" viewBox="0 0 100 26" aria-hidden="true">{path}</svg>'


def picture(size: Size, body: str, label: str, hover: object) -> str:
    """The SVG element: `body`, what it says in words, and what the pointer shows."""
    data = html.escape(json.dumps(hover, separators=(",", ":"), ensure_ascii=True))
    return (
        f'<svg class="chart" viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{html.escape(label)}" '
        f'data-hover="{data}">{body}<path class="cross" d=""/></svg>'
    )


def with_label(size: Size, y: Axis) -> Size:
    """A size with room above for the name of the vertical axis, where it has one."""
    more = 22 if y.label else 0
    return Size(size.width, size.height + more, size.left, size.right, size.top + more, size.bottom)


def draw_axes(frame: Frame, x: Axis, y: Axis, *, grid: bool = True) -> str:
    """Ticks with their numbers, the grid, and the names of both directions."""
    size = frame.size
    bottom, right = size.height - size.bottom, size.width - size.right
    out = []
    out.append(f'<text class="t" x="2" y="{size.top - 14}">{html.escape(y.label)}</text>' if y.label else "")
    for tick in _ticks(*frame.y, count=5, whole=y.whole):
        at = frame.py(tick)
        line = f'<path class="grid" d="M{size.left} {at:g}H{right}"/>' if grid else ""
        text = html.escape(y.write(tick))
        out.append(f'{line}<text class="t e" x="{size.left - 7}" y="{at + 4:g}">{text}</text>' if text else line)
    places = _ticks(*frame.x, count=5, whole=x.whole or x.label == "step") if frame.only is None else [frame.only]
    for tick in places:
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
    room = pad * (high - (low if axis.low is None else min(low, axis.low)))
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
    x, means = merged(line.x, np.stack(parts, axis=1))
    low, high = (means[:, 1], means[:, 2]) if len(parts) == 3 else (None, None)
    return Line(
        name=line.name, x=x, y=means[:, 0], low=low, high=high, color=line.color, style=line.style, dots=line.dots
    )


def merged(x: Floats, columns: Floats, most: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """Means over neighbours, so that at most `most` are left."""
    if x.size <= most:
        return x, columns
    starts = np.linspace(0, x.size, most + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(columns, starts, axis=0) / counts[:, None]


def column_width(x: Floats) -> float:
    """Of columns at `x`: a step recorded twice, or out of order, must not leave them without any."""
    gaps = np.diff(x)
    gaps = gaps[gaps > 0]
    return float(gaps.min()) if gaps.size else 1.0


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """Points as the path through them."""
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points)

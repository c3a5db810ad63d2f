"""Description of a chart: a title; curves, stacked layers or shades over two axes; the same numbers as a table.

A description holds data in their own units; `renderer` draws it for the page and for image files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from paced_fast.report.read_run import Floats, Record, series

COLORS = 8
"""Colours in the style sheet, and so the most layers of a stack."""
MAX_POINTS = 240
"""Most points of a curve, or columns of a stack, that are drawn; neighbours are averaged if there are more."""
_HEAT_COLUMNS = 48
"""Most columns of a heat map; few, so that each averages many steps."""


def compact(x: float) -> str:
    """Format with three digits, and k, M or G for large numbers."""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else "-"
    for scale, least, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e5, "k")):
        if abs(x) >= least:
            return f"{x / scale:.3g}{suffix}"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.1e}".replace(".0e", "e").replace("e-0", "e-")


def percent(x: float) -> str:
    """Format a share in per cent, with decimals only where they matter."""
    if not math.isfinite(x):
        return "-"
    digits = 1 if abs(x) >= 0.01 or x == 0 else 2
    text = f"{100 * x:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.')}%"


def seconds(x: float) -> str:
    """Format a duration in its two largest units."""
    if x < 60:
        return f"{x:.3g} s"
    minutes, rest = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def gibibytes(x: float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{x / 2**30:.3g} GiB" if abs(x) >= 2**30 else f"{x / 2**20:.3g} MiB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Number format of an axis."""

    text: Callable[[float], str]
    """Format under the pointer and in tables."""
    tick: str = (
        "datum.value && abs(datum.value) < 1e-3 ? format(datum.value, '.2~e') : "
        "format(datum.value, abs(datum.value) < 1e5 ? ',.5~r' : '.3~s')"
    )
    """Format at the ticks: a Vega expression."""
    scales: Sequence[tuple[float, str]] = ()
    """(size, name) of units, largest first; ticks use the first unit that fits twice into the end of the axis."""


NUMBER = Unit(text=compact)
PERCENT = Unit(text=percent, tick="format(datum.value, '~%')")
TIME = Unit(text=seconds, scales=((3600.0, "h"), (60.0, "min"), (1.0, "s")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of a chart; an end that is None is taken from the data."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    unit: Unit = NUMBER
    whole: bool = False
    """Place ticks only at whole numbers."""
    ticks: Sequence[float] = ()
    """Positions of the ticks; if empty, round numbers."""

    def write(self, x: float) -> str:
        """Format a number of this axis."""
        return self.unit.text(x)

    def row_name(self, low: float, high: float) -> str:
        """Name an interval of the axis: the whole numbers in it, or its ends."""
        first, last = (math.ceil(low), math.floor(high)) if self.whole else (low, high)
        return self.write(first) if first == last else f"{self.write(first)} to {self.write(last)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A curve: points in order of x, with an interval around each where `low` and `high` are given.

    Styles `raw`, `dashed` (a straight reference line) and `bars` (each from `low` up to y) are in the background: the
    pointer and the table ignore them. `bubbles` are points without a line, with intervals drawn as bars.
    """

    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    color: int = 0
    style: Literal["thick", "plain", "thin", "raw", "dashed", "bubbles", "bars"] = "plain"
    dash: Sequence[int] = ()
    """Lengths of dashes and gaps in pixels, by which curves can be told apart without colours; empty for none."""
    dots: bool = False
    sizes: Floats | None = None
    """Areas of bubbles, relative to the largest."""
    texts: Sequence[str] = ()
    """Text under the pointer at each point; if empty, y and its interval."""

    @property
    def in_background(self) -> bool:
        """Whether the pointer and the table ignore this line."""
        return self.style in ("raw", "dashed", "bars")

    def thinned(self) -> Line:
        """Return the line reduced to the points that are drawn."""
        parts = [part for part in (self.y, self.low, self.high) if part is not None]
        x, (y, *ends) = (found.T for found in merged(self.x, np.stack(parts, axis=1)))
        low, high = ends or (None, None)
        return self if x.size == self.x.size else replace(self, x=x, y=y, low=low, high=high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Layers stacked on top of each other, one column per x."""

    x: Floats
    layers: Mapping[str, Floats]

    def columns(self) -> tuple[Floats, Floats]:
        """Return x and the drawn values, one column per layer."""
        return merged(self.x, np.stack(list(self.layers.values()), axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Shares as shades: `shares[i]` is the column at `x[i]`, in rows of equal height from the low end of y upwards."""

    x: Floats
    shares: Floats

    def columns(self) -> tuple[Floats, Floats]:
        """Return x and the shares that are drawn."""
        return merged(self.x, self.shares, _HEAT_COLUMNS)

    @property
    def darkest(self) -> float:
        """Share from which all shades are the darkest: the 99th percentile."""
        return float(np.quantile(self.shares, 0.99)) or float(self.shares.max()) or 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Description of one chart, from which both the page and the image files are drawn."""

    name: str  # stable, used in links
    title: str
    x: Axis
    y: Axis
    words: str
    """Text alternative for readers who do not see the picture."""
    caption: str = ""
    lines: Sequence[Line] = ()
    stack: Stack | None = None
    heat: Heat | None = None
    legend: Sequence[tuple[str, int]] = ()
    """Names and numbers of colours."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Head and rows; None = the points of the curves."""
    third: bool = False
    """Place three charts per row instead of two."""
    width: int = 0
    height: int = 0
    """Width and height in pixels; 0 = the default."""
    bare: bool = False
    """Omit the axes."""

    def numbers(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Return the head and the rows of the table."""
        return curve_table(self.lines, self.x, self.y) if self.table is None else self.table


def curve_table(lines: Sequence[Line], x: Axis, y: Axis, most: int = 40) -> tuple[list[str], list[list[str]]]:
    """Table of the points of curves: one row per x of any curve, thinned evenly to at most `most` rows."""
    lines = [line for line in lines if not line.in_background]
    xs = sorted({float(a) for line in lines for a in line.x})
    if len(xs) > most:
        xs = [xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)]
    known = [dict(zip(line.x.tolist(), line.y.tolist(), strict=True)) for line in lines]
    rows = [[x.write(a), *(y.write(found[a]) if a in found else "" for found in known)] for a in xs]
    return [x.label, *(line.name for line in lines)], rows


def merged(x: Floats, columns: Floats, most: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """Average neighbours so that at most `most` points are left."""
    if x.size <= most:
        return x, columns
    starts = np.linspace(0, x.size, most + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(columns, starts, axis=0) / counts[:, None]


def column_edges(x: Floats) -> Floats:
    """Edges of columns at `x`; the outer columns keep a width even if a step is recorded twice or out of order."""
    gaps = np.diff(x)
    gaps = gaps[gaps > 0]
    half = float(gaps.min()) / 2 if gaps.size else 0.5
    return np.concatenate([[x[0] - half], (x[1:] + x[:-1]) / 2, [x[-1] + half]])


def running_mean(y: Floats) -> Floats:
    """Running mean over a window of 1/15 of the points; at the ends, over the points that exist."""
    ones = np.ones(max(1, y.size // 15))
    return np.convolve(y, ones, mode="same") / np.convolve(np.ones_like(y), ones, mode="same")


def single(
    records: Sequence[Record],
    *keys: str,
    title: str,
    name: str = "",
    caption: str = "",
    unit: Unit = NUMBER,
    ends: tuple[float | None, float | None] = (None, None),
    height: int = 0,
    above: float = 0.0,
    rare: bool = False,
) -> list[Chart]:
    """Chart of one figure over the steps, as the excess over `above`; no chart if the run lacks the figure.

    The chart is named after the figure unless `name` is given.
    A `rare` figure is 0 in most runs; a run in which it is always 0 gets no chart.
    """
    x, y = series(records, *keys)
    y = y - above
    if not x.size or (rare and not y.any()):
        return []
    lines = [Line(name=title, x=x, y=running_mean(y), dots=x.size < 12)]
    if x.size >= 30:  # with fewer, the window is a single step
        lines.insert(0, Line(name="every step", x=x, y=y, style="raw"))
    ax, ay = Axis(label="step", whole=True), Axis(low=ends[0], high=ends[1], unit=unit)
    words = f"{title} over the steps: {ay.write(float(y[0]))} first, {ay.write(float(y[-1]))} last"
    return [
        Chart(
            name=name or keys[-1],
            title=title,
            x=ax,
            y=ay,
            words=words,
            caption=caption,
            lines=lines,
            third=True,
            height=height,
        )
    ]


def share(records: Sequence[Record], key: str, *, title: str, rare: bool = False) -> list[Chart]:
    """Chart of one share over the steps, with the axis starting at 0."""
    return single(records, key, title=title, unit=PERCENT, ends=(0.0, None), rare=rare)

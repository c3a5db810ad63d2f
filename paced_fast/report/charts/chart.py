"""What a chart is: a title, curves, stacked layers or shades over two axes, and the same numbers as a table.

A description holds data in their own units; `renderer` draws it, for a page and for a file alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from paced_fast.report.read_run import Floats, Record, series

COLORS = 8
"""Of the style sheet; a stack has no more layers."""
MAX_POINTS = 240
"""Points of a curve, and columns of a stack, that are drawn; more are averaged."""
_HEAT_COLUMNS = 48
"""Columns of a heat map, so that each is an average of enough."""


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


def seconds(x: float) -> str:
    """A duration in its two largest units."""
    if x < 60:
        return f"{x:.3g} s"
    minutes, rest = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def gibibytes(x: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{x / 2**30:.3g} GiB" if abs(x) >= 2**30 else f"{x / 2**20:.3g} MiB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """How the numbers of an axis are written."""

    text: Callable[[float], str]
    """Under the pointer and in tables."""
    tick: str = (
        "datum.value && abs(datum.value) < 1e-3 ? format(datum.value, '.2~e') : "
        "format(datum.value, abs(datum.value) < 1e5 ? ',.5~r' : '.3~s')"
    )
    """At the axis: an expression of Vega."""
    scales: Sequence[tuple[float, str]] = ()
    """Sizes and names, the largest first; the ticks are in the first that the end of the axis holds twice."""


NUMBER = Unit(text=compact)
PERCENT = Unit(text=percent, tick="format(datum.value, '~%')")
TIME = Unit(text=seconds, scales=((3600.0, "h"), (60.0, "min"), (1.0, "s")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A direction of a chart; without ends, those of the data."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    unit: Unit = NUMBER
    whole: bool = False
    """Ticks at whole numbers alone."""
    ticks: Sequence[float] = ()
    """Where there are ticks; without them, at round numbers."""

    def write(self, x: float) -> str:
        """The number as text."""
        return self.unit.text(x)

    def row_name(self, low: float, high: float) -> str:
        """A part of the axis in words: the whole numbers in it, or its ends."""
        first, last = (math.ceil(low), math.floor(high)) if self.whole else (low, high)
        return self.write(first) if first == last else f"{self.write(first)} to {self.write(last)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A curve: points in order of x, with an interval around each where `low` and `high` are given.

    `raw` is in the background and not under the pointer, as are `dashed` (a straight line to compare with) and `bars`
    (each from `low` up to y); `bubbles` are points alone, their intervals drawn as bars.
    """

    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    color: int = 0
    style: Literal["thick", "plain", "thin", "raw", "dashed", "bubbles", "bars"] = "plain"
    dots: bool = False
    sizes: Floats | None = None
    """Areas of bubbles, as shares of the largest."""
    texts: Sequence[str] = ()
    """What stands under the pointer at each point; without them, y and its interval."""

    @property
    def in_background(self) -> bool:
        """Whether the pointer and the table pass over it."""
        return self.style in ("raw", "dashed", "bars")

    def thinned(self) -> Line:
        """The line through the points that are drawn."""
        parts = [part for part in (self.y, self.low, self.high) if part is not None]
        x, (y, *ends) = (found.T for found in merged(self.x, np.stack(parts, axis=1)))
        low, high = ends or (None, None)
        return self if x.size == self.x.size else replace(self, x=x, y=y, low=low, high=high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Layers on top of each other, a column for each x."""

    x: Floats
    layers: Mapping[str, Floats]

    def columns(self) -> tuple[Floats, Floats]:
        """x and, one column a layer, the values that are drawn."""
        return merged(self.x, np.stack(list(self.layers.values()), axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Shares as shades: `shares[i]` stand over `x[i]`, in rows of equal height from the low end of y up."""

    x: Floats
    shares: Floats

    def columns(self) -> tuple[Floats, Floats]:
        """x and the shares that are drawn."""
        return merged(self.x, self.shares, _HEAT_COLUMNS)

    @property
    def darkest(self) -> float:
        """The share from which on shades no longer differ: the one that 1 in 100 exceed."""
        return float(np.quantile(self.shares, 0.99)) or float(self.shares.max()) or 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One description from which the page and the files are drawn."""

    name: str  # stable, for links
    title: str
    x: Axis
    y: Axis
    words: str
    """What the picture says, for those who do not see it."""
    caption: str = ""
    lines: Sequence[Line] = ()
    stack: Stack | None = None
    heat: Heat | None = None
    legend: Sequence[tuple[str, int]] = ()
    """Names and colours."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Head and rows; without them, the points of the curves."""
    third: bool = False
    """Three to a row instead of two."""
    width: int = 0
    height: int = 0
    """In pixels; without them, those of most charts."""
    bare: bool = False
    """Whether the axes are left out."""

    def numbers(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """The table: head and rows."""
        return curve_table(self.lines, self.x, self.y) if self.table is None else self.table


def curve_table(lines: Sequence[Line], x: Axis, y: Axis, most: int = 40) -> tuple[list[str], list[list[str]]]:
    """The points of curves as a table, every x where some curve has one; evenly thinned to `most` rows."""
    lines = [line for line in lines if not line.in_background]
    xs = sorted({float(a) for line in lines for a in line.x})
    if len(xs) > most:
        xs = [xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)]
    known = [dict(zip(line.x.tolist(), line.y.tolist(), strict=True)) for line in lines]
    rows = [[x.write(a), *(y.write(found[a]) if a in found else "" for found in known)] for a in xs]
    return [x.label, *(line.name for line in lines)], rows


def merged(x: Floats, columns: Floats, most: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """Means over neighbours, so that at most `most` are left."""
    if x.size <= most:
        return x, columns
    starts = np.linspace(0, x.size, most + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(columns, starts, axis=0) / counts[:, None]


def column_edges(x: Floats) -> Floats:
    """Where columns at `x` meet; a step recorded twice, or out of order, must not leave the outer ones no width."""
    gaps = np.diff(x)
    gaps = gaps[gaps > 0]
    half = float(gaps.min()) / 2 if gaps.size else 0.5
    return np.concatenate([[x[0] - half], (x[1:] + x[:-1]) / 2, [x[-1] + half]])


def running_mean(y: Floats) -> Floats:
    """Means over a fifteenth of the points around each; at the ends over those there are."""
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
    """A chart of one figure over the steps, as far as it is `above` a level; none where the run does not have it.

    Named like the figure, unless given a name.
    A `rare` figure is 0 in most runs, and a run in which it always was has nothing to show.
    """
    x, y = series(records, *keys)
    y = y - above
    if not x.size or (rare and not y.any()):
        return []
    lines = [Line(name=title, x=x, y=running_mean(y), dots=x.size < 12)]
    if x.size >= 30:  # else the mean is over single steps
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
    """A chart of one share over the steps, from 0."""
    return single(records, key, title=title, unit=PERCENT, ends=(0.0, None), rare=rare)

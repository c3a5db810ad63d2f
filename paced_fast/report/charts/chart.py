"""What a chart on the page consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paced_fast.report.charts.svg import Axis, Line, Size, line_chart, percent
from paced_fast.report.read_run import Floats, Record, series

THIRD = Size(width=360, height=200, left=44, right=10, top=8, bottom=38)


_COLORS = 8
"""Of the style sheet; a stack has no more layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A titled picture with its legend, what to see in it, and its numbers as a table."""

    name: str
    """Stable, for links."""
    title: str
    svg: str
    caption: str = ""
    legend: Sequence[tuple[str, int]] = ()
    """Names and colours."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())
    """Head and rows."""
    shades: str = ""
    """Of a heat map: the share its darkest shade begins at."""
    third: bool = False
    """Three to a row instead of two."""


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


def curve_table(lines: Sequence[Line], x: Axis, y: Axis, most: int = 40) -> tuple[list[str], list[list[str]]]:
    """The points of curves as a table, every x where some curve has one; evenly thinned to `most` rows."""
    lines = [line for line in lines if line.style != "raw"]
    xs = sorted({float(a) for line in lines for a in line.x})
    if len(xs) > most:
        xs = [xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)]
    known = [dict(zip(line.x.tolist(), line.y.tolist(), strict=True)) for line in lines]
    rows = [[x.write(a), *(y.write(found[a]) if a in found else "" for found in known)] for a in xs]
    return [x.label, *(line.name for line in lines)], rows


def smoothed(x: Floats, y: Floats, name: str, color: int = 0) -> list[Line]:
    """Every step, and the mean of its neighbours where there are enough to need one."""
    width = max(1, x.size // 15)
    if width == 1:
        return [Line(name=name, x=x, y=y, color=color, dots=x.size < 12)]
    ones = np.ones(width)
    mean = np.convolve(y, ones, mode="same") / np.convolve(np.ones_like(y), ones, mode="same")
    return [Line(name="every step", x=x, y=y, color=color, style="raw"), Line(name=name, x=x, y=mean, color=color)]


def single(
    records: Sequence[Record],
    *keys: str,
    name: str,
    title: str,
    caption: str = "",
    text: Callable[[float], str] | None = None,
    ends: tuple[float | None, float | None] = (None, None),
    size: Size = THIRD,
) -> list[Chart]:
    """A chart of one figure over the steps; none where the run does not have it."""
    x, y = series(records, *keys)
    if not x.size:
        return []
    lines = smoothed(x, y, title)
    ax, ay = Axis(label="step"), Axis(low=ends[0], high=ends[1], text=text)
    label = f"{title} over the steps: {ay.write(float(y[0]))} first, {ay.write(float(y[-1]))} last"
    svg = line_chart(lines, ax, ay, label, size=size)
    table = curve_table(lines, ax, ay)
    return [Chart(name=name, title=title, svg=svg, caption=caption, table=table, third=True)]


def share(records: Sequence[Record], *keys: str, name: str, title: str, caption: str = "") -> list[Chart]:
    """A chart of one share over the steps, from 0."""
    return single(records, *keys, name=name, title=title, caption=caption, text=percent, ends=(0.0, None))

"""Draw charts: a description becomes a Vega-Lite specification, then an SVG for a page or a part of a PNG.

An SVG refers to the colours of the page's style sheet, so it follows the reader's light or dark setting. Names of the
run are in the page around it, not in the SVG. A PNG uses the light colours and includes title and legend.
"""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from paced_fast.report.charts.chart import Axis, Chart, Line, column_edges, percent
from paced_fast.report.read_run import HIDDEN, Floats

logger = logging.getLogger(__name__)

LEVELS = 9
"""Number of shades of a heat map."""
_WIDTHS = {"thick": 2.6, "plain": 1.9, "thin": 1.3, "raw": 1.0, "dashed": 1.3, "bubbles": 1.9, "bars": 21.0}
_OPACITIES = {"thin": 0.75, "raw": 0.3, "dashed": 0.7, "bubbles": 0.85, "bars": 0.35}
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, sans-serif"
_LONGEST = 40
"""Most characters of a name in a picture."""
_PROGRAM = Path(__file__).with_name("render_process.py")
_SECONDS = 600
"""Time limit of the drawing process: hundreds of times what it normally takes."""

Spec = dict[str, Any]
Ends = tuple[float, float]


def draw(
    charts: Sequence[Chart], pictures: Mapping[str, Sequence[Chart]] | None = None
) -> tuple[dict[str, Markup], dict[str, bytes]]:
    """Return an SVG per chart name, and a PNG for each of `pictures` with its charts side by side.

    A chart that cannot be drawn is left out and logged.
    """
    light = _light()
    page = {name: f"var(--{name})" for name in light}
    jobs: dict[tuple[str, str], Spec] = {}
    for kind, wanted in (("svg", {chart.name: [chart] for chart in charts}), ("png", pictures or {})):
        for name, parts in wanted.items():
            try:
                spec = specification(parts[0], page) if kind == "svg" else _beside(parts, light)
                json.dumps(spec, allow_nan=False)
                jobs[kind, name] = spec
            except Exception:  # keep the other charts
                logger.exception("chart %s.%s could not be drawn", name, kind)
    drawn = _drawn([(kind, spec) for (kind, _), spec in jobs.items()])
    svgs, pngs = {}, {}
    for (kind, name), found in zip(jobs, drawn, strict=True):
        if "error" in found:
            logger.error("chart %s.%s could not be drawn: %s", name, kind, found["error"])
        elif "svg" in found:
            svgs[name] = _inline(found["svg"])
        elif "png" in found:
            pngs[name] = b64decode(found["png"])
    return svgs, pngs


def _drawn(jobs: Sequence[tuple[str, Spec]]) -> list[dict[str, str]]:
    """Draw in a separate process: `svg`, `png` in base 64, or `error` per job; {} for jobs it did not reach."""
    command = [sys.executable, "-P", str(_PROGRAM)]
    found: list[dict[str, str]] = []
    try:
        done = subprocess.run(
            command,
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            start_new_session=True,  # Ctrl-C is for the run, which decides what it ends
        )
        told = f"status {done.returncode}: {' '.join(done.stderr.split())[:400]}"
        found += map(json.loads, done.stdout.splitlines())
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        told = str(error)
    if missing := len(jobs) - len(found):
        logger.error("%d of %d charts could not be drawn: the drawing process ended (%s)", missing, len(jobs), told)
    return found + [{}] * missing


def _light() -> dict[str, str]:
    """Light-mode colours of the style sheet by name."""
    style = files("paced_fast.report").joinpath("templates/colors.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#\w{6})", style[: style.index("}")]))


def _inline(svg: str) -> Markup:
    """Inline SVG for a page: full width, coordinates with two decimals, unused parts removed."""
    root = ElementTree.fromstring(re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2))
    plot = root.find(".//path[@class='background']")  # the pointer script needs its position
    for parent in list(root.iter()):
        for child in list(parent):
            if child is not plot and child.get("class") in ("background", "foreground"):
                parent.remove(child)
    for node in root.iter():
        kept = {k: v for k, v in node.items() if not k.startswith(("aria", "class", "role", "pointer", "font-family"))}
        node.attrib.clear()
        node.attrib.update(
            {k: _FRACTION.sub(_short, v) for k, v in kept.items()} | ({"class": "plot"} if node is plot else {})
        )
    for name in ("width", "height", "version"):
        root.attrib.pop(name)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_FRACTION = re.compile(r"-?\d+\.\d{3,}(e-\d+)?")


def _short(found: re.Match[str]) -> str:
    return f"{round(float(found.group()), 2):g}"


# Specifications


def specification(chart: Chart, colors: Mapping[str, str]) -> Spec:
    """Vega-Lite of a chart for a page, which itself adds title, legend and caption."""
    fit = {"type": "fit", "contains": "padding"}
    return {**_view(chart, colors), "config": _config(colors), "background": None, "padding": 3, "autosize": fit}


def _beside(charts: Sequence[Chart], colors: Mapping[str, str]) -> Spec:
    """Vega-Lite of charts side by side in one picture, with titles and legends."""
    views = []
    for chart in charts:
        view = _view(chart, colors)
        named: dict[str, str] = {}
        for name, color in chart.legend:
            named[_plain(name) + " (again)" * (_plain(name) in named)] = colors[f"c{color}"]
        dashes = {_plain(line.name): line.dash for line in chart.lines if line.dash}
        view["layer"] += [_legend(named, dashes)] if named else []
        shades = f"darkest: {percent(chart.heat.darkest)} or more of a step" if chart.heat else ""
        views.append({**view, "title": {"text": _plain(chart.title), "subtitle": shades}})
    own = {"color": "independent", "strokeDash": "independent"}
    apart = {"scale": own, "legend": own}
    columns = 3 if len(views) > 2 else 2
    whole = {"config": _config(colors), "background": colors["card"], "padding": 20, "spacing": 32, "resolve": apart}
    return {"concat": views, "columns": columns, **whole}


def _plain(text: str) -> str:
    """Make a name safe for a picture: invisible characters become their numbers, and long names are cut."""
    shown = HIDDEN.sub(lambda found: f"U+{ord(found.group()):04X}", text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."


def _config(colors: Mapping[str, str]) -> Spec:
    text = {"labelColor": colors["soft"], "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}
    axis = {**text, "titleColor": colors["soft"], "gridColor": colors["grid"], "domainColor": colors["line"]}
    axis |= {"ticks": False, "labelPadding": 7, "tickCount": 5}
    title = {"anchor": "start", "color": colors["ink"], "subtitleColor": colors["soft"], "fontSize": 14, "offset": 22}
    return {
        "aria": False,
        "font": _FONT,
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False, "labelFlush": False, "labelSeparation": 14, "titlePadding": 9},
        "axisY": {"domain": False, "minExtent": 38, "labelOverlap": False},
        "legend": {**text, "orient": "bottom", "columns": 4, "title": None, "symbolOpacity": 1, "labelLimit": 260},
        "title": title,
    }


def _legend(named: Mapping[str, str], dashes: Mapping[str, Sequence[int]]) -> Spec:
    """Legend, attached to invisible marks: squares, or strokes if some of the names have dashes."""
    scale = {"domain": list(named), "range": list(named.values())}
    look: Spec = {"color": {"field": "name", "type": "nominal", "scale": scale}}
    if dashes:
        long = {"symbolSize": 900, "symbolStrokeWidth": 2}  # so that a stroke shows more than one dash
        strokes = {"domain": list(named), "range": [list(dashes.get(name) or (1, 0)) for name in named]}
        look["strokeDash"] = {"field": "name", "type": "nominal", "scale": strokes, "legend": long}
        look["color"]["legend"] = long
    return {
        "data": {"values": [{"name": name} for name in named]},
        "mark": {"type": "line" if dashes else "square", "opacity": 0},
        "encoding": {"x": {"value": 0}, "y": {"value": 0}, **look},
    }


def _view(chart: Chart, colors: Mapping[str, str]) -> Spec:
    """Axes and all marks of a chart."""
    across, up, only = _ends(chart)
    x, by_x = _channel("x", chart.x, across, {"values": [only]} if only is not None else {})
    y, by_y = _channel("y", chart.y, up, _ABOVE | {"grid": chart.heat is None})
    layers = [*_columns(chart, colors)]
    for line in sorted((line.thinned() for line in chart.lines), key=lambda line: line.style == "thick"):
        layers += _curve(line, colors["soft"] if line.style == "dashed" else colors[f"c{line.color}"], up)
    for row in (row for layer in layers for row in layer["data"]["values"]):
        row |= {
            k: row[k] / by
            for k, by in (("x", by_x), ("x2", by_x), ("y", by_y), ("low", by_y), ("high", by_y))
            if k in row
        }
    if chart.bare:
        x["axis"] = y["axis"] = None
    width, height = (360, 200) if chart.third else (480, 270)
    height = (chart.height or height) + (22 if chart.y.label else 0)
    return {"width": chart.width or width, "height": height, "encoding": {"x": x, "y": y}, "layer": layers}


_ABOVE = {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": -38, "titleY": -12}
"""Place the label of a vertical axis horizontally above it."""


def _channel(name: str, axis: Axis, ends: Ends, look: Spec) -> tuple[Spec, float]:
    """Encoding of one axis, and the size of the unit of its ticks."""
    scales = axis.unit.scales or ((1.0, ""),)
    by, unit = next((scale for scale in scales if ends[1] >= 2 * scale[0]), scales[-1])
    title = _plain(axis.label) + (f" ({unit})" if unit else "")
    look = {"title": title or None, "labelExpr": axis.unit.tick} | look
    look |= {"tickMinStep": 1} if axis.whole else {}
    look |= {"values": list(axis.ticks), "tickCount": 2 * len(axis.ticks)} if axis.ticks else {}
    look |= {"values": [value / by for value in look["values"]]} if "values" in look else {}
    scale = {"domain": [end / by for end in ends], "nice": False, "zero": False}
    return {"field": name, "type": "quantitative", "scale": scale, "axis": look}, by


def _mark(mark: str, color: str, columns: Mapping[str, Floats], encoding: Spec, **look: object) -> Spec:
    """Layer with its own data."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    values = [dict(zip(columns, row, strict=True)) for row in rows]
    return {"data": {"values": values}, "mark": {"type": mark, "color": color, **look}, "encoding": encoding}


_FROM_LOW_TO_HIGH = {"y": {"field": "low"}, "y2": {"field": "high"}}


def _own(field: str) -> Spec:
    """Encoding of a field whose values are used as they are, without a scale."""
    return {"field": field, "type": "quantitative", "scale": None, "legend": None}


def _columns(chart: Chart, colors: Mapping[str, str]) -> Iterator[Spec]:
    """Shades of a heat map, or layers of a stack, cut off at the end of the axis."""
    _, (low, top), _ = _ends(chart)
    if chart.heat is not None:
        x, shares = chart.heat.columns()
        edges, rows = column_edges(x), np.linspace(low, top, shares.shape[1] + 1)
        # Square root: makes the small shares between the extremes visible, which are of most interest.
        levels = np.ceil(LEVELS * np.sqrt(np.clip(shares / chart.heat.darkest, 0, 1)))
        i, j = np.nonzero(levels)
        shade = np.round(0.08 + 0.92 * (levels[i, j] / LEVELS) ** 1.2, 2)
        cells = {"x": edges[i], "x2": edges[i + 1], "low": rows[j], "high": rows[j + 1], "shade": shade}
        more = {"x2": {"field": "x2"}, "opacity": _own("shade")}
        yield _mark("rect", colors["heat"], cells, _FROM_LOW_TO_HIGH | more)
    if chart.stack is not None:
        x, columns = chart.stack.columns()
        heights = np.concatenate([columns, columns[-1:]])  # close the last column at its own edge
        bounds = np.minimum(np.pad(np.cumsum(heights, axis=1), ((0, 0), (1, 0))), top)
        for i, (lower, upper) in enumerate(pairwise(bounds.T)):
            layer = {"x": column_edges(x), "low": lower, "high": upper}
            yield _mark("area", colors[f"c{i}"], layer, _FROM_LOW_TO_HIGH, interpolate="step-after", opacity=0.9)


def _curve(line: Line, color: str, up: Ends) -> Iterator[Spec]:
    """Marks of a curve, its interval and its dots."""
    points = {"x": line.x, "y": np.clip(line.y, *up)}  # a page clips nothing: a spike would cross other charts
    look = {"strokeWidth": _WIDTHS[line.style], "opacity": _OPACITIES.get(line.style, 1)}
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.low) & np.isfinite(line.high)
        low, high = np.clip(line.low[known], *up), np.clip(line.high[known], *up)
        interval = {"x": line.x[known], "low": low, "high": high}
        if line.style in ("bubbles", "bars") or known.sum() == 1:
            yield _mark("rule", color, interval, _FROM_LOW_TO_HIGH, **look)
        else:
            yield _mark("area", color, interval, _FROM_LOW_TO_HIGH, opacity=0.16)
    if line.style == "bars":
        return
    if line.x.size > 1 and line.style != "bubbles":
        lengths = [4, 4] if line.style == "dashed" else list(line.dash)
        dash = {"strokeDash": lengths} if lengths else {}
        yield _mark("line", color, points, {}, strokeJoin="round", strokeCap="round", **dash, **look)
    if line.sizes is not None:
        area = np.pi * (3 + 9 * np.sqrt(line.sizes)) ** 2
        yield _mark("circle", color, {**points, "area": area}, {"size": _own("area")}, opacity=look["opacity"])
    elif line.dots or line.x.size == 1:
        radius = {"thick": 3.4, "plain": 2.8}.get(line.style, 2.0)
        yield _mark("circle", color, points, {}, size=math.pi * radius**2, opacity=1)


# Ends of the axes, and data for the pointer


def _ends(chart: Chart) -> tuple[Ends, Ends, float | None]:
    """Return the ends of both axes, and x if there is only one (it is then centred)."""
    if (columns := chart.heat or chart.stack) is not None:
        edges = column_edges(columns.columns()[0])
        top = 1.0 if chart.y.high is None else chart.y.high
        return (float(edges[0]), float(edges[-1])), (chart.y.low or 0.0, top), None
    lines = [line.thinned() for line in chart.lines]
    up = _range(chart.y, _extents(lines), pad=0.06)
    places = {float(at) for line in lines for at in line.x}
    if len(places) == 1:
        (only,) = places
        return (only - 1.0, only + 1.0), up, only
    return _range(chart.x, [line.x for line in lines], pad=0.0), up, None


def _extents(lines: Sequence[Line]) -> list[Floats]:
    """Values that must be visible: curves and their intervals; raw points without outliers (1 % at either end)."""
    raw = [line.style == "raw" and line.y.size > 20 for line in lines]
    found = [np.quantile(line.y, [0.01, 0.99]) for line, far in zip(lines, raw, strict=True) if far]
    parts = (part for line, far in zip(lines, raw, strict=True) if not far for part in (line.y, line.low, line.high))
    return found + [part for part in parts if part is not None]


def _range(axis: Axis, values: Sequence[Floats], *, pad: float) -> Ends:
    """Return the ends of an axis: as given, else those of the finite data with a margin."""
    known = np.concatenate([v[np.isfinite(v)] for v in values] or [np.zeros(1)])
    known = known if known.size else np.zeros(1)
    low, high = float(known.min()), float(known.max())
    room = pad * (high - (low if axis.low is None else min(low, axis.low)))
    low = axis.low if axis.low is not None else low - room
    high = axis.high if axis.high is not None else high + room
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):  # a single point or a constant
        room = 0.1 * abs(low) or 1.0
        low, high = (low if axis.low is not None else low - room), max(low, high) + room
    return low, high


def pointer(chart: Chart) -> Spec:
    """Pointer data by position: x as a share of the plot's width, rows of a heat map counted from the bottom."""
    across, up, _ = _ends(chart)

    def places(values: Floats, ends: Ends) -> list[float]:
        return np.round((values - ends[0]) / (ends[1] - ends[0]), 4).tolist()

    if chart.heat is not None:
        x, shares = chart.heat.columns()
        rows = np.linspace(*up, shares.shape[1] + 1)
        names = [chart.y.row_name(low, high) for low, high in pairwise(rows.tolist())]
        grid = {"x": list(zip(places(x, across), map(chart.x.write, x.tolist()), strict=True)), "y": names}
        return {"x": chart.x.label, "g": grid | {"v": np.round(shares, 4).tolist()}}
    if chart.stack is not None:
        x, columns = chart.stack.columns()
        found = list(enumerate(zip(chart.stack.layers, columns.T, strict=True)))
        lines = [Line(name=name, x=x, y=layer, color=i) for i, (name, layer) in reversed(found)]
    else:
        lines = [line.thinned() for line in chart.lines if not line.in_background]
    series = []
    for line in lines:
        texts = line.texts or [chart.y.write(y) + _interval(line, i, chart.y) for i, y in enumerate(line.y.tolist())]
        points = list(zip(places(line.x, across), map(chart.x.write, line.x.tolist()), texts, strict=True))
        series.append({"n": line.name, "c": line.color, "p": points})
    return {"x": chart.x.label, "s": series}


def _interval(line: Line, i: int, y: Axis) -> str:
    if line.low is None or line.high is None or not math.isfinite(line.low[i] + line.high[i]):
        return ""
    return f" [{y.write(float(line.low[i]))}, {y.write(float(line.high[i]))}]"

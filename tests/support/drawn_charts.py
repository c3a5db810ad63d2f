"""What a drawn chart shows, read from its SVG in shares of the plot: 0 is left or bottom, 1 is right or top."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from paced_fast.report.charts import renderer
from paced_fast.report.charts.chart import Chart

EMPTY = '<svg width="1" height="1" version="1.1" viewBox="0 0 1 1"><path class="background" d="M0,0h1v1h-1Z"/></svg>'


def draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are described and specified, and the process that draws them, most of a report's time, is left out."""

    def drawn(jobs: Sequence[tuple[str, Any]]) -> list[dict[str, str]]:
        json.dumps(jobs, allow_nan=False)
        return [{kind: EMPTY if kind == "svg" else "ZHJhd24="} for kind, _ in jobs]

    monkeypatch.setattr(renderer, "_drawn", drawn)


@dataclass(frozen=True)
class Mark:
    """A line, area, cell or dot, by its colour and where its corners, or its middle, lie."""

    color: str
    opacity: float
    points: list[tuple[float, float]]
    dot: bool


def marks(chart: Chart) -> list[Mark]:
    """Of a chart, in the order in which they are drawn; the colour is its name in the style sheet."""
    svgs, _ = renderer.draw([chart])
    root = ElementTree.fromstring(svgs[chart.name])
    plot = root.find(".//path[@class='plot']")
    assert plot is not None
    width, height = (float(x) for x in re.findall(r"[\d.]+", plot.get("d", ""))[2:4])

    def place(x: float, y: float) -> tuple[float, float]:
        return round(x / width, 3), round(1 - y / height, 3)

    found = []
    for node in root.iter():
        name = re.fullmatch(r"var\(--(c\d|heat|soft)\)", node.get("stroke") or node.get("fill") or "")
        if name is None or node.tag == "text":
            continue
        at = [float(x) for x in _NUMBER.findall(node.get("transform", ""))] or [0.0, 0.0]
        dot = node.tag == "path" and "transform" in node.attrib
        if node.tag == "line":
            points = [place(*at), place(at[0] + float(node.get("x2", 0)), at[1] + float(node.get("y2", 0)))]
        else:
            points = [place(*at)] if dot else [place(*p) for p in _corners(node.get("d", ""))]
        found.append(Mark(name.group(1), float(node.get("opacity", 1)), points, dot))
    return found


_NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def _corners(path: str) -> list[tuple[float, float]]:
    x = y = 0.0
    points = []
    for command, rest in re.findall(r"([MLhvHV])([^MLhvHVZ]*)", path):
        numbers = [float(n) for n in _NUMBER.findall(rest)]
        if command in "ML":
            x, y = numbers
        else:
            x, y = (x + numbers[0], y) if command == "h" else (x, y + numbers[0])
        points.append((x, y))
    return points


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")

"""The parts a page is put together from: document, tiles, figures, tables."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paced_fast.errors import InputError
from paced_fast.report.charts.chart import Chart
from paced_fast.report.charts.svg_maps import LEVELS
from paced_fast.report.style import POLICY, SCRIPT, STYLE

__all__ = [
    "Section",
    "Tile",
    "counted",
    "document",
    "figures",
    "notes",
    "pairs_table",
    "shown",
    "table",
    "tiles",
    "write_page",
]

ARROW = "\u2192"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A headline figure: HTML of the number, of the line below, and of a picture."""

    name: str
    text: str
    sub: str = ""
    picture: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with an entry in its navigation."""

    name: str
    title: str
    body: str
    lead: str = ""


def document(*, title: str, state: str, top: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML that needs nothing beside it and asks nobody for anything."""
    links = "".join(f'<a href="#{part.name}">{html.escape(part.title)}</a>' for part in sections)
    parts = "".join(
        f'<section id="{part.name}"><h2>{html.escape(part.title)}</h2>'
        + (f'<p class="lead">{html.escape(part.lead)}</p>' if part.lead else "")
        + f"{part.body}</section>"
        for part in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{html.escape(title)}</h1><div class="state">{state}</div></header>'
        f'<nav aria-label="Parts of the page">{links}</nav>{top}{parts}'
        f'</main><div id="tip" aria-hidden="true"></div><script>{SCRIPT}</script></body></html>\n'
    )


def write_page(path: Path, text: str) -> None:
    """Writes a page; half a character, of a folder's name or a setting, stands there by its number.

    Raises InputError when that cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"the page cannot be written to {path}: {error.strerror or error}") from error


def tiles(items: Sequence[Tile]) -> str:
    """The headline figures."""
    cards = "".join(
        f'<div class="card tile"><span class="name">{html.escape(item.name)}</span><b>{item.text}</b>'
        f'{item.picture}<span class="sub">{item.sub}</span></div>'
        for item in items
    )
    return f'<div class="tiles">{cards}</div>' if items else ""


def notes(lines: Sequence[str]) -> str:
    """What a reader must not miss."""
    return f'<ul class="notes">{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def figures(charts: Sequence[Chart]) -> str:
    """Charts side by side, large ones first, each with its numbers as a table."""
    charts = sorted(charts, key=lambda chart: chart.third)
    return f'<div class="grid">{"".join(_figure(chart) for chart in charts)}</div>' if charts else ""


def _figure(chart: Chart) -> str:
    keys = "".join(f'<span><i class="k{color}"></i>{html.escape(name)}</span>' for name, color in chart.legend)
    if chart.shades:
        scale = "".join(f'<i class="h{level}"></i>' for level in range(1, LEVELS + 1))
        keys += f"<span>share of a step: 0 {scale} {html.escape(chart.shades)} or more</span>"
    head, rows = chart.table
    data = f'<details class="data"><summary>numbers</summary><div>{table(head, rows)}</div></details>' if rows else ""
    caption = f"<figcaption>{html.escape(chart.caption)}</figcaption>" if chart.caption else ""
    return (
        f'<figure class="card {"third" if chart.third else "wide"}" id="chart-{html.escape(chart.name)}">'
        f"<h3>{html.escape(chart.title)}</h3>"
        + (f'<div class="legend">{keys}</div>' if keys else "")
        + f"{chart.svg}{caption}{data}</figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, changed: bool = False) -> str:
    """A table of plain texts; with `changed` the last column stands out."""
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{html.escape(cell)}</th>'
            if i == 0
            else f"<td{' class=changed' if changed and i == len(row) - 1 else ''}>{html.escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if any(head) else ''}<tbody>{body}</tbody></table>"


def pairs_table(rows: Mapping[str, object]) -> str:
    """Names and values."""
    if not rows:
        return '<p class="none">not written yet</p>'
    plain = [[key, shown(value)] for key, value in rows.items() if not isinstance(value, Mapping | list) or not value]
    nested = "".join(
        f"<details><summary>{html.escape(key)}</summary><pre>{html.escape(json.dumps(value, indent=1))}</pre></details>"
        for key, value in rows.items()
        if isinstance(value, Mapping | list) and value
    )
    return table((), plain) + nested


def counted(count: int, what: str) -> str:
    """So many of something, in words that fit one as well."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def shown(value: object) -> str:
    """A value as text; long numbers shortened to what a reader compares."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)

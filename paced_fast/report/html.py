"""Build pages from `templates/`, which escape all values from a run unless they are `Markup` from a template."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from paced_fast.errors import InputError
from paced_fast.report.charts.chart import Chart, percent
from paced_fast.report.charts.renderer import LEVELS, pointer

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Headline figure: the number, a line below it, and a small curve."""

    name: str
    text: str
    sub: str = ""
    course: Chart | None = None
    warns: bool = False
    """Whether the figure is out of its usual range."""


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("paced_fast.report")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters["options"] = options
    templates.globals |= {
        "levels": range(1, LEVELS + 1),
        "middot": Markup(" &middot; "),
        "percent": percent,
        "pointer": lambda chart: json.dumps(pointer(chart), separators=(",", ":")),
    }
    return templates


def options(text: str) -> Markup:
    """Escape a text; an option in it is broken at its dots only, since a break behind `--` reads as another word."""

    def whole(found: re.Match[str]) -> str:
        return "<wbr>".join(f'<span class="option">{word}</span>' for word in re.split(r"(?<=\.)", found[0]))

    return Markup(re.sub(r"--[a-z][a-z0-9-]*(\.[a-z0-9-]+)*", whole, str(escape(text))))


def part(name: str, *values: object, **named: object) -> Markup:
    """Render a macro of parts.html."""
    return getattr(_templates().get_template("parts.html").module, name)(*values, **named)


def document(template: str, bodies: Mapping[str, Markup], *, refresh: int = 0, **shown: object) -> str:
    """Render a self-contained HTML page; parts without a body are left out. With `refresh` it loads itself again after
    so many seconds.

    Its content security policy forbids fetching and any script but the page's own, whatever a completion contains.
    """
    folder = files("paced_fast.report") / "templates"
    names = ("colors.css", "style.css", "hover.js", "nav.js", "refresh.js")
    colors, style, *scripts = (Markup(folder.joinpath(name).read_text(encoding="utf-8")) for name in names)
    script = Markup("").join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = _templates().get_template(template)
    return page.render(policy=policy, style=colors + style, script=script, bodies=bodies, refresh=refresh, **shown)


def write_page(path: Path, text: str) -> None:
    """Replace a page; a reader sees the old one or the new one. Lone surrogates (from folder names or settings) are
    written as escapes.

    Raises InputError if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"the page cannot be written to {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def pairs_table(rows: Mapping[str, object]) -> Markup:
    """Table of names and values; nested values are folded."""
    if not rows:
        return part("absent", "not written yet")
    nested = {key: value for key, value in rows.items() if isinstance(value, Mapping | list) and value}
    plain = [[key, shown(value)] for key, value in rows.items() if key not in nested]
    return part("pairs", plain, [(key, json.dumps(value, indent=1)) for key, value in nested.items()])


def shown(value: object) -> str:
    """Format a value as text; long numbers are rounded."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value) or "none"
    return value if isinstance(value, str) else json.dumps(value) if value or isinstance(value, bool) else "none"

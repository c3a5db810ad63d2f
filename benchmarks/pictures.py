"""Learning curves of the suites, drawn from their committed runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.training.efficiency import curves, files, sections, suites, summary
from benchmarks.training.efficiency.summary import Row


def place(suite: str) -> Path:
    """Path of the picture of a suite, beside the folder of its runs."""
    return sections.ROOT / f"{suite}.png"


def draw_all() -> None:
    """Draw the curves of every suite that has runs; the same runs give the same bytes."""
    for name in suites.NAMES:
        rows = summary.rows(name, files.read_all(sections.ROOT, name))
        if rows:
            curves.draw({row.arm: list(row.runs.values()) for row in rows}, place(name))


def first(found: Mapping[str, list[Row]]) -> Path | None:
    """Picture of the first suite that has runs, if it has been drawn."""
    return next((place(name) for name, rows in found.items() if rows and place(name).is_file()), None)

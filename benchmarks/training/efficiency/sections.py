"""Sections of the READMEs that are made from run files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.efficiency import files, summary, table
from benchmarks.training.efficiency.summary import Row

ROOT = Path(__file__).parents[2] / "results" / "sample_efficiency"
"""Folder of the committed run files."""


@dataclass(frozen=True)
class RunFiles:
    """Part of a README that is generated from the run files of suites."""

    suites: tuple[str, ...]
    """Suites whose runs it reads."""
    make: Callable[[dict[str, list[Row]]], str]
    """Function from the rows of each suite to Markdown."""
    root: Path = ROOT
    """Folder with a folder for each suite."""
    case = "sample_efficiency"
    module = files.CODE

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The runs of each suite."""
        return {name: files.read_all(self.root, name) for name in self.suites}

    def commits(self) -> list[str]:
        """Commits at which they were measured."""
        return sorted({run["environment"]["commit"] for runs in self.read().values() for run in runs})

    def text(self) -> str:
        """Markdown of the section; it says which suites have no runs."""
        return self.make({name: summary.rows(name, runs) for name, runs in self.read().items()})


def suite_table(suites: dict[str, list[Row]]) -> str:
    """Format everything about one suite."""
    ((name, rows),) = suites.items()
    return table.full(name, rows, f"../benchmarks/results/sample_efficiency/{name}.png")

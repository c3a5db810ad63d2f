"""Sections of the READMEs that are made from run files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.efficiency import files, table

ROOT = Path(__file__).parents[2] / "results" / "sample_efficiency"
"""Folder of the committed run files."""

RunsOfSuites = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class RunFiles:
    """Part of a README that is generated from the run files of suites."""

    suites: tuple[str, ...]
    """Suites whose runs it reads."""
    make: Callable[[RunsOfSuites], str]
    """Function from the runs of each suite to Markdown."""
    root: Path = ROOT
    """Folder with a folder for each suite."""
    case = "sample_efficiency"
    module = files.CODE

    def read(self) -> RunsOfSuites:
        """The runs of each suite."""
        return {name: files.read_all(self.root, name) for name in self.suites}

    def commits(self) -> list[str]:
        """Commits at which they were measured."""
        return sorted({run["environment"]["commit"] for runs in self.read().values() for run in runs})

    def text(self) -> str:
        """Markdown of the section; it says which suites have no runs."""
        return self.make(self.read())


def suite_table(runs: RunsOfSuites) -> str:
    """Format everything about one suite."""
    ((name, members),) = runs.items()
    return table.full(name, members, f"../benchmarks/results/sample_efficiency/{name}.png")

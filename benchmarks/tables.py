"""Write the tables of the READMEs from the committed results: `python -m benchmarks.tables`.

The learning curves are drawn too. `--check` only compares. `--stale` lists the tables whose code has changed since they
were measured. A section is the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; it is left unchanged if its
result file is missing. The tables of sample_efficiency are made from the files of its runs, and say which have none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pictures, run, stale
from benchmarks.pages import faults, loss, models, rewards, training, tree
from benchmarks.training.efficiency import sections, suites, table
from benchmarks.training.efficiency.sections import RunFiles
from benchmarks.training.efficiency.summary import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


_PAGES = (
    *("data-and-rewards", "evaluation", "model-types", "other-trainers", "results"),
    *("scaling-and-reliability", "vllm"),
)
READMES = (ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _PAGES))
"""Pages with generated sections."""


def comparison(found: dict[str, list[Row]]) -> str:
    """Format the short comparison of the algorithms, with the learning curves of the first suite that has a picture."""
    text, path = table.short(found), pictures.first(found)
    return text if path is None else f"{text}\n\n![learning curves]({path.relative_to(ROOT).as_posix()})"


@dataclass(frozen=True)
class Section:
    """Part of a README that is generated from the result of a case."""

    case: str
    """Case of `benchmarks.run` that measures it."""
    make: Callable[[dict[str, Any]], str]
    """Function from the result to Markdown."""
    file: str = ""
    """Name of the committed result; empty = name of the case."""

    @property
    def path(self) -> Path:
        """Path of the committed result."""
        return RESULTS / (self.file or f"{self.case}.json")

    @property
    def module(self) -> str:
        """Module whose code makes the section stale when it changes."""
        return f"benchmarks.{run.CASES[self.case][0]}"

    def commits(self) -> list[str]:
        """Commits at which it was measured; none while there is no result."""
        return [json.loads(self.path.read_text())["environment"]["commit"]] if self.path.is_file() else []

    def text(self) -> str | None:
        """Markdown of the section; None while there is no result."""
        return self.make(json.loads(self.path.read_text())) if self.path.is_file() else None


SECTIONS: dict[str, Section | RunFiles] = {
    "sample_efficiency": RunFiles(suites.NAMES, comparison),
    **{f"sample_efficiency_{name}": RunFiles((name,), sections.suite_table) for name in suites.NAMES},
    "tiny": Section("train_tiny", training.train_run),
    "kernels": Section("trajectory_balance", loss.kernels),
    "logprobs": Section("logprobs", loss.kernels),
    "peaked": Section("peaked", loss.peaked_policies),
    "compile": Section("compile", loss.compiled),
    "priority_tree": Section("priority_tree", tree.priority_tree),
    "weight_sync": Section("weight_sync", training.weight_sync),
    "math_rewards": Section("math_rewards", rewards.math_rewards),
    "sandbox": Section("sandbox", rewards.sandbox),
    "model_types": Section("model_types", models.model_types),
    "integrations": Section("integrations", training.integrations),
    "trainer": Section("trainer", training.trainer),
    "trainer_longer": Section("trainer", training.trainer, "trainer_longer.json"),
    "end_to_end": Section("end_to_end", training.end_to_end),
    "sampling": Section("sampling", training.sampled),
    "faults": Section("faults", faults.faults),
}
"""Sections by the name in their marks."""


def render(text: str) -> str:
    """Return `text` with every generated section replaced."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        made = section.text() if found else None
        if made is not None:
            text = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    return text


def stale_lines() -> list[str]:
    """Return a line for each section whose code has changed since its measurement, or whose commit is unknown."""
    lines = []
    for name, section in SECTIONS.items():
        for commit in section.commits():
            changed = stale.changed_since(commit, section.module)
            if changed is None:
                lines.append(f"{name}: measured at {commit}, which is not in this clone")
            elif changed:
                shown = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
                lines.append(f"{name}: files changed since {commit}: {len(changed)}: {shown}")
    return lines


def main() -> None:
    """Entry point; exit status 1 if `--check` finds an outdated README."""
    unknown = set(sys.argv[1:]) - {"--check", "--stale"}
    if unknown:
        sys.stderr.write(f"error: unknown option {min(unknown)!r}: the options are --check and --stale\n")
        raise SystemExit(2)
    if "--stale" in sys.argv:
        print("\n".join(stale_lines()) or "every table was measured with the present code")
        return
    if "--check" not in sys.argv:
        pictures.draw_all()
    is_current = True
    for path in READMES:
        old = path.read_text()
        new = render(old)
        is_current = is_current and old == new
        if "--check" not in sys.argv:
            path.write_text(new)
    if "--check" in sys.argv:
        raise SystemExit(not is_current)


if __name__ == "__main__":
    main()

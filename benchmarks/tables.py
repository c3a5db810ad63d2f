"""Write the tables of README.md from the committed results: `python -m benchmarks.tables` (`--check` only compares)."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import curves

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _path(section: str) -> Path:
    return RESULTS / (f"{section}.json" if section == "sample_efficiency" else f"train_{section}.json")


def _environment(result: dict[str, Any]) -> str:
    where = result["environment"]
    versions = where["versions"]
    parts = [where["date"], f"commit {where['commit']}", where["cpu"], f"{where['cores']} cores"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers")]
    return ", ".join(parts)


def sample_efficiency() -> str:
    """The comparison of the algorithms as Markdown."""
    result = json.loads((_path("sample_efficiency")).read_text())
    rows, titles = result["rows"], result["titles"]
    lines = [f"| {' | '.join(curves.COLUMNS)} |", "|" + "---|" * len(curves.COLUMNS)]
    lines += [f"| {titles[row['arm']]} | {' | '.join(curves.cells(row))} |" for row in rows]
    note = f"""
        Held-out accuracy of the medium problems (160 prompts x 16 samples, {rows[0]["start"]["mean"]:.3f} before
        training) after
        {result["rollout_budget"]:,} rollouts; {result["settings"]["seeds"]} seeds, mean and standard error;
        a seed is its own warm start and training noise. `rollouts to GRPO's final`: share of the budget at which the
        isotonic fit of the mean curve reaches the end of GRPO's, with its 90 % bootstrap interval over seeds.
        `accuracy at equal time`: after {result["seconds_budget"]:.1f} s of training, the time GRPO takes.
        `mixed groups`: share of all sampled groups that are neither all right nor all wrong. {_environment(result)}."""
    picture = "![learning curves](benchmarks/results/sample_efficiency.png)"
    table = "\n".join(lines).replace("+-", "\u00b1")
    return "\n".join([table, "", _wrapped(note), "", picture])


def train_run(name: str) -> str:
    """A sentence on one run of a preset."""
    result = json.loads((_path(name)).read_text())
    summary = result["summary"]

    def rise(key: str) -> str:
        return f"{summary[f'{key}_before']:.3f} to {summary[f'{key}_after']:.3f}"

    text = f"""
        Held-out accuracy goes from {rise("accuracy")} and pass@8 from {rise("pass_at_8")} with {summary["rollouts"]:,}
        rollouts in {summary["train_seconds"]:.0f} s of training; start to end took {result["wall_seconds"]:.0f} s,
        {"the cached" if result["warm_start_cached"] else "the"} warm start included. On held-out prompts the value ends
        with a rank correlation of {summary["value_rank_correlation"]:.2f} to the measured accuracy and a calibration
        error of {summary["value_ece"]:.3f} ({_environment(result)})."""
    return _wrapped(text)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=120, break_long_words=False, break_on_hyphens=False)


def render(text: str) -> str:
    """`text` with every generated section replaced."""
    sections = {
        "sample_efficiency": sample_efficiency,
        "tiny": lambda: train_run("tiny"),
        "smollm2": lambda: train_run("smollm2"),
    }
    for name, make in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        if found and _path(name).is_file():
            text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Entry point; exit status 1 when `--check` finds README.md out of date."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old)
    if "--check" in sys.argv:
        raise SystemExit(old != new)
    path.write_text(new)


if __name__ == "__main__":
    main()

"""Sections on rewards and sandboxes, as Markdown, from the results of their cases."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.words import environment_line, wrapped
from benchmarks.rewards import sandbox as sandbox_case


def math_rewards(result: dict[str, Any]) -> str:
    """Format errors of the math rewards on the labelled table, and their speed, as Markdown."""
    table, speeds = result["table"], result["throughput"]
    columns = ["judged by", "wrong answers passed", "right answers failed", "both, on held-out rows only"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for method, counts in result["summary"].items():
        cells = [
            [f"{part['false_positives']} of {part['wrong']}", f"{part['failed']} of {part['right']}"]
            for part in (counts["all"], counts["held_out"])
        ]
        lines.append(f"| {method} | {' | '.join(cells[0])} | {', '.join(cells[1])} |")
    cases = list(speeds["cases"])
    rates = [f"| answers per second | {' | '.join(cases)} |", "|" + "---|" * (1 + len(cases))]
    for method in speeds["cases"][cases[0]]:
        cells = (speeds["cases"][case][method] for case in cases)
        rates.append(
            f"| {method} | "
            + " | ".join("{median:,.0f} ({least:,.0f} to {largest:,.0f})".format(**c) for c in cells)
            + " |"
        )
    note = f"""
        Judged were {table["rows"]} pairs of answer key and completion, of {len(table["kinds"])} kinds, labelled by hand
        for each mode (`tests/verdicts/math.jsonl`); {table["held_out"]} of them (held-out) were written after the rules
        were fixed. math-verify {result["math_verify"]} reads the raw completion and is compared with the labels of
        `math` and with those of `math_strict`. Speed: median (smallest to largest) of {speeds["repeats"]} interleaved
        batches of {speeds["answers"]} answers, half of them right; math-verify in one process; load average
        {result["load"]:.1f} on {speeds["cores"]} cores. {environment_line(result)}."""
    return "\n".join([*lines, "", *rates, "", wrapped(note)])


def sandbox(result: dict[str, Any]) -> str:
    """Format isolation and cost of each sandbox as Markdown."""
    rows = result["rows"]
    ways = "; ".join(row["strength"] for row in rows.values() if row["strength"])
    note = f"""
        Time from start to end of a program that prints its input: {result["runs"]} programs per sandbox, one at a time;
        programs/s: one program per core at once. Isolation: {ways}. {environment_line(result)}."""
    return "\n".join([*sandbox_case.table(rows), "", wrapped(note)])

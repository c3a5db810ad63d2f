"""Section on injected faults, as Markdown, from the result of its case."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.words import environment_line, wrapped


def faults(result: dict[str, Any]) -> str:
    """Format the injected faults and their outcomes as Markdown."""
    found, processes = result["checkpoint"], result["processes"]
    kill, damage, planted = found["kill"], found["damage"], found["planted_code"]
    cuts, ablation = found["resume"]["cuts"], found["resume"]["ablation"]
    kinds = len({outcome["cell"].split("/")[0] for outcome in processes["outcomes"]})
    phases = len({outcome["cell"].split("/")[1] for outcome in processes["outcomes"]})
    slowest = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in processes["slowest_seconds"].items())
    lines = [
        "| injected fault | times | result |",
        "|---|---|---|",
        f"| process killed, {kill['kills_inside_a_save']} times during a save | {kill['kills']} | "
        f"{len(kill['wrong'])} of {kill['acknowledged']} acknowledged checkpoints lost |",
        f"| checkpoint damaged: {', '.join(damage['by_kind'])} | {damage['damages']} | "
        f"{len(damage['wrong'])} loaded silently |",
        f"| code planted in a checkpoint file | {planted['slots']} | ran {planted['code_ran']} times |",
        f"| run killed and resumed | {cuts['cut_points']} | "
        f"{len(cuts['wrong'])} differ from an uninterrupted run in any bit |",
        f"| part of the state left out on resume | {ablation['pieces']} | {len(ablation['wrong'])} not noticed, "
        f"{len(ablation['idle'])} without effect on the run |",
        f"| one of two ranks fails: {kinds} faults in {phases} phases | {processes['cells']} | "
        f"{processes['recovered_equal_and_clean']} recover bit-equal and leave nothing behind |",
    ]
    note = f"""Longest time from a fault to the end of the run: {slowest}. The whole matrix takes
        {result["seconds"]:.0f} s.
        {environment_line(result)}."""
    return "\n".join([*lines, "", wrapped(note)])

"""Share of each phase in a training step, from a short run of a preset as a user would start it.

The phases are the NVTX ranges and timing columns of `metrics.jsonl` with the same names. On a CPU they are host times;
on a GPU, times between events of the stream, so that each phase is charged for the work it launched.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quick import quick
from paced_fast import train
from paced_fast.config.presets import preset
from paced_fast.errors import InputError

PACED_PHASES = ("schedule", "replay", "head")
"""Phases that PACED-RL adds to a step: drawing prompts, replay, the log Z head."""


@dataclass(frozen=True)
class Arguments:
    """Time the phases of a step."""

    preset: str = "smollm2"
    """Name of the preset."""
    steps: int = 10
    """Number of steps of the run."""
    skip: int = 4
    """Number of first steps excluded: warm-up of scheduler, caches and allocator."""
    seed: int = 0
    """Seed of the run."""
    quick: bool = False
    """Toy sizes except for the number of steps, to check that everything works."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure median seconds and share of each phase, and the share of phases that PACED-RL adds."""
    del path
    if not 0 <= arguments.skip < arguments.steps:
        raise InputError(f"--skip is {arguments.skip} and --steps is {arguments.steps}: give fewer to skip than steps")
    config = quick(preset(arguments.preset)) if arguments.quick else preset(arguments.preset)
    evaluation = dataclasses.replace(config.evaluation, every=0, final_samples=1)
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(
            config, steps=arguments.steps, seed=arguments.seed, evaluation=evaluation, run_dir=f"{folder}/run"
        )
        train.run(run, Console())
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["seconds"] for record in records if "seconds" in record][arguments.skip :]
    result = summarise(steps)
    print(table(result))
    settings = dataclasses.asdict(dataclasses.replace(run, run_dir=None))
    return {"preset": arguments.preset, "steps": len(steps), "config": settings, **result}


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Return seconds and shares per phase: median, minimum and maximum over steps; a missing phase counts 0 s."""
    names = sorted({name for seconds in steps for name in seconds})
    totals = [sum(seconds.values()) for seconds in steps]
    phases = {}
    for name in names:
        seconds = [step.get(name, 0.0) for step in steps]
        shares = [value / total for value, total in zip(seconds, totals, strict=True)]
        phases[name] = {
            "median_seconds": statistics.median(seconds),
            "median_share": statistics.median(shares),
            "least_share": min(shares),
            "largest_share": max(shares),
        }
    added = [
        sum(step.get(name, 0.0) for name in PACED_PHASES) / total for step, total in zip(steps, totals, strict=True)
    ]
    return {
        "phases": phases,
        "median_step_seconds": statistics.median(totals),
        "paced_share": statistics.median(added),
        "largest_paced_share": max(added),
    }


def table(result: dict[str, Any]) -> str:
    """Format the phases, largest first, as text."""
    phases = sorted(result["phases"].items(), key=lambda item: -item[1]["median_share"])
    lines = [f"{'phase':<14}{'seconds':>10}{'share':>9}"]
    lines += [f"{name:<14}{row['median_seconds']:>10.4f}{row['median_share']:>9.2%}" for name, row in phases]
    lines += [f"{'whole step':<14}{result['median_step_seconds']:>10.4f}{1:>9.2%}"]
    added = " + ".join(PACED_PHASES)
    lines += [f"{added}: {result['paced_share']:.2%} of a step (median), {result['largest_paced_share']:.2%} at most"]
    return "\n".join(lines)

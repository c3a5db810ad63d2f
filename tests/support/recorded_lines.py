"""Short runs that write every kind of line of metrics.jsonl there is.

    python tests/support/recorded_lines.py > tests/run/metrics_lines.json

keeps what they write, for a change that means to alter it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import tiny_run

from paced_fast import train
from paced_fast.run.start.build import PreparedRun


def _with_engine(run: PreparedRun) -> None:
    """Figures as an engine gives them, of whatever samples."""
    cast(Any, run.collector.generator).after_update = lambda: {"bytes": 0.0}
    figures = {"scored_mean": 1e-6, "scored_max": 1e-5, "sampled_mean": 1e-6, "sampled_max": 1e-5}
    guard = SimpleNamespace(due=lambda step: True, prime=lambda: None, ask=lambda step: (), judge=lambda step: figures)
    run.stepper.parity = cast(Any, guard)


def _as_it_is(run: PreparedRun) -> None:
    del run


CASES: dict[str, tuple[str, dict[str, Any], Callable[[PreparedRun], None]]] = {
    "paced": ("paced", {"steps": 3, "reward__shaping": ("0.1*length",)}, _as_it_is),
    "grpo": ("grpo", {"steps": 1}, _as_it_is),
    "flowrl": ("flowrl", {"steps": 1}, _as_it_is),
    "nothing held out": ("paced", {"steps": 2, "data__eval": (), "evaluation__every": 1}, _as_it_is),
    "engine": ("paced", {"steps": 2, "data__eval": ()}, _with_engine),
}
"""Algorithm, settings, and what is done to the run before it starts."""


def lines_of(case: str, folder: Path) -> list[str]:
    """The lines of metrics.jsonl that a case writes."""
    algorithm, changes, prepare = CASES[case]
    rewards = tiny_run.write_rewards(folder)
    task = f"task:signed_sums?reward={rewards}:odd&split="
    small = {
        "data__train": (f"{task}train&size=8",),
        "data__eval": (f"{task}eval&size=2",),
        "generation__prompts_per_step": 2,
        "generation__group_size": 2,
        "replay__capacity": 4,
        "replay__insert_per_step": 2,
        "replay__draw_per_step": 2,
    }
    run = tiny_run.build(tiny_run.config(rewards, algorithm, **small | changes), folder / "run")
    prepare(run)
    train.train(run, tiny_run.quiet())
    return (folder / "run" / "metrics.jsonl").read_text().splitlines()


def main() -> None:
    """Write the lines of all cases as JSON."""
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case] = lines_of(case, Path(folder))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

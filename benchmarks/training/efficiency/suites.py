"""Suites of the benchmark: which preset is trained, for how long, and what is measured on the way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.quick import quick
from paced_fast.config import Config
from paced_fast.config.presets import PRESETS, preset
from paced_fast.errors import InputError

QUICK = "-quick"
"""Ending of a suite's name at toy sizes."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One scale of the comparison."""

    name: str
    """Name on the command line and of the folder of its runs."""
    preset: str
    """Preset that every arm changes."""
    steps: int = 0
    """Rollout budget in steps of the preset; 0 for the preset's own steps."""
    eval_every: int
    """Budget between two points of a curve, in the same unit."""
    seeds: int
    """Seeds of the comparison, counted from 0."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates of the sweep, as multiples of the preset's."""
    sweep_seeds: int = 2
    """Seeds of the sweep of learning rates, of `files.SWEEP_SEEDS` from the first."""
    finalists: int = 0
    """Best rates of the sweep that are run on one more seed, which decides between them; 0 for no such round."""
    easiest: str = ""
    """Slice whose accuracy shows forgetting; empty for the slice of the highest accuracy before training."""
    table_prompts: int = 1000
    """Training prompts on which the value is compared with the measured accuracy, at most; the same in every run."""
    table_samples: int = 16
    """Completions for each of them."""
    table_at: tuple[str, ...] = ("start", "middle", "end")
    """When: before training, at half the rollout budget, at all of it."""
    oracle_every: int = 20
    """`oracle`: steps between two measurements of the whole table."""
    oracle_samples: int = 8
    """`oracle`: completions for each prompt of the table."""

    def config(self) -> Config:
        """Settings that the arms change; toy sizes for a quick suite."""
        config = preset(self.preset)
        return quick(config) if self.name.endswith(QUICK) else config

    @property
    def budget_steps(self) -> int:
        """Rollout budget, in steps."""
        return self.steps or self.config().steps

    @property
    def rollouts(self) -> int:
        """Rollout budget."""
        return self.budget_steps * self.config().rollouts_per_step


_SUITES = (
    Suite(
        name="tiny",
        preset="tiny",
        steps=150,
        eval_every=25,
        seeds=10,
        factors=(0.25, 0.5, 1.0, 2.0),
        easiest="trivial",
    ),
    Suite(
        name="small",
        preset="small",
        eval_every=30,
        seeds=5,
        factors=(0.5, 1.0, 2.0, 4.0),
        table_prompts=500,
        table_at=("end",),
    ),
    Suite(
        name="smollm2",
        preset="smollm2",
        eval_every=8,
        seeds=5,
        factors=(0.5, 1.0, 2.0),
        sweep_seeds=1,
        finalists=2,
        easiest="word_sequence_reversal_2words",
        table_prompts=200,
        table_samples=8,
        table_at=("end",),
        oracle_every=8,
        oracle_samples=4,
    ),
)
NAMES = tuple(suite.name for suite in _SUITES)
"""Every suite, those whose preset does not exist yet included."""
SUITES = {suite.name: suite for suite in _SUITES if suite.preset in PRESETS}
"""Every suite whose preset exists."""


def find(name: str) -> Suite:
    """Return a suite, or its toy version if the name ends with `QUICK`. Raises InputError naming the known ones."""
    plain = name.removesuffix(QUICK)
    if plain not in SUITES:
        raise InputError(f"unknown suite {name!r}: the suites are {', '.join(SUITES)}")
    suite = SUITES[plain]
    if plain == name:
        return suite
    return dataclasses.replace(
        suite,
        name=name,
        steps=0,
        eval_every=1,
        seeds=1,
        factors=(0.25, 0.5, 1.0),
        easiest="",
        table_prompts=8,
        table_samples=2,
        oracle_every=1,
        oracle_samples=2,
    )

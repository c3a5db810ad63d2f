"""Named settings, as functions: a preset is where a run's settings begin, and every field can be overridden."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from paced_fast.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    WarmStartConfig,
    WarmStartPhase,
)
from paced_fast.errors import InputError


def tiny() -> Config:
    """Signed sums on a CPU: a 227k-parameter model learns to combine digits into a target, in minutes."""
    demonstrations = "task:signed_sums?split=demonstrations&size=60000"
    return Config(
        preset="tiny",
        steps=150,
        model=ModelConfig(name="tiny"),
        data=DataConfig(
            train=("task:signed_sums?split=train&size=4000&seed=42",),
            eval=("task:signed_sums?split=eval",),
            headline=("k3", "k4", "k5", "k6"),
            max_prompt_tokens=12,
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=(f"{demonstrations}&seed=1",), steps=450, batch_size=256, learning_rate=2e-3, warmup_steps=30
            ),
            second=WarmStartPhase(
                sources=(f"{demonstrations}&seed=2&flip_probability=0.6",),
                steps=70,
                batch_size=256,
                learning_rate=1e-3,
                warmup_steps=10,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=13),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
    )


PRESETS: dict[str, Callable[[], Config]] = {"tiny": tiny}


def preset(name: str) -> Config:
    """The settings of a preset. Raises InputError naming the known ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown preset {name!r}: {hint}the presets are {', '.join(PRESETS)}")
    return PRESETS[name]()

"""Whole runs small enough for a test: rewards for a model that knows nothing, and settings by dotted name."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import tiny_policy
from rich.console import Console

from paced_fast.config import Config
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.run.start.build import PreparedRun
from paced_fast.run.start.build import build as build_run

REWARDS = """
import random

def odd(prompts, completions, **columns):
    return [float(sum(map(ord, p + c)) % 3 == 0) for p, c in zip(prompts, completions)]

def odd_with_noise(prompts, completions, **columns):
    return [float((value > 0) != (random.random() < 0.1)) for value in odd(prompts, completions)]

def always(prompts, completions, **columns):
    return [1.0] * len(completions)

def not_a_number(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def too_few(prompts, completions, **columns):
    return [1.0]  * (len(completions) - 1)

def crashes(prompts, completions, **columns):
    return [completion[0] for completion in completions]
"""
"""Reward functions for a model that knows nothing: a third of what it says is right."""


def write_rewards(folder: Path) -> Path:
    """The reward functions as a file of a user's."""
    path = folder / "rewards.py"
    path.write_text(REWARDS)
    return path


def config(rewards: Path, algorithm: str = "paced", *, reward: str = "odd", **changes: Any) -> Config:
    """Four prompts of four completions per step, a model of width 16 without a warm start."""
    task = f"task:signed_sums?reward={rewards}:{reward}&split="
    small: dict[str, Any] = {
        "algorithm": algorithm,
        "steps": 8,
        "model__hidden_size": 16,
        "model__intermediate_size": 24,
        "model__num_layers": 1,
        "model__num_heads": 2,
        "data__train": (f"{task}train&size=40",),
        "data__eval": (f"{task}eval&size=12",),
        "data__headline": (),
        "warm_start__first__sources": ("task:signed_sums?split=demonstrations&size=50",),
        "warm_start__first__steps": 0,
        "warm_start__second__steps": 0,
        "warm_start__cache_dir": str(rewards.parent / "cache"),
        "generation__prompts_per_step": 4,
        "generation__group_size": 4,
        "generation__max_completion_tokens": 5,
        "optimizer__learning_rate": 1e-2,
        "optimizer__warmup_steps": 2,
        "log_z__hidden_size": 8,
        "scheduler__warmup_steps": 2,
        "replay__mode": "on" if algorithm == "paced" else "auto",  # off by default, and to be tested
        "replay__capacity": 12,
        "replay__insert_per_step": 5,
        "replay__draw_per_step": 4,
        "evaluation__every": 2,
        "evaluation__samples": 2,
        "evaluation__final_samples": 2,
        "run__checkpoint_every": 4,
        "run__threads": 1,
        "run__report": False,
    }
    return tiny_policy.replaced(preset("tiny"), **small | changes)


def quiet() -> Console:
    return Console(file=io.StringIO())


def build(settings: Config, folder: Path) -> PreparedRun:
    return build_run(resolve(dataclasses.replace(settings, run_dir=str(folder))), quiet())

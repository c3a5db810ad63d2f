"""Settings that may differ in a resumed run, and what to say about the others."""

from __future__ import annotations

import shlex
from pathlib import Path

from paced_fast.config import Config, flatten
from paced_fast.data.sources import rewarded

OF_THE_START = ("run_dir", "resume")
"""Settings of how a run is started, which differ between the runs of one command, and are told by the run's folder."""
NOT_OF_TRAINING = (*OF_THE_START, "warm_start.cache_dir", "run.")
"""Prefixes of settings that concern where a run is stored and what it records, not how it trains."""

# Settings that may differ in a resumed run: its length, what it keeps, and paths.
# Settings that an error message advises to change must be among them.
FREE_ON_RESUME = (
    *(f"model.{name}" for name in ("attention", "gradient_checkpointing", "liger", "compile")),
    *NOT_OF_TRAINING,
    *("steps", "distributed.", "guard.", "generation.max_batch_sequences"),
    "generation.stop_tokens",  # compared by their resolved value, which the checkpoint has
    *(f"weight_sync.{name}" for name in ("mode", "kv_cache_gib", "sleep_level", "bucket_mib", "tensor_parallel")),
    *(f"weight_sync.{name}" for name in ("check_every", "check_prompts", "max_mean_difference")),
)
_SHOWN = 3
_SOURCES = ("data.train", "data.eval")


def differences(old: Config, new: Config) -> list[str]:
    """Settings that differ and may not, each as `--option was OLD`; `old` are those of the run's folder."""
    before, found = flatten(old), []
    told_before, told_now = _with_reward(old), _with_reward(new)
    for name, value in flatten(new).items():
        if name in _SOURCES and told_before[name] == told_now[name]:
            continue
        if name == "data.date" and value is None:  # the run's own is taken
            continue
        if name == "data.template" and value == "auto":  # decided by the tokenizer, which is compared
            continue
        if not name.startswith(FREE_ON_RESUME) and before[name] != value:
            option = f"--{name.replace('_', '-')}"
            found.append(f"{option} was {_typed(before[name])} in that run and is {_typed(value)} now")
    return found


def _with_reward(config: Config) -> dict[str, tuple[str, ...]]:
    """The sources of prompts, each with its reward, which folders of older runs have in the source itself."""
    reward, of_run = config.reward.name, flatten(config)
    return {
        name: tuple(spec if reward is None else rewarded(spec, reward) for spec in of_run[name]) for name in _SOURCES
    }


def _typed(value: object) -> str:
    """A value as one types it on the command line; `none` for nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, (), ""):
        return "none"
    words = value if isinstance(value, tuple) else (value,)
    return " ".join(shlex.quote(str(word)) for word in words)


def remedy(folder: Path, found: list[str]) -> str:
    """One line about the `differences` of a run in `folder`, and what to do about them."""
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"{', '.join(found[:_SHOWN])}{more}: leave {'it' if len(found) == 1 else 'them'} out to continue the run "
        f"(--resume {folder} needs nothing else), or start a new run with --config {folder / 'config.json'}"
    )

"""Named settings, as functions: a preset is where a run's settings begin, and every field can be overridden."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from paced_fast.config import Config
from paced_fast.config.presets.cpu import tiny
from paced_fast.config.presets.gpu import deepcoder_1_5b, qwen3_4b, qwen_math_1_5b, qwen_math_1_5b_lora, qwen_math_7b
from paced_fast.config.presets.own import own
from paced_fast.config.presets.small import small
from paced_fast.config.presets.smollm2 import smollm2
from paced_fast.errors import InputError

__all__ = ["BASES", "PRESETS", "known", "preset", "without_gpu"]

PRESETS: dict[str, Callable[[], Config]] = {
    make.__name__: make
    for make in (tiny, small, smollm2, qwen_math_1_5b, qwen_math_1_5b_lora, qwen_math_7b, qwen3_4b, deepcoder_1_5b)
}
"""Presets that are complete: each trains by its name alone."""
BASES: dict[str, Callable[[], Config]] = {own.__name__: own, **PRESETS}
"""Those, and the one that a model and data are added to."""


def preset(name: str) -> Config:
    """The settings of a preset. Raises InputError naming the known ones."""
    if name not in BASES:
        raise InputError(f"unknown preset {name!r}: {known(name)}")
    return BASES[name]()


def known(name: str) -> str:
    """For a message about an unknown preset: the one whose name is near, and all there are."""
    near = difflib.get_close_matches(name, BASES, n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}the presets are {', '.join(BASES)}"


def without_gpu() -> list[str]:
    """The presets that need no GPU."""
    return [name for name, make in PRESETS.items() if make().model.device != "cuda"]

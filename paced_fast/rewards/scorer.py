"""Completions of many rows, judged by the reward function that each row names."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paced_fast.batch import PromptRow
from paced_fast.config import RewardConfig
from paced_fast.errors import InputError
from paced_fast.rewards.loading import RewardFunction, load_reward

_RESERVED_COLUMNS = ("prompts", "completions")


class Scorer:
    """Judges completions: each reward function is loaded once and called once for all of its rows.

    Example: `Scorer(row.reward for row in table.rows)` loads what the rows name, so that a wrong name fails early.

    Raises:
        InputError: a name that `load_reward` does not know.
    """

    def __init__(self, names: Iterable[str] = (), settings: RewardConfig | None = None) -> None:
        self.settings = settings or RewardConfig()
        self._functions: dict[str, RewardFunction] = {}
        for name in names:
            self._function(name)

    def problem(self, name: str, columns: Mapping[str, Any]) -> str | None:
        """What keeps the reward function `name` from ever judging a row of these columns, None when nothing does."""
        asked = getattr(self._function(name), "problem", None)
        return None if asked is None else asked(columns)

    def take_counts(self) -> dict[str, dict[str, int]]:
        """Verdicts by kind (right, wrong, timeout ...) of each reward function that counts them, since last asked."""
        taken: dict[str, dict[str, int]] = {}
        for name, function in self._functions.items():
            counts = getattr(function, "counts", None)
            if counts:
                taken[name] = dict(counts)
                counts.clear()
        return taken

    def close(self) -> None:
        """Ends the processes of the reward functions that have some."""
        for function in self._functions.values():
            close = getattr(function, "close", None)
            if close is not None:
                close()

    def score(self, rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float | None]:
        """One reward in [0, 1] for each completion, in order; `rows[i]` is the prompt of `completions[i]`.

        None means unscored: no verdict could be had, and the completion must count neither as right nor as wrong.

        Raises:
            InputError: a reward function failed or returned something other than one number in [0, 1] a completion.
        """
        if len(rows) != len(completions):
            raise InputError(
                f"got {len(rows)} rows and {len(completions)} completions: one row a completion is expected"
            )
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.reward, []).append(i)
        rewards: list[float | None] = [None] * len(rows)
        for name, members in groups.items():
            returned = _call(name, self._function(name), [rows[i] for i in members], [completions[i] for i in members])
            for i, value in zip(members, returned, strict=True):
                rewards[i] = _checked(name, value, i)
        return rewards

    def _function(self, name: str) -> RewardFunction:
        if name not in self._functions:
            self._functions[name] = load_reward(name, self.settings)
        return self._functions[name]


def _call(name: str, function: RewardFunction, rows: Sequence[PromptRow], completions: list[str]) -> list[Any]:
    keys = dict.fromkeys(key for row in rows for key in row.columns if key not in _RESERVED_COLUMNS)
    columns = {key: [row.columns.get(key) for row in rows] for key in keys}
    given = {"prompts": [row.prompt for row in rows], "completions": completions, **columns}
    try:
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            given = {key: given[key] for key in (parameter.name for parameter in parameters) if key in given}
        returned: Any = function(**given)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the reward function {name!r} failed: {reason}") from error
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        kind = type(returned).__name__
        raise InputError(f"the reward function {name!r} returned a {kind}: a list of {len(rows)} numbers is expected")
    if len(returned) != len(rows):
        raise InputError(f"the reward function {name!r} returned {len(returned)} rewards for {len(rows)} completions")
    return list(returned)


def _checked(name: str, value: Any, index: int) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, numbers.Real | np.bool_)
    if not is_number or not math.isfinite(float(value)) or not 0.0 <= float(value) <= 1.0:
        raise InputError(
            f"the reward function {name!r} returned {value!r} for completion {index}: a number in [0, 1] is expected"
        )
    return float(value)

"""Rewards of procedural tasks, judged by the checker that made the problem."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paced_fast.errors import InputError
from paced_fast.rewards.text import tagged
from paced_fast.tasks import check_signed_sum, reasoning_gym_scorer

logger = logging.getLogger(__name__)


class SignedSumsReward:
    """1 for a completion that solves its prompt, a problem of the task signed_sums, else 0."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [check_signed_sum(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """That the prompt is none of the task; nothing where the columns come without it."""
        prompt = columns.get("prompt")
        if prompt is None:
            return None
        try:
            check_signed_sum(prompt if isinstance(prompt, str) else repr(prompt), "")
        except InputError as error:
            return str(error)
        return None


signed_sums = SignedSumsReward()


class ReasoningGymReward:
    """Scores by the data sets' own scorers, built once for each task and its settings."""

    def __init__(self) -> None:
        self._scorers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        missing = [key for key in ("task", "settings", "entry") if key not in columns]
        if missing:
            raise InputError(
                f"reward 'reasoning_gym' needs rows of an rg: source; the column {missing[0]!r} is missing"
            )
        rows = zip(columns["task"], columns["settings"], columns["entry"], completions, strict=True)
        return [self._score(*row) for row in rows]

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """What of an rg: source the row lacks."""
        for key, kind in (("task", str), ("settings", Mapping), ("entry", Mapping)):
            if not isinstance(columns.get(key), kind):
                return f"reward 'reasoning_gym' needs rows of an rg: source; the row has no {key!r} of one"
        return None if "answer" in columns["entry"] else "the entry of the row has no answer: make the rows with rg:"

    def _score(self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], completion: str) -> float:
        key = json.dumps([task, settings], sort_keys=True, default=repr)
        if key not in self._scorers:
            self._scorers[key] = reasoning_gym_scorer(task, settings)
        scorer = self._scorers[key]
        inside = tagged(completion)
        try:
            return scorer((completion if inside is None else inside).strip(), entry)
        except Exception as error:
            scorer(entry["answer"], entry)  # a scorer that fails on its own answer is broken: let that one out
            logger.warning("reasoning_gym %s cannot score %.80r (%r): 0", task, completion, error)
            return 0.0

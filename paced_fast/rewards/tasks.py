"""Rewards of procedural tasks, judged by the checker that made the problem."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paced_fast.errors import InputError
from paced_fast.tasks import check_signed_sum, reasoning_gym_scorer

logger = logging.getLogger(__name__)


def signed_sums(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """1 for a completion that solves its prompt, a problem of the task signed_sums, else 0."""
    return [check_signed_sum(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


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

    def _score(self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], completion: str) -> float:
        key = json.dumps([task, settings], sort_keys=True, default=repr)
        if key not in self._scorers:
            self._scorers[key] = reasoning_gym_scorer(task, settings)
        scorer = self._scorers[key]
        tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
        try:
            return scorer((tagged[-1] if tagged else completion).strip(), entry)
        except Exception as error:
            scorer(entry["answer"], entry)  # a scorer that fails on its own answer is broken: let that one out
            logger.warning("reasoning_gym %s cannot score %.80r (%r): 0", task, completion, error)
            return 0.0

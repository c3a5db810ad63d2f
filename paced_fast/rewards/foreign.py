"""Adapters for reward functions written for other trainers.

    verl:MODULE:FUNCTION   verl's compute_score(data_source, solution_str, ground_truth, extra_info), per completion
    trl:MODULE:FUNCTION    a TRL function that expects chats: prompts and completions are lists of messages

A plain `MODULE:FUNCTION` has TRL's signature with text and needs no adapter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from paced_fast.errors import InputError
from paced_fast.rewards.user_function import is_async, parameters_of


class VerlReward:
    """verl's `compute_score` applied to a batch; async or not. It may return a number, a dict with `score`, or None.

    The ground truth is `reward_model["ground_truth"]` as in verl's data sets, else the column `ground_truth`, else
    `answer`. The columns `data_source` and `extra_info` are passed on; they are None if the row has none.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self.origin = function
        self.is_async = is_async(function)
        self._names = parameters_of(function)
        missing = set() if self._names is None else {"solution_str", "ground_truth"} - set(self._names)
        if missing:
            raise InputError(
                f"reward {name!r}: a verl function needs the parameters data_source, solution_str, ground_truth and "
                f"extra_info, and this one lacks {sorted(missing)[0]!r}"
            )

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """Return a message if the row has no ground truth, else None."""
        if _ground_truth(columns) is None:
            return (
                f"reward {self._name!r} needs reward_model.ground_truth, ground_truth or answer, all of which the row "
                "lacks"
            )
        return None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Any:
        rows = [{key: values[i] for key, values in columns.items()} for i in range(len(completions))]
        returned = (self._asked(row, text) for row, text in zip(rows, completions, strict=True))
        return self._all(list(returned)) if self.is_async else [self._score(one) for one in returned]

    async def _all(self, waiting: Sequence[Awaitable[Any]]) -> list[Any]:
        return [self._score(one) for one in await asyncio.gather(*waiting)]

    def _asked(self, row: Mapping[str, Any], text: str) -> Any:
        given = {
            "data_source": row.get("data_source"),
            "solution_str": text,
            "ground_truth": _ground_truth(row),
            "extra_info": row.get("extra_info"),
        }
        wanted = given if self._names is None else {key: value for key, value in given.items() if key in self._names}
        return self._function(**wanted)

    def _score(self, returned: Any) -> Any:
        if isinstance(returned, Mapping):
            if "score" not in returned:
                raise InputError(f"reward {self._name!r} returned a dict without 'score': {sorted(map(str, returned))}")
            return returned["score"]
        return returned


class TRLChatReward:
    """A TRL reward function that expects chats: a text prompt becomes a user message, a completion an assistant one."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self.origin = function
        self.is_async = is_async(function)
        self._names = parameters_of(function)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Any:
        given = {
            "prompts": [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts],
            "completions": [[{"role": "assistant", "content": text}] for text in completions],
            **columns,
        }
        return self._function(**{k: v for k, v in given.items() if self._names is None or k in self._names})


def _ground_truth(row: Mapping[str, Any]) -> Any:
    model = row.get("reward_model")
    if isinstance(model, Mapping) and model.get("ground_truth") is not None:
        return model["ground_truth"]
    found = row.get("ground_truth")
    return row.get("answer") if found is None else found

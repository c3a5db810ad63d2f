"""Shaping: a bonus or penalty per completion, apart from correctness. It enters the policy's loss, never log Z.

    overlong    0 up to the last fifth of the completion limit, then falling to -1 at the limit (DAPO, arXiv 2503.14476,
                eq. 13; the share is `reward.overlong_share`)
    length      minus the share of the completion limit that was used
    truncated   -1 for a completion that was cut off
    boxed       1 for a completion with exactly one \\boxed{}
    package.module:function, path/to/file.py:function

A function of your own has the signature of a reward, returns numbers in [-1, 1], and receives the columns `num_tokens`,
`stopped` and `max_completion_tokens` in addition to those of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.config.reward_terms import parse_terms
from paced_fast.data.records import Completion, PromptRow
from paced_fast.errors import InputError, nearest
from paced_fast.rewards.loading import import_function
from paced_fast.rewards.user_function import Call, run_all

ShapingFunction = Callable[..., Sequence[float | None]]


class Shaper:
    """Weighted sum of the shaping terms named in `settings.shaping`.

    Raises:
        InputError: a name is unknown, or a weight is 0 or not finite.
    """

    def __init__(self, settings: RewardConfig) -> None:
        self.settings = settings
        self._terms = parse_terms("+".join(settings.shaping)) if settings.shaping else ()
        self._functions = {term.name: self._load(term.name) for term in self._terms}

    def __bool__(self) -> bool:
        return bool(self._terms)

    def shape(
        self,
        rows: Sequence[PromptRow],
        texts: Sequence[str],
        completions: Sequence[Completion],
        max_completion_tokens: int,
    ) -> list[float]:
        """Return one number per completion. A term that returns None for a completion adds 0.

        Raises:
            InputError: a function failed, or did not return one number in [-1, 1] or None per completion.
        """
        columns = {
            "num_tokens": [len(completion.token_ids) for completion in completions],
            "stopped": [completion.stopped for completion in completions],
            "max_completion_tokens": [max_completion_tokens] * len(texts),
        }
        calls = [
            Call(
                name=term.name,
                function=self._functions[term.name],
                rows=rows,
                completions=texts,
                low=-1.0,
                more_columns=columns,
                is_ours=":" not in term.name,
            )
            for term in self._terms
        ]
        found = run_all(calls, self.settings)
        return [
            sum(term.weight * (numbers[i] or 0.0) for term, numbers in zip(self._terms, found, strict=True))
            for i in range(len(texts))
        ]

    def _load(self, name: str) -> ShapingFunction:
        if name == "overlong":
            return self._overlong
        if name in _PLAIN:
            return _PLAIN[name]
        if ":" not in name:
            known = ("overlong", *_PLAIN)
            raise InputError(
                f"unknown shaping {name!r}{nearest(name, known)}: use one of {', '.join(known)}, "
                "package.module:function or path/to/file.py:function"
            )
        return import_function(name, "shaping")

    def _overlong(self, num_tokens: Sequence[int], max_completion_tokens: Sequence[int]) -> list[float]:
        share = self.settings.overlong_share
        return [
            -max(0.0, n - (1 - share) * limit) / (share * limit)
            for n, limit in zip(num_tokens, max_completion_tokens, strict=True)
        ]


def _length(num_tokens: Sequence[int], max_completion_tokens: Sequence[int]) -> list[float]:
    return [-n / limit for n, limit in zip(num_tokens, max_completion_tokens, strict=True)]


def _truncated(stopped: Sequence[bool]) -> list[float]:
    return [0.0 if ended else -1.0 for ended in stopped]


def _boxed(completions: Sequence[str]) -> list[float]:
    return [float(text.count("\\boxed{") == 1) for text in completions]


_PLAIN: dict[str, Callable[..., Any]] = {"length": _length, "truncated": _truncated, "boxed": _boxed}


def centred(shaping: Sequence[float], scored: Sequence[bool]) -> list[float]:
    """Return a group's shaping minus its mean over the scored completions; 0 for the unscored ones.

    Shaping then ranks the completions of a prompt against each other without changing their mean, which log Z learns.
    """
    chosen = [value for value, has_verdict in zip(shaping, scored, strict=True) if has_verdict]
    mean = sum(chosen) / len(chosen) if chosen else 0.0
    return [value - mean if has_verdict else 0.0 for value, has_verdict in zip(shaping, scored, strict=True)]

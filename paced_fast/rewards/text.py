"""Rewards that compare texts and plain numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from paced_fast.errors import InputError

_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_MAX_NUMBER_CHARACTERS = 100


def answers_of(name: str, columns: Mapping[str, Sequence[Any]], completions: Sequence[str]) -> Sequence[Any]:
    """The column `answer`; InputError naming the reward and the completion whose row has none."""
    answers = columns.get("answer", [None] * len(completions))
    for i, answer in enumerate(answers):
        if answer is None:
            raise InputError(f"reward {name!r} needs a column 'answer', and the row of its completion {i} has none")
    return answers


def exact(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """1 where the text is the answer, white space aside; numbers by value."""

    def equal(completion: str, answer: str) -> bool:
        value = whole_number(completion)
        return completion == answer or (value is not None and value == whole_number(answer))

    pairs = zip(completions, answers_of("exact", columns, completions), strict=True)
    return [float(equal(" ".join(completion.split()), " ".join(str(answer).split()))) for completion, answer in pairs]


def number(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """1 where the last number of the text is the answer."""
    rewards = []
    for completion, answer in zip(completions, answers_of("number", columns, completions), strict=True):
        wanted = last_number(str(answer))
        if wanted is None:
            raise InputError(f"reward 'number' needs a number as answer, got {answer!r}: use exact or math")
        found = last_number(completion)
        # The slack is for answers that were stored as binary floats.
        rewards.append(float(found is not None and abs(found - wanted) <= abs(wanted) / 10**9))
    return rewards


def last_number(text: str) -> Fraction | None:
    """The last number of a text (`-3`, `1,234.5`, `3/4`, `$18`, `2e3`), None when there is none or it is absurdly long.

    A sign counts only where a number can begin: `5-3` ends in 3, `= -3` in -3.
    """
    last = None
    for match in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        last = match[0]
    return None if last is None else _fraction(last)


def whole_number(text: str) -> Fraction | None:
    """The number that is all of a text, None when it is something else."""
    text = text.replace("\N{MINUS SIGN}", "-")
    return _fraction(text) if _NUMBER.fullmatch(text) else None


def _fraction(text: str) -> Fraction | None:
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    try:
        return Fraction(text.replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):
        return None

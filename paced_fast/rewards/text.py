"""Rewards that compare texts and plain numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from paced_fast.errors import InputError

_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_MAX_NUMBER_CHARACTERS = 100
INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"
"""Zero-width characters, ignored at both ends of an answer."""


def tagged(text: str) -> str | None:
    """Return the text inside the last closed <answer> tag, or None if there is none."""
    begin = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    return None if begin < 0 else text[begin + len("<answer>") : text.index("</answer>", begin)]


def answers_of(name: str, columns: Mapping[str, Sequence[Any]], completions: Sequence[str]) -> Sequence[Any]:
    """Return the column `answer`. Raise InputError, naming reward and completion, if a row has no answer."""
    answers = columns.get("answer", [None] * len(completions))
    for i, answer in enumerate(answers):
        if answer is None:
            raise InputError(f"reward {name!r} needs a column 'answer', which the row of completion {i} lacks")
    return answers


class TextReward:
    """Reward function made from a rule that compares one completion with one answer."""

    def __init__(
        self,
        name: str,
        judge: Callable[[str, str], float],
        flaw: Callable[[str], str | None] = lambda answer: None,
    ) -> None:
        self._name, self._judge, self._flaw = name, judge, flaw

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        pairs = zip(completions, answers_of(self._name, columns, completions), strict=True)
        return [self._judge(completion, str(answer)) for completion, answer in pairs]

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """Return the reason why the row can never be judged: no answer, an empty one, or one the rule cannot read."""
        answer = columns.get("answer")
        if answer is None or not str(answer).strip():
            return f"reward {self._name!r} needs an answer, which the row lacks: drop the row"
        return self._flaw(str(answer))


def _exact(completion: str, answer: str) -> float:
    completion, answer = " ".join(completion.split()), " ".join(answer.split())
    value = whole_number(completion)
    return float(completion == answer or (value is not None and value == whole_number(answer)))


def _number(completion: str, answer: str) -> float:
    wanted = last_number(answer)
    if wanted is None:
        raise InputError(_no_number(answer))
    found = last_number(completion)
    # The relative tolerance of 1e-9 is for answers that were stored as binary floats.
    return float(found is not None and abs(found - wanted) <= abs(wanted) / 10**9)


def _no_number(answer: str) -> str | None:
    if last_number(answer) is not None:
        return None
    return f"reward 'number' needs a number as answer, not {answer[:80]!r}: give reward=exact or reward=math"


exact = TextReward("exact", _exact)
"""1 if the text equals the answer; white space is ignored and numbers are compared by value."""

number = TextReward("number", _number, _no_number)
"""1 if the last number of the text is the answer."""


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text (`-3`, `1,234.5`, `3/4`, `$18`, `2e3`), or None.

    None if there is no number, or the last one has more than 100 characters. A sign counts only where a number can
    begin: the last number of `5-3` is 3, that of `= -3` is -3.
    """
    last = None
    for match in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        last = match[0]
    return None if last is None else _fraction(last)


def whole_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and nothing else, or None for any other text."""
    text = text.replace("\N{MINUS SIGN}", "-")
    return _fraction(text) if _NUMBER.fullmatch(text) else None


def _fraction(text: str) -> Fraction | None:
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    try:
        return Fraction(text.replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):
        return None

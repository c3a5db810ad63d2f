"""Key of a completion's answer, for majority voting over many completions of one prompt."""

from __future__ import annotations

import re

from paced_fast.rewards.math.answers import tidy
from paced_fast.rewards.math.endings import final_answer
from paced_fast.rewards.text import last_number, tagged, whole_number


def answer_key(reward: str, completion: str) -> str | None:
    r"""Return the final answer of `completion` in a normal form (equal answers, equal texts); None without an answer.

    The row's reward determines where the answer is: the last number for `number`, the text given to the verifier for
    `math` and `math_strict`, the tagged part for `reasoning_gym`, and the whole text for any other. Numbers are equal
    by value. For a sum of rewards, the first term that has such a rule decides.
    """
    name = next((part for part in re.split(r"[+*]", reward) if part in _RULES), "")
    answer = " ".join(_RULES.get(name, str)(completion).split())
    value = whole_number(answer) if name in _READ_AS_NUMBERS else None
    return (answer if value is None else str(value)) or None


def _number(completion: str) -> str:
    value = last_number(completion)
    return "" if value is None else str(value)


def _math(completion: str) -> str:
    return tidy(final_answer(completion)).casefold().replace(" ", "")


def _tagged(completion: str) -> str:
    inside = tagged(completion)
    return completion if inside is None else inside


_RULES = {"number": _number, "math": _math, "math_strict": _math, "exact": str, "reasoning_gym": _tagged}
_READ_AS_NUMBERS = ("math", "math_strict", "exact")

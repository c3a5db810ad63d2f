"""What a completion votes for when many completions of one prompt are asked for their common answer."""

from __future__ import annotations

import re

from paced_fast.rewards.math.answers import tidy
from paced_fast.rewards.math.endings import final_answer
from paced_fast.rewards.text import last_number, tagged, whole_number


def answer_key(reward: str, completion: str) -> str | None:
    r"""The answer that `completion` commits to, written so that equal answers are equal texts; None for no answer.

    The reward that judges the completion says where the answer stands: the last number for `number`, what a verifier
    would be shown for `math`, the tagged part for `reasoning_gym`; for any other it is all of the text. Numbers are
    equal by value. Of a sum of rewards the first with a rule of its own decides.
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

"""Test cases of a row as plain data: what goes into the sandbox, and what stays on this side of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paced_fast.rewards.code.compare import JSON_ERRORS

_MAX_BITS = 14_000  # about 4200 digits, within what Python turns into text

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "sorted": sorted,
    "len": len,
    "list": list,
    "tuple": list,  # JSON knows lists only
    "set": lambda value: sorted(set(value)),
    "bool": bool,
}
"""Functions that a HumanEval assert may put around the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One input and what is expected of it."""

    stdin: str = ""
    arguments: tuple[Any, ...] = ()
    expected: Any
    """Text of the whole output, or a value as JSON has it."""
    or_text: str | None = None
    """What the expected value is where the text it was read from is meant as a text."""
    or_first: bool = False
    """The expected value is a list of one, which may stand for its element."""
    tolerance: float | None = None
    """Largest absolute difference; None for the rule of all."""
    wrapper: str | None = None
    """One of WRAPPERS, to be called with the value first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A test that is run, in a process of the sandbox that is not the program's."""

    test: str
    """Text that defines `check`, a function that is given the program's."""
    helpers: str
    """Text of what the test calls besides."""
    shows_arguments: bool
    """Whether the test looks at what a call did to its arguments."""
    finite: bool
    """Whether the program's numbers must be: the test does not speak of others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """The cases of one row, or else its check."""

    cases: tuple[Case, ...] = ()
    check: Check | None = None
    function: str | None = None
    """What is called; None for a program that reads its input and prints."""
    continues_prompt: bool = False
    """Whether the prompt is code that the completion may go on from."""


class UnusableTests(ValueError):
    """Why a row cannot be judged, in words that follow its place."""


def request_of(case: Case) -> bytes:
    """The arguments of one call as a line of JSON, or as Python where JSON would change them (tuples, say)."""
    try:
        text = json.dumps(case.arguments, allow_nan=False)
        if _same(json.loads(text), list(case.arguments)):
            return f'{{"arguments": {text}}}'.encode()
    except JSON_ERRORS:
        pass
    return json.dumps({"literal": repr(case.arguments)}).encode()


def is_plain(value: Any) -> bool:
    """Whether all numbers in a value can be compared and written down."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= _MAX_BITS
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return not isinstance(value, list | tuple | set | frozenset) or all(map(is_plain, value))


def _same(read: Any, given: Any) -> bool:
    if type(read) is not type(given):
        return False
    if isinstance(given, list):
        return len(read) == len(given) and all(map(_same, read, given))
    if isinstance(given, dict):
        return list(read) == list(given) and all(_same(read[key], given[key]) for key in given)
    return read == given

"""Test cases of a row as plain data: inputs, which go into the sandbox, and expected values, which do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paced_fast.rewards.code.compare import JSON_ERRORS

_MAX_BITS = 14_000  # about 4200 digits, within Python's limit for converting integers to text

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "sorted": sorted,
    "len": len,
    "list": list,
    "tuple": list,  # JSON has lists only
    "set": lambda value: sorted(set(value)),
    "bool": bool,
}
"""Functions that a HumanEval assert may apply to the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One input and its expected result."""

    stdin: str = ""
    arguments: tuple[Any, ...] = ()
    expected: Any
    """The whole output as text, or a JSON value."""
    or_text: str | None = None
    """Text from which `expected` was parsed; accepted too, because it may be meant as a text."""
    or_first: bool = False
    """True if `expected` is a list of one element; the element alone is accepted too."""
    tolerance: float | None = None
    """Largest absolute difference; None for the default rule, see `compare`."""
    wrapper: str | None = None
    """One of WRAPPERS, applied to the returned value before the comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A test that is run as a program, in a separate process of the sandbox."""

    test: str
    """Source that defines `check`, a function that receives the program's function."""
    helpers: str
    """Source of other functions that the test calls."""
    shows_arguments: bool
    """True if the test inspects how a call changed its arguments."""
    finite: bool
    """True if the program's numbers must be finite, because the test does not mention NaN or infinity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Tests of one row: cases, or a check."""

    cases: tuple[Case, ...] = ()
    check: Check | None = None
    function: str | None = None
    """Name of the function to call; None for a program that reads its input and prints."""
    continues_prompt: bool = False
    """True if the prompt is code that the completion may continue."""


class UnusableTests(ValueError):
    """The row cannot be judged. The message is a predicate that follows the name of the row: "has no tests"."""


def request_of(case: Case) -> bytes:
    """Return the arguments of a call as a line of JSON, with a Python literal if JSON would change them (tuples)."""
    try:
        text = json.dumps(case.arguments, allow_nan=False)
        if _same(json.loads(text), list(case.arguments)):
            return f'{{"arguments": {text}}}'.encode()
    except JSON_ERRORS:
        pass
    return json.dumps({"literal": repr(case.arguments)}).encode()


def is_plain(value: Any) -> bool:
    """Return True if every number in a value is finite and short enough to be converted to text."""
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

"""Comparison of a program's output with the expected one, as plain text or JSON values, in the trainer's process.

Text is compared line by line and word by word, without white space at the ends of lines and of the text. A word is
compared as a number if the expected word has a decimal point, else as text.
Values: lists and tuples are equal, because JSON has no tuples; True is not 1; 2 is 2.0. If a float is expected, floats
and integers are compared as numbers. Numbers may differ by 1e-6, absolute or relative.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

TOLERANCE = 1e-6
JSON_ERRORS = (ValueError, TypeError, RecursionError, AttributeError, MemoryError)
"""Exceptions that reading hostile or malformed JSON can raise."""

_DECIMAL = re.compile(r"[-+]?[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]{1,3})?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")


def read_json(text: str | bytes) -> Any:
    """Parse JSON without NaN and infinities; raise one of JSON_ERRORS for any other text."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def same_text(given: bytes, expected: str) -> bool:
    """Return True if an output is the expected text."""
    try:
        lines = _lines(given.decode("utf-8"))
    except UnicodeDecodeError:
        return False
    wanted = _lines(expected)
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().split("\n")]


def _same_line(line: list[str], wanted: list[str]) -> bool:
    if line == wanted:
        return True
    return len(line) == len(wanted) and all(map(_same_word, line, wanted))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if not _DECIMAL.fullmatch(wanted) or len(word) > 400 or not _NUMBER.fullmatch(word):
        return False
    return math.isfinite(float(wanted)) and close(float(word), float(wanted))


def close(number: float, wanted: float, tolerance: float | None = None) -> bool:
    """Return True if two numbers are equal within the (absolute) tolerance; an infinity equals only itself."""
    if not math.isfinite(number) or not math.isfinite(wanted):
        return number == wanted
    if tolerance is not None:
        return abs(number - wanted) <= tolerance
    return abs(number - wanted) <= TOLERANCE * max(1.0, abs(wanted))


def same_value(given: Any, expected: Any, tolerance: float | None = None) -> bool:
    """Return True if a value read from JSON is the expected one."""
    if isinstance(given, bool) or isinstance(expected, bool):
        return given is expected
    if isinstance(expected, float) or (tolerance is not None and isinstance(expected, int)):
        if not isinstance(given, int | float) or abs(given) > 1e300:
            return given == expected
        return close(float(given), float(expected), tolerance)
    if isinstance(expected, int):
        return isinstance(given, int | float) and given == expected
    if isinstance(expected, list):
        same_length = isinstance(given, list) and len(given) == len(expected)
        return same_length and all(same_value(a, b, tolerance) for a, b in zip(given, expected, strict=True))
    if isinstance(expected, dict):
        same_keys = isinstance(given, dict) and given.keys() == expected.keys()
        return same_keys and all(same_value(given[key], expected[key], tolerance) for key in expected)
    return type(given) is type(expected) and given == expected

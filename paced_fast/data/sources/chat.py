"""Chat-template settings: arguments besides the messages, and the date that counts as today."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

from paced_fast.errors import InputError

_RESERVED = {
    *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "strftime_now", "raise_exception"),
}
"""Names that the trainer or transformers fills itself."""


def template_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Arguments of a chat template from words like `enable_thinking=false`, or JSON objects of several.

    A value is JSON where it is that, else text.

    Raises:
        InputError: a word is neither, a name is no name, is the trainer's own, or is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        pairs = _object(word) if word.lstrip().startswith("{") else _pair(word)
        for name, value in pairs.items():
            if not name.isidentifier():
                raise InputError(f"{word[:80]!r}: {name[:80]!r} is not a valid name of an argument: give name=value")
            if name in _RESERVED:
                raise InputError(f"{word[:80]!r}: {name!r} is set by the trainer: leave it out")
            if name in found:
                raise InputError(f"argument {name!r} is given twice: give it once")
            found[name] = value
    return found


def parse_day(text: str) -> datetime.date:
    """The day of a text like 2026-01-31.

    Raises:
        InputError: it is no such day.
    """
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.isoformat() != text:
        raise InputError(f"{text[:80]!r} is not a date: give one as YYYY-MM-DD")
    return day


def _object(word: str) -> dict[str, Any]:
    try:
        return json.loads(word)  # what begins with a brace is an object or no JSON
    except (ValueError, RecursionError):
        raise InputError(f"{word[:80]!r} is not a JSON object: give name=value, or an object in quotes") from None


def _pair(word: str) -> dict[str, Any]:
    name, equals, text = word.partition("=")
    if not equals:
        raise InputError(f"{word[:80]!r} is not of the form name=value, such as enable_thinking=false")
    try:
        return {name: json.loads(text)}
    except (ValueError, RecursionError):
        return {name: {"True": True, "False": False, "None": None}.get(text, text)}

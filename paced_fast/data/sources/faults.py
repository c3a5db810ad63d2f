"""Rows that cannot be used: the reason, and whether it stops the run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from paced_fast.data.sources.spec import ROLES, Messages
from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

_MAX_PROMPT_CHARACTERS = 1_000_000
_MAX_ANSWER_CHARACTERS = 100_000
_BLANK = re.compile("[\\s\u200b-\u200f\u2060\ufeff]*")
_SHOWN = 3


class BadRow(InputError):
    """Raised for a row that cannot be used; the message begins with its name."""


class MissingColumn(NamedTuple):
    """A column that a row lacks and the function of its reward has a parameter for, without a default."""

    reward: str
    column: str


class BadRows:
    """Handling of bad rows: raise the first one (`error`), or leave them out and count them (`skip`)."""

    def __init__(self, mode: Literal["error", "skip"] = "error", max_share: float = 0.01) -> None:
        self.mode = mode
        self.max_share = max_share
        self._found: list[BadRow] = []

    def add(self, bad: BadRow) -> None:
        """Raises `bad`, or counts it."""
        if self.mode == "error":
            raise bad
        self._found.append(bad)

    def settle(self, spec: str, kept: int) -> None:
        """Log in one line how many rows of the source were left out besides `kept` good ones, and reset the count.

        Raises:
            InputError: their share is above the limit.
        """
        found, self._found = self._found, []
        if not found:
            return
        rows = kept + len(found)
        reasons = "; ".join(str(bad) for bad in found[:_SHOWN])
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        if len(found) > self.max_share * rows:
            raise InputError(
                f"{len(found)} of {rows} rows of {spec!r} are bad, more than --data.max-bad-share {self.max_share:g} "
                f"allows ({reasons}{more}): fix the rows, or raise --data.max-bad-share"
            )
        logger.warning("%s: left out %d of %d rows: %s%s", spec, len(found), rows, reasons, more)


def check_text(row: Mapping[str, Any], where: str) -> None:
    """Raises BadRow when a text of the row, however deep, cannot be written as UTF-8."""
    stack: list[tuple[str, Any]] = list(row.items())
    while stack:
        name, value = stack.pop()
        if isinstance(value, str):
            if not value.isascii() and not _encodes(value):
                raise BadRow(f"{where}: {name!r} contains half of a surrogate pair, which is not text: fix the row")
        elif isinstance(value, Mapping):
            stack += [(name, part) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            stack += [(name, part) for part in value]


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked_prompt(prompt: Any, name: str, where: str) -> str | Messages:
    """The prompt as text or messages. Raises BadRow for anything else, for an empty one and for a huge one."""
    result: Any = prompt
    texts: list[Any] = [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        for message in prompt:
            _check_message(message, name, where)
        result = [{"role": message.get("role"), "content": message.get("content")} for message in prompt]
        texts = [message["content"] for message in result]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(
            f"{where}: the prompt in {name!r} is neither text nor a list of messages, each with a role "
            f"({', '.join(ROLES)}) and text as content: fix the row, or name another field, as in prompt=FIELD"
        )
    # A role comes out of the template between control tokens, so only known ones are let through.
    wrong = [message["role"] for message in result if message["role"] not in ROLES] if result is not prompt else []
    if wrong:
        raise BadRow(f"{where}: the prompt in {name!r} has the role {wrong[0]!r}: the roles are {', '.join(ROLES)}")
    if all(_BLANK.fullmatch(text) for text in texts):
        raise BadRow(f"{where}: the prompt in {name!r} is empty: drop the row")
    for text in texts:
        _check_characters(text, "prompt", name, where, _MAX_PROMPT_CHARACTERS)
    return result


_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Parts of a message beside its content that a template may write."""


def _check_message(message: Mapping[str, Any], name: str, where: str) -> None:
    """Raises BadRow for a message that says more than its content."""
    for key in _UNREAD:
        if message.get(key):
            raise BadRow(
                f"{where}: a message of the prompt in {name!r} has {key!r}, which would be lost: move it into content"
            )


def checked_answer(answer: Any, name: str, where: str) -> Any:
    """The answer, when it is text or a finite number. Raises BadRow for anything else and for a blank text."""
    if isinstance(answer, str):
        if _BLANK.fullmatch(answer):
            raise BadRow(
                f"{where}: the answer in {name!r} is empty: drop the row, or name another field, as in answer=FIELD"
            )
        _check_characters(answer, "answer", name, where, _MAX_ANSWER_CHARACTERS)
    elif isinstance(answer, float | Decimal) and not math.isfinite(answer):
        raise BadRow(f"{where}: the answer in {name!r} is {answer}: give a finite number")
    elif not isinstance(answer, bool | int | float | Decimal):
        inner: list[Any] = (
            [0][: len(answer)] if isinstance(answer, list) else list(answer) if isinstance(answer, Mapping) else []
        )
        remedy = f"name a part of it with a dot, as in answer={name}.{inner[0]}" if inner else "write it as text"
        raise BadRow(f"{where}: the answer in {name!r} is a {type(answer).__name__}, not one text or number: {remedy}")
    return answer


def _check_characters(text: str, kind: str, name: str, where: str, limit: int) -> None:
    if len(text) > limit:
        raise BadRow(
            f"{where}: the {kind} in {name!r} has {len(text)} characters, above the limit of {limit}: drop the row"
        )
    if "\0" in text:
        raise BadRow(f"{where}: the {kind} in {name!r} contains a NUL character: fix the row")
    if text.startswith("\ufeff"):
        raise BadRow(f"{where}: the {kind} in {name!r} begins with a byte order mark: fix the row")

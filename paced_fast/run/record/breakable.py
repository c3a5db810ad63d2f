"""Text in a narrow column of a terminal: broken where a path or a data source has a mark, not within a word."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

_PART = re.compile(r"[^\s?&/,]*(?:[?&/,]+\s*|\s+|$)")
"""As much of a text as stays together: up to its next mark or blank, which end a line."""
_PIECE = re.compile(r"[^-_.:=]*(?:[-_.:=]+\s*|$)")
"""The same of a part that is wider than the column."""


class Breakable:
    """Text that a table may break after `?`, `&`, `/`, a comma and blanks.

    A part between them that is wider than the column is broken after other marks, and cut where it has none.
    """

    def __init__(self, text: str) -> None:
        """The text is shown as it is: brackets are no markup, and its ends of line are kept."""
        self._lines = [_divided(_PART, line) for line in text.split("\n")]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        parts = [cell_len(part.rstrip()) for line in self._lines for part in line]
        whole = [cell_len("".join(line)) for line in self._lines]
        return Measurement(max(parts, default=0), max(whole)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for parts in self._lines:
            line = ""
            for part in parts:
                fits = cell_len(part.rstrip()) <= options.max_width
                for piece in [part] if fits else _divided(_PIECE, part):
                    if line and cell_len((line + piece).rstrip()) > options.max_width:
                        yield Text(line.rstrip(), overflow="fold")
                        line = ""
                    line += piece
            yield Text(line.rstrip(), overflow="fold")


def _divided(pattern: re.Pattern[str], text: str) -> list[str]:
    """The parts of a text, which together are the text."""
    return [part for part in pattern.findall(text) if part]


def setting_in_words(value: object) -> str:
    """The value of a setting for a reader; long items of a list have a line each."""
    if not isinstance(value, list | tuple):
        return "none" if value in (None, "") else str(value)
    items = [str(item) for item in value]
    return ("\n" if any(len(item) > _LONG for item in items) else ", ").join(items) or "none"


_LONG = 24
"""Characters of an item of a list above which it has a line of its own."""

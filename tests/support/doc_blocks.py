"""Blocks of code in a page of documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block; one with a title is the content of a file of that name."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that name their language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2] or "", found[3], text.count("\n", 0, found.start()) + 2)
        for found in _FENCE.finditer(text)
    ]


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    """Run a block in `names`; a traceback shows the page and the line."""
    padded = "\n" * (block.line - 1) + block.text
    exec(compile(padded, str(page), "exec"), names)  # the project's own pages

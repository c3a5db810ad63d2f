"""What every section of a page needs: lines of a page's width, and where a result was measured."""

from __future__ import annotations

import textwrap
from typing import Any


def wrapped(text: str, indent: str = "") -> str:
    """Break a paragraph into lines of a page; `indent` goes before every line but the first."""
    words = " ".join(text.split())
    return textwrap.fill(words, width=120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def environment_line(result: dict[str, Any]) -> str:
    """Date, commit, processor and versions of a result."""
    where = result["environment"]
    versions = where["versions"]
    parts = [where["date"], f"commit {where['commit']}", where["cpu"], f"{where['cores']} cores"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers", "trl") if versions.get(name)]
    return ", ".join(parts)

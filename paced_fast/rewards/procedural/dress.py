"""Formatting around an answer to a task: a full stop, emphasis, dollar signs, quotes, a box, a fence, "Answer:"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paced_fast.rewards.procedural.plain import Judge

_MOST_LAYERS = 5
_LAYERS = tuple(
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"```[a-z]*\s*\n(.*)\n\s*```",
        r"\\boxed\s*\{(.*)\}",
        r"\$\$(.+)\$\$",
        r"\$([^$]+)\$",
        r"\*\*([^*]+)\*\*",
        r"`([^`]+)`",
        r"'([^']*)'",
        r'"([^"]*)"',
        r"(?:the )?(?:final |correct )?answer(?: is)?\s*[: ]\s*(.+)",
        r"(.+?)\s*\.",
    )
)


def undressed(text: str) -> list[str]:
    """Return the text after each removal of a layer of formatting, up to 5 layers, outermost first."""
    found: list[str] = []
    for _ in range(_MOST_LAYERS):
        match = next((match for layer in _LAYERS if (match := layer.fullmatch(text.strip()))), None)
        if match is None or not match[1].strip():
            break
        text = match[1].strip()
        found.append(text)
    return found


def dressed(judge: Judge, *, in_full: bool = False) -> Judge:
    """Return a rule that also accepts a formatted answer: in full, or by its share of the text, as in the package."""

    def judged(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
        score = judge(text, entry, settings)
        if score >= 1.0:
            return score
        inner = (judge(bare, entry, settings) * (1.0 if in_full else len(bare) / len(text)) for bare in undressed(text))
        return max((score, *inner))

    return judged

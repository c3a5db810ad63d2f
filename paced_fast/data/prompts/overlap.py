"""Prompts with equal normalised text: between training and held-out rows, and among training rows."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from paced_fast.data.records import PromptRow, PromptTable

# Numbers whole, words whole, and one by one the marks that carry meaning in mathematics and programs. Other
# punctuation, quotes, dollar signs and white space are dress. A hyphen counts unless it joins two words.
_PARTS = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|(?<![^\W\d_])-|-(?![^\W\d_])|(?<=[\d)])!|[+*/^=<>%|()\[\]{}\\_~&#@]")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Overlap:
    """Training rows whose prompt is that of a held-out row, by normalised text."""

    train: tuple[int, ...]
    """Their positions in the training table."""
    eval_rows: int
    """Held-out rows that have such a training row."""
    pairs: tuple[tuple[str, str], ...]
    """Names of the first few such training rows, each with its held-out row."""
    by_slice: Mapping[str, int]
    """Such training rows by the slice of their held-out row; a row that is in several counts in the first."""
    slices: frozenset[str]
    """Slices of those held-out rows."""

    def __str__(self) -> str:
        """Text for a message, such as `2 training prompts are also held-out prompts (a.jsonl:1 is b.jsonl:7; ...)`."""
        shown = "; ".join(f"{one} is {other}" for one, other in self.pairs)
        dots = "; ..." if len(self.train) > len(self.pairs) else ""
        count = len(self.train)
        told = (
            "training prompt is also a held-out prompt" if count == 1 else "training prompts are also held-out prompts"
        )
        return f"{count} {told} ({shown}{dots})"


def overlap(train: PromptTable, held_out: PromptTable) -> Overlap:
    """Training rows whose prompt is that of a held-out row: case, white space, punctuation, the form of characters
    (NFKC), the chat roles and system messages aside."""
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(held_out.rows):
        places.setdefault(_key(row), []).append(i)
    found = [(i, places[key]) for i, key in enumerate(map(_key, train.rows)) if key in places]
    places_found = {place for _, others in found for place in others}
    return Overlap(
        train=tuple(i for i, _ in found),
        eval_rows=len(places_found),
        by_slice=Counter(held_out.rows[others[0]].slice for _, others in found),
        slices=frozenset(held_out.rows[place].slice for place in places_found),
        pairs=tuple((train.rows[i].where, held_out.rows[others[0]].where) for i, others in found[:_SHOWN]),
    )


def duplicates(table: PromptTable) -> tuple[tuple[int, int], ...]:
    """Positions (row, earlier row) for every row whose prompt an earlier row has, compared as `overlap` does."""
    first: dict[bytes, int] = {}
    places = [(i, first.setdefault(_key(row), i)) for i, row in enumerate(table.rows)]
    return tuple(pair for pair in places if pair[0] != pair[1])


def normalised(text: str) -> str:
    """Normalise a text: the parts that carry meaning, one space apart."""
    plain = unicodedata.normalize("NFKC", text).translate(_DASHES).casefold()
    return " ".join(part.replace(",", "") for part in _PARTS.findall(plain))


def _key(row: PromptRow) -> bytes:
    prompt = row.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(m["content"] for m in prompt if m["role"] not in ("system", "developer"))
    # A prompt without any such part is compared as it is.
    return hashlib.sha256((normalised(prompt) or prompt).encode()).digest()[:16]

"""What changed between the first and the last evaluation, prompt by prompt: accuracy, and slices that became worse.

Needs no tensor library, so that a reader of run folders can use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TypeGuard

_LEVEL = 0.95
_FEWEST = 5
"""Prompts of a slice below which a spread over prompts says too little."""


@dataclass(frozen=True, slots=True)
class Fall:
    """Accuracy of one slice before and after, and the interval of the difference."""

    slice: str
    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """After minus before; below 0 for a fall."""
        return self.after - self.before

    def __str__(self) -> str:
        """Text for a message, such as `slice trivial fell from 98.0% to 78.7% (-24.1 to -14.5 points)`."""
        ends = f"{100 * self.low:+.1f} to {100 * self.high:+.1f} points"
        return f"slice {self.slice} fell from {self.before:.1%} to {self.after:.1%} ({ends})"


def fallen_slices(first: Mapping[str, object], last: Mapping[str, object]) -> list[Fall]:
    """Slices that fell by more than their noise, the largest fall first.

    `first` and `last` are evaluation records of the same prompts; the first names the slice of each (`prompt_slices`).
    The noise is that of the mean difference over prompts, which holds their sampling too: an interval of 95 % for all
    slices together. Empty if the records cannot be compared.
    """
    known = _known(first, last)
    if not known:
        return []
    z = NormalDist().inv_cdf(1 - (1 - _LEVEL) / 2 / len(known))
    falls = []
    for name, found in known.items():
        changes = [new - old for old, new in found]
        change, half = fmean(changes), z * stdev(changes) / math.sqrt(len(changes))
        if change + half < 0:
            old, new = fmean(old for old, _ in found), fmean(new for _, new in found)
            falls.append(Fall(name, old, new, change - half, change + half))
    return sorted(falls, key=lambda fall: fall.change)


def recovered_slices(first: Mapping[str, object], last: Mapping[str, object]) -> frozenset[str]:
    """Slices whose accuracy is no lower in `last` than in `first`, by the prompts that both scored; see `_pairs`."""
    pairs = _pairs(first, last)
    return frozenset(name for name, found in pairs.items() if fmean(new - old for old, new in found) >= 0)


def can_compare(first: Mapping[str, object], last: Mapping[str, object]) -> bool:
    """Whether any slice has enough prompts that both records scored to tell a fall from noise."""
    return bool(_known(first, last))


def change_interval(first: Mapping[str, object], last: Mapping[str, object]) -> tuple[float, float] | None:
    """Interval of 95 % of the change in accuracy, from the mean difference over prompts that both records scored.

    The prompts are those of the headline slices, or all if the records name none. None if they are too few.
    """
    headline = _list(first.get("headline"))
    pairs = _pairs(first, last)
    changes = [new - old for name, found in pairs.items() if not headline or name in headline for old, new in found]
    if len(changes) < _FEWEST:
        return None
    half = NormalDist().inv_cdf(1 - (1 - _LEVEL) / 2) * stdev(changes) / math.sqrt(len(changes))
    return fmean(changes) - half, fmean(changes) + half


def _known(first: Mapping[str, object], last: Mapping[str, object]) -> dict[str, list[tuple[float, float]]]:
    """Those slices of `_pairs` whose spread over prompts says enough."""
    return {name: found for name, found in _pairs(first, last).items() if len(found) >= _FEWEST}


def _pairs(first: Mapping[str, object], last: Mapping[str, object]) -> dict[str, list[tuple[float, float]]]:
    """Accuracy in both records of each prompt that both scored, by slice; empty if the prompts are not the same."""
    slices, before, after = (
        _list(first.get("prompt_slices")),
        *(_list(r.get("prompt_accuracy")) for r in (first, last)),
    )
    pairs: dict[str, list[tuple[float, float]]] = {}
    if not len(slices) == len(before) == len(after):
        return pairs
    for name, old, new in zip(slices, before, after, strict=True):
        if _is_number(old) and _is_number(new):
            pairs.setdefault(str(name), []).append((old, new))
    return pairs


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Weighted sums of named functions: `0.7*math+0.3*exact`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from paced_fast.errors import InputError

_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a weighted sum."""

    weight: float
    name: str


def parse_terms(text: str) -> tuple[Term, ...]:
    """Return the terms of `[weight*]name+[weight*]name+...`.

    `path:function` is one name if the file exists, even if its path contains `+` or `*`.

    Raises:
        InputError: a term without a name, a weight that is 0 or not finite, or a name given twice.
    """
    path, _, function = text.rpartition(":")
    if function.isidentifier() and _is_file(path):
        return (Term(1.0, text),)
    terms = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        weight = (float(factor) if _NUMBER.fullmatch(factor.strip()) else math.nan) if star else 1.0
        if not name.strip() or not math.isfinite(weight) or weight == 0.0:
            raise InputError(
                f"{text!r}: {part.strip()!r} is neither a name nor weight*name with a finite weight other than 0"
            )
        terms.append(Term(weight, name.strip()))
    names = [term.name for term in terms]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"{text!r} names {name!r} twice: name it once, with the sum of the weights")
    return tuple(terms)


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # invalid as a file name, or a home directory that does not exist
        return False


def parse_reward(text: str) -> tuple[Term, ...]:
    """Return the terms of a row's reward, weights scaled to add up to 1. A negative weight is an InputError too."""
    terms = parse_terms(text)
    for term in terms:
        if term.weight < 0:
            raise InputError(
                f"reward {text!r}: the weight of {term.name!r} is negative: give a positive one, because correctness "
                "is in [0, 1]"
            )
    total = sum(term.weight for term in terms)
    if not math.isfinite(total):
        raise InputError(f"reward {text!r}: the sum of the weights is too large for a number: scale them down")
    return tuple(Term(term.weight / total, term.name) for term in terms)

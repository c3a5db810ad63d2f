"""Rounded decimals that `math` accepts, if math-verify does too: it compares the first six digits after the point."""

from __future__ import annotations

from fractions import Fraction

_RELATIVE = Fraction(1, 10**5)
_PLACES = 6
_COARSEST = Fraction(1, 50)


def is_rounding(gold: Fraction, answer: Fraction) -> bool:
    """Return True if one of two numbers, at least one of them a decimal, is an acceptable rounding of the other.

    True if they differ by at most 1e-5 of the gold, or if one is the other rounded to six digits after the point and
    they differ by at most 2 % of the gold. 0 matches only 0.
    """
    if gold == 0 or answer == 0 or (gold < 0) != (answer < 0):
        return gold == answer
    difference = abs(gold - answer)
    if difference <= _RELATIVE * abs(gold):
        return True
    if difference > _COARSEST * abs(gold):
        return False
    return any(_has_places(one) and round(other, _PLACES) == one for one, other in ((gold, answer), (answer, gold)))


def _has_places(one: Fraction) -> bool:
    return (one * 10**_PLACES).denominator == 1

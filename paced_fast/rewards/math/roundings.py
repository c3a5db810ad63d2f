"""Which decimals `math` takes for a number, math-verify willing: it compares the first six digits after the point."""

from __future__ import annotations

from fractions import Fraction

_RELATIVE = Fraction(1, 10**5)
_PLACES = 6
_COARSEST = Fraction(1, 50)


def is_rounding(gold: Fraction, answer: Fraction) -> bool:
    """Whether one of two numbers may stand for the other, at least one of them being a decimal.

    They differ by a hundred-thousandth of the gold, or one is the other rounded to six or more digits after the point
    and keeps a digit or two. Only 0 stands for 0.
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

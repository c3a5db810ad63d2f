"""Equality of two constants: rational numbers exactly, others to as many digits as are needed to tell them apart.

Only the workers of the math rewards run this file; they load it by its path.

If two numbers made of integers by + - * / and roots differ, they differ by at least a bound that follows from their
sizes (Burnikel, Funke, Mehlhorn, Schirra, Schmitt: A separation bound for real algebraic expressions, Algorithmica
2009), so agreement to that many digits proves them equal. With functions such as exp or sin there is no proof: the same
formula, applied to the sizes of their values and arguments, gives the digits that a difference written out in the
expressions would need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import sympy
from mpmath import libmp

DIGITS = 100
"""Minimum number of digits that are compared."""
_MOST_DIGITS = 6_000
_MOST_BITS = 1 << 22
_MOST_DENOMINATOR_BITS = 1 << 18
_SLACK_BITS = 12
_ROUNDING_BITS = 70
_LEAST_KNOWN_BITS = 16
_EXACT = 1 << 30
_BITS = math.log2(10)

Points = Mapping[sympy.Basic, sympy.Basic | float]


def same(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Return True if two constants are equal; False also if they are too large to decide."""
    exactly = fraction(gold), fraction(answer)
    if exactly[0] is not None and exactly[1] is not None:
        return exactly[0] == exactly[1]
    left, right = (evaluated(one, {}, DIGITS) for one in (gold, answer))
    if not agree(left, right, DIGITS):
        return False
    upper, lower, degree = sizes(gold, answer)
    # Unequal products differ within the compared digits, but in a sum a small last term could lie below them.
    if upper + lower > _MOST_DIGITS * _BITS and (gold.has(sympy.Add) or answer.has(sympy.Add)):
        return False
    bits = lower + (degree - 1) * upper + max(0, magnitude(left), magnitude(right))
    digits = min(math.ceil(bits / _BITS) + 10, _MOST_DIGITS)
    if digits <= DIGITS:
        return True
    left, right = (evaluated(one, {}, digits) for one in (gold, answer))
    return agree(left, right, digits)


def fraction(one: sympy.Expr) -> Fraction | None:
    """Return the exact value of a rational expression; None for any other, or if it would have too many digits."""
    try:
        return _fraction(one)
    except (_TooLargeError, ZeroDivisionError):
        return None


class _TooLargeError(Exception):
    """An exact value would take too many digits."""


def _fraction(one: Any) -> Fraction | None:
    if isinstance(one, sympy.Rational):
        return _bounded(Fraction(int(one.p), int(one.q)))
    if not isinstance(one, _RATIONAL):
        return None
    parts = [_fraction(part) for part in one.args]
    values = [part for part in parts if part is not None]
    if len(values) < len(parts):
        return None
    if isinstance(one, sympy.Add | sympy.Mul):
        total = Fraction(isinstance(one, sympy.Mul))
        for value in values:
            total = _bounded(total + value if isinstance(one, sympy.Add) else total * value)
        return total
    if isinstance(one, sympy.Abs):
        return abs(values[0])
    if any(value.denominator != 1 for value in values[isinstance(one, sympy.Pow) :]):
        return None
    first, whole = values[0], int(values[-1])
    if isinstance(one, sympy.Pow):
        _allow(abs(whole) * (first.numerator.bit_length() + first.denominator.bit_length()))
        return _bounded(first**whole)
    top = int(first)
    if top < 0 or whole < 0:
        return None
    if isinstance(one, sympy.factorial):
        _allow(top * top.bit_length())
        return Fraction(math.factorial(top))
    _allow(min(whole, abs(top - whole)) * top.bit_length())
    return Fraction(math.comb(top, whole))


_RATIONAL = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Abs, sympy.factorial, sympy.binomial)


def _allow(bits: int) -> None:
    if bits > _MOST_BITS:
        raise _TooLargeError


def _bounded(value: Fraction) -> Fraction:
    _allow(value.numerator.bit_length())
    if value.denominator.bit_length() > _MOST_DENOMINATOR_BITS:
        raise _TooLargeError
    return value


def sizes(gold: sympy.Expr, answer: sympy.Expr) -> tuple[float, float, int]:
    """Return log2 u, log2 l and a degree d such that |gold - answer| >= 1 / (l u^(d - 1)) unless the two are equal."""
    degrees: dict[Any, int] = {}
    upper, lower = _sizes(sympy.Add(gold, sympy.Mul(-1, answer, evaluate=False), evaluate=False), degrees)
    return upper, lower, min(math.prod(degrees.values()), 1 << 40)


def _sizes(one: Any, degrees: dict[Any, int]) -> tuple[float, float]:
    """Return log2 of bounds on numerator and denominator, with all conjugates; roots are added to `degrees`."""
    if isinstance(one, sympy.Rational):
        return _log2(abs(int(one.p))), _log2(int(one.q))
    if isinstance(one, sympy.Add):
        upper, lower = -math.inf, 0.0
        for part in one.args:
            more, under = _sizes(part, degrees)
            upper, lower = max(upper + under, more + lower) + 1, lower + under
        return max(upper, 0.0), lower
    if isinstance(one, sympy.Mul | sympy.Abs):
        parts = [_sizes(part, degrees) for part in one.args]
        return sum(upper for upper, _ in parts), sum(lower for _, lower in parts)
    if one is sympy.I:
        degrees[one] = 2
        return 0.0, 0.0
    if isinstance(one, sympy.Symbol):
        return 0.0, 0.0
    if isinstance(one, sympy.Pow) and (exponent := fraction(one.exp)) is not None and _log2(exponent.denominator) < 32:
        return _sizes_of_power(one.base, exponent, degrees)
    # Not algebraic, or not known to be: its own size plus twice the sizes of its arguments.
    more = 2 * sum(sum(_sizes(part, degrees)) for part in one.args if isinstance(part, sympy.Expr))
    size = 2.0 if one.free_symbols else float(magnitude(evaluated(one, {}, 15)))
    return max(size, 0.0) + more, max(-size, 0.0) + more


def _sizes_of_power(base: Any, exponent: Fraction, degrees: dict[Any, int]) -> tuple[float, float]:
    upper, lower = _sizes(base, degrees)
    root = exponent.denominator
    if root > 1:
        degrees[base, root] = root
        if upper >= lower:
            upper = (upper + (root - 1) * lower) / root
        else:
            lower = ((root - 1) * upper + lower) / root
    if exponent < 0:
        upper, lower = lower, upper
    times = abs(exponent.numerator)
    return upper * times, lower * times


def _log2(value: int) -> float:
    return float(value.bit_length()) if value > 1 else 0.0


Value = tuple[tuple[Any, int], tuple[Any, int]]
"""Real and imaginary part, each an mpmath number with its count of known bits; 0 bits if it is 0 as far as known."""


def evaluated(one: sympy.Expr, points: Points, digits: int) -> Value:
    """Return the value of an expression to `digits` digits.

    Raises:
        ValueError: the value is not a number, or is infinite.
    """
    return value_of(one.evalf(digits, subs=dict(points), maxn=2 * digits))


def value_of(number: sympy.Expr) -> Value:
    """Convert a result of `evalf`, with the precision it has.

    Raises:
        ValueError: the value is not a number, or is infinite.
    """
    if not number.is_number or number.has(sympy.nan, sympy.zoo, sympy.oo):
        raise ValueError("no number")
    real, imaginary = number.as_real_imag()
    return _part(real), _part(imaginary)


def _part(part: Any) -> tuple[Any, int]:
    if isinstance(part, sympy.Rational):
        return libmp.from_rational(int(part.p), int(part.q), 4 * _MOST_DIGITS if part else 53), _EXACT
    if not isinstance(part, sympy.Float):
        raise ValueError("no number")
    known = part._prec
    return part._mpf_, known if known > _LEAST_KNOWN_BITS else 0


def agree(one: Value, other: Value, digits: int) -> bool:
    """Return True if two values agree, up to rounding, in all digits that both have, and those are about `digits`."""
    known = max(map(_error, (*one, *other)))
    if known > max(0, magnitude(one)) - digits * _BITS + _ROUNDING_BITS:
        return False
    precision = max(bits for _, bits in (*one, *other, (None, 4 * 53)) if bits < _EXACT) + 64
    for (left, _), (right, _) in zip(one, other, strict=True):
        difference = libmp.mpf_sub(left, right, precision, "n")
        if difference[1] and difference[2] + difference[3] > known + _SLACK_BITS:
            return False
    return True


def _error(part: tuple[Any, int]) -> float:
    """Return log2 of the error of a real or imaginary part."""
    (_, mantissa, exponent, count), bits = part
    if not mantissa:
        return -math.inf
    return exponent + count - (bits if bits < _EXACT else math.inf)


def magnitude(value: Value) -> int:
    """Return log2 of the size of a value, -2^30 for 0."""
    found = [number[2] + number[3] for number, bits in value if number[1] and bits]
    return max(found, default=-_EXACT)

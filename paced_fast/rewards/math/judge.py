"""Program of the math rewards' workers: math-verify, and the exact comparison.

It runs under `fork_server` in separate processes. math-verify's own time limit is an alarm signal, which works only in
the main thread and does not stop every computation; it is off here, and the pool kills a worker that takes too long.

A request is `[trees, texts]`: gold and answer as trees made by `forms`, for the exact comparison, and as LaTeX, for
math-verify; either may be None. The reply is `right` if one of the comparisons holds, `unreadable` if the parser cannot
read the gold as mathematics, else `wrong`. If neither text has a decimal point, so that no rounding is allowed, the
exact comparison decides about numbers, because math-verify treats values close to 0 as 0.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_CLEARLY_DIFFERENT = 1e-3
_NEARLY_NOTHING = 1e-9
_MOST_DIGITS = 2_000
# Kinds of points to compare at: piecewise functions such as max(1, x) equal simpler ones on one side of 1 or 0.
_BELOW, _ABOVE, _BOTH, _NEGATIVE, _WHOLE = "below 1", "above 1", "both", "negative", "whole"
_BOUNDS = {
    _BELOW: (50_000_000, 240_000_000),
    _ABOVE: (260_000_000, 1_000_000_000),
    _BOTH: (50_000_000, 1_000_000_000),
    _NEGATIVE: (-1_000_000_000, -50_000_000),
    _WHOLE: (2, 9),
}
_UNEVALUATED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
_IMAGINARY = sympy.Symbol("i", real=False)
_INFINITE = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod)
_STRICT = (LatexExtractionConfig(normalization_config=NormalizationConfig(True, False, True, True, "all", False)),)
_WARMING = (
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{-1+\sqrt{5}}{2}", r"\frac{\sqrt[3]{5}-1}{2}"),
    ("x^2+1", "1+y^2"),
    ("(x-2)(x+3)", "x^2+x-6"),
    (r"\frac{n(n+1)}{2}", r"\frac{1}{2}n^{2}+n/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{\pi}{3}", r"100-25\pi"),
    ("3.14", r"\pi"),
    (r"\ln 2", r"\log_{2}(3)"),
    (r"\sin^2 x", r"1-\cos^2(x)"),
    ("2^{n+1}-1", r"2\cdot 2^n - e^{2}"),
    ("3+4i", "4i+3"),
    ("(1,2)", r"\left(1, \frac{1}{2}\right]"),
    (r"\{1,5\}", r"\{5,1\}"),
    ("1,2", "2,1"),
    (r"(-\infty,-2)\cup(2,\infty)", r"[0,\infty)"),
    ("y=2x+3", "y=3-2x"),
    ("x > 3", r"3 \le x"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"|x|", r"5\%"),
    (r"3\times 10^4", r"60^\circ"),
)


def _beside(name: str) -> Any:
    """Import a module of this folder by path: a worker runs without the package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


constants = _beside("constants")
roundings = _beside("roundings")


def prepare() -> None:
    """Fill the caches of the parser and of sympy before the first fork; without them a pair takes ten times as long."""
    logging.disable(logging.CRITICAL)
    for gold, answer in _WARMING:
        judge([[["expression", gold], ["expression", answer]], [gold, answer]])
    for left, right in (("y", "2x+3"), ("x^2+y^2", "25")):
        sides = ["expression", left], "=", ["expression", right]
        other = ["expression", f"{left}-({right})"], "=", ["number", "0"]
        judge([[["relation", *sides], ["relation", *other]], None])


def judge(request: Sequence[Any]) -> str:
    """Return the verdict on a request: `right`, `wrong` or `unreadable`."""
    trees, texts = request
    exactly = _verdict(_same, trees) if trees else ""
    if exactly == "right" or not texts:
        return exactly
    if trees and _verdict(functools.partial(_differ, is_decimal=_is_decimal(texts)), trees) == "right":
        return "wrong"
    return _verdict(_verified, texts)


def _verdict(compare: Callable[[Any, Any], bool], pair: Sequence[Any]) -> str:
    """Return `right` if the comparison holds; `wrong` if it does not or fails; `unreadable` on UnreadableError."""
    try:
        return "right" if compare(*pair) else "wrong"
    except UnreadableError:
        return "unreadable"
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError):
        return "wrong"  # sympy cannot compute with it


class UnreadableError(Exception):
    """The parser cannot read the gold as mathematics."""


def _verified(gold_text: str, answer_text: str) -> bool:
    gold = _parsed(gold_text)
    if not gold:
        raise UnreadableError
    answer = parse(f"\\boxed{{{answer_text}}}", parsing_timeout=0, fallback_mode="no_fallback")
    texts = gold_text, answer_text
    if not answer or is_clearly_different(gold[0], answer[0], is_decimal=_is_decimal(texts)):
        return False
    if (
        "%" not in f"{texts}"
        and _verdict(functools.partial(_part_differs, is_decimal=_is_decimal(texts)), texts) == "right"
    ):
        return False
    return bool(verify(list(gold), answer, timeout_seconds=None))


@functools.lru_cache(4096)
def _parsed(gold: str) -> tuple[Any, ...]:
    return tuple(parse(f"\\boxed{{{gold}}}", parsing_timeout=0, fallback_mode="no_fallback"))


def _is_decimal(texts: Sequence[str]) -> bool:
    return any(re.search(r"\.[0-9]|[0-9]\.", text) for text in texts)


def _differ(gold: Sequence[Any], answer: Sequence[Any], *, is_decimal: bool) -> bool:
    """Return True if two trees have corresponding parts that differ by more than any allowed rounding.

    Rounding is allowed only if gold or answer has a decimal point.
    """
    gold, answer = (tree[1] if tree[0] == "set" and len(tree) == 2 else tree for tree in (gold, answer))
    kind, other = gold[0], answer[0]
    if {kind, other} <= {"number", "expression"}:
        return _part_differs(gold[1], answer[1], is_decimal=is_decimal)
    if kind != other or len(gold) != len(answer):
        return False
    if kind == "relation":
        sides = list(zip(gold[1::2], answer[1::2], strict=True))
        if len(sides) != 2 or gold[2] != answer[2]:
            return False
        return any(_same(*sides[i]) and _differ(*sides[1 - i], is_decimal=is_decimal) for i in (0, 1))
    if kind in ("()", "[]", "(]", "[)"):
        return any(_differ(*parts, is_decimal=is_decimal) for parts in zip(gold[1:], answer[1:], strict=True))
    if kind not in ("set", "union"):
        return False
    left = list(answer[1:])
    for part in gold[1:]:
        found = [i for i, one in enumerate(left) if not _differ(part, one, is_decimal=is_decimal)]
        if not found:
            return True
        del left[found[0]]
    return False


def _part_differs(gold_text: str, answer_text: str, *, is_decimal: bool) -> bool:
    gold, answer = _read(gold_text, is_gold=True), _read(answer_text)
    if is_clearly_different(gold, answer, is_decimal=is_decimal):
        return True
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        if gold.shape != answer.shape:
            return False
        return any(_value_differs(*pair, is_decimal) for pair in zip(gold.flat(), answer.flat(), strict=True))
    return _value_differs(gold, answer, is_decimal)


def _value_differs(gold: Any, answer: Any, is_decimal: bool) -> bool:
    if not _is_plain(gold, answer) or gold.free_symbols != answer.free_symbols:
        return False
    if is_decimal and not gold.free_symbols:
        return not roundings.is_rounding(*(constants.fraction(one) or _fraction(one) for one in (gold, answer)))
    return not is_decimal and not _equal(gold, answer)


def _fraction(one: sympy.Expr) -> Fraction:
    """Return a constant to thirty digits. Raise ValueError if it is not real."""
    value = one.evalf(30)
    if not isinstance(value, sympy.Float | sympy.Rational):
        raise ValueError("not real")
    return Fraction(*(int(part) for part in sympy.Rational(value).as_numer_denom()))


def _is_plain(*values: Any) -> bool:
    """Return True if all values are finite expressions of numbers, variables and known functions."""
    return all(
        isinstance(one, sympy.Expr) and not one.has(sympy.UnevaluatedExpr, sympy.core.function.AppliedUndef, *_INFINITE)
        for one in values
    )


def is_clearly_different(gold: Any, answer: Any, *, is_decimal: bool = True) -> bool:
    """Return True if two expressions differ at one point by more than math-verify's rounding tolerates.

    math-verify itself proves a difference by `simplify`, which takes ten times as long. It has separate rules for
    percentages and single symbols.
    """
    if not _is_plain(gold, answer) or isinstance(gold, sympy.Symbol) or isinstance(answer, sympy.Symbol):
        return False
    try:
        points = _points(gold, answer, _ABOVE)
        values = [one.evalf(20, subs=points, maxn=100) for one in (gold, answer)]
        try:
            values = [complex(value) for value in values]
        except OverflowError:
            sizes = [constants.magnitude(constants.value_of(value)) for value in values]
            return abs(sizes[0] - sizes[1]) > 1
    except (ArithmeticError, TypeError, ValueError, AttributeError):
        return False
    larger = max(map(abs, values))
    if not is_decimal and larger < _NEARLY_NOTHING:
        return False  # perhaps two zeros
    return abs(values[0] - values[1]) > _CLEARLY_DIFFERENT * (larger + is_decimal)


def _same(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Return True if two trees are equal. A tree is `[kind, part, ...]`; a part is a tree, or the text of a leaf."""
    kind, other = gold[0], answer[0]
    if kind == "number" and other == "number":
        return gold[1] == answer[1]
    if kind == "expression" and other in ("number", "expression"):
        return _equal(_read(gold[1], is_gold=True), _read(answer[1]))
    if kind == "relation" and other == "relation":
        return _same_relation(gold[1:], answer[1:])
    if kind != other or len(gold) != len(answer):
        return False
    if kind == "text":
        return gold[1] == answer[1]
    if kind not in ("set", "union"):
        return all(map(_same, gold[1:], answer[1:]))
    left = list(answer[1:])
    for part in gold[1:]:
        found = next((i for i, candidate in enumerate(left) if _same(part, candidate)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_relation(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Compare `[left, operator, right, operator, ...]`: equal sides, or one operator and proportional differences."""
    if gold[1::2] == answer[1::2] and len(gold) == len(answer) and all(map(_same, gold[::2], answer[::2])):
        return True
    if len(gold) != 3 or len(answer) != 3 or gold[1] != answer[1]:
        return False
    golds = [_read(side[1], is_gold=True) for side in gold[::2]]
    answers = [_read(side[1]) for side in answer[::2]]
    if any(not isinstance(side, sympy.Expr) for side in (*golds, *answers)):
        return False
    difference, other = golds[0] - golds[1], answers[0] - answers[1]
    if not difference.free_symbols or difference.free_symbols != other.free_symbols:
        return False
    ratios: list[sympy.Expr] = []
    digits = _digits(difference, other)
    for draw in _draws(difference, other):
        points = _points(difference, other, draw)
        values = [_value(one, points, draw, digits) for one in (difference, other)]
        if draw in (_NEGATIVE, _WHOLE) and not all(value.is_real and value for value in values):
            continue
        if not all(value.is_number and value.is_finite and value for value in values):
            return False
        ratios.append(values[0] / values[1])
    least = sympy.Float(10, digits) ** (20 - digits)
    if any(not abs(ratio - ratios[0]) < least * abs(ratio) for ratio in ratios):
        return False
    return gold[1] in ("=", "!=") or bool(ratios[0].is_positive)


@functools.lru_cache(4096)
def _parsed_exactly(text: str) -> Any:
    found = parse(f"\\boxed{{{text}}}", _STRICT, parsing_timeout=0, fallback_mode="no_fallback")
    return _exact(found[0]) if found else None


def _read(text: str, *, is_gold: bool = False) -> Any:
    """Return the value of a leaf; if it cannot be read, None for an answer and UnreadableError for the gold."""
    value = _parsed_exactly(text)
    if value is None and is_gold:
        raise UnreadableError
    return value


def _exact(value: Any) -> Any:
    """Convert decimals to exact fractions and, except in sums, integrals and limits, the letter i to sympy.I."""
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(_exact)
    if not isinstance(value, sympy.Basic):
        return value
    exact: dict[Any, Any] = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    if _IMAGINARY in value.free_symbols and not value.has(*_UNEVALUATED):
        exact[_IMAGINARY] = sympy.I
    return value.xreplace(exact) if exact else value


def _equal(gold: Any, answer: Any) -> bool:
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_equal, gold.flat(), answer.flat()))
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return gold == answer or _is_zero(gold, answer)
    # Other objects of the parser, for example a logical formula.
    return answer is not None and bool(verify(gold, answer, timeout_seconds=None))


def _is_zero(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Return True if gold and answer agree at random points of every kind, or as constants if gold has no variable."""
    if not answer.free_symbols <= gold.free_symbols:
        return False
    gold, answer = (one.doit() if one.has(*_UNEVALUATED) else one for one in (gold, answer))
    if gold.has(*_INFINITE) or answer.has(*_INFINITE):
        return bool(sympy.simplify(gold - answer) == 0)
    if not gold.free_symbols:
        return bool(constants.same(gold, answer))
    digits = _digits(gold, answer)
    for draw in _draws(gold, answer):
        points = _points(gold, answer, draw)
        values = [_value(one, points, draw, digits) for one in (gold, answer)]
        if draw in (_NEGATIVE, _WHOLE) and not all(value.is_real for value in values):
            continue
        if any(not value.is_number or value.has(sympy.nan, sympy.zoo) for value in values):
            return bool(sympy.simplify(gold - answer) == 0)
        if values[0] == values[1]:
            continue
        if not constants.agree(*map(constants.value_of, values), digits):
            return False
    return True


def _digits(gold: sympy.Expr, answer: sympy.Expr) -> int:
    """Return the number of digits to compare: at least as many as the numbers in both expressions have together."""
    upper, lower, _ = constants.sizes(gold, answer)
    return min(max(constants.DIGITS, int((upper + lower) / 3) + 10), _MOST_DIGITS)


def _draws(gold: sympy.Expr, answer: sympy.Expr) -> tuple[str, ...]:
    """Return the kinds of points to compare at."""
    if not gold.free_symbols:
        return (_ABOVE,)
    steps = gold.has(*_STEPS) or answer.has(*_STEPS)
    return (_BELOW, _ABOVE, _BOTH, _NEGATIVE, *([_WHOLE] if steps else []))


def _value(one: sympy.Expr, points: dict[sympy.Basic, sympy.Basic | float], draw: str, digits: int) -> sympy.Expr:
    """Evaluate an expression at a point, by `evalf`: `subs` would expand powers of fractions exactly, without limit."""
    if draw == _WHOLE:
        return sympy.N(one.subs(list(points.items())), digits)
    return one.evalf(digits, subs=points, maxn=2 * digits)


def _points(gold: sympy.Expr, answer: sympy.Expr, draw: str) -> dict[sympy.Basic, sympy.Basic | float]:
    """Return a value for every variable between the bounds of `draw`, the same in every call."""
    points: dict[sympy.Basic, sympy.Basic | float] = {}
    low, high = _BOUNDS[draw]
    for symbol in gold.free_symbols | answer.free_symbols:
        numerator = random.Random(f"{symbol} {draw}").randint(low, high)
        points[symbol] = sympy.Integer(numerator) if draw == _WHOLE else sympy.Rational(numerator, 250_000_001)
    return points

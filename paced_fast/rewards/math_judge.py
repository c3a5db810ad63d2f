"""What the workers of the math rewards run: math-verify, and the exact comparison of `math_strict`.

A program for `fork_server`, in processes of its own: math-verify's time limit is an alarm signal, which works in the
main thread only and does not stop every computation, so it is off here and the pool kills what takes too long.

A request is `[trees, texts]`: gold and answer as the trees that `forms` makes, to compare exactly, and as LaTeX, to ask
math-verify; either may be None. The reply is `right` when one comparison says so, else `wrong`, or `unreadable` when
the gold is no mathematics to the parser.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_DIGITS = 100
_ZERO = sympy.Float("1e-80")
_CLEARLY_DIFFERENT = 1e-3
# Kinds of points to compare at: functions of pieces, as max(1, x), agree with others on one side of 1 or 0.
_BELOW, _ABOVE, _BOTH, _NEGATIVE, _WHOLE = "below 1", "above 1", "both", "negative", "whole"
_BOUNDS = {
    _BELOW: (50_000_000, 240_000_000),
    _ABOVE: (260_000_000, 1_000_000_000),
    _BOTH: (50_000_000, 1_000_000_000),
    _NEGATIVE: (-1_000_000_000, -50_000_000),
    _WHOLE: (2, 9),
}
_UNEVALUATED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
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


def prepare() -> None:
    """Fills the caches of the parser and of sympy, before the first fork: a cold pair takes ten times as long."""
    logging.disable(logging.CRITICAL)
    for gold, answer in _WARMING:
        judge([[["expression", gold], ["expression", answer]], [gold, answer]])
    for left, right in (("y", "2x+3"), ("x^2+y^2", "25")):
        sides = ["expression", left], "=", ["expression", right]
        other = ["expression", f"{left}-({right})"], "=", ["number", "0"]
        judge([[["relation", *sides], ["relation", *other]], None])


def judge(request: Sequence[Any]) -> str:
    """The verdict on a pair."""
    trees, texts = request
    exactly = _verdict(_same, trees) if trees else ""
    if exactly == "right" or not texts:
        return exactly
    if trees and _verdict(_differ, trees) == "right":
        return "wrong"
    return _verdict(_verified, texts)


def _verdict(compare: Callable[[Any, Any], bool], pair: Sequence[Any]) -> str:
    """`right` when the comparison holds."""
    try:
        return "right" if compare(*pair) else "wrong"
    except UnreadableError:
        return "unreadable"
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError):
        return "wrong"  # sympy cannot compute with it


class UnreadableError(Exception):
    """The gold is no mathematics to the parser."""


def _verified(gold_text: str, answer_text: str) -> bool:
    gold = _parsed(gold_text)
    if not gold:
        raise UnreadableError
    answer = parse(f"\\boxed{{{answer_text}}}", parsing_timeout=0, fallback_mode="no_fallback")
    if not answer or is_clearly_different(gold[0], answer[0]):
        return False
    return bool(verify(list(gold), answer, timeout_seconds=None))


@functools.lru_cache(4096)
def _parsed(gold: str) -> tuple[Any, ...]:
    return tuple(parse(f"\\boxed{{{gold}}}", parsing_timeout=0, fallback_mode="no_fallback"))


def _differ(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Whether two trees of one form have parts in the same place that no rounding makes equal."""
    kind, other = gold[0], answer[0]
    if {kind, other} <= {"number", "expression"}:
        return is_clearly_different(_read(gold[1], is_gold=True), _read(answer[1]))
    if kind != other or len(gold) != len(answer) or kind not in ("()", "[]", "(]", "[)"):
        return False
    return any(map(_differ, gold[1:], answer[1:]))


def is_clearly_different(gold: Any, answer: Any) -> bool:
    """Whether two expressions differ at some point by more than any rounding of math-verify forgives.

    Its proof that they differ, `simplify`, takes ten times as long. Percentages and single symbols have rules of their
    own there.
    """
    for one in (gold, answer):
        if not isinstance(one, sympy.Expr) or isinstance(one, sympy.Symbol) or one.has(sympy.UnevaluatedExpr):
            return False
    if gold.has(sympy.core.function.AppliedUndef) or answer.has(sympy.core.function.AppliedUndef):
        return False
    try:
        points = _points(gold, answer, _ABOVE)
        values = [complex(one.evalf(20, subs=points, maxn=100)) for one in (gold, answer)]
    except (ArithmeticError, TypeError, ValueError, AttributeError):
        return False
    return abs(values[0] - values[1]) > _CLEARLY_DIFFERENT * (1 + max(map(abs, values)))


def _same(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Equality of two trees: `[kind, part, ...]`, where a part is a tree, or the text of a leaf."""
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
    """`[left, operator, right, operator, ...]`: the same sides, or, with one operator, a multiple of the difference."""
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
    for draw in _draws(difference, other):
        points = _points(difference, other, draw)
        values = [_value(one, points, draw) for one in (difference, other)]
        if draw in (_NEGATIVE, _WHOLE) and not all(value.is_real and value for value in values):
            continue
        if not all(value.is_number and value.is_finite and value for value in values):
            return False
        ratios.append(values[0] / values[1])
    if any(not abs(ratio - ratios[0]) < _ZERO * (1 + abs(ratio)) for ratio in ratios):
        return False
    return gold[1] in ("=", "!=") or bool(ratios[0].is_positive)


@functools.lru_cache(4096)
def _parsed_exactly(text: str) -> Any:
    found = parse(f"\\boxed{{{text}}}", _STRICT, parsing_timeout=0, fallback_mode="no_fallback")
    return _exact(found[0]) if found else None


def _read(text: str, *, is_gold: bool = False) -> Any:
    """The value of a leaf, None for an answer that cannot be read."""
    value = _parsed_exactly(text)
    if value is None and is_gold:
        raise UnreadableError
    return value


def _exact(value: Any) -> Any:
    """Decimals as the fractions they are."""
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(_exact)
    if not isinstance(value, sympy.Basic):
        return value
    floats = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    return value.xreplace(floats) if floats else value


def _equal(gold: Any, answer: Any) -> bool:
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_equal, gold.flat(), answer.flat()))
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return gold == answer or _is_zero(gold, answer)
    # Something else the parser knows, a logical formula for example.
    return answer is not None and bool(verify(gold, answer, timeout_seconds=None))


def _is_zero(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Whether the difference vanishes: to 80 digits, with variables at random points of every kind."""
    if not answer.free_symbols <= gold.free_symbols:
        return False
    gold, answer = (one.doit() if one.has(*_UNEVALUATED) else one for one in (gold, answer))
    for draw in _draws(gold, answer):
        points = _points(gold, answer, draw)
        values = [_value(one, points, draw) for one in (gold, answer)]
        if draw in (_NEGATIVE, _WHOLE) and not all(value.is_real for value in values):
            continue
        if any(not value.is_number or value.has(sympy.nan, sympy.zoo) for value in values):
            return bool(sympy.simplify(gold - answer) == 0)
        if values[0] == values[1]:
            continue
        if not abs(values[0] - values[1]) < _ZERO * (1 + abs(values[0])):
            return False
    return True


def _draws(gold: sympy.Expr, answer: sympy.Expr) -> tuple[str, ...]:
    """The kinds of points to compare at."""
    if not gold.free_symbols:
        return (_ABOVE,)
    steps = gold.has(*_STEPS) or answer.has(*_STEPS)
    return (_BELOW, _ABOVE, _BOTH, _NEGATIVE, *([_WHOLE] if steps else []))


def _value(one: sympy.Expr, points: dict[sympy.Basic, sympy.Basic | float], draw: str) -> sympy.Expr:
    """An expression at a point. Substituted, powers of fractions would be worked out exactly, digits without end."""
    if draw == _WHOLE:
        return sympy.N(one.subs(list(points.items())), _DIGITS)
    return one.evalf(_DIGITS, subs=points, maxn=2 * _DIGITS)


def _points(gold: sympy.Expr, answer: sympy.Expr, draw: str) -> dict[sympy.Basic, sympy.Basic | float]:
    """A value for every variable, the same at any time, between the bounds of the draw."""
    points: dict[sympy.Basic, sympy.Basic | float] = {}
    low, high = _BOUNDS[draw]
    for symbol in gold.free_symbols | answer.free_symbols:
        numerator = random.Random(f"{symbol} {draw}").randint(low, high)
        points[symbol] = sympy.Integer(numerator) if draw == _WHOLE else sympy.Rational(numerator, 250_000_001)
    return points

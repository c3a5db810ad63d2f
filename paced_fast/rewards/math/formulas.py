"""Formulas such as `x**2*sin(3*x)/2 + C`, read token by token and compared at random points to 40 digits.

Nothing is evaluated as code, and every number keeps 50 digits, so `9**999**999` is refused and `(9**999)**999` costs no
more than any other product. Formulas that agree at complex points of both half planes count as equal.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

_DIGITS, _TOLERANCE_DIGITS = 50, 40
_MOST_DIGITS, _MOST_TOKENS, _MOST_OF_FUNCTION = 100, 1000, 1000
_NUM_POINTS = 4
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|([A-Za-z]+)|(\*\*|[-+*/()]))")
_POWER = re.compile(
    r"\*\*\s*(?:-?\s*[0-9]{1,3}|[A-Za-z]|\(\s*-?\s*[0-9]{1,3}\s*(?:/\s*[0-9]{1,3}\s*)?\))"
    r"(?![0-9A-Za-z.(])(?!\s*\*\*)"
)
_RANKS = {")": 0, "+": 1, "-": 1, "*": 2, "/": 2, "u+": 3, "u-": 3, "**": 4}

Pair = tuple[Any, Any]
"""A value and its derivative with respect to the variable, both mpmath numbers."""


class NoFormulaError(ValueError):
    """The text is not a formula, or the formula has no value at a point."""


def is_formula(text: str) -> bool:
    """Return True if a text consists of numbers, one-letter names and known functions with + - * / ** and parentheses.

    An exponent must not be a power itself, nor have more than three digits.
    """
    try:
        _postfix(text)
    except NoFormulaError:
        return False
    return True


def is_integral(text: str, integrand: str, variable: str) -> bool:
    """Return True if the derivative of `text` by `variable` is `integrand`; every other letter is a constant."""
    return _same(text, integrand, variable, lambda given, wanted: (given[1], wanted[0]))


def is_sum(text: str, answer: str) -> bool:
    """Return True if `text` equals `answer` and is multiplied out: parentheses only around exponents."""
    is_flat = "(" not in re.sub(r"\*\*\s*\([^()]*\)", "", text)
    return is_flat and _same(text, answer, "", lambda given, wanted: (given[0], wanted[0]))


def _same(text: str, other: str, variable: str, sides: Callable[[Pair, Pair], tuple[Any, Any]]) -> bool:
    context = _context()
    try:
        postfix, wanted = _postfix(text), _postfix(other)
        for i in range(_NUM_POINTS):
            # The points are the same in every call, so that a verdict does not depend on chance.
            rng = random.Random(f"{other} {i}")
            names = {name: _point(context, rng, i) for name in _names(postfix, wanted)}
            pairs = (_value(context, one, names, variable) for one in (postfix, wanted))
            a, b = sides(*pairs)
            if not abs(a - b) <= (1 + abs(b)) * context.mpf(10) ** -_TOLERANCE_DIGITS:
                return False
    except (NoFormulaError, ArithmeticError):
        return False
    return True


@functools.cache
def _context() -> Any:
    """Return an mpmath context of 50 digits, separate from the global one."""
    import mpmath

    context = mpmath.mp.clone()
    context.dps = _DIGITS
    return context


def _point(context: Any, rng: random.Random, index: int) -> Any:
    real, imaginary = (context.mpf(rng.randint(10**6, 10**7)) / 10**7 for _ in range(2))
    return context.mpc(-real if index % 2 else real, imaginary)


def _names(*formulas: list[str]) -> list[str]:
    found = {token for formula in formulas for token in formula if len(token) == 1 and token.isalpha()}
    return sorted(found - {"E", "I"})


def _postfix(text: str) -> list[str]:
    """Return the tokens of a formula in postfix order, signs as `u+` and `u-`; NoFormulaError for any other text."""
    output: list[str] = []
    waiting: list[str] = []
    is_operand = True  # an operand comes next
    for token in _tokens(text.strip()):
        if is_operand and (token in "+-(" or (len(token) > 1 and token in _functions())):
            waiting.append(f"u{token}" if token in "+-" else token)
        elif token[0].isalnum():
            if not is_operand:
                raise NoFormulaError
            output.append(token)
            is_operand = False
        elif is_operand or token == "(":
            raise NoFormulaError
        else:
            while waiting and waiting[-1] != "(" and _binds(waiting[-1], token):
                output.append(waiting.pop())
            if token == ")":
                if not waiting:
                    raise NoFormulaError
                waiting.pop()
                if waiting and waiting[-1] in _functions():
                    output.append(waiting.pop())
            else:
                waiting.append(token)
                is_operand = True
    if is_operand or "(" in waiting:
        raise NoFormulaError
    return output + waiting[::-1]


def _binds(waiting: str, token: str) -> bool:
    """Return True if the waiting operator is applied before the one that arrives."""
    if token == "**":
        return False  # right-associative; and -x**2 is -(x**2)
    return _RANKS.get(waiting, 9) >= _RANKS[token]


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or len(tokens) == _MOST_TOKENS:
            raise NoFormulaError
        number, name, symbol = found.groups()
        is_known = name is None or len(name) == 1 or name == "pi" or name in _functions()
        if not is_known or len(number or "") > _MOST_DIGITS:
            raise NoFormulaError
        if name in _functions() and text[found.end() : found.end() + 1] != "(":
            raise NoFormulaError
        if symbol == "**" and not _POWER.match(text, found.start(3)):
            raise NoFormulaError
        tokens.append(number or name or symbol)
        at = found.end()
    return tokens


def _value(context: Any, formula: list[str], names: Mapping[str, Any], variable: str) -> Pair:
    """Return the value at a point, and the derivative by `variable`.

    Raises:
        NoFormulaError: there is no value, or the argument of a function is too large.
        ArithmeticError: division by zero, or overflow.
    """
    known = {"pi": context.pi, "E": context.e, "I": context.mpc(0, 1)}
    stack: list[Pair] = []
    for token in formula:
        if token in known or token in names:
            stack.append((known.get(token, names.get(token)), context.mpf(token == variable)))
        elif token[0].isdigit():
            stack.append((context.mpf(token), context.mpf(0)))
        elif token in ("u+", "u-"):
            value, slope = stack.pop()
            stack.append((value, slope) if token == "u+" else (-value, -slope))
        elif token in _functions():
            value, slope = stack.pop()
            if abs(value) > _MOST_OF_FUNCTION:
                raise NoFormulaError
            stack.append((_functions()[token](context, value), _slopes()[token](context, value) * slope))
        else:
            right = stack.pop()
            stack.append(_combined(context, token, stack.pop(), right))
    return stack[-1]


def _combined(context: Any, operator: str, left: Pair, right: Pair) -> Pair:
    (a, da), (b, db) = left, right
    if operator in "+-":
        sign = 1 if operator == "+" else -1
        return a + sign * b, da + sign * db
    if operator == "*":
        return a * b, da * b + a * db
    if operator == "/":
        return a / b, (da * b - a * db) / (b * b)
    if b == context.nint(b.real) and not db:
        power = int(b.real)
        return a**power, power * a ** (power - 1) * da if power else context.mpf(0)
    if not a or abs(b * context.log(a)) > _MOST_OF_FUNCTION:
        raise NoFormulaError
    value = context.exp(b * context.log(a))
    return value, value * (db * context.log(a) + b * da / a)


@functools.cache
def _functions() -> dict[str, Callable[[Any, Any], Any]]:
    plain = "sqrt exp log ln sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh"
    return {name: functools.partial(_call, name) for name in plain.split()}


def _call(name: str, context: Any, value: Any) -> Any:
    return getattr(context, name)(value)


@functools.cache
def _slopes() -> dict[str, Callable[[Any, Any], Any]]:
    return {
        "sqrt": lambda c, x: 1 / (2 * c.sqrt(x)),
        "exp": lambda c, x: c.exp(x),
        "log": lambda c, x: 1 / x,
        "ln": lambda c, x: 1 / x,
        "sin": lambda c, x: c.cos(x),
        "cos": lambda c, x: -c.sin(x),
        "tan": lambda c, x: c.sec(x) ** 2,
        "sec": lambda c, x: c.sec(x) * c.tan(x),
        "csc": lambda c, x: -c.csc(x) * c.cot(x),
        "cot": lambda c, x: -(c.csc(x) ** 2),
        "asin": lambda c, x: 1 / c.sqrt(1 - x * x),
        "acos": lambda c, x: -1 / c.sqrt(1 - x * x),
        "atan": lambda c, x: 1 / (1 + x * x),
        "sinh": lambda c, x: c.cosh(x),
        "cosh": lambda c, x: c.sinh(x),
        "tanh": lambda c, x: c.sech(x) ** 2,
        "asinh": lambda c, x: 1 / c.sqrt(1 + x * x),
        "acosh": lambda c, x: 1 / (c.sqrt(x - 1) * c.sqrt(x + 1)),
        "atanh": lambda c, x: 1 / (1 - x * x),
    }

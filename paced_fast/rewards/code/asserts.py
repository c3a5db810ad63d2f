"""HumanEval's tests: asserts are split into calls and expected values, so that the test itself need not run.

A test that cannot be split (loops, random inputs, helpers, computed values) is run unchanged, see `checks`.
"""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from paced_fast.rewards.code.blocks import code_in_prompt
from paced_fast.rewards.code.cases import WRAPPERS, Case, Suite, UnusableTests
from paced_fast.rewards.code.checks import check_of
from paced_fast.rewards.code.compare import JSON_ERRORS, read_json


def human_eval(columns: Mapping[str, Any]) -> Suite:
    """Return the tests of a row with the columns `test` and `entry_point`.

    Raises:
        UnusableTests: the test can be neither split nor run.
    """
    name = columns.get("entry_point")
    if not isinstance(name, str) or not name.isidentifier():
        raise UnusableTests("has a column 'test' but no entry_point that names a function")
    try:
        tree = ast.parse(str(columns["test"]))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UnusableTests("has a column 'test' that is not Python") from None
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None:
        raise UnusableTests("has a column 'test' without a function check(candidate)")
    called = {name, *(argument.arg for argument in check.args.args)}
    try:
        cases = tuple(_cases(check, called))
    except (*JSON_ERRORS, ArithmeticError):
        helpers = code_in_prompt(columns.get("prompt"), name, whole=True)
        found = check_of(tree, check, entry=name, test=str(columns["test"]), helpers=helpers)
        return Suite(check=found, function=name, continues_prompt=True)
    return Suite(cases=cases, function=name, continues_prompt=True)


def _cases(check: ast.FunctionDef, called: set[str]) -> Iterator[Case]:
    """Yield a case per assert; raise one of JSON_ERRORS or ArithmeticError if a statement is no assert on one call."""
    for node in check.body:
        if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or isinstance(node, ast.Pass):
            continue
        if not isinstance(node, ast.Assert):
            raise ValueError
        if not (isinstance(node.test, ast.Constant) and node.test.value):  # assert True, "this prints if ..."
            yield _assertion(node.test, called)


def _assertion(node: ast.expr, called: set[str]) -> Case:
    """Parse candidate(...), not candidate(...), candidate(...) == value, or abs(candidate(...) - value) < tolerance."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return Case(arguments=_arguments(node.operand, called), expected=False, wrapper="bool")
    if isinstance(node, ast.Call):
        return Case(arguments=_arguments(node, called), expected=True, wrapper="bool")
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise ValueError
    left, right = node.left, node.comparators[0]
    if isinstance(node.ops[0], ast.Lt | ast.LtE) and _function_name(left) in ("abs", "fabs"):
        difference = left.args[0] if isinstance(left, ast.Call) else None
        if not isinstance(difference, ast.BinOp) or not isinstance(difference.op, ast.Sub):
            raise ValueError
        ends = [difference.left, difference.right]
        if _function_name(ends[0]) not in called:
            ends.reverse()
        expected = float(_literal(ends[1]))
        return Case(arguments=_arguments(ends[0], called), expected=expected, tolerance=float(_literal(right)))
    if not isinstance(node.ops[0], ast.Eq | ast.Is):
        raise ValueError
    if not _calls(left, called):
        left, right = right, left
    wrapper = _function_name(left) if _function_name(left) in WRAPPERS else None
    if wrapper is not None and isinstance(left, ast.Call) and len(left.args) == 1 and not left.keywords:
        left = left.args[0]
        if _function_name(right) == wrapper and isinstance(right, ast.Call):
            return Case(
                arguments=_arguments(left, called),
                expected=_plain(WRAPPERS[wrapper](_literal(right.args[0]))),
                wrapper=wrapper,
            )
    expected = _literal(right)
    if wrapper == "set":
        expected = sorted(expected) if isinstance(expected, set) else NotImplemented
    return Case(arguments=_arguments(left, called), expected=_plain(expected), wrapper=wrapper)


def _plain(value: Any) -> Any:
    return read_json(json.dumps(value, allow_nan=False))


def _function_name(node: ast.expr) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)


def _calls(node: ast.expr, called: set[str]) -> bool:
    return any(isinstance(part, ast.Call) and _function_name(part) in called for part in ast.walk(node))


def _arguments(node: ast.expr, called: set[str]) -> tuple[Any, ...]:
    if not isinstance(node, ast.Call) or _function_name(node) not in called or node.keywords:
        raise ValueError
    return tuple(_literal(argument) for argument in node.args)


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, which may contain small arithmetic such as [1] * 100 or 2 ** 10."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _literal(node.left), _literal(node.right)
        sizes = [abs(value) if isinstance(value, int | float) else len(value) for value in (left, right)]
        if isinstance(node.op, ast.Pow) and not (sizes[0] <= 1000 and sizes[1] <= 100):
            raise ValueError
        are_numbers = all(isinstance(value, int | float) for value in (left, right))
        if isinstance(node.op, ast.Mult) and math.prod(sizes) > (1e15 if are_numbers else 1e6):
            raise ValueError
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.List | ast.Tuple):
        items = [_literal(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    return ast.literal_eval(node)

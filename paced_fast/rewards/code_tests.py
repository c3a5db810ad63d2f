"""Test cases of a row, from the shapes in which data sets keep them. Expected values stay on this side of the sandbox.

public_test_cases, private_test_cases     LiveCodeBench: lists of {input, output, testtype}, func_name in metadata
tests, test_cases, input_output,          {inputs, outputs, fn_name}, or a list of {type, input, output, fn_name},
verification_info, ground_truth           or such a list under test_cases; as JSON text or already read
test, entry_point                         HumanEval: a function `check` of asserts, read but never run
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from paced_fast.rewards.verdicts import JSON_ERRORS, read_json

COLUMNS = ("tests", "test_cases", "input_output", "verification_info", "ground_truth")
_MAX_UNPACKED_BYTES = 1 << 28
_MAX_BITS = 14_000  # about 4200 digits, within what Python turns into text
_FUNCTION_TYPES = {"functional", "function_call", "function"}
_STDIN_TYPES = {"stdin", "stdin_stdout", "stdio", "standard_input"}

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "sorted": sorted,
    "len": len,
    "list": list,
    "tuple": list,  # JSON knows lists only
    "set": lambda value: sorted(set(value)),
    "bool": bool,
}
"""Functions that a HumanEval assert may put around the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One input and what is expected of it."""

    stdin: str = ""
    arguments: tuple[Any, ...] = ()
    expected: Any
    """Text of the whole output, or a value as JSON has it."""
    or_text: str | None = None
    """What the expected value is where the text it was read from is meant as a text."""
    or_first: bool = False
    """The expected value is a list of one, which may stand for its element."""
    tolerance: float | None = None
    """Largest absolute difference; None for the rule of all."""
    wrapper: str | None = None
    """One of WRAPPERS, to be called with the value first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """The cases of one row."""

    cases: tuple[Case, ...]
    function: str | None = None
    """What is called; None for a program that reads its input and prints."""
    continues_prompt: bool = False
    """Whether the prompt is code that the completion may go on from."""


class UnusableTests(ValueError):
    """Why a row cannot be judged, in words that follow its place."""


def suite_of(columns: Mapping[str, Any]) -> Suite:
    """The tests of a row.

    Raises:
        UnusableTests: there are none, or none that can be read.
    """
    if columns.get("public_test_cases") is not None or columns.get("private_test_cases") is not None:
        suite = _live_code_bench(columns)
    elif (name := next((key for key in COLUMNS if columns.get(key) is not None), None)) is not None:
        suite = _listed(name, _read(name, columns[name]), _function_of(columns))
    elif columns.get("test") is not None:
        suite = _human_eval(columns)
    else:
        raise UnusableTests(f"has no tests: a column {', '.join(COLUMNS)}, public_test_cases or test is needed")
    if not suite.cases:
        raise UnusableTests("has no test cases")
    if not all(_is_plain([case.arguments, case.expected, case.tolerance]) for case in suite.cases):
        raise UnusableTests("has a number in its tests that is infinite, not a number, or of too many digits")
    if suite.function is None and not any(case.expected.strip() for case in suite.cases):
        raise UnusableTests("expects no output in any test case, which a program that does nothing passes")
    return suite


def request_of(case: Case) -> bytes:
    """The arguments of one call as a line of JSON, or as Python where JSON would change them (tuples, say)."""
    try:
        text = json.dumps(case.arguments, allow_nan=False)
        if _same(json.loads(text), list(case.arguments)):
            return f'{{"arguments": {text}}}'.encode()
    except JSON_ERRORS:
        pass
    return json.dumps({"literal": repr(case.arguments)}).encode()


def _is_plain(value: Any) -> bool:
    """Whether all numbers in a value can be compared and written down."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= _MAX_BITS
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return not isinstance(value, list | tuple | set | frozenset) or all(map(_is_plain, value))


def _same(read: Any, given: Any) -> bool:
    if type(read) is not type(given):
        return False
    if isinstance(given, list):
        return len(read) == len(given) and all(map(_same, read, given))
    if isinstance(given, dict):
        return list(read) == list(given) and all(_same(read[key], given[key]) for key in given)
    return read == given


def _read(name: str, value: Any) -> Any:
    """JSON, from text or read before; pickles, packed or not, are refused by name."""
    if not isinstance(value, str | bytes):
        return value
    data = value.encode() if isinstance(value, str) else value
    if data[:1] == b"\x80":
        _refuse_pickle(name)
    try:
        return read_json(data)
    except JSON_ERRORS as error:
        reason = str(error)[:80]
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), _MAX_UNPACKED_BYTES)
    except (binascii.Error, zlib.error, ValueError):
        raise UnusableTests(f"has a column {name!r} that is not JSON: {reason}") from None
    if unpacked[:1] == b"\x80":
        _refuse_pickle(name)
    try:
        return read_json(unpacked)
    except JSON_ERRORS:
        raise UnusableTests(f"has a column {name!r} that is packed but not JSON inside") from None


def _refuse_pickle(name: str) -> NoReturn:
    raise UnusableTests(f"has a column {name!r} that is a pickle, which can run code when read: store it as JSON")


def _live_code_bench(columns: Mapping[str, Any]) -> Suite:
    items = []
    for name in ("public_test_cases", "private_test_cases"):
        if columns.get(name) is not None:
            found = _read(name, columns[name])
            if not isinstance(found, list):
                raise UnusableTests(f"has a column {name!r} that is no list")
            items += found
    metadata = _read("metadata", columns.get("metadata") or {})
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    return _items(items, name)


def _function_of(columns: Mapping[str, Any]) -> Any:
    """The function that a row's metadata name, as DeepCoder's do for the cases of LiveCodeBench."""
    metadata = columns.get("metadata")
    if isinstance(metadata, str) and metadata.lstrip().startswith("{"):
        metadata = _read("metadata", metadata)
    return metadata.get("func_name") or None if isinstance(metadata, dict) else None


def _listed(name: str, tests: Any, function: Any) -> Suite:
    if isinstance(tests, dict) and "test_cases" in tests:
        tests = _read(name, tests["test_cases"])
    if isinstance(tests, list):
        return _items(tests, function)
    if not isinstance(tests, dict) or not {"inputs", "outputs"} <= set(tests):
        raise UnusableTests(
            f"has a column {name!r} that is neither a list of cases nor an object of inputs and outputs"
        )
    inputs, outputs, function = tests["inputs"], tests["outputs"], tests.get("fn_name") or None
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise UnusableTests(f"has a column {name!r} whose inputs and outputs are not two lists of the same length")
    kind = "stdin" if function is None else "function_call"
    pairs = zip(inputs, outputs, strict=True)
    return _items([{"type": kind, "input": given, "output": expected} for given, expected in pairs], function)


def _items(items: Sequence[Any], function: Any) -> Suite:
    cases, names, kinds = [], {function} - {None}, set()
    for i, item in enumerate(items):
        if not isinstance(item, dict) or "input" not in item or "output" not in item:
            raise UnusableTests(f"has a test case {i} without input and output")
        metadata = _read("metadata", item.get("metadata") or {})
        named = item.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, dict) else None)
        kind = item.get("testtype") or item.get("type") or ("function_call" if named or function else "stdin")
        names |= {named} - {None, ""}
        kind = kind.lower() if isinstance(kind, str) else kind
        kinds.add(kind in _FUNCTION_TYPES)
        if kind in _STDIN_TYPES:
            cases.append(Case(stdin=_text(item["input"], i), expected=_text(item["output"], i)))
        elif kind in _FUNCTION_TYPES:
            cases.append(_call(item["input"], item["output"], i, by_line=kind == "functional"))
        else:
            raise UnusableTests(f"has a test case {i} of the unknown type {kind!r}: stdin or function_call is expected")
    if len(kinds) > 1:
        raise UnusableTests("mixes test cases that read input with calls of a function")
    if True in kinds and (len(names) != 1 or not str(next(iter(names))).isidentifier()):
        raise UnusableTests("calls a function but does not name one: fn_name, or func_name in metadata, is needed")
    return Suite(cases=tuple(cases), function=names.pop() if True in kinds else None)


def _text(value: Any, index: int) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableTests(f"has a test case {index} whose input or output holds half a character") from None
    else:
        raise UnusableTests(f"has a test case {index} whose input or output is not text but a {type(value).__name__}")
    return value


def _call(given: Any, expected: Any, index: int, *, by_line: bool) -> Case:
    """LiveCodeBench writes one argument a line and the value as JSON; others a list of arguments and the value."""
    try:
        if by_line:
            arguments = [read_json(line) for line in given.split("\n") if line.strip()]
            return Case(arguments=tuple(arguments), expected=read_json(expected))
        arguments = read_json(given) if isinstance(given, str) else given
        value = _or_text(expected)
    except JSON_ERRORS:
        raise UnusableTests(f"has a test case {index} whose arguments or value are not JSON") from None
    if not isinstance(arguments, list):
        raise UnusableTests(f"has a test case {index} whose arguments are no list")
    return Case(
        arguments=tuple(arguments),
        expected=value,
        or_text=expected if isinstance(expected, str) else None,
        or_first=isinstance(value, list) and len(value) == 1,
    )


def _or_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return read_json(value)
        except JSON_ERRORS:
            return value  # a text that is the value itself
    return read_json(json.dumps(value))


def _human_eval(columns: Mapping[str, Any]) -> Suite:
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
    cases = []
    for node in check.body:
        if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or isinstance(node, ast.Pass):
            continue
        try:
            if not isinstance(node, ast.Assert):
                raise ValueError
            if not (isinstance(node.test, ast.Constant) and node.test.value):  # assert True, "this prints if ..."
                cases.append(_assertion(node.test, called))
        except (*JSON_ERRORS, ArithmeticError):
            shown = ast.unparse(node).splitlines()[0][:60]
            raise UnusableTests(
                f"has a test that cannot be taken apart into a call and its expected value: {shown}"
            ) from None
    return Suite(cases=tuple(cases), function=name, continues_prompt=True)


def _assertion(node: ast.expr, called: set[str]) -> Case:
    """candidate(...), not candidate(...), candidate(...) == value, abs(candidate(...) - value) < tolerance."""
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
    """A value written out, with small arithmetic such as [1] * 100 or 2 ** 10."""
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

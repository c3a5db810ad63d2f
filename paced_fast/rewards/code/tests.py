"""Read the test cases of a row from the formats of common data sets. Expected values of cases never enter the sandbox.

public_test_cases, private_test_cases     LiveCodeBench: lists of {input, output, testtype}, func_name in metadata
tests, test_cases, input_output,          {inputs, outputs, fn_name}, or a list of {type, input, output, fn_name},
verification_info, ground_truth           or such a list under test_cases; as JSON text or already parsed
test, entry_point                         HumanEval: a function `check`, split into cases, or else run
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from paced_fast.rewards.code.asserts import human_eval
from paced_fast.rewards.code.cases import Case, Suite, UnusableTests, is_plain
from paced_fast.rewards.code.compare import JSON_ERRORS, read_json

COLUMNS = ("tests", "test_cases", "input_output", "verification_info", "ground_truth")
_MAX_UNPACKED_BYTES = 1 << 28
_FUNCTION_TYPES = {"functional", "function_call", "function"}
_STDIN_TYPES = {"stdin", "stdin_stdout", "stdio", "standard_input"}


def suite_of(columns: Mapping[str, Any]) -> Suite:
    """Return the tests of a row; `columns` includes `prompt`, because some tests need its code.

    Raises:
        UnusableTests: the row has no tests, or none that can be read.
    """
    if columns.get("public_test_cases") is not None or columns.get("private_test_cases") is not None:
        suite = _live_code_bench(columns)
    elif (name := next((key for key in COLUMNS if columns.get(key) is not None), None)) is not None:
        suite = _listed(name, _read(name, columns[name]), _function_of(columns))
    elif columns.get("test") is not None:
        suite = human_eval(columns)
    else:
        raise UnusableTests(f"has no tests: add a column {', '.join(COLUMNS)}, public_test_cases or test")
    if suite.check is None and not suite.cases:
        raise UnusableTests("has no test cases")
    if not all(is_plain([case.arguments, case.expected, case.tolerance]) for case in suite.cases):
        raise UnusableTests("has a number in its tests that is infinite, NaN, or has too many digits")
    if suite.function is None and not any(case.expected.strip() for case in suite.cases):
        raise UnusableTests("expects no output in any test case, so that a program that does nothing would pass")
    return suite


def _read(name: str, value: Any) -> Any:
    """Return a JSON value, parsed from text (plain, or zlib in base64) if need be; pickles are refused as such."""
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
                raise UnusableTests(f"has a column {name!r} that is not a list")
            items += found
    metadata = _read("metadata", columns.get("metadata") or {})
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    return _items(items, name)


def _function_of(columns: Mapping[str, Any]) -> Any:
    """Return the function name in a row's metadata, where DeepCoder keeps it for LiveCodeBench cases; else None."""
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
            raise UnusableTests(f"has a test case {i} of the unknown type {kind!r}: give stdin or function_call")
    if len(kinds) > 1:
        raise UnusableTests("mixes test cases that read input with test cases that call a function")
    if True in kinds and (len(names) != 1 or not str(next(iter(names))).isidentifier()):
        raise UnusableTests("calls a function but does not name one: add fn_name, or func_name in metadata")
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
    """Parse a call: a JSON argument per line and a JSON value (LiveCodeBench), else a list of arguments and a value."""
    try:
        if by_line:
            arguments = [read_json(line) for line in given.split("\n") if line.strip()]
            return Case(arguments=tuple(arguments), expected=read_json(expected))
        arguments = read_json(given) if isinstance(given, str) else given
        value = _or_text(expected)
    except JSON_ERRORS:
        raise UnusableTests(f"has a test case {index} whose arguments or value are not JSON") from None
    if not isinstance(arguments, list):
        raise UnusableTests(f"has a test case {index} whose arguments are not a list")
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
            return value  # the text itself is the value
    return read_json(json.dumps(value))

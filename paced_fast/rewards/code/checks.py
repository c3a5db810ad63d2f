"""Tests that cannot be split into cases: checks on a test before it is run, and running it for its verdict.

The test is code of the data set. It runs in its own process of the sandbox, which never receives the program's code or
any of its objects. This process forwards its calls to the program's process one at a time, and plain data come back.
"""

from __future__ import annotations

import ast
import dataclasses
import logging
import math
import re
import symtable
import sys
import time
from collections.abc import Iterator

from paced_fast.rewards.code.cases import Check, UnusableTests
from paced_fast.rewards.code.compare import JSON_ERRORS, read_json
from paced_fast.rewards.sandbox import CALL, VERDICT, Limits, Outcome, Sandbox, known_names

logger = logging.getLogger(__name__)

_RUN_TEXT = {"eval", "exec", "compile", "__import__"}
_RUN_TEXT_MODULES = {"importlib", "pickle", "marshal", "shelve", "runpy", "code", "codeop", "ctypes"}
_LOOK_INSIDE = {"redirect_stdout", "redirect_stderr", "mock", "patch", "input"}
_STREAMS = {"stdin", "stdout", "stderr"}
_NOT_FINITE = re.compile(r"nan|inf|infinity|isnan|isinf|isfinite", re.IGNORECASE)
_TEST_OUTPUT = 16  # multiple of a program's output limit: inputs of many calls are larger than answers


class NoVerdict(RuntimeError):
    """The test ended without a verdict and the program was not the cause, so nothing is known about the program."""


def check_of(tree: ast.Module, check: ast.FunctionDef, *, entry: str, test: str, helpers: str) -> Check:
    """Return a test to be run; `tree` is the parsed test, `helpers` the source of functions that it may call.

    Raises:
        UnusableTests: the result of the test cannot depend on the program, or not from another process.
    """
    called = {entry, *(argument.arg for argument in check.args.args)}
    parts = [*ast.walk(tree), *ast.walk(ast.parse(helpers))]
    if any(isinstance(part, ast.ClassDef) and part.name == entry for part in parts):
        raise UnusableTests(f"tests the class {entry}, whose objects stay in the program's process")
    if len(check.args.args) + len(check.args.posonlyargs) - len(check.args.defaults) > 1:
        raise UnusableTests("has a function check of more than one argument")
    if any(isinstance(part, ast.Yield | ast.YieldFrom) for statement in check.body for part in ast.walk(statement)):
        raise UnusableTests("has a function check that yields, so that calling it tests nothing")
    if not any(isinstance(part, ast.Name) and part.id in called for part in ast.walk(tree)):
        raise UnusableTests("has a function check that never calls the program")
    if not any(_can_fail(part) for part in parts):
        raise UnusableTests("has a function check that asserts nothing")
    for part in parts:
        _refuse_imports(part)
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else None
        if name in _RUN_TEXT and (isinstance(part, ast.Name) or name in ("eval", "exec")):
            raise UnusableTests(f"has a test that runs text as code ({name}), which could be the program's")
        stores = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
        if name in _LOOK_INSIDE or (name in _STREAMS and stores):
            raise UnusableTests(f"has a test that changes or watches the program's process ({name})")
    try:
        compile(test, "test.py", "exec", dont_inherit=True)
        unknown = sorted(_unknown_names(test, helpers) - {entry})
    except SyntaxError as error:  # an error that only the compiler finds, such as a return outside a function
        raise UnusableTests(f"has a test that is not Python ({error.msg})") from None
    if unknown:
        raise UnusableTests(f"has a test that uses {unknown[0]}, which neither the test nor the prompt defines")
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    words = [
        part.id if isinstance(part, ast.Name) else part.attr
        for part in parts
        if isinstance(part, ast.Name | ast.Attribute)
    ]
    return Check(
        test=test,
        helpers=helpers,
        shows_arguments=_looks_at_arguments(tree, called),
        finite=not any(_NOT_FINITE.fullmatch(word.strip("+- ")) for word in (*texts, *words)),
    )


def _can_fail(part: ast.AST) -> bool:
    if isinstance(part, ast.Assert):
        return not (isinstance(part.test, ast.Constant) and part.test.value)
    return isinstance(part, ast.Raise)


def _refuse_imports(part: ast.AST) -> None:
    names = [alias.name for alias in part.names] if isinstance(part, ast.Import) else []
    if isinstance(part, ast.ImportFrom):
        names = [part.module or "."]
    for name in names:
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names:
            raise UnusableTests(f"has a test that imports {name}, which programs in the sandbox do not have")
        if top in _RUN_TEXT_MODULES:
            raise UnusableTests(f"has a test that imports {name}, which can run what the program returns")


def _unknown_names(test: str, helpers: str) -> set[str]:
    """Return the names that a test uses and nothing defines; none if there is an `import *`."""
    if re.search(r"^\s*from\s.*\simport\s+\*", f"{helpers}\n{test}", re.MULTILINE):
        return set()
    used, defined = set[str](), set[str]()
    for text, is_test in ((helpers, False), (test, True)):
        tables = [symtable.symtable(text, "test.py", "exec")]
        while tables:
            table = tables.pop()
            tables += table.get_children()
            is_module = table.get_type() == "module"
            for symbol in table.get_symbols():
                makes = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
                if (is_module or symbol.is_declared_global()) and makes:
                    defined.add(symbol.get_name())
                elif is_test and symbol.is_referenced() and (is_module or symbol.is_global()):
                    used.add(symbol.get_name())
    return used - defined - known_names() - {"__name__", "__file__"}


def _looks_at_arguments(tree: ast.Module, called: set[str]) -> bool:
    """Return True if a condition after a call is about the arguments of the call and not about its result.

    Only then does the test see the program's changes to its arguments. Otherwise a program could change them so that
    the test computes the program's own answer from them: `assert candidate(xs) == sorted(xs)` with `xs` emptied.
    """
    results = _results(tree, called)
    own = {part.name for part in ast.walk(tree) if isinstance(part, ast.FunctionDef)}
    passed = [
        ((part.lineno, part.col_offset), name)
        for part in ast.walk(tree)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in called
        for argument in (*part.args, *(keyword.value for keyword in part.keywords))
        for name in _names(argument)
    ]
    for condition in _conditions(tree, own):
        names = _names(condition)
        before = {name for place, name in passed if place < (condition.lineno, condition.col_offset)}
        compared = isinstance(condition, ast.Compare) and isinstance(condition.ops[0], ast.Is | ast.IsNot)
        if names & before and (not names & results or compared):
            return True
    return False


def _conditions(tree: ast.Module, own: set[str]) -> Iterator[ast.expr]:
    """Yield the asserted conditions, each part of an `and` or `or` separately; calls of the test's functions too."""
    for part in ast.walk(tree):
        test = part.test if isinstance(part, ast.Assert | ast.If) else None
        if isinstance(part, ast.If) and not any(isinstance(inner, ast.Raise) for inner in ast.walk(part)):
            test = None
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            test = part.value if isinstance(part.value.func, ast.Name) and part.value.func.id in own else None
        if test is not None:
            yield from test.values if isinstance(test, ast.BoolOp) else [test]


def _results(tree: ast.Module, called: set[str]) -> set[str]:
    """Return the names of the program's function and of all variables derived from its results."""
    found, before = set(called), 0
    while len(found) > before:
        before = len(found)
        for part in ast.walk(tree):
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
            value = getattr(part, "iter", None) or getattr(part, "value", None)
            if isinstance(value, ast.AST) and _names(value) & found:
                found |= {name for target in targets if target is not None for name in _names(target)}
    return found


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def judge(sandbox: Sandbox, program: str, function: str, check: Check, limits: Limits, budget: float) -> str | Outcome:
    """Return `right`, `wrong` or `timeout`, or the Outcome of a program that ended instead of answering a call.

    The test and the program each have `limits`: `seconds` for a call or for the time between two calls; `budget` is the
    limit in seconds for the whole test.

    Raises:
        SandboxError: the sandbox failed.
        NoVerdict: the test cannot be completed, whatever the program does.
    """
    limits = dataclasses.replace(limits, cpu_seconds=max(limits.cpu_seconds, math.ceil(budget)))
    roomy = dataclasses.replace(limits, output_kib=_TEST_OUTPUT * limits.output_kib)
    more = {"test": check.test, "entry": function, "finite": check.finite, "shown": check.shows_arguments}
    end = time.monotonic() + budget
    tester = sandbox.session(check.helpers, function, roomy, more=more)
    tested = None
    try:
        said = tester.ask(None)
        while said is not None and said.startswith(CALL):
            if tested is None:
                tested = sandbox.session(program, function, limits, more={"plain": True})
            answer = tested.ask(said[len(CALL) :])
            if answer is None:
                ended, tested = tested.finish(), None
                return ended
            if time.monotonic() > end:
                return "timeout"
            said = tester.ask(answer)
    finally:
        was_called = tested is not None
        try:
            if tested is not None:
                tested.finish()
        finally:
            ending = tester.finish()
    verdict = _read_verdict(said)
    if verdict.get("verdict") == "passed" and was_called:
        return "right"
    if verdict.get("verdict") == "failed" and was_called:
        return "wrong"
    last = ending.stderr[-300:].decode(errors="replace").strip().rpartition("\n")[2]
    why = verdict.get("why") or last or f"it ended by {ending.ended}"
    if verdict.get("verdict") == "unusable" or not was_called:
        raise NoVerdict(f"the test of {function} gave no verdict ({why})")
    logger.warning("code: the test of %s ended without a verdict (%s), so the program counts as wrong", function, why)
    return "timeout" if ending.ended == "timeout" else "wrong"


def _read_verdict(said: bytes | None) -> dict[str, str]:
    if said is None or not said.startswith(VERDICT):
        return {}
    try:
        read = read_json(said[len(VERDICT) :])
    except JSON_ERRORS:
        return {}
    return {key: str(value) for key, value in read.items()} if isinstance(read, dict) else {}

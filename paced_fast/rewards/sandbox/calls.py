"""Calls from a test to a program in two processes of the sandbox; the process that started both forwards them.

A test and the program under test share no process, so the program cannot affect the test by changing its own process.
The result of a call is read as plain data (see `values`), and only the test can write the verdict.
A line of the test begins with CALL (for the program) or VERDICT (for the process that started both). Each call has a
random id, which its answer repeats, so that early or repeated answers do not count.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import secrets
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from paced_fast.rewards.sandbox.values import NotPlain, is_changing, line_of, pack, unpack

CALL, VERDICT = b"?", b"!"

Send = Callable[[bytes], None]


# The program's side


def answer(line: str, find: Callable[[], Callable[..., Any]], held: dict[int, Iterator[Any]]) -> bytes:
    """Return the answer to one request: the value or error of the function from `find`, and the changed arguments.

    Iterators that the function returns stay here, in `held`; their values are sent one by one on request.
    """
    request = json.loads(line)
    (arguments, named), objects = unpack(request["nodes"], request["given"])
    before = [json.dumps(node) for node in pack([], objects)[0]]
    said: dict[str, Any] = {"id": request["id"]}
    words = ""
    try:
        roots = [next(held[request["next"]]) if "next" in request else find()(*arguments, **named)]
    except Exception as error:
        said["raised"] = [kind.__name__ for kind in type(error).__mro__]
        roots = [*error.args]
        words = str(error)

    def hold(iterator: Iterator[Any]) -> int:
        held[len(held)] = iterator
        return len(held) - 1

    try:
        nodes, said["given"], _ = pack(roots, objects, hold)
    except NotPlain as error:
        if "raised" not in said:
            return line_of({"id": request["id"], "unsent": str(error)})
        nodes, said["given"], _ = pack([words], objects, hold)
    said["nodes"] = nodes[len(objects) :]
    said["changed"] = {place: nodes[place] for place, old in enumerate(before) if json.dumps(nodes[place]) != old}
    return line_of(said)


# The test's side


def run_test(settings: dict[str, Any], names: dict[str, Any], read: Callable[[], str], send: Send) -> None:
    """Run a test's `check` on a function in another process and send the verdict.

    `names` holds the helpers of the test. `settings`: `test`, the source of the test; `entry`, the function's name;
    `finite`, True if the program's numbers must be finite; `shown`, True if the test sees changes to arguments.
    """
    far = _Far(names, read, send, finite=settings["finite"], shown=settings["shown"])

    def function(*arguments: Any, **named: Any) -> Any:
        return far.call(arguments, named)

    function.__name__ = function.__qualname__ = settings["entry"]
    names[settings["entry"]] = function
    random.seed(0)
    said: dict[str, Any]
    try:
        exec(compile(settings["test"], "test.py", "exec", dont_inherit=True, optimize=0), names)
        check = names["check"]
        check(function) if check.__code__.co_argcount else check()
        said = {"verdict": "passed"}
    except _NotSent as error:
        said = {"verdict": "unusable", "why": f"it passes a value that cannot be sent to another process: {error}"}
    except BaseException as error:
        said = {"verdict": "failed", "why": "".join(traceback.format_exception_only(error)).strip()[:300]}
    send(VERDICT + line_of(said))


class _NotSent(BaseException):
    """An argument in the test is not plain data. The program is not the cause, and no test catches this exception."""


class _Far:
    """Proxy in the test's process for the function in the program's process."""

    def __init__(
        self, names: dict[str, Any], read: Callable[[], str], send: Send, *, finite: bool, shown: bool
    ) -> None:
        self._names, self._read, self._send = names, read, send
        self._finite, self._shown = finite, shown

    def call(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call the function and return its value, or raise its error."""
        try:
            nodes, given, objects = pack([arguments, named])
        except NotPlain as error:
            raise _NotSent(str(error)) from None
        return self._ask({"nodes": nodes, "given": given}, objects)

    def _ask(self, request: dict[str, Any], objects: list[Any]) -> Any:
        request["id"] = secrets.token_hex(8)
        self._send(CALL + line_of(request))
        try:
            answer = json.loads(self._read())
            if answer["id"] != request["id"]:
                raise ValueError("an answer without a call")
            if "unsent" in answer:
                raise ValueError(answer["unsent"])
            raised = answer.get("raised")
            changed = {int(place): node for place, node in answer["changed"].items()}
            before = request["nodes"]
            if any(not 0 <= place < len(before) or not is_changing(before[place]) for place in changed):
                raise ValueError("a change of an immutable value")
            nodes = [*(changed.get(place, node) for place, node in enumerate(before)), *answer["nodes"]]
            values, _ = unpack(
                nodes,
                answer["given"],
                objects if self._shown else (),
                changed=[*changed] if self._shown else (),
                follow=self._follow,
                finite=self._finite,
            )
            error = None if raised is None else self._error(raised, values)
            value = values[0] if raised is None else None
        except Exception as fault:  # caused by hostile data: a test must not mistake it for an error of the function
            self._fail(f"no value that a test can have: {fault}")
        if error is not None:
            raise error
        return value

    def _follow(self, number: int) -> Iterator[Any]:
        while True:
            try:
                value = self._ask({"nodes": [["tuple"], ["dict"]], "given": [[0], [1]], "next": number}, [(), {}])
            except StopIteration:
                return
            yield value

    def _error(self, kinds: list[str], arguments: list[Any]) -> Exception:
        """Return an error of the first class in `kinds` (its class and bases, by name) that the test knows too."""
        for name in kinds:
            for kind in (self._names.get(name), getattr(builtins, str(name), None)):
                if isinstance(kind, type) and issubclass(kind, Exception):
                    try:
                        return kind(*arguments)
                    except TypeError:
                        continue  # this class needs other arguments
        raise ValueError("an error without a type")

    def _fail(self, why: str) -> NoReturn:
        """Send the verdict `failed` and end the process, which the test cannot prevent."""
        self._send(VERDICT + line_of({"verdict": "failed", "why": why}))
        os._exit(1)

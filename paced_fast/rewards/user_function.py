"""Call a reward or shaping function, plain or async: choose its columns, run it in its time limit, check its result."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import numbers
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.data.records import PromptRow
from paced_fast.errors import InputError
from paced_fast.rewards.workers.time_limit import TookTooLong, limited, stack_of

# A column named `self` would collide with the object if the function is a method.
_RESERVED_COLUMNS = ("self", "prompts", "completions")
_MOST_SHOWN = 500  # characters of foreign text in a message
_OF_TEXT_READ_AS_MESSAGES = (
    "string indices must be",
    "string index out of range",
    "'str' object has no attribute 'get'",
)
_LATE_SECONDS = 10.0  # extra time for an event loop to end after the time limit of its functions


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A function with its name, the completions to judge, and the allowed range of its numbers."""

    name: str
    function: Callable[..., Any]
    rows: Sequence[PromptRow]
    completions: Sequence[str]
    places: Sequence[int] = ()
    """Indices of the completions, for messages; counted from 0 if empty."""
    low: float = 0.0
    high: float = 1.0
    more_columns: Mapping[str, Sequence[Any]] | None = None
    """Columns in addition to those of the rows, one entry per completion; they override a row's own."""
    is_ours: bool = False
    """True if the function enforces its own time limits, as those of this package do."""

    @property
    def is_async(self) -> bool:
        """True for an async function, see `is_async`."""
        return is_async(self.function)

    def run(self, seconds: float) -> list[float | None]:
        """Return the function's numbers, one per completion. `seconds` is the time limit of a user's plain function.

        Raises:
            InputError: the function failed, exceeded the limit, or did not return one number in range or None per
                completion.
        """
        given = self._arguments()
        what = f"the reward function {self.name!r}"
        try:
            with contextlib.nullcontext() if self.is_ours else limited(what, seconds):
                returned = self.function(**given)
        except TookTooLong as late:
            raise InputError(
                f"{what} did not return within --reward.function-seconds {seconds:g} for {len(self.completions)} "
                f"completions; it was {self._place(late.stack)}: make it faster, or raise the limit"
            ) from None
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise self._failure(error) from error
        return self._read(returned)

    async def run_async(self, seconds: float) -> list[float | None]:
        """As `run`, for an async function; if it has not returned after `seconds`, all its completions are unscored."""
        try:
            return self._read(await asyncio.wait_for(self._awaited(), seconds))
        except TimeoutError:
            return [None] * len(self.completions)

    async def _awaited(self) -> Any:
        try:
            return await self.function(**self._arguments())
        except (InputError, TimeoutError):
            raise
        except BaseException as error:  # SystemExit too, which would end the thread silently
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # cancelled at the time limit
            raise self._failure(error) from error

    def _read(self, returned: Any) -> list[float | None]:
        """Return the checked numbers. If a returned object raises while it is read, the function counts as failed."""
        try:
            return self._checked(returned)
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> InputError:
        place = self._place(traceback.extract_tb(error.__traceback__)[1:])
        at = f" ({place})" if place else ""
        remedy = self._reads_chats(error) or "correct it, or let it return None for what it cannot judge"
        return InputError(f"the reward function {self.name!r} failed: {reason(error)}{at}: {remedy}")

    def _reads_chats(self, error: BaseException) -> str:
        """Hint for a function that reads messages, as some of TRL's do, where completions are texts."""
        adapted = self.is_ours or self.name.startswith(("trl:", "verl:"))
        if adapted or not any(words in reason(error) for words in _OF_TEXT_READ_AS_MESSAGES):
            return ""
        name = "FILE.py:FUNCTION" if self.name.startswith("given:") else self.name
        return f"completions are texts here; a function of TRL that reads messages is named trl:{name}"

    def _place(self, stack: Sequence[traceback.FrameSummary]) -> str:
        """Return the position of a call: the innermost line of the stack in the function's own file, else in any.

        Without a stack the call itself failed, and its definition is named.
        """
        function = inspect.unwrap(getattr(self.function, "origin", self.function))
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        own = [one for one in stack if code is not None and one.filename == code.co_filename]
        if not stack and code is not None:
            return f"defined at {code.co_filename}:{code.co_firstlineno}"
        return "".join(f"at {one.filename}:{one.lineno} in {one.name}" for one in (own or stack)[-1:])

    def _arguments(self) -> dict[str, Any]:
        """Return all columns for a function with `**columns`, else those named by its parameters."""
        keys = dict.fromkeys(key for row in self.rows for key in row.columns if key not in _RESERVED_COLUMNS)
        columns = {key: [row.columns.get(key) for row in self.rows] for key in keys}
        prompts, completions = [row.prompt for row in self.rows], list(self.completions)
        given = {"prompts": prompts, "completions": completions, **columns, **(self.more_columns or {})}
        names = parameters_of(self.function)
        return given if names is None else {key: given[key] for key in names if key in given}

    def _checked(self, returned: Any) -> list[float | None]:
        if hasattr(returned, "tolist"):
            returned = returned.tolist()
        count = len(self.completions)
        if not isinstance(returned, list | tuple):
            kind = type(returned).__name__
            if inspect.iscoroutine(returned):
                returned.close()
                raise InputError(
                    f"the reward function {self.name!r} returned a coroutine instead of {count} numbers: define it, "
                    "or the function that decorates it, by `async def`"
                )
            what = "None" if returned is None else f"a {kind}"
            raise InputError(
                f"the reward function {self.name!r} returned {what}, not a list: return a list with one number per "
                "completion, in their order"
            )
        if len(returned) != count:
            raise InputError(
                f"the reward function {self.name!r} returned {len(returned)} rewards for {count} completions: return "
                "one per completion"
            )
        return [self._number(value, i) for i, value in zip(self.places or range(count), returned, strict=True)]

    def _number(self, value: Any, index: int) -> float | None:
        if value is None:
            return None
        plain: Any = value.tolist() if hasattr(value, "tolist") else value
        is_number = issubclass(type(plain), numbers.Real | Decimal)
        # Compare before converting: an integer may be too large for a float.
        if not is_number or not self.low <= plain <= self.high or abs(plain) == math.inf:
            raise InputError(
                f"the reward function {self.name!r} returned {_short(repr(value))} for completion {index}: "
                f"return a number in [{self.low:g}, {self.high:g}], or None to leave it unscored"
            )
        return float(plain)


def run_all(calls: Sequence[Call], settings: RewardConfig) -> list[list[float | None]]:
    """Return the numbers of every call, in order. Async functions run concurrently with each other and the plain ones.

    Raises:
        InputError: as for `Call.run`; also if an async function blocks its thread instead of awaiting.
    """
    waiting = [i for i, call in enumerate(calls) if call.is_async]
    results: list[list[float | None]] = [[] for _ in calls]

    async def gather() -> None:
        found = await asyncio.gather(*(calls[i].run_async(settings.async_seconds) for i in waiting))
        for i, numbers_ in zip(waiting, found, strict=True):
            results[i] = numbers_

    with _Background(gather() if waiting else None, [calls[i] for i in waiting], settings.async_seconds):
        for i, call in enumerate(calls):
            if i not in waiting:
                results[i] = call.run(settings.function_seconds)
    return results


class _Background:
    """Run a coroutine in its own thread, because the caller's may already have an event loop; joined on exit."""

    def __init__(self, work: Coroutine[Any, Any, None] | None, calls: Sequence[Call], seconds: float) -> None:
        self._work, self._calls = work, calls
        self._seconds = seconds + _LATE_SECONDS
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="async rewards", daemon=True)

    def __enter__(self) -> None:
        if self._work is not None:
            self._thread.start()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._work is None:
            return
        names = ", ".join(repr(call.name) for call in self._calls)
        try:
            with limited(f"one of the async reward functions {names}", self._seconds):
                self._thread.join()
        except TookTooLong:
            stack = stack_of(sys._current_frames().get(self._thread.ident or 0))
            raise InputError(
                f"one of the async reward functions {names} blocks its thread for more than --reward.async-seconds "
                f"instead of awaiting; it was {self._calls[0]._place(stack)}: await there, or raise the limit"
            ) from None
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        assert self._work is not None
        try:
            asyncio.run(self._work)
        except BaseException as error:  # raised again in the waiting thread
            self._error = error


def is_async(function: Callable[..., Any]) -> bool:
    """Return True for a coroutine function, an object whose `__call__` is one, or an object with `is_async` True."""
    called = getattr(function, "__call__", None)  # noqa: B004
    says_so = getattr(function, "is_async", False)
    return bool(says_so) or inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def parameters_of(function: Callable[..., Any]) -> list[str] | None:
    """Return the function's parameter names, or None if it accepts any (so does a builtin without a signature)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def missing_column(function: Callable[..., Any], columns: Mapping[str, Any]) -> str | None:
    """Return the first parameter without a default that no column of a row fills, or None.

    An answer of None fills none: it stands for a row without one.
    For a decorated function the parameters of the outermost wrapper count: a decorator may supply others itself.
    """
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    filled = {"prompts", "completions", *columns} - ({"answer"} if columns.get("answer") is None else set())
    return next((name for name in needed if name not in filled), None)


def reason(error: BaseException) -> str:
    """Return an error raised by foreign code as one line of text."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    return _short(" ".join(f"{type(error).__name__}: {text}".split()))


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."

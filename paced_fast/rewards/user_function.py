"""One call of a reward or shaping function: the columns it asks for, plain or async, and a check of what it returns."""

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

# A column of the first name would meet the object itself, where the function is a method of one.
_RESERVED_COLUMNS = ("self", "prompts", "completions")
_MOST_SHOWN = 500  # characters of somebody else's text in a message
_LATE_SECONDS = 10.0  # for the end of an event loop whose functions have had their time


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A function by its name, the completions it is to judge, and the range its numbers must lie in."""

    name: str
    function: Callable[..., Any]
    rows: Sequence[PromptRow]
    completions: Sequence[str]
    places: Sequence[int] = ()
    """What the completions are numbered in messages; from 0 unless given."""
    low: float = 0.0
    high: float = 1.0
    more_columns: Mapping[str, Sequence[Any]] | None = None
    """Columns beside those of the rows, one entry per completion; they win over a row's own."""
    is_ours: bool = False
    """Whether the function keeps its own limits of time, as those of this package do."""

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function, or an object whose call is one or that says so."""
        return is_async(self.function)

    def run(self, seconds: float) -> list[float | None]:
        """The function's numbers, one per completion; a plain function of a user's has `seconds` for them.

        Raises:
            InputError: it failed, took longer, or returned something other than a number in range, or None, for each
                completion.
        """
        given = self._arguments()
        what = f"the reward function {self.name!r}"
        try:
            with contextlib.nullcontext() if self.is_ours else limited(what, seconds):
                returned = self.function(**given)
        except TookTooLong as late:
            raise InputError(
                f"{what} did not return within --reward.function-seconds {seconds:g}, called with "
                f"{len(self.completions)} completions: it stands {self._place(late.stack)}"
            ) from None
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise self._failure(error) from error
        return self._read(returned)

    async def run_async(self, seconds: float) -> list[float | None]:
        """The same for an async function; after `seconds` without an answer all its completions are unscored."""
        try:
            return self._read(await asyncio.wait_for(self._awaited(), seconds))
        except TimeoutError:
            return [None] * len(self.completions)

    async def _awaited(self) -> Any:
        try:
            return await self.function(**self._arguments())
        except (InputError, TimeoutError):
            raise
        except BaseException as error:  # SystemExit too, which would end the thread without a word
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # at the limit of time
            raise self._failure(error) from error

    def _read(self, returned: Any) -> list[float | None]:
        """The checked numbers; an object of the user's own that fails when it is read is a failure of the function."""
        try:
            return self._checked(returned)
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> InputError:
        place = self._place(traceback.extract_tb(error.__traceback__)[1:])
        return InputError(f"the reward function {self.name!r} failed: {reason(error)}{f' ({place})' if place else ''}")

    def _place(self, stack: Sequence[traceback.FrameSummary]) -> str:
        """Where a call has got to: the innermost line of the function's own file in a stack, else the innermost."""
        function = inspect.unwrap(getattr(self.function, "origin", self.function))
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        own = [one for one in stack if code is not None and one.filename == code.co_filename]
        return "".join(f"at {one.filename}:{one.lineno} in {one.name}" for one in (own or stack)[-1:])

    def _arguments(self) -> dict[str, Any]:
        """All columns for a function with `**columns`, else those it names."""
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
                    f"the reward function {self.name!r} returned a coroutine instead of {count} numbers: declare it, "
                    "or what decorates it, with `async def`"
                )
            raise InputError(f"the reward function {self.name!r} returned a {kind}, not a list of {count} numbers")
        if len(returned) != count:
            raise InputError(
                f"the reward function {self.name!r} returned {len(returned)} rewards for {count} completions"
            )
        return [self._number(value, i) for i, value in zip(self.places or range(count), returned, strict=True)]

    def _number(self, value: Any, index: int) -> float | None:
        if value is None:
            return None
        plain: Any = value.tolist() if hasattr(value, "tolist") else value
        is_number = issubclass(type(plain), numbers.Real | Decimal)
        # Compared before it is converted: a whole number may be too large for a float.
        if not is_number or not self.low <= plain <= self.high or abs(plain) == math.inf:
            raise InputError(
                f"the reward function {self.name!r} returned {_short(repr(value))} for completion {index}: "
                f"a number in [{self.low:g}, {self.high:g}] is expected, or None for no verdict"
            )
        return float(plain)


def run_all(calls: Sequence[Call], settings: RewardConfig) -> list[list[float | None]]:
    """The numbers of every call, in order; async ones wait together, beside the plain ones.

    Raises:
        InputError: as `Call.run`; also for an async function that blocks its thread instead of waiting.
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
    """Runs a coroutine in a thread of its own, since the caller's may have an event loop already; joined at the end."""

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
                f"one of the async reward functions {names} blocks instead of waiting, for more than "
                f"--reward.async-seconds: it stands {self._calls[0]._place(stack)}"
            ) from None
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        assert self._work is not None
        try:
            asyncio.run(self._work)
        except BaseException as error:  # raised again by the thread that waits
            self._error = error


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function is a coroutine function, or an object whose call is one or that says so."""
    called = getattr(function, "__call__", None)  # noqa: B004
    says_so = getattr(function, "is_async", False)
    return bool(says_so) or inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def parameters_of(function: Callable[..., Any]) -> list[str] | None:
    """The names of what a function takes; None when it takes any. A builtin that does not say takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def missing_column(function: Callable[..., Any], columns: Mapping[str, Any]) -> str | None:
    """A parameter without a default that no column of a row fills, None when there is none.

    Of a decorated function the outermost parameters count: a decorator may supply others itself.
    """
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return next((name for name in needed if name not in ("prompts", "completions") and name not in columns), None)


def reason(error: BaseException) -> str:
    """An error of somebody else's code in one line."""
    try:
        text = str(error)
    except Exception:
        text = "(its own text cannot be made)"
    return _short(" ".join(f"{type(error).__name__}: {text}".split()))


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."

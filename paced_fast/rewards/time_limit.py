"""A limit for functions that stay in this process, because of the models or connections they hold.

No thread of this process can promise one: `sum(range(10**14))` holds the interpreter's lock, and nothing else runs. So
another process keeps the time. At the limit it signals this one, whose main thread raises in the function, wherever
that is. A function that does not end by that, or was called from another thread, ends the whole process a few seconds
later, after a line that names it and a dump of the stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

_TIMEKEEPER = Path(__file__).with_name("timekeeper.py")
_GRACE_SECONDS = 5.0
# One that nobody else uses: rewards of other people set alarms of their own.
_NOW, _DUMP = (getattr(signal, "SIGRTMAX", signal.SIGUSR2) - i for i in (0, 1))


class TookTooLong(BaseException):
    """Raised in a function at its limit; `except Exception` does not stop it."""

    def __init__(self, stack: Sequence[traceback.FrameSummary]) -> None:
        super().__init__()
        self.stack = stack
        """Where the main thread stood, the innermost call last."""


class TimeLimit:
    """Limits calls, one after the other. Its process starts with the first and ends with `close`, or with this one."""

    def __init__(self) -> None:
        self._pid = 0
        self._is_armed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None

    @contextlib.contextmanager
    def __call__(self, what: str, seconds: float) -> Iterator[None]:
        """Ends what is inside after `seconds`; `what` is its name in the last line of a process that has to go.

        Raises:
            TookTooLong: in the main thread.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if self._pid != os.getpid():
            self._start()
        if is_main:
            signal.signal(_NOW, self._raise)  # and stays: the signal may come when the call has just ended
            self._is_armed = True
        self._tell({"seconds": seconds, "grace": _GRACE_SECONDS, "what": what, "signal": _NOW if is_main else 0})
        try:
            yield
        finally:
            self._is_armed = False
            self._tell(None)

    def close(self) -> None:
        """End the process that keeps the time. A later call starts another."""
        self._end()
        self._pid = 0

    def _start(self) -> None:
        self._end()
        with contextlib.suppress(OSError, ValueError):  # standard error may be no file
            faulthandler.register(_DUMP, file=2, all_threads=True)
        command = [sys.executable, "-I", "-S", str(_TIMEKEEPER), str(os.getpid()), str(int(_DUMP))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self._pid = os.getpid()
        self._end = weakref.finalize(self, _stop, self._process, self._pid)

    def _tell(self, message: dict[str, Any] | None) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody killed it: then there is no limit
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:
            self._is_armed = False
            raise TookTooLong(stack_of(frame))


def stack_of(frame: FrameType | None) -> list[traceback.FrameSummary]:
    """The calls that led to a frame, as they stand now."""
    return list(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False))[::-1] if frame else []


def _stop(process: subprocess.Popen[bytes], pid: int) -> None:
    if pid == os.getpid() and process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()

"""Time limit for functions that run in this process because of the models or connections they hold.

Nothing outside can end such a function except the end of its process. At the limit a kernel timer therefore sends a
signal that raises an exception in the main thread, wherever it is. This ends even `9**9**9**9`, which lets no other
thread run, but not code that never checks for signals. If the function continues, or runs in another thread, the whole
process ends a few seconds later: after a line that names the function and a dump of the stacks, or after the stacks
alone if the function holds the interpreter lock, as `sum(range(10**14))` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

GRACE_SECONDS = 5.0
# A signal that is otherwise unused: users' rewards may set alarms (SIGALRM) themselves.
_SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
_MONOTONIC, _THREAD = 1, 4  # CLOCK_MONOTONIC, SIGEV_THREAD_ID


class TookTooLong(BaseException):
    """Raised in a function at its time limit; not caught by `except Exception`."""

    def __init__(self, stack: Sequence[traceback.FrameSummary]) -> None:
        super().__init__()
        self.stack = stack
        """Stack of the main thread at the limit, innermost call last."""


@contextlib.contextmanager
def limited(what: str, seconds: float) -> Iterator[None]:
    """Limit the body to `seconds`; `what` names it in the error line if the whole process must end.

    Raises:
        TookTooLong: the limit was reached in the main thread.
    """
    ended = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not ended.is_set():
            raise TookTooLong(stack_of(frame))

    is_main = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    timer = None
    if is_main:
        signal.signal(_SIGNAL, interrupt)  # never reset: the signal may arrive just after the call
        timer = _start_timer(seconds)
    watch = threading.Thread(target=_watch, args=(what, seconds, ended, is_main), name="time limit", daemon=True)
    watch.start()
    faulthandler.dump_traceback_later(seconds + 2 * GRACE_SECONDS, exit=True, file=2)
    try:
        yield
    finally:
        ended.set()
        if timer is not None:
            _library().timer_delete(timer)
        faulthandler.cancel_dump_traceback_later()
        watch.join()


def stack_of(frame: FrameType | None) -> list[traceback.FrameSummary]:
    """Return the call stack of a frame as it is now, innermost call last."""
    return list(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False))[::-1] if frame else []


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_byte * 44),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    # Before glibc 2.34 the timer functions were in librt.
    return library if hasattr(library, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)


def _start_timer(seconds: float) -> ctypes.c_void_p:
    """Start a kernel timer that signals this thread once after `seconds`, and return it."""
    timer = ctypes.c_void_p()
    event = _Event(None, int(_SIGNAL), _THREAD, threading.get_native_id())
    whole, rest = divmod(seconds, 1.0)
    times = (ctypes.c_long * 4)(
        0, 0, int(whole), max(1, int(rest * 1e9))
    )  # seconds and nanoseconds: the interval, then the first expiry
    if (
        _library().timer_create(_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) != 0
        or _library().timer_settime(timer, 0, times, None) != 0
    ):
        raise OSError(ctypes.get_errno(), f"no timer: {os.strerror(ctypes.get_errno())}")
    return timer


def _watch(what: str, seconds: float, ended: threading.Event, is_main: bool) -> None:
    if ended.wait(seconds):
        return
    if is_main and ended.wait(GRACE_SECONDS):
        return
    with contextlib.suppress(OSError, ValueError):  # the other end may be closed
        sys.stderr.write(f"\nerror: {what} did not end within {seconds:g} s: ending the run\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(2, all_threads=True)
    os._exit(1)

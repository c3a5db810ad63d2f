"""Waits and limits that do not depend on what else the machine does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

_TICK = 0.05
_LATE = 0.2


class Steady:
    """`with Steady() as clock: ...; clock.seconds` is the wall time of the block, less that of stalls.

    A second thread sleeps in short ticks: where one takes far longer, nothing on this machine ran. For waits on other
    processes and threads only: code that holds the interpreter's lock keeps the ticks from coming as well, and is
    timed by `time.process_time`.
    """

    def __enter__(self) -> Steady:
        self._lost, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _tick(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(_TICK):
            now = time.perf_counter()
            if now - last > _LATE:
                self._lost += now - last - _TICK
            last = now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        self.seconds -= self._lost


LIMIT_SECONDS = 120.0
"""Of waits for something that comes in milliseconds on a free machine."""


def wait_for(condition: Callable[[], object], seconds: float = LIMIT_SECONDS) -> None:
    """Until `condition()` is true. What fails in the end is the wait, and it says so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"limit of time met: not so after {seconds:g} s")
        time.sleep(0.005)


def takes_less(
    limit: float, work: Callable[[], object], clock: Callable[[], float] = time.process_time, tries: int = 7
) -> bool:
    """Whether one of a few calls of `work` takes less than `limit` seconds of `clock`; others may have been disturbed.

    For limits far above what the right code takes and far below what the wrong one does.
    """
    for _ in range(tries):
        began = clock()
        work()
        if clock() - began < limit:
            return True
    return False

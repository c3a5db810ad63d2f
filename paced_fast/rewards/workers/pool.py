"""Workers that judge requests and can be killed: one warm process that forks, one thread that hands out the work.

A worker is forked from a process that has loaded the judge (`fork_server`): a new one costs milliseconds, and killing
one that takes long is cheap. Every request first gets a short turn, `TURN_SECONDS`. One that needs longer while others
wait is killed, and starts again when the short ones are done: a hostile request delays an honest one by a turn, never
by the limit.

A call of n requests to W workers returns within `seconds` + (n - 1) * TURN_SECONDS / W, and a fraction of a second for
the killing, whatever the requests are and whatever other threads ask. The clock starts when the call is made, or when
the processes are ready, should they still be starting. A request without a reply by then is a `timeout`. One whose
worker dies or is stopped is tried once more on a fresh one, then it has `died`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paced_fast.rewards.workers.pool_loop import PoolLoop, Reply


class WorkerPool:
    """Judges lists of JSON requests by the `judge` of a program file; from any thread, from a forked process too.

    Example: `WorkerPool(Path("math_judge.py"), name="math", num_workers=2, seconds=3.0).run([["1/2", "0.5"]])`

    The processes start with the first call or with `warm`, and end with `close`, with the object, or with this process.
    """

    def __init__(self, program: Path, *, name: str, num_workers: int, seconds: float) -> None:
        self._make = lambda: PoolLoop(program, name, num_workers, seconds)
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._loop: PoolLoop | None = None
        self._end: Callable[[], Any] = lambda: None

    def run(self, requests: Sequence[Any]) -> list[Reply]:
        """A reply for each request, in order.

        Raises:
            InputError: the workers do not start.
        """
        return self._running().call(requests) if requests else []

    def warm(self) -> None:
        """Starts the processes and waits until they are ready, so that the first call does not.

        Raises:
            InputError: they do not start.
        """
        self._running().call([])

    def close(self) -> None:
        """Ends the processes. A later call starts new ones."""
        with self._lock:
            self._end()
            self._loop = None

    def _running(self) -> PoolLoop:
        if self._pid != os.getpid():  # forked: the thread and the processes are the parent's
            self._lock, self._pid, self._loop = threading.Lock(), os.getpid(), None
            self._end = lambda: None
        with self._lock:
            if self._loop is None or self._loop.failure is not None:
                self._end()
                self._loop = self._make()
                self._end = weakref.finalize(self, self._loop.stop)
            return self._loop

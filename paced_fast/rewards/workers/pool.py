"""Pool of workers that judge requests and can be killed: one warm process forks them, one thread distributes the work.

A worker is forked from a process that has loaded the judge (`fork_server`), so a new one costs milliseconds, and
killing a slow one is cheap. Every request first gets a short turn, `TURN_SECONDS`. If it needs longer while others
wait, its worker is killed and it starts again after the short ones. A hostile request therefore delays an honest one by
one turn, never by the time limit.

A call of n requests to W workers returns within `seconds` + (n - 1) * TURN_SECONDS / W, plus a fraction of a second for
killing, for any requests and any load from other threads. The clock starts with the call, or when the processes are
ready if they are still starting. A request without a reply by then is a `timeout`. A request whose worker dies or is
stopped is tried once more on a new worker; after a second time its reply is `died`.
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
    """Judge lists of JSON requests by the `judge` of a program file. Usable from any thread and after a fork.

    Example: `WorkerPool(Path("math_judge.py"), name="math", num_workers=2, seconds=3.0).run([["1/2", "0.5"]])`

    The processes start with the first call or `warm`, and end with `close`, with this object, or with this process.
    """

    def __init__(self, program: Path, *, name: str, num_workers: int, seconds: float) -> None:
        self._make = lambda: PoolLoop(program, name, num_workers, seconds)
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._loop: PoolLoop | None = None
        self._end: Callable[[], Any] = lambda: None

    def run(self, requests: Sequence[Any]) -> list[Reply]:
        """Return one reply per request, in order.

        Raises:
            InputError: the workers do not start.
        """
        return self._running().call(requests) if requests else []

    def warm(self) -> None:
        """Start the processes and wait until they are ready, so that the first call need not wait.

        Raises:
            InputError: the workers do not start.
        """
        self._running().call([])

    def close(self) -> None:
        """End the processes. A later call starts new ones."""
        with self._lock:
            self._end()
            self._loop = None

    def _running(self) -> PoolLoop:
        if self._pid != os.getpid():  # after a fork: thread and processes belong to the parent
            self._lock, self._pid, self._loop = threading.Lock(), os.getpid(), None
            self._end = lambda: None
        with self._lock:
            if self._loop is None or self._loop.failure is not None:
                self._end()
                self._loop = self._make()
                self._end = weakref.finalize(self, self._loop.stop)
            return self._loop

"""A request to stop, from Slurm or a person: SIGTERM or SIGUSR1 to any one rank stops all of them at a step's end.

The first signal only raises a flag. At the next boundary the ranks agree, save a checkpoint together and leave with
`status`: a run that is asked to stop has not failed. A second signal ends the process at once, also one that hangs in
an exchange, because a thread hears it and not the interpreter's main loop.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paced_fast.data.distributed import World

logger = logging.getLogger(__name__)

HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 3.0
"""Slurm signals every process, and torchrun passes on what it got: two signals so close together are one request."""
_STOPPED_ALONE = 75  # EX_TEMPFAIL of sysexits.h: not done, to be tried again
_SET_PDEATHSIG = 1


def status(launched: bool) -> int:
    """Exit status of a run that stopped on request: 75, or 0 when torchrun `launched` it, which restarts any other."""
    return 0 if launched else _STOPPED_ALONE


class StopRequest:
    """Handles the signals while it is entered; in a thread other than the main one, which gets none, it does nothing.

    Example: `with StopRequest() as stop: ...; if stop.agreed(world): ...`
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        """`ends_process`: a second signal ends the process; else it raises KeyboardInterrupt in the main thread,
        because the process is a user's and holds more than the run."""
        self._ends_process, self._raises = ends_process, False
        self.name: str | None = None
        """The signal that asked this rank to stop."""
        self._heard_at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank calls this at the same place. Alone it costs nothing."""
        return world.any(self.name is not None) if world.size > 1 else self.name is not None

    def __enter__(self) -> StopRequest:
        self._listens = threading.current_thread() is threading.main_thread()
        if not self._listens:
            return self
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._before = {number: signal.signal(number, self._ask) for number in HEARD}
        self._wakeup_before = signal.set_wakeup_fd(self._ours.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._listens:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ours.close()
        self._thread.join()
        self._theirs.close()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """The interpreter runs this when it can; the thread has heard the signal before."""
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

    def _listen(self) -> None:
        while received := self._theirs.recv(64):
            for number in received:
                if number in HEARD:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._heard_at = number.name, now
            logger.warning("%s: stopping at the end of this step; a second signal stops at once", number.name)
        elif now - self._heard_at > SAME_REQUEST_SECONDS and not self._ends_process:
            self._raises = True
            _thread.interrupt_main(number)
        elif now - self._heard_at > SAME_REQUEST_SECONDS:
            with contextlib.suppress(OSError, ValueError):  # the reading end may be closed
                sys.stderr.write(f"stopped at once by a second {number.name}, without a checkpoint\n")
                sys.stderr.flush()
            os._exit(128 + number)


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one dies, so that no rank outlives its launcher."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # not Linux: then a rank ends at its next exchange
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)

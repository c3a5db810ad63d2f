"""A request to stop, from Slurm or a person: SIGTERM, SIGUSR1 or Ctrl-C (SIGINT) to any one rank stops all of them.

During training the first signal only raises a flag. At the end of the step the ranks agree, save a checkpoint together
and leave with `status`: a run that is asked to stop has not failed. Before the first step there is nothing to save, so
a run of one process stops where it is. A second signal ends the process at once, also one that hangs in an exchange,
because a thread hears it and not the interpreter's main loop.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from paced_fast.errors import StopRequested

if TYPE_CHECKING:
    from paced_fast.data.distributed import World

logger = logging.getLogger(__name__)

HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 3.0
"""Slurm signals every process, and torchrun passes on what it got: two signals so close together are one request."""
SAME_KEY_SECONDS = 0.2
"""The same for Ctrl-C without a launcher, which nobody passes on."""
_STOPPED_ALONE = 75  # EX_TEMPFAIL of sysexits.h: not done, to be tried again
_SET_PDEATHSIG = 1


def status(launched: bool) -> int:
    """Exit status of a run that stopped on request: 75, or 0 when torchrun `launched` it, which restarts any other."""
    return 0 if launched else _STOPPED_ALONE


def end_at_interrupt() -> None:
    """End this process in one line at the first Ctrl-C, until a StopRequest takes over: nothing has been written yet.

    A command calls this before its slow imports.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


TOO_EARLY = "SIGINT: stopped before anything was done: start it again with the same command"
"""Message of a command that was stopped before it had read anything."""


def _end(number: int, frame: FrameType | None) -> None:
    sys.stderr.write(f"{TOO_EARLY}\n")
    sys.stderr.flush()
    os._exit(_STOPPED_ALONE)  # an import that is broken off leaves modules in a state that no cleanup can rely on


def ignore_interrupts() -> None:
    """Ignore Ctrl-C from here to the end of the process: it was asked to stop, and has said so."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def how_to_resume(folder: Path) -> str:
    """Words that continue the run in `folder`, or start it again if it has no checkpoint yet."""
    return f"continue with --resume {shlex.quote(str(folder))}, which stands for all other options"


class StopRequest:
    """Handles the signals while it is entered; in a thread other than the main one, which gets none, it does nothing.

    Example: `with StopRequest() as stop: ...; if stop.agreed(world): ...`
    """

    def __init__(self, *, at_once: bool = False, ends_process: bool = True) -> None:
        """`at_once`: until `waits` is called, the first signal stops the main thread where it is, and the end of the
        `with` block raises StopRequested. `ends_process`: a second signal ends the process; else it raises
        KeyboardInterrupt in the main thread, because the process is a user's and holds more than the run."""
        self._ends_process, self._raises = ends_process, False
        self.name: str | None = None
        """The signal that asked this rank to stop."""
        self.remedy = "start it again with the same command"
        """How to go on, for the message of a run that stops before its first step."""
        self._at_once, self._is_stopping = at_once, False
        self._heard_at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank calls this at the same place. Alone it costs nothing."""
        return world.any(self.name is not None) if world.size > 1 else self.name is not None

    def waits(self) -> None:
        """From now on a signal waits for the end of the step."""
        self._at_once = False

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
        self._at_once = False
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ours.close()
        self._thread.join()
        self._theirs.close()
        if self._is_stopping and isinstance(error, KeyboardInterrupt):
            where = str(error) or "before the first step"
            raise StopRequested(f"{self.name}: stopped {where}: {self.remedy}") from None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """The interpreter runs this when it can; the thread hears the signal in any case."""
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt
        if self._at_once:
            self._at_once, self._is_stopping = False, True  # a later one is the second request
            self.name = self.name or signal.Signals(number).name
            raise KeyboardInterrupt  # no `except Exception` holds it up

    def _listen(self) -> None:
        while received := self._theirs.recv(64):
            for number in received:
                if number in HEARD:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._heard_at:
            what = "stopping" if self._at_once or self._is_stopping else "stopping at the end of this step"
            self.name, self._heard_at = number.name, now
            logger.warning("%s: %s; a second signal stops at once", number.name, what)
        elif now - self._heard_at > _same_request_seconds(number) and not self._ends_process:
            self._raises = True
            _thread.interrupt_main(number)
        elif now - self._heard_at > _same_request_seconds(number):
            with contextlib.suppress(OSError, ValueError):  # the reading end may be closed
                sys.stderr.write(f"stopped at once by a second {number.name}, without a checkpoint\n")
                sys.stderr.flush()
            os._exit(128 + number)


def _same_request_seconds(number: signal.Signals) -> float:
    is_key = number is signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ
    return min(SAME_KEY_SECONDS, SAME_REQUEST_SECONDS) if is_key else SAME_REQUEST_SECONDS


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one dies, so that no rank outlives its launcher."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # not Linux: then a rank ends at its next exchange
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)

"""The report while a run goes on: written by another process, so that training never waits for it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_SHARE = 0.05
"""Most of the time that a core spends on reports: after one that took 5 s the next comes 100 s later."""
_NICE = 10
_SECONDS = 10.0


class LiveReport:
    """Context manager that rewrites report.html every `every` steps, unless one is still being written or took too
    long; a failure is logged once."""

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every
        self._process: subprocess.Popen[bytes] | None = None
        self._open = contextlib.ExitStack()
        self._began = self._not_before = 0.0
        self._has_failed = False

    def due(self, step: int) -> bool:
        """Whether a report is to be written after this step; to be asked after every step."""
        is_free = self._settle()
        return self._every > 0 and step % self._every == 0 and is_free and time.monotonic() >= self._not_before

    def write(self) -> None:
        """Start writing."""
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "paced_fast.report", str(self._folder.absolute()), "--page-only"],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._told,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        self._began = time.monotonic()
        with contextlib.suppress(OSError, AttributeError):  # not on this system, or it has ended
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)

    def _settle(self) -> bool:
        """Look after the process; False while it writes."""
        process = self._process
        if process is None:
            return True
        if process.poll() is None:
            return False
        self._process = None
        took = time.monotonic() - self._began  # at most: it may have ended long ago
        self._not_before = self._began + took / _SHARE
        if process.returncode:
            self._told.seek(0)
            told = self._told.read().decode(errors="replace").split()
            self._fail(" ".join(told)[-300:] or f"status {process.returncode}")
        return True

    def _fail(self, why: str) -> None:
        if not self._has_failed:
            logger.warning("the report was not written during training (%s): the run continues", why)
        self._has_failed = True

    def __enter__(self) -> LiveReport:
        # Not a pipe, which would hold the process up when it is full.
        self._told = self._open.enter_context(tempfile.TemporaryFile())
        return self

    def stop(self) -> None:
        """End the process: the report of the whole run replaces what it would write."""
        if self._process is not None and not self._settle():
            self._process.kill()
            self._process.wait(_SECONDS)
            self._process = None

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._open.close()

"""Append-only file of lines; a full disk can lose lines but never ends the run."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from paced_fast.errors import counted

logger = logging.getLogger(__name__)


class Journal:
    """Appends whole lines to a file, or nothing.

    A failed write is logged once, and its lines are kept up to `keep_bytes` and written with the next lines that
    succeed; lines beyond that are lost.
    """

    def __init__(self, path: Path, *, keep_bytes: int) -> None:
        self.path, self._keep_bytes = path, keep_bytes
        self._waiting = b""
        self._lost = 0
        self._is_failing = False

    def append(self, lines: Iterable[str]) -> None:
        """Append lines, each without its end."""
        new = "".join(f"{line}\n" for line in lines).encode()
        try:
            _append(self.path, self._waiting + new)
        except OSError as error:
            if len(self._waiting) + len(new) <= self._keep_bytes:
                self._waiting += new
            else:
                self._lost += new.count(b"\n")
            if not self._is_failing:
                told = "%s cannot be written (%s): the run continues, and tries again with the next lines"
                logger.warning(told, self.path, error.strerror or error)
            self._is_failing = True
            return
        if self._is_failing:
            logger.warning("%s can be written again%s", self.path, self._missing())
        self._waiting, self._is_failing = b"", False

    def close(self) -> None:
        """Try the unwritten lines a last time, and log how many are missing."""
        if self._waiting:
            self.append([])
        if self._is_failing:
            self._lost += self._waiting.count(b"\n")
            self._waiting = b""
            logger.warning("%s is incomplete%s", self.path, self._missing())
        self._is_failing = False

    def _missing(self) -> str:
        lost, self._lost = self._lost, 0
        return f": {counted(lost, 'line')} {'is' if lost == 1 else 'are'} missing" if lost else ""


def _append(path: Path, data: bytes) -> None:
    """Write all of the data, or none of it on an error."""
    if not data:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)

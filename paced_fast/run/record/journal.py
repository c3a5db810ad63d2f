"""A file of lines that a run appends to: a disk that takes none costs lines at most, never the run."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)


class Journal:
    """Appends whole lines to a file, or nothing.

    What the disk does not take is told once and, up to `keep_bytes`, written with the next lines that it does take;
    lines beyond that are left out.
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
                logger.warning("%s cannot be written (%s): the run goes on", self.path, error.strerror or error)
            self._is_failing = True
            return
        if self._is_failing:
            logger.warning("%s is written again%s", self.path, self._missing())
        self._waiting, self._is_failing = b"", False

    def close(self) -> None:
        """A last attempt at what the disk did not take; says how many lines are missing."""
        if self._waiting:
            self.append([])
        if self._is_failing:
            self._lost += self._waiting.count(b"\n")
            self._waiting = b""
            logger.warning("%s is not whole%s", self.path, self._missing())
        self._is_failing = False

    def _missing(self) -> str:
        lost, self._lost = self._lost, 0
        return f": {lost} lines are missing" if lost else ""


def _append(path: Path, data: bytes) -> None:
    """All of the data, or none where the disk does not take it."""
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

"""The process behind `TimeLimit`: a clock that no function of the trainer can stop.

python timekeeper.py PID DUMP_SIGNAL      # a line of JSON on standard input begins a call, `null` ends it
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

_DUMP_SECONDS = 1.0
_LOOK_SECONDS = 5.0


def main() -> None:
    """Serves until standard input ends or the other process is gone."""
    pid, dump = int(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the run, which may go on for a while
    lines = _Lines(pid)
    while True:
        call = lines.next()
        if call is None or lines.come_within(call["seconds"]):
            continue
        if call["signal"]:
            _signal(pid, call["signal"])
            if lines.come_within(call["grace"]):
                continue
        if os.getppid() == pid:
            os.write(2, f"\nerror: {call['what']} did not end within {call['seconds']:g} s: the run ends\n".encode())
            _signal(pid, dump)
            time.sleep(_DUMP_SECONDS)
            _signal(pid, signal.SIGKILL)
        return


class _Lines:
    """Lines of standard input, unbuffered, so that `select` knows of them."""

    def __init__(self, pid: int) -> None:
        self._pid, self._data = pid, b""

    def come_within(self, seconds: float) -> bool:
        """Whether there is input within so many seconds."""
        return b"\n" in self._data or bool(select.select([0], [], [], seconds)[0])

    def next(self) -> dict[str, Any] | None:
        """The next line, read as JSON; this process ends with the input, or when the other one is gone."""
        while b"\n" not in self._data:
            # A child of that process may hold the pipe open for longer than it lives.
            if not select.select([0], [], [], _LOOK_SECONDS)[0]:
                if os.getppid() != self._pid:
                    raise SystemExit(0)
                continue
            part = os.read(0, 1 << 16)
            if not part:
                raise SystemExit(0)
            self._data += part
        line, _, self._data = self._data.partition(b"\n")
        return json.loads(line)


def _signal(pid: int, number: int) -> None:
    if os.getppid() == pid:  # else it is gone, and the id may be another's
        os.kill(pid, number)


if __name__ == "__main__":
    main()

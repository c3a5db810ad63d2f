"""A stand-in for the cases of the benchmarks: parts of a visit that end well, crash, hang, or are killed.

    python -m visit_standin CASE --json FILE --progress FILE ...

What hangs first leaves a mark, a file named after the case, in the folder that VISIT_MARKS names. `JumpingClock` lets
time pass then, so that no limit depends on how fast the machine is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


class JumpingClock:
    """Stands in for the module `time`: every file in a folder is ten thousand seconds."""

    def __init__(self, marks: Path) -> None:
        self.marks, self.sleep = marks, time.sleep

    def monotonic(self) -> float:
        """Seconds, and ten thousand for each mark."""
        return time.monotonic() + 1e4 * len(list(self.marks.iterdir()))


def _mark(case: str) -> None:
    if "VISIT_MARKS" in os.environ:
        Path(os.environ["VISIT_MARKS"], case).touch()


def main() -> None:
    """Write who runs and what is known; then do what the case says."""
    case, words = sys.argv[1], sys.argv[2:]
    result, progress = (Path(words[words.index(name) + 1]) for name in ("--json", "--progress"))

    def write(**known: object) -> None:
        result.write_text(json.dumps({"case": case, "pid": os.getpid(), "words": words, "cells": [], **known}))

    write(known="at first")
    progress.write_text("bad (T1-H1-V1, full)")
    if case == "good" or (case == "hangs_on_bad" and "bad" in words):
        write(known="all")
    elif case == "crashes":
        raise RuntimeError("no device")
    elif case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "deaf":
        signal.signal(signal.SIGINT, lambda *_: _mark("deaf to an interruption"))
        _mark(case)
        while True:  # a handler ends a sleep early
            time.sleep(600)
    else:
        try:
            _mark(case)
            time.sleep(600)
        except KeyboardInterrupt:
            write(known="when interrupted")
            raise


if __name__ == "__main__":
    main()

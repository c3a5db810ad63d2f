"""The process of a user around a call: what a run changes in it, put back as it was."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from paced_fast.errors import InputError
from paced_fast.policy.loading import progress_bars_off
from paced_fast.run import checkpoint
from paced_fast.run.record import terminal


@contextlib.contextmanager
def as_found(*, progress: bool, words: Callable[[str], str]) -> Iterator[Console]:
    """Context of one call, with a console; it and the log lines are told in the `words` of Python.

    Threads, precision, random generators and logging are restored after it.

    Raises:
        InputError: the process is one of several ranks, which need the command.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "this process is one of several ranks, and paced_fast.api runs in one: train by torchrun -m "
            "paced_fast.train, with data and reward in files"
        )
    package = logging.getLogger("paced_fast")
    handlers, level, propagates = list(package.handlers), package.level, package.propagate
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    flushes = float(torch.tensor(1e-40) * 1.0) == 0.0
    ambient = checkpoint.random_state()
    try:
        with progress_bars_off():
            yield _console(progress, words)
    finally:
        checkpoint.restore_random_state(ambient)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(flushes)
        package.handlers, package.propagate = handlers, propagates
        package.setLevel(level)


class _Told(Console):
    """A console that prints texts in other words."""

    def __init__(self, words: Callable[[str], str]) -> None:
        super().__init__()
        self.words = words

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(self.words(one) if isinstance(one, str) else one for one in objects), **options)


def _console(progress: bool, words: Callable[[str], str]) -> Console:
    """The console of the terminal or of the notebook's cell; without progress only warnings are shown."""

    def told(record: logging.LogRecord) -> bool:
        record.msg, record.args = words(record.getMessage()), ()
        return True

    console = terminal.configure_logging(rank=0 if progress else 1, console=_Told(words))
    for handler in logging.getLogger("paced_fast").handlers:
        handler.addFilter(told)
    # Without force_jupyter a console in a notebook shows what it prints, whatever its file is.
    return console if progress else Console(file=io.StringIO(), force_jupyter=False)

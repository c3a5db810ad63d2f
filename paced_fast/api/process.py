"""The process of a user around a call: what a run changes in it, put back as it was."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

import torch
from rich.console import Console

from paced_fast.errors import InputError
from paced_fast.policy.loading import progress_bars_off
from paced_fast.run import checkpoint
from paced_fast.run.record import terminal


@contextlib.contextmanager
def as_found(*, progress: bool) -> Iterator[Console]:
    """Context of one call, with a console; threads, precision, random generators and logging are restored after it.

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
            yield _console(progress)
    finally:
        checkpoint.restore_random_state(ambient)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(flushes)
        package.handlers, package.propagate = handlers, propagates
        package.setLevel(level)


def _console(progress: bool) -> Console:
    """The console of the terminal or of the notebook's cell; without progress only warnings are shown."""
    if progress:
        return terminal.configure_logging()
    terminal.configure_logging(rank=1)
    return Console(file=io.StringIO())

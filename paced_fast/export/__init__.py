"""Write the policy of a run as a folder that transformers, vLLM and others load.

    python -m paced_fast export RUN_OR_CHECKPOINT FOLDER [--step N] [--dtype auto|bfloat16|float32]

RUN_OR_CHECKPOINT is a run folder (its newest checkpoint, or that of --step, 0 being before training) or one checkpoint
of it. Weights that the optimiser keeps in higher precision than the policy are taken from the optimiser, and
written in that precision unless --dtype says otherwise. A model card
(README.md) says what it is, and the run's report.html comes with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from paced_fast.config import command
from paced_fast.errors import InputError, interrupts_in_one_line
from paced_fast.export.arguments import COMMAND, ExportArguments
from paced_fast.run.record import terminal

__all__ = ["ExportArguments", "export", "main"]


def export(arguments: ExportArguments) -> Path:
    """Write the policy as a folder; see `write.export`."""
    from paced_fast.export import write
    from paced_fast.policy import quiet

    quiet()
    return write.export(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of exports. Exit status: 0 when done, 2 for wrong input."""
    console = terminal.configure_logging()
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        given = command.read(COMMAND, ExportArguments, words)
        terminal.announce(f"export of {given.run_or_checkpoint}")
        write = import_module(
            "paced_fast.export.write"
        )  # takes seconds, in which an interrupt ends the process at once
        with interrupts_in_one_line():
            folder = export(given)
            console.print(f"wrote {folder}, weights in {write.stored_dtype(folder)}", soft_wrap=True)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None

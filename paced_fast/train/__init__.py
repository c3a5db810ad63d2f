"""Train a policy by PACED-RL.

    python -m paced_fast train [PRESET] [--field.subfield value ...]

The run folder holds config.json, metrics.jsonl, rollouts.jsonl, checkpoints/, summary.json and report.html.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paced_fast.config import Config, cli, modes
from paced_fast.config.files import write_config
from paced_fast.errors import EVERYWHERE, InputError, StopRequested, TrainingError
from paced_fast.run.record import terminal
from paced_fast.run.start import signals

if TYPE_CHECKING:  # these import PyTorch and transformers, which takes seconds
    from paced_fast.run.start.build import PreparedRun
    from paced_fast.run.start.signals import StopRequest
    from paced_fast.run.start.watchdog import Watchdog

__all__ = ["main", "run", "train"]


def run(config: Config, console: Console | None = None, *, replay: Path | None = None) -> dict[str, Any]:
    """Train with `config`, from start to summary; see `loop.run`."""
    from paced_fast.train import loop

    return loop.run(config, console, replay=replay)


def train(
    run: PreparedRun, console: Console, stop: StopRequest | None = None, watchdog: Watchdog | None = None
) -> dict[str, Any]:
    """Run the training loop of a prepared run; see `loop.train`."""
    from paced_fast.train import loop

    return loop.train(run, console, stop, watchdog)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of training. Exit status: 0 when done, 2 for wrong input, 3 if the run stopped itself.

    A run stopped by a signal exits with 75, or with 0 under torchrun, which would restart it otherwise. What is wrong
    with the arguments is told before PyTorch is imported.
    """
    console = terminal.configure_logging()
    try:
        mode, words = modes.take(sys.argv[1:] if arguments is None else arguments)
        config = cli.parse(words)
        if mode.save_config is not None:
            write_config(config, mode.save_config)
            console.print(f"wrote {mode.save_config}: train with --config {mode.save_config}", soft_wrap=True)
            return
        cli.check(config)
        if mode.trains:
            cli.check_files(config)
        if os.environ.get("RANK", "0") == "0":
            terminal.announce(f"{config.label}, model {config.model.name}")
        summary = _start(config, mode, console)
    except InputError as error:
        _tell(f"error: {error}", error)
        raise SystemExit(2) from None
    except TrainingError as error:
        _tell(f"stopped: {error}", error)
        raise SystemExit(3) from None
    except (StopRequested, KeyboardInterrupt) as error:
        signals.ignore_interrupts()
        _tell(str(error) or signals.TOO_EARLY, error)
        raise SystemExit(signals.status(launched="TORCHELASTIC_RUN_ID" in os.environ)) from None
    if summary:
        console.print(terminal.final_table(summary, run_dir=summary["run_dir"]))


def _start(config: Config, mode: modes.Launch, console: Console) -> dict[str, Any]:
    """Train, or do what `mode` asks for instead; returns the summary of a training run."""
    from paced_fast.policy import quiet
    from paced_fast.run.modes import ranks_here, run_bench
    from paced_fast.run.plan import dry_run

    quiet()
    if mode.dry_run is not None:
        ranks = mode.dry_run or ranks_here()
        dry_run.show(dry_run.make_plan(config, ranks=ranks, nodes=mode.nodes, device=mode.device), console)
        return {}
    if mode.bench is not None:
        run_bench(config, mode, console)
        return {}
    if mode.check:
        from paced_fast.run.start.first_rows import check_data

        check_data(config, console)
        return {}
    return run(config, console, replay=mode.replay)


def _tell(line: str, error: BaseException) -> None:
    """Write one line to the user; an error that every rank raises is reported by rank 0 only."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or EVERYWHERE not in getattr(error, "__notes__", ()):
        sys.stderr.write(f"{line}\n" if rank == "0" else f"rank {rank}: {line}\n")

"""Evaluate a run's checkpoint, or any model, on benchmarks or other sources of prompts.

python -m paced_fast evaluate RUN_OR_MODEL [--benchmarks gsm8k,aime24] [--data SOURCE ...] [--samples 32]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paced_fast.config import command
from paced_fast.errors import InputError, TrainingError, interrupts_in_one_line
from paced_fast.evaluate.arguments import COMMAND, EvaluateArguments, check
from paced_fast.run.record import files, terminal

if TYPE_CHECKING:  # these import PyTorch and transformers, which takes seconds
    from paced_fast.evaluation.held_out import Sample
    from paced_fast.rewards.loading import RewardFunction

__all__ = ["EvaluateArguments", "evaluate_target", "main"]


def evaluate_target(
    arguments: EvaluateArguments,
    keep: Callable[[Sequence[Sample]], None] | None = None,
    *,
    functions: Mapping[str, RewardFunction] | None = None,
) -> dict[str, Any]:
    """Evaluate a run or a model; see `target.evaluate_target`."""
    from paced_fast.evaluate import target
    from paced_fast.policy import quiet

    quiet()
    return target.evaluate_target(arguments, keep, functions=functions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of evaluations: tables for people, and with --json one line of JSON for programs."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        given = command.read(COMMAND, EvaluateArguments, words)
        check(given)
        console = terminal.configure_logging(console=Console(stderr=given.json == "-"))
        terminal.announce(f"evaluation of {given.run_or_model}")
        import_module("paced_fast.evaluate.target")  # takes seconds, in which an interrupt ends the process at once
        with interrupts_in_one_line():
            _evaluate(given, console)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except TrainingError as error:
        sys.stderr.write(f"stopped: {error}\n")
        raise SystemExit(3) from None


def _evaluate(arguments: EvaluateArguments, console: Console) -> None:
    samples: list[Sample] = []
    record = evaluate_target(arguments, samples.extend)
    if not console.is_terminal:
        console.width = 100  # a file has no width, and 80 columns would wrap figures
    for table in terminal.evaluation_tables(record):
        console.print(table)
    if arguments.json == "-":
        sys.stdout.write(json.dumps(files.plain(record), allow_nan=False) + "\n")
    _write(arguments, record, samples)


def _write(arguments: EvaluateArguments, record: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Write the requested files; the disk may be full although the place was writable before."""
    option = "json"
    try:
        if arguments.json is not None and arguments.json != "-":
            files.write_json_atomic(arguments.json, record)
        option = "save-samples"
        if arguments.save_samples is not None:
            _save(samples, arguments.save_samples)
    except OSError as error:
        if option == "json":  # the figures took long
            sys.stdout.write(json.dumps(files.plain(record), allow_nan=False) + "\n")
        raise InputError(f"--{option} cannot be written ({error.strerror}): give another place") from error


def _save(samples: Sequence[Sample], path: str) -> None:
    with Path(path).open("w", encoding="utf-8") as file:
        for sample in samples:
            line = {
                "slice": sample.row.slice,
                "where": sample.row.where,
                "prompt": sample.row.prompt,
                "completion": sample.text,
                "reward": sample.reward,
                "answer": sample.vote,
                "tokens": sample.tokens,
                "stopped": sample.stopped,
            }
            file.write(json.dumps(line) + "\n")

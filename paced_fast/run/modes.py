"""Modes of `train` other than training: timing a step."""

from __future__ import annotations

import os
import re

from rich.console import Console

from paced_fast.config import Config, modes
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError
from paced_fast.run.plan import bench
from paced_fast.run.record import files
from paced_fast.run.start.session import ranks_of_run


def run_bench(config: Config, mode: modes.Launch, console: Console) -> None:
    """Time steps instead of training; tables to the console, figures to `mode.json`."""
    if mode.json is not None and not mode.json.parent.is_dir():
        raise InputError(f"--bench-json {mode.json}: the folder {mode.json.parent} does not exist: create it first")
    config = resolve(config)
    with ranks_of_run(config, console) as (world, console):
        result = bench.measure(config, steps=mode.bench or 1, lengths=mode.lengths, world=world)
        for table in bench.tables(result):
            console.print(table)
        if mode.json is not None and world.is_rank0:
            files.write_json_atomic(mode.json, result)


def ranks_here() -> int:
    """Number of processes according to the environment, for a plan without a number."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise InputError(f"--dry-run: WORLD_SIZE is {text[:80]!r}, not a number of processes: give --dry-run RANKS")
    return int(text)

"""The processes of a run while it lasts: ranks, console, watchdog."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from rich.console import Console

from paced_fast.config import Config
from paced_fast.config.presets import without_gpu
from paced_fast.config.run import OWN
from paced_fast.data import distributed
from paced_fast.data.distributed import World
from paced_fast.errors import InputError
from paced_fast.run.start import signals
from paced_fast.run.start.build import PreparedRun
from paced_fast.run.start.watchdog import Watchdog, open_board


def watch(run: PreparedRun, watchdog: Watchdog) -> None:
    """Let the watchdog see every phase of the run, and within one every pass of the policy and of the generator."""
    watchdog.count = lambda: run.stepper.counters.step
    run.stepper.phases.listener = watchdog.phase
    run.trainer.policy.body.register_forward_pre_hook(lambda *_: watchdog.progress())
    run.collector.generator.progress = watchdog.progress


@contextlib.contextmanager
def ranks_of_run(config: Config, console: Console) -> Iterator[tuple[World, Console]]:
    """Context of a run's ranks, which stay together until the end, and a console that prints on rank 0 only."""
    if config.model.device == "cuda" and not torch.cuda.is_available():
        if config.preset == OWN:
            raise InputError("--model.device cuda: torch finds no GPU on this machine: give auto or cpu")
        raise InputError(
            f"preset {config.preset} needs a GPU (--model.device cuda), and torch finds none: "
            f"use one that needs none ({', '.join(without_gpu())}), or --model.device cpu"
        )
    world = distributed.start(config.model.device, config.distributed.timeout_seconds)
    if world.size > 1:
        signals.end_with_parent()
    try:
        if not world.is_rank0:
            logging.getLogger("paced_fast").setLevel(logging.WARNING)
        yield world, console if world.is_rank0 else Console(quiet=True)
    finally:
        distributed.stop()


def watchdog_of_rank(config: Config, world: World) -> Watchdog:
    """Make the watchdog of this rank; torchrun's environment names the store of all ranks, and the number of this
    attempt."""
    address, port = "", 0
    if world.size > 1:  # with one rank they may be unrelated: Kubernetes sets MASTER_PORT for a service called master
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Watchdog(
        world,
        stall_seconds=config.distributed.stall_seconds,
        gone_seconds=config.distributed.timeout_seconds,
        board=open_board(world, address, port),
        name=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )

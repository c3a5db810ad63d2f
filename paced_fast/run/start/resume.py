"""Resuming a run: its checkpoint, and the settings that may differ."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from pathlib import Path

from paced_fast.config import Config, stream_seed
from paced_fast.config.resolve import resolve
from paced_fast.config.resuming import differences, remedy
from paced_fast.config.saved import load_config
from paced_fast.data.distributed import World
from paced_fast.errors import InputError
from paced_fast.run import checkpoint
from paced_fast.run.checkpoint.state import spread_tensors
from paced_fast.run.record import files
from paced_fast.run.start.run_folder import OWN_NAMES, RunLock
from paced_fast.run.step import Counters, Stepper

logger = logging.getLogger(__name__)


def continue_from(stepper: Stepper, folder: Path, newest: Path, identity: dict[str, str]) -> None:
    """Restore the state of a checkpoint, and save the settings of the resumed run."""
    world, config = stepper.world, stepper.config
    tensors, state, generators = checkpoint.load(newest, spread_tensors(stepper.trainer), world)
    with world.agreement():
        checkpoint.check_identity(state, identity, newest)
    stepper.load_state_tensors(tensors)
    stepper.counters = Counters(**state["counters"])
    if generators is None:  # there are more ranks now than wrote it
        checkpoint.seed_random_state(stream_seed(config.seed, stepper.counters.step, f"ambient/{world.rank}"))
    else:
        checkpoint.restore_random_state(generators)
    if world.is_rank0:
        files.write_json_atomic(folder / "config.json", dataclasses.asdict(config))
    step = stepper.counters.step
    logger.info("resumed after step %d from %s", step, newest)
    if step >= config.steps:
        where = shlex.quote(str(folder))
        logger.info("%s is finished after step %d: --resume %s --steps %d goes on", folder, step, where, 2 * step)


def newest_checkpoint(config: Config, folder: Path, lock: RunLock, world: World) -> Path | None:
    """Checkpoint that `--resume auto` continues from; None when nothing has been saved yet. Raises InputError rather
    than restart a damaged run."""
    began = world.is_rank0 and any((folder / name).exists() for name in OWN_NAMES)
    with world.agreement():
        if began:
            _check_same_run(config, folder)
    with world.agreement():
        if world.is_rank0 and folder.is_dir():
            lock.take(folder)
    root = folder / "checkpoints"
    newest, error = checkpoint.newest(root, world), None
    if newest is None and (found := checkpoint.folders(root)):
        error = InputError(
            f"--resume auto: every checkpoint in {root} is damaged ({found[-1].name}: "
            f"{checkpoint.verify(found[-1])}): to start over, give --resume never --run.overwrite"
        )
    world.agree(error)
    if newest is None and began:
        logger.warning("%s has no checkpoint yet, so the run starts over at step 1", folder)
    return newest


def _check_same_run(config: Config, folder: Path) -> None:
    try:
        old = resolve(load_config(folder))  # a folder older than a setting has its default, maybe `auto`
    except InputError as error:
        raise InputError(
            f"--resume auto: {folder} was trained with settings that this version refuses: {error}"
        ) from None
    if found := differences(old, config):
        raise InputError(f"--resume auto: {folder}: {remedy(folder, found)}")

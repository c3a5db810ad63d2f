"""The checkpoints of a run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from torch import Tensor

from paced_fast.policy import PolicyFiles, plain_state
from paced_fast.run import checkpoint
from paced_fast.run.start.build import PreparedRun


def make_saver(run: PreparedRun) -> checkpoint.Saver:
    """Make the saver of the run's checkpoints; the tokenizer's files are copied from those written before training."""
    initial = run.folder / "initial"
    generation = initial / "generation_config.json"
    files = PolicyFiles(run.trainer.policy.model, generation=generation.read_bytes() if generation.is_file() else None)

    def write_policy(folder: Path, state: dict[str, Tensor]) -> None:
        files.write(folder, state)
        for path in initial.iterdir():
            weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
            if not weights and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)

    settings = run.config.run
    return checkpoint.Saver(
        run.folder / "checkpoints",
        keep=settings.keep_checkpoints,
        write_policy=write_policy,
        background=settings.async_save,
        world=run.world,
    )


def save(run: PreparedRun, saver: checkpoint.Saver, *, last: bool) -> None:
    """Save a checkpoint of the run's current state; the `last` one is on disk when this returns."""
    stepper = run.stepper
    with stepper.phases.phase("checkpoint"):
        saver.save(
            stepper.counters.step,
            tensors=stepper.state_tensors(),
            model=plain_state(run.trainer.policy.model),
            state={
                "counters": dataclasses.asdict(stepper.counters),
                "identity": run.identity,
                "versions": checkpoint.versions(),
            },
            last=last,
        )

"""The initial policy of a seed: warm-started once, and then read by every arm.

It is kept in a folder named by suite, seed and settings, not by the code, so that a change elsewhere in the project
does not give a benchmark in progress another initial policy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from benchmarks.training.efficiency import arms
from benchmarks.training.efficiency.suites import Suite
from paced_fast.config import Config, digest
from paced_fast.run.start.build import build
from paced_fast.run.start.run_folder import RunLock

CACHE = Path("~/.cache/paced_fast/benchmark")
"""Default folder of initial policies."""


def folder_of(suite: Suite, seed: int, cache: Path) -> Path:
    """Folder of the initial policy of a seed."""
    config = arms.arm_config(suite, arms.BASE, rate=arms.preset_rate(suite), seed=seed)
    warm = dataclasses.replace(config.warm_start, cache_dir="")
    key = digest(config.model, warm, [config.data.template, config.data.system_prompt, config.data.template_args])
    return cache.expanduser() / f"{suite.name}-seed-{seed}-{key}"


def initial_policy(suite: Suite, seed: int, cache: Path) -> Path:
    """Return the folder of the initial policy of a seed, which is made first if it is not there.

    Two processes at once may both make it, with the same result; the first to end keeps its folder.
    """
    folder = folder_of(suite, seed, cache)
    if folder.is_dir():  # it got its name when it was complete
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = arms.arm_config(suite, arms.BASE, rate=arms.preset_rate(suite), seed=seed)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as work, RunLock() as lock:
        config = dataclasses.replace(config, run_dir=f"{work}/run")
        build(config, Console(quiet=True), lock=lock)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.move(f"{work}/run/initial", part)
        try:
            part.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(part)
    return folder


def from_folder(config: Config, folder: Path) -> Config:
    """The settings of a run that starts from the policy in `folder` instead of a warm start of its own."""
    warm = config.warm_start
    phases = {name: dataclasses.replace(getattr(warm, name), steps=0, sources=()) for name in ("first", "second")}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=str(folder)),
        warm_start=dataclasses.replace(warm, **phases),
    )


def policy_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of the names, shapes and values of a model's parameters."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]

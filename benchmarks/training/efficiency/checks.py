"""Checks of a run that show when the benchmark, or what it measures, is not what it says: cheap, in every run.

Each returns lines for the field `warnings` of the run's file, which the table repeats.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from paced_fast.config.paced import RULES
from paced_fast.data import prompts
from paced_fast.paced.trainer import Trainer
from paced_fast.run.start.build import PreparedRun

LEAST_RANK = 0.2
"""Rank correlation on the training table below which an estimate counts as belonging to other prompts."""
TAU_TOLERANCE = 0.2
"""Distance of the mean accuracy of drawn prompts from tau above which a schedule counts as aiming elsewhere."""
LEAST_GROUPS = 64
"""Groups, drawn by the schedule after its warm-up, below which their mean says nothing."""


def estimate_ranks(table: dict[str, Any] | None) -> list[str]:
    """Notice values that belong to other prompts: their rank correlation on the training table is near 0."""
    rank = None if table is None else table["whole"]["rank"]
    if rank is None or rank >= LEAST_RANK:
        return []
    return [f"the values do not rank the training prompts (rank correlation {rank:.2f}): do they belong to others?"]


def draws_near_tau(run: PreparedRun, accuracies: list[float]) -> list[str]:
    """Notice a schedule that aims at another accuracy than `scheduler.tau`, by the measured accuracies of what it drew
    after its warm-up."""
    config = run.config.scheduler
    aims = RULES[config.rule].reads_value or RULES[config.rule].counts_outcomes
    if not aims or len(accuracies) < LEAST_GROUPS:
        return []
    mean = sum(accuracies) / len(accuracies)
    if abs(mean - config.tau) <= TAU_TOLERANCE:
        return []
    return [f"the mean accuracy of the drawn prompts is {mean:.2f}, and tau is {config.tau:g}"]


def tables_apart(run: PreparedRun) -> list[str]:
    """Notice held-out prompts that are training prompts; slices beside the headline may share small problems."""
    same = prompts.overlap(run.collector.table, run.eval_table)
    headline = run.config.data.headline
    shared = same.slices.intersection(headline) if headline else same.slices
    return [f"held-out prompts of {', '.join(sorted(shared))} are in the training table"] if shared else []


class StateWatch:
    """Notices that an evaluation changes what the method knows of its prompts."""

    def __init__(self, trainer: Trainer) -> None:
        """Watch the schedule, log Z and replay of `trainer`."""
        self.trainer = trainer
        self.changed = False
        self._before = ""

    def __enter__(self) -> StateWatch:
        """An evaluation begins."""
        self._before = self._digest()
        return self

    def __exit__(self, *_: object) -> None:
        """An evaluation has ended."""
        self.changed = self.changed or self._digest() != self._before

    def warnings(self) -> list[str]:
        """A line if anything changed."""
        return ["an evaluation changed the state of schedule, log Z or replay"] if self.changed else []

    def _digest(self) -> str:
        trainer, found = self.trainer, hashlib.sha256()
        for part in (trainer.scheduler, trainer.log_z, trainer.replay):
            for name, tensor in sorted(part.state_dict().items()) if part is not None else ():
                found.update(name.encode())
                found.update(_bytes(tensor))
        return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

"""State tensors of a run: everything besides the policy's weights and the counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from paced_fast.paced.trainer import Trainer
from paced_fast.policy.optimizer import load_optimizer_tensors, optimizer_tensors
from paced_fast.run.checkpoint.tensors import below, prefixed


class Remembers(Protocol):
    """Object with a state of tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""
        ...


def state_tensors(trainer: Trainer, guards: Remembers) -> dict[str, Tensor]:
    """All state tensors of a run."""
    tensors = spread_tensors(trainer) | prefixed("scheduler", trainer.scheduler.state_dict())
    tensors |= prefixed("guards", guards.state_dict())
    if trainer.log_z is not None:
        tensors |= prefixed("log_z.head", trainer.log_z.state_dict())
        tensors |= prefixed("log_z.optimizer", optimizer_tensors(trainer.log_z.optimizer))
    if trainer.replay is not None:
        tensors |= prefixed("replay", trainer.replay.state_dict())
    return tensors


def spread_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """State tensors that may be spread over ranks; filled in place when a run is resumed."""
    return trainer.optimizer.named_state()


def load_state_tensors(trainer: Trainer, guards: Remembers, tensors: dict[str, Tensor]) -> None:
    """Restore `state_tensors()`, after those of `spread_tensors` were filled in place."""
    trainer.optimizer.publish()
    trainer.scheduler.load_state_dict(below("scheduler", tensors))
    guards.load_state_dict(below("guards", tensors))
    if trainer.log_z is not None:
        trainer.log_z.load_state_dict(below("log_z.head", tensors))
        load_optimizer_tensors(trainer.log_z.optimizer, below("log_z.optimizer", tensors))
    if trainer.replay is not None:
        trainer.replay.load_state_dict(below("replay", tensors))

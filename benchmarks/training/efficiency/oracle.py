"""Values measured instead of learned: what completions spent on the estimate alone would do for the schedule.

N = prompts in the training table.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.training.efficiency import value
from paced_fast.paced.log_z import LogZ
from paced_fast.run.start.build import PreparedRun


class MeasuredValues:
    """Takes the place of the head's values; everything else is the head's, which goes on learning."""

    def __init__(self, run: PreparedRun, samples: int) -> None:
        """`samples` completions are sampled for each prompt of the table at every measurement."""
        assert run.trainer.log_z is not None
        self.run, self.samples, self.head = run, samples, run.trainer.log_z
        self.values = torch.zeros(len(run.collector.table), device=self.head.values.device)
        self.is_windowed = False
        self.measure()

    def __getattr__(self, name: str) -> Any:
        """What the head has."""
        return getattr(self.head, name)

    def measure(self) -> None:
        """Sample every prompt of the table with the policy as it is. The rollouts are not counted."""
        draw = f"oracle/{self.run.stepper.counters.step}"
        found = value.sampled(self.run, self.run.collector.table, self.samples, draw).prompt_accuracy
        known = [0.5 if accuracy is None else accuracy for accuracy in found]
        self.values.copy_(torch.tensor(known))

    def score(self) -> Tensor:
        """Measured accuracies f32[N]."""
        return self.values

    def all_values(self) -> Tensor:
        """Measured accuracies f32[N]."""
        return self.values


def install(run: PreparedRun, samples: int) -> MeasuredValues:
    """Let the trainer of `run` read measured accuracies for its values."""
    found = MeasuredValues(run, samples)
    run.trainer.log_z = cast(LogZ, found)
    return found

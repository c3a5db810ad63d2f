"""What a step's figures may be before the run warns, and which warnings stop it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds

WarningName = Literal[
    "kl",
    "log_ratio",
    "sample_share",
    "generator_mismatch",
    "truncated",
    "reward_collapse",
    "value_gap",
    "value_stuck",
    "head_loss",
    "non_finite",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Named warnings about a step's figures; each is said when it begins to hold, and counted in metrics.jsonl."""

    max_kl: Annotated[float, Bounds(0.0, math.inf)] = 1.0
    """`kl`: largest divergence of the policy after a step from the one before, in nats a completion."""
    max_log_ratio: Annotated[float, Bounds(0.0, math.inf)] = 2.0
    """`log_ratio`: largest mean of log pi - log pi_old of a step's completions, either way, in nats."""
    min_sample_share: Annotated[float, Bounds(0.0, 1.0)] = 0.3
    """`sample_share`: least effective share of the step's completions under their importance weights."""
    max_token_ratio: Annotated[float, Bounds(1.0, math.inf)] = 1.05
    """`generator_mismatch`: largest mean of exp |log pi_trainer - log pi_generator| of a token."""
    max_truncated_share: Annotated[float, Bounds(0.0, 1.0)] = 0.9
    """`truncated`: largest share of the step's completions that were cut at the limit."""
    collapsed_reward: Annotated[float, Bounds(0.0, 1.0)] = 0.01
    """`reward_collapse`: a mean reward of so little over `patience` steps, in a run that had `healthy_reward`."""
    healthy_reward: Annotated[float, Bounds(0.0, 1.0)] = 0.1
    """`reward_collapse`: mean reward over `patience` steps from which a fall is a collapse."""
    max_value_gap: Annotated[float, Bounds(0.0, math.inf)] = 0.5
    """`value_gap`: largest difference between the mean value and the accuracy of the drawn prompts, in `patience` steps
    in a row; a head that knows nothing says one half, which is off by no more."""
    stuck_value: Annotated[float, Bounds(0.0, 0.1)] = 0.01
    """`value_stuck`: the drawn prompts' values all within this of 0, or of 1, in `patience` steps in a row, while the
    accuracy is ten times as far from it."""
    max_head_loss_growth: Annotated[float, Bounds(1.0, math.inf)] = 10.0
    """`head_loss`: largest ratio of log Z's loss to its median over the last 20 steps, for a loss above 1."""
    patience: Annotated[int, Bounds(1, 10**4)] = 5
    """Steps over which the slow warnings look."""
    repeat_every: Annotated[int, Bounds(1, 10**9)] = 50
    """Steps after which a warning that still holds is said again."""
    stop_on: tuple[WarningName, ...] = ()
    """Warnings that stop the run (exit status 3) when they begin to hold."""

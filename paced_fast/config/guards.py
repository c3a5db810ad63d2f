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
    "no_signal",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Named warnings about a step's figures; each is logged when it first holds, and counted in metrics.jsonl."""

    max_kl: Annotated[float, Bounds(0.0, math.inf)] = 1.0
    """`kl`: warn if the policy diverges from the policy before the step by more than this, in nats per completion."""
    max_log_ratio: Annotated[float, Bounds(0.0, math.inf)] = 2.0
    """`log_ratio`: warn if the absolute mean of log pi - log pi_old over a step's completions is above this, in
    nats."""
    min_sample_share: Annotated[float, Bounds(0.0, 1.0)] = 0.3
    """`sample_share`: warn if the effective sample size under the importance weights, as a share of the step's
    completions, is below this."""
    max_token_ratio: Annotated[float, Bounds(1.0, math.inf)] = 1.05
    """`generator_mismatch`: warn if the mean over tokens of exp |log pi_trainer - log pi_generator| is above this."""
    max_truncated_share: Annotated[float, Bounds(0.0, 1.0)] = 0.9
    """`truncated`: warn if a larger share of the step's completions was cut at the length limit."""
    collapsed_reward: Annotated[float, Bounds(0.0, 1.0)] = 0.01
    """`reward_collapse`: warn if the mean reward over `patience` steps falls to this or less, after it had reached
    `healthy_reward`."""
    healthy_reward: Annotated[float, Bounds(0.0, 1.0)] = 0.1
    """`reward_collapse`: mean reward over `patience` steps that a run must have reached before a fall counts."""
    max_value_gap: Annotated[float, Bounds(0.0, math.inf)] = 0.5
    """`value_gap`: warn if the drawn prompts' mean value differs from their accuracy by more than this in `patience`
    steps in a row. An untrained head predicts 0.5 and so stays within 0.5."""
    stuck_value: Annotated[float, Bounds(0.0, 0.1)] = 0.01
    """`value_stuck`: warn if all drawn prompts' values lie within this distance of 0, or of 1, in `patience` steps in a
    row, while the accuracy is at least ten times as far away."""
    max_head_loss_growth: Annotated[float, Bounds(1.0, math.inf)] = 10.0
    """`head_loss`: warn if log Z's loss is above 1 and above its median over the last 20 steps times this."""
    patience: Annotated[int, Bounds(1, 10**4)] = 5
    """Number of steps over which `reward_collapse`, `value_gap`, `value_stuck` and `no_signal` are judged. `no_signal`:
    warn if none of them has a mixed group, one with right and wrong completions; not with groups of one."""
    repeat_every: Annotated[int, Bounds(1, 10**9)] = 50
    """Steps after which a warning that holds is logged again, whether or not it held in between."""
    stop_on: tuple[WarningName, ...] = ()
    """Warnings that stop the run (exit status 3) in a step in which they hold."""

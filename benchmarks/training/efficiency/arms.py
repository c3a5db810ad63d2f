"""Arms of the comparison: algorithms and schedules, as changes to the settings of a suite's preset."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from benchmarks.training.efficiency.suites import Suite
from paced_fast.config import Config, flatten
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError

BASE = "grpo"
"""Arm that the others are compared with; its training time is the time budget."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the comparison."""

    title: str
    """Name in tables and curves."""
    words: str
    """What it does, with its paper."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the preset's, by dotted name."""
    group_size: int = 8
    """Completions for each prompt; a step has as many rollouts as one of the preset, in more or fewer prompts."""
    by_oracle: bool = False
    """Whether the schedule reads measured accuracies: no competitor, as their rollouts are not counted."""


ARMS: dict[str, Arm] = {
    "grpo": Arm(title="GRPO", words="uniform prompts (arXiv 2402.03300)", changes={"algorithm": "grpo"}),
    "grpo_groups_of_4": Arm(
        title="GRPO, groups of 4",
        words="twice the prompts a step, half the completions of each",
        changes={"algorithm": "grpo"},
        group_size=4,
    ),
    "dynamic": Arm(
        title="GRPO, dynamic sampling",
        words="groups that are all right or all wrong are dropped and counted (DAPO, arXiv 2503.14476)",
        changes={"algorithm": "grpo", "scheduler.rule": "dynamic"},
    ),
    "history": Arm(
        title="GRPO, group-variance history",
        words="prompts in proportion to p (1 - p) of their last measured accuracy p",
        changes={"algorithm": "grpo", "scheduler.rule": "history"},
    ),
    "mopps": Arm(
        title="MoPPS",
        words="GRPO on the P prompts for which a draw from a Beta posterior of past outcomes is nearest to one half, "
        "of 16 P drawn uniformly (arXiv 2507.04632; half of the old counts is forgotten at each visit)",
        changes={
            "algorithm": "grpo",
            "scheduler.rule": "mopps",
            "scheduler.pool_factor": 16,
            "scheduler.tau": 0.5,
        },
    ),
    "pcl": Arm(
        title="PCL",
        words="GRPO on the P prompts nearest to one half, by a value model fitted to group means with squared error, "
        "of 4 P drawn uniformly (arXiv 2510.01135; the value model is our head on the prompt's embedding)",
        changes={
            "algorithm": "grpo",
            "scheduler.rule": "greedy",
            "scheduler.pool_factor": 4,
            "scheduler.exploration": 0.0,
            "scheduler.tau": 0.5,
            "log_z.loss": "tb",
            "log_z.memory": "off",
            # GRPO's loss does not read beta. The head's target, reward - beta * log ratio, then is the reward.
            "loss.beta": 1e-6,
        },
    ),
    "gflowrl": Arm(
        title="GFlowRL",
        words="trajectory balance with the group's mean reward for beta * log Z, uniform prompts (arXiv 2607.13394)",
        changes={"algorithm": "tb_group"},
    ),
    "flowrl": Arm(
        title="FlowRL",
        words="FlowRL's loss with a learned log Z, uniform prompts (arXiv 2509.15207)",
        changes={"algorithm": "flowrl"},
    ),
    "paced_paper": Arm(
        title="PACED-RL, the paper's pair",
        words="learned log Z by the trajectory-balance residual, the prompts nearest to tau in a pool, replay by the "
        "error of the estimate (arXiv 2602.12642)",
        changes={"algorithm": "paced_paper", "scheduler.exploration": 0.0},
    ),
    "groups_of_4": Arm(
        title="PACED-RL, groups of 4",
        words="log Z learned with a memory of past groups, the prompts nearest to tau in a pool",
        changes={"algorithm": "paced", "replay.mode": "off"},
        group_size=4,
    ),
    "selection": Arm(
        title="PACED-RL, groups of 8",
        words="the same, half the prompts a step and groups as large as those of the other arms",
        changes={"algorithm": "paced", "replay.mode": "off"},
    ),
    "paced": Arm(
        title="PACED-RL with replay",
        words="in groups of 8, and replay by the error of the estimate",
        changes={"algorithm": "paced", "replay.mode": "on"},
    ),
    "replay": Arm(
        title="replay alone",
        words="as PACED-RL with replay, but uniform prompts",
        changes={"algorithm": "paced", "scheduler.rule": "uniform", "replay.mode": "on"},
    ),
    "oracle": Arm(
        title="measured values",
        words="as PACED-RL, but the value is the accuracy of every prompt, measured anew at intervals with rollouts "
        "that are not counted, and prompts are drawn by a bell around tau",
        changes={"algorithm": "paced", "scheduler.rule": "tree", "replay.mode": "off"},
        by_oracle=True,
    ),
}
"""Every arm by its name."""


def chosen(names: tuple[str, ...]) -> list[str]:
    """Return the arms of a comparison, `BASE` first, in the order of `ARMS`. Raises InputError for an unknown one."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise InputError(f"unknown arm {unknown[0]!r}: the arms are {', '.join(ARMS)}")
    return [name for name in ARMS if name == BASE or name in names]


def preset_rate(suite: Suite) -> float:
    """Learning rate of the suite's preset."""
    return suite.config().optimizer.learning_rate


def arm_config(suite: Suite, arm: str, *, rate: float, seed: int) -> Config:
    """Resolved settings of one run; the warm start is that of the suite's preset with the run's seed."""
    config = suite.config()
    group_size = min(ARMS[arm].group_size, config.rollouts_per_step // config.optimizer.minibatches)
    groups = {
        "generation.group_size": group_size,
        "generation.prompts_per_step": config.rollouts_per_step // group_size,
    }
    for key, value in {**ARMS[arm].changes, **groups, "optimizer.learning_rate": rate}.items():
        config = _replace(config, key, value)
    return resolve(
        dataclasses.replace(
            config,
            seed=seed,
            steps=suite.budget_steps,
            warm_start=dataclasses.replace(config.warm_start, seed=seed),
            run=dataclasses.replace(config.run, threads=1, report=False, rollouts_per_step=0),
        )
    )


def changed_settings(suite: Suite, config: Config) -> dict[str, Any]:
    """Every setting of a run that differs from the resolved preset's, by dotted name, without paths."""
    base = flatten(resolve(suite.config()))
    return {
        name: value
        for name, value in flatten(config).items()
        if base[name] != value and name not in ("run_dir", "warm_start.seed", "seed") and not name.startswith("run.")
    }


def _replace(config: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    inner = _replace(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})

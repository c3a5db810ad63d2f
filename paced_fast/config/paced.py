"""Settings of the method: algorithm, loss, log Z, schedule, replay; and what each algorithm and schedule asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds

Algorithm = Literal["paced", "tb", "tb_group", "flowrl", "grpo"]
Rule = Literal["auto", "tree", "greedy", "history", "uniform", "dynamic"]
Intercept = Literal["value", "group_mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """Needs and defaults of an algorithm."""

    rule: Rule = "uniform"
    """Meaning of `scheduler.rule` auto."""
    replay: Literal["on", "off"] = "off"
    """Meaning of `replay.mode` auto."""
    intercepts: tuple[Intercept, ...]
    """Values that `loss.intercept` may have; the first is the meaning of auto."""
    compares_groups: bool = False
    """Whether the signal of a completion depends on the other completions of its group."""
    keeps_initial_policy: bool = False
    """Whether the reference is the policy before training, not the policy before the step."""
    value_is_accuracy: bool = True
    """Whether the head, where there is one, predicts accuracy."""

    @property
    def may_replay(self) -> bool:
        """Whether completions can be replayed: they come without their group, ranked by the error of an accuracy."""
        return self.value_is_accuracy and not self.compares_groups


ALGORITHMS: dict[Algorithm, Traits] = {
    "paced": Traits(rule="tree", replay="on", intercepts=("value", "group_mean")),
    "tb": Traits(intercepts=("value", "group_mean")),
    "tb_group": Traits(intercepts=("group_mean",)),
    "flowrl": Traits(intercepts=("value",), compares_groups=True, keeps_initial_policy=True, value_is_accuracy=False),
    "grpo": Traits(intercepts=("group_mean",), compares_groups=True),
}
"""Every algorithm; its loss is in `paced.losses`, what it regresses on in `paced.algorithms`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTraits:
    """Needs of a schedule."""

    reads_value: bool = False
    """Whether it draws by the learned value; before there is one it draws uniformly."""
    explores_by_age: bool = False
    """Whether `scheduler.explore` age has a meaning."""
    mixed_groups_only: bool = False
    """Whether groups that are all right or all wrong are dropped, and prompts drawn in their place."""


RULES: dict[str, RuleTraits] = {
    "tree": RuleTraits(reads_value=True, explores_by_age=True),
    "greedy": RuleTraits(reads_value=True),
    "history": RuleTraits(explores_by_age=True),
    "uniform": RuleTraits(),
    "dynamic": RuleTraits(mixed_groups_only=True),
}
"""Every schedule; `paced.scheduler` has its draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The policy's loss."""

    beta: Annotated[float, Bounds(1e-6, 1e6)] = 0.05
    """Weight of the squared log-ratio against the reward: the residual uses reward / beta."""
    intercept: Literal["auto", "value", "group_mean"] = "auto"
    """What stands for beta * log Z in the policy's loss: the learned value (paper) or the group's mean reward."""
    importance_cap: Annotated[float, Bounds(1e-6, math.inf)] = 1.28
    """Upper bound of the detached weight exp(log pi - log pi_old) of a sequence."""
    grpo_clip: Annotated[float, Bounds(1e-6, 1.0)] = 0.2
    """Half width of the ratio clip of `grpo`."""
    flowrl_reward_scale: Annotated[float, Bounds(0.0, 1e6)] = 15.0
    """`flowrl`: factor of the group-normalised reward (an inverse temperature)."""
    flowrl_importance_cap: Annotated[float, Bounds(1e-6, math.inf)] = 10.0
    """`flowrl`: upper bound of the sequence weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogZConfig:
    """The head that predicts value = beta * log Z, the policy's accuracy on a prompt."""

    loss: Literal["auto", "tb", "bce"] = "auto"
    """`tb`: squared trajectory-balance residual in reward units (paper); `bce`: cross-entropy on raw correctness."""
    learning_rate: Annotated[float, Bounds(0.0, 1.0)] = 1e-3
    """AdamW learning rate of the head."""
    hidden_size: Annotated[int, Bounds(1, 10**6)] = 128
    """Width of the head's two hidden layers."""
    max_grad_norm: Annotated[float, Bounds(1e-12, math.inf)] = 1.0
    """Gradient norm bound of the head, apart from the policy's."""
    updates_per_step: Annotated[int, Bounds(1, 10**6)] = 1
    """Gradient steps on each batch of fresh groups."""
    cache_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type in which the prompts' embeddings are kept; the head computes in float32."""
    scored_per_step: Annotated[int, Bounds(0, 10**9)] = 0
    """Prompts whose value is brought up to date in a step, in turn; 0 for all. The drawn ones always are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Which prompts come next."""

    rule: Rule = "auto"
    """`tree` (weights peak at tau), `greedy` (nearest tau in a pool), `history` (past group variance), `uniform`,
    or `dynamic` (DAPO: draw uniformly, drop groups that are all right or all wrong, draw again)."""
    tau: Annotated[float, Bounds(0.0, 1.0)] = 0.5
    """Accuracy that training aims at."""
    bandwidth: Annotated[float, Bounds(1e-3, 1e6)] = 0.1
    """Width of the bell around tau in the `tree` rule."""
    exploration: Annotated[float, Bounds(0.0, 1.0)] = 0.1
    """Share of draws that ignores the estimate."""
    explore: Literal["uniform", "age"] = "uniform"
    """Whom that share goes to (`tree` and `history`): every prompt alike, or by the steps since its last visit."""
    max_visits: Annotated[int, Bounds(0, 10**9)] = 0
    """Most draws of a prompt within an epoch, which is as many whole batches as the prompts make; 0 for no limit."""
    warmup_steps: Annotated[int, Bounds(0, 10**9)] = 5
    """First steps, drawn uniformly."""
    pool_factor: Annotated[int, Bounds(1, 10**6)] = 8
    """`greedy`: size of the random pool, in batches."""
    max_resamples: Annotated[int, Bounds(1, 10**6)] = 10
    """`dynamic`: rounds of drawing for one batch before it is taken as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Replay of correct completions, those with the largest error of the estimate first."""

    mode: Literal["auto", "on", "off"] = "auto"
    """Whether completions are replayed."""
    keep: Literal["correct", "all"] = "correct"
    """Which completions may enter: correct ones, or failures too, which `importance` needs."""
    capacity: Annotated[int, Bounds(1, 10**9)] = 128
    """Completions kept; the oldest leaves first."""
    insert_per_step: Annotated[int, Bounds(1, 10**9)] = 64
    """At most so many completions enter in a step, those of the largest priority."""
    priority: Literal["error", "z"] = "error"
    """`error`: |group accuracy - value| (paper); `z`: that over its standard deviation if the value were right."""
    draw_per_step: Annotated[int, Bounds(1, 10**9)] = 64
    """Completions added to each step's batch."""
    max_age: Annotated[int, Bounds(1, 10**9)] = 4
    """Completions sampled more steps ago are not drawn."""
    half_life: Annotated[float, Bounds(0.0, math.inf)] = 0.0
    """Steps after which a completion is drawn half as often; 0 for no decay."""
    prioritized: bool = False
    """Draw in proportion to the refreshed priority (true) or evenly (false)."""
    importance: bool = False
    """Weigh replayed completions by pi_old / pi_sampled, scaled to a mean of 1. Needs `keep all`; what enters and what
    is drawn is then chosen without regard to rewards, or no weight could make up for the choice."""
    trains_log_z: bool = False
    """Whether the head learns from replayed completions too; correct ones alone bias it upwards."""

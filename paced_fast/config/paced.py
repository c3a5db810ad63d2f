"""Settings of the method: algorithm, loss, log Z, schedule, replay; and what each algorithm and schedule asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds

Algorithm = Literal["paced", "paced_paper", "tb", "tb_group", "flowrl", "grpo"]
Rule = Literal["auto", "tree", "greedy", "mopps", "history", "uniform", "dynamic"]
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
    remembers: bool = True
    """Meaning of `log_z.memory` auto."""
    keeps_initial_policy: bool = False
    """Whether the reference is the policy before training, not the policy before the step."""
    value_is_accuracy: bool = True
    """Whether the head, where there is one, predicts accuracy."""

    @property
    def may_replay(self) -> bool:
        """Whether completions can be replayed: they come without their group, ranked by the error of an accuracy."""
        return self.value_is_accuracy and not self.compares_groups


ALGORITHMS: dict[Algorithm, Traits] = {
    "paced": Traits(rule="greedy", intercepts=("value", "group_mean")),
    "paced_paper": Traits(rule="greedy", replay="on", intercepts=("value",), remembers=False),
    "tb": Traits(intercepts=("value", "group_mean")),
    "tb_group": Traits(intercepts=("group_mean",)),
    "flowrl": Traits(
        intercepts=("value",), compares_groups=True, remembers=False, keeps_initial_policy=True, value_is_accuracy=False
    ),
    "grpo": Traits(intercepts=("group_mean",), compares_groups=True),
}
"""Every algorithm; its loss is in `paced.losses`, what it regresses on in `paced.targets`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTraits:
    """Needs of a schedule."""

    reads_value: bool = False
    """Whether it draws by the learned value; before there is one it draws uniformly."""
    mixed_groups_only: bool = False
    """Whether groups that are all right or all wrong are dropped, and prompts drawn in their place."""
    counts_outcomes: bool = False
    """Whether it keeps a distribution of each prompt's accuracy by its outcomes."""


RULES: dict[str, RuleTraits] = {
    "tree": RuleTraits(reads_value=True),
    "greedy": RuleTraits(reads_value=True),
    "mopps": RuleTraits(counts_outcomes=True),
    "history": RuleTraits(),
    "uniform": RuleTraits(),
    "dynamic": RuleTraits(mixed_groups_only=True),
}
"""Every schedule; `paced.scheduler` has its draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The policy's loss."""

    beta: Annotated[float, Bounds(1e-6, 1e6)] = 0.05
    """Weight of staying near the old policy, relative to the reward: the residual is log Z + log-ratio -
    reward / beta."""
    intercept: Literal["auto", "value", "group_mean"] = "auto"
    """Estimate of beta * log Z in the policy's loss: `value` (the learned value, as in the paper), `group_mean` (the
    group's mean reward), or `auto`: the algorithm's own."""
    importance_cap: Annotated[float, Bounds(1e-6, math.inf)] = 1.28
    """Upper bound of a sequence's importance weight exp(log pi - log pi_old), through which no gradient flows."""
    skipped_share: Annotated[float, Bounds(0.0, 0.5)] = 0.0
    """Largest share of the gradient of the logits that the vocabulary head's products may leave out, 0 for none; saves
    time with a peaked policy. At 0.001953125 (2^-9) the errors' bound is that of rounding to bfloat16."""
    grpo_clip: Annotated[float, Bounds(1e-6, 1.0)] = 0.2
    """`grpo`: token ratios are clipped to the range from 1 - this to 1 + this."""
    flowrl_reward_scale: Annotated[float, Bounds(0.0, 1e6)] = 15.0
    """`flowrl`: factor of the group-normalised reward (its 1 / beta)."""
    flowrl_importance_cap: Annotated[float, Bounds(1e-6, math.inf)] = 10.0
    """`flowrl`: upper bound of a sequence's importance weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogZConfig:
    """The estimate of value = beta * log Z, the policy's accuracy on a prompt."""

    loss: Literal["auto", "tb", "bce"] = "auto"
    """Loss of the head: `tb` (squared trajectory-balance residual in reward units, as in the paper), `bce` (binary
    cross-entropy on correctness), or `auto`: bce with `memory` on, else tb."""
    learning_rate: Annotated[float, Bounds(0.0, 1.0)] = 1e-3
    """AdamW learning rate of the head."""
    hidden_size: Annotated[int, Bounds(1, 10**6)] = 128
    """Width of the head's two hidden layers."""
    max_grad_norm: Annotated[float, Bounds(1e-12, math.inf)] = 1.0
    """Gradient norm to which the head's gradient is scaled down, separate from the policy's."""
    memory: Literal["auto", "on", "off"] = "auto"
    """`on`: fit the head to past groups as well, and combine its prediction with the prompt's own outcomes; `off`: the
    head alone, fitted to the groups of each step (as in the paper); `auto`: off for paced_paper and flowrl, else on."""
    updates_per_step: Annotated[int, Bounds(0, 10**6)] = 0
    """Gradient steps of the head on each batch of fresh groups; 0: 4 with `memory` on, 1 with it off."""
    past_groups: Annotated[int, Bounds(1, 10**9)] = 4096
    """Capacity of the memory in groups; the oldest group leaves first."""
    past_per_fresh: Annotated[int, Bounds(1, 10**6)] = 4
    """Past groups per fresh group in each gradient step of the head."""
    prior: Annotated[float, Bounds(1e-3, 1e9)] = 8.0
    """Weight of the head's prediction beside a prompt's own outcomes, in completions."""
    decay: Annotated[float, Bounds(0.0, 1.0)] = 0.97
    """Factor by which the weight of a prompt's own outcomes shrinks per step."""
    embedding: Literal["auto", "mean", "mean_and_last"] = "auto"
    """Input of the head: the mean of the prompt's last-layer states, or that and the state of its last token; `auto`:
    mean with `memory` off, else both."""
    cache_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the cached prompt embeddings; the head computes in float32."""
    scored_per_step: Annotated[int, Bounds(0, 10**9)] = 0
    """Number of prompts whose value is recomputed per step, in turn, besides the pool of the draw and the batch; 0: all
    of a table of up to 65,536 prompts, and so many of a larger one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Choice of the next prompts."""

    rule: Rule = "auto"
    """How prompts are drawn: `tree` (weight highest where the value is near tau), `greedy` (values nearest to tau in a
    random pool), `mopps` (draws from a Beta posterior of past outcomes nearest to tau in a random pool), `history`
    (weight by the variance of past groups), `uniform`, `dynamic` (as in DAPO: draw uniformly, drop groups that are all
    right or all wrong, draw again), or `auto`: the algorithm's own rule."""
    tau: Annotated[float, Bounds(0.0, 1.0)] = 0.5
    """Target accuracy: prompts with a predicted accuracy near it are drawn most often."""
    bandwidth: Annotated[float, Bounds(1e-3, 1e6)] = 0.1
    """Width of the bell around tau in the `tree` rule."""
    exploration: Annotated[float, Bounds(0.0, 1.0)] = 0.1
    """Share of draws that are made without regard to the estimated accuracy."""
    max_visits: Annotated[int, Bounds(0, 10**9)] = 0
    """Maximum number of draws per prompt and epoch, where an epoch is the number of whole batches that the prompts
    fill; 0: no limit."""
    warmup_steps: Annotated[int, Bounds(0, 10**9)] = 5
    """Number of first steps in which prompts are drawn uniformly."""
    pool_factor: Annotated[int, Bounds(1, 10**6)] = 8
    """`greedy` and `mopps`: size of the random pool of candidates, in batches of prompts."""
    max_resamples: Annotated[int, Bounds(1, 10**6)] = 10
    """`dynamic`: maximum number of draws per batch; after the last one the batch is used as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Replay of correct completions, first those whose predicted accuracy was furthest off."""

    mode: Literal["auto", "on", "off"] = "auto"
    """Whether completions are replayed; `auto`: the algorithm's default."""
    capacity: Annotated[int, Bounds(1, 10**9)] = 64
    """Maximum number of completions in the buffer; the oldest is removed first."""
    insert_per_step: Annotated[int, Bounds(1, 10**9)] = 32
    """Maximum number of completions that enter per step, those of highest priority: |group accuracy - value|, as in the
    paper."""
    draw_per_step: Annotated[int, Bounds(1, 10**9)] = 32
    """Maximum number of replayed completions added to each step's batch. Those of a prompt are drawn together, because
    they share its forward pass."""
    max_age: Annotated[int, Bounds(1, 10**9)] = 4
    """Maximum age of a replayed completion, in steps since it was sampled."""

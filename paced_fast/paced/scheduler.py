"""Prompt scheduling: weights from the estimated accuracy, drawn with the priority tree.

Statistics, weights and draws are tensors of fixed shape on the device. Every draw is a function of (seed, step, round),
so a resumed run draws what the uninterrupted one would have, and so does every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.config import SchedulerConfig, stream_seed
from paced_fast.config.paced import RULES
from paced_fast.paced.posterior import BetaPosterior
from paced_kernels import Bell, PriorityTree

# Offset of the random stream for later draws within a step; above the number of steps of any run.
_ROUND = 2**40


@dataclass(frozen=True, slots=True)
class Draw:
    """What a rule is asked for."""

    count: int  # prompts, at most N
    now: Tensor  # i64[], the step
    round_: int
    is_warmup: Tensor  # bool[]
    tau: float
    values: Tensor | None  # f32[N]; None for a rule that does not read them
    refresh: Callable[[Tensor], None] | None  # computes the `values` of prompts i64[K] anew
    allowed: Tensor | None  # bool[N]; None for all

    def estimates(self, pool: Tensor | None = None) -> Tensor:
        """Values f32[N] of all prompts, or newly computed f32[K] of a `pool` i64[K]; tau during the warm-up."""
        assert self.values is not None
        values = self.values
        if pool is not None:
            if self.refresh is not None:
                self.refresh(pool)
            values = values[pool]
        return torch.where(self.is_warmup, self.tau, values)


class PromptScheduler:
    """Draws distinct prompts by one of the rules in `DRAWS`. N = prompts in the table, P = prompts drawn in a step."""

    def __init__(self, num_prompts: int, config: SchedulerConfig, *, seed: int, device: torch.device) -> None:
        """Schedule `num_prompts` prompts; `seed` fixes every draw."""
        self.config, self.num_prompts = config, num_prompts
        self.tree = PriorityTree(num_prompts, seed=stream_seed(seed, 0, "schedule"), device=device)
        self.bell = Bell(config.tau, config.bandwidth)
        self.last_accuracy = torch.full((num_prompts,), 0.5, device=device)
        self.visits = torch.zeros(num_prompts, dtype=torch.int64, device=device)
        self.epoch_draws = torch.zeros(num_prompts, dtype=torch.int64, device=device)
        self.posterior: BetaPosterior | None = None
        if RULES[config.rule].counts_outcomes:
            self.posterior = BetaPosterior(num_prompts, seed=seed, device=device)

    def draw(
        self,
        count: int,
        step: int | Tensor,
        values: Tensor | None,
        round_: int = 0,
        refresh: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Draw `count` distinct prompts i64[count]; `values` f32[N] are the estimated accuracies of all prompts.

        `step` counts from 1, on the host or as i64[] on the device. `round_` numbers repeated draws within one step
        (`dynamic`). With `count` above N prompts repeat, evenly. A rule that reads the values of a pool only has
        `refresh` compute them anew, in place, for these prompts i64[K].
        """
        now = self._now(step)
        if count > self.num_prompts:
            return self._repeated(count, now, round_)
        allowed, is_warmup = self._allowed(count), now <= self.config.warmup_steps
        rule = self.config.rule
        if RULES[rule].reads_value and values is None:
            rule = "uniform"
        index = DRAWS[rule](self, Draw(count, now, round_, is_warmup, self.config.tau, values, refresh, allowed))
        if self.config.max_visits:
            self.epoch_draws.index_add_(0, index, torch.ones_like(index))
        return index

    def race(self, draw: Draw) -> Tensor:
        """Draw by the tree's weights, but for the share that explores."""
        return self._race(self.tree, draw.count, draw.now, draw.round_, exploration=self.config.exploration)

    @staticmethod
    def _race(tree: PriorityTree, count: int, now: Tensor, round_: int, *, exploration: float = 0.0) -> Tensor:
        """Draw by a tree's weights, without replacement even when a few prompts carry nearly all the weight."""
        tree.step.copy_(now + round_ * _ROUND)  # the draw belongs to the step, not to the number of draws before
        return tree.sample_distinct(count, "race", exploration=exploration).idx

    def _uniform(self, count: int, now: Tensor, round_: int, allowed: Tensor | None) -> Tensor:
        if allowed is None:
            return self._race(self._even, count, now, round_)
        self.tree.rebuild(torch.ones_like(self.last_accuracy), allowed=allowed)
        return self._race(self.tree, count, now, round_)

    @functools.cached_property
    def _even(self) -> PriorityTree:
        """Tree of equal weights, written once, with the random numbers of `tree`."""
        even = PriorityTree(self.num_prompts, seed=0, device=self.tree.device)
        even.seed.copy_(self.tree.seed)
        even.stream.copy_(self.tree.stream)
        even.rebuild(torch.ones_like(self.last_accuracy))
        return even

    def _repeated(self, count: int, now: Tensor, round_: int) -> Tensor:
        """Repeat the whole table, each time in another random order."""
        passes = -(-count // self.num_prompts)
        orders = [self._uniform(self.num_prompts, now, round_ * passes + k, None) for k in range(passes)]
        return torch.cat(orders)[:count]

    def _allowed(self, count: int) -> Tensor | None:
        """Prompts bool[N] that this epoch has not drawn `max_visits` times; None when there is no limit.

        An epoch is N draws. When it has no room for `count` more, the next one begins.
        """
        if not self.config.max_visits:
            return None
        is_over = self.epoch_draws.sum() + count > self.num_prompts
        self.epoch_draws.mul_((~is_over).long())
        return self.epoch_draws < self.config.max_visits

    def observe(self, prompt_index: Tensor, accuracy: Tensor, scored: Tensor | None = None) -> None:
        """Record the measured group accuracy f32[P] of prompts i64[P].

        `scored` i64[P] are the completions that it is the mean of: without any it is not known. None stands for one
        each.
        """
        if self.posterior is not None:
            count = torch.ones_like(accuracy) if scored is None else scored.to(accuracy.dtype)
            share = accuracy.clamp(0.0, 1.0)
            self.posterior.observe(prompt_index, share * count, (1.0 - share) * count)
        if scored is not None:
            accuracy = torch.where(scored > 0, accuracy, self.last_accuracy[prompt_index])
        self.last_accuracy[prompt_index] = accuracy
        self.visits.index_add_(0, prompt_index, torch.ones_like(prompt_index))

    def _now(self, step: int | Tensor) -> Tensor:
        return step if isinstance(step, Tensor) else torch.full((), step, device=self.visits.device)

    def state_dict(self) -> dict[str, Tensor]:
        """State of the scheduler, as tensors."""
        tree = {f"tree.{name}": value for name, value in self.tree.state_dict().items()}
        return {**tree, **self._statistics()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`; what an older version saved beside it is left aside."""
        self.tree.load_state_dict({k.removeprefix("tree."): v for k, v in state.items() if k.startswith("tree.")})
        self.__dict__.pop("_even", None)  # it has the seed of before
        for name, tensor in self._statistics().items():
            tensor.copy_(state[name])

    def _statistics(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("last_accuracy", "visits", "epoch_draws")}
        if self.posterior is not None:
            found |= {"posterior.alpha": self.posterior.alpha, "posterior.beta": self.posterior.beta}
        return found

    def pool(self, draw: Draw) -> Tensor:
        """`pool_factor` batches of prompts i64[pool] in random order; ends in -1 where fewer are allowed."""
        size = min(self.num_prompts, max(draw.count, self.config.pool_factor * draw.count))
        return self._uniform(size, draw.now, draw.round_, draw.allowed)

    def nearest(self, pool: Tensor, values: Tensor) -> Tensor:
        """Positions i64[pool] in the order of distance from tau, given the values f[pool]."""
        distance = torch.where(pool >= 0, (values - self.config.tau).abs(), torch.inf)
        return distance.argsort(stable=True)


def near_tau(scheduler: PromptScheduler, draw: Draw) -> Tensor:
    """`tree`: the weight of a prompt is a bell around tau of its value; a share of the draws explores."""
    scheduler.tree.rebuild(scheduler.bell, draw.estimates(), allowed=draw.allowed)
    return scheduler.race(draw)


def nearest_of_pool(scheduler: PromptScheduler, draw: Draw) -> Tensor:
    """`greedy`: the prompts nearest tau in a random pool (the rule of the paper); the same share explores the rest."""
    count, pool = draw.count, scheduler.pool(draw)
    explore = min(round(scheduler.config.exploration * count), count)
    values = draw.estimates(pool.clamp(min=0))
    is_known = (pool >= 0) & ~values.isnan()
    order = is_known.long().argsort(descending=True, stable=True)  # no prompt is drawn whose value is NaN
    pool, values = torch.where(is_known, pool, -1)[order], values[order]
    nearest = scheduler.nearest(pool, values)
    chosen, rest = nearest[: count - explore], nearest[count - explore :]
    # The pool is in random order, so its first members among the rest are a uniform draw.
    return torch.cat([pool[chosen], pool[rest.sort().values[:explore]]])


def nearest_by_chance(scheduler: PromptScheduler, draw: Draw) -> Tensor:
    """`mopps`: of a random pool the prompts for which a draw from the posterior of their accuracy is nearest tau."""
    assert scheduler.posterior is not None
    pool = scheduler.pool(draw)
    values = scheduler.posterior.draw(pool.clamp(min=0), draw.now + draw.round_ * _ROUND)
    return pool[scheduler.nearest(pool, values)[: draw.count]]


def mixed_before(scheduler: PromptScheduler, draw: Draw) -> Tensor:
    """`history`: weight p (1 - p) of the last measured group accuracy p, one quarter while unseen; same share."""
    accuracy = torch.where(draw.is_warmup, 0.5, scheduler.last_accuracy)
    # Every prompt keeps a small weight, so an old measurement cannot exclude it for good.
    weight = (accuracy * (1 - accuracy) * 4).clamp(min=2.0**-27)
    scheduler.tree.rebuild(weight, allowed=draw.allowed)
    return scheduler.race(draw)


def evenly(scheduler: PromptScheduler, draw: Draw) -> Tensor:
    """`uniform`, and `dynamic`, which differs in what the trainer does with the groups."""
    return scheduler._uniform(draw.count, draw.now, draw.round_, draw.allowed)


DRAWS: dict[str, Callable[[PromptScheduler, Draw], Tensor]] = {
    "tree": near_tau,
    "greedy": nearest_of_pool,
    "mopps": nearest_by_chance,
    "history": mixed_before,
    "uniform": evenly,
    "dynamic": evenly,
}
"""The draw of each rule: distinct prompts, i64[count]."""

"""Which prompts come next: weights from the estimated accuracy, drawn through the priority tree.

Every draw is a function of (seed, step, stream), so a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paced_fast.config import SchedulerConfig, stream_seed
from paced_kernels import PriorityTree


class PromptScheduler:
    """Draws distinct prompts. N = prompts in the table, P = prompts drawn in a step.

    `tree`: weight of a prompt = bell around tau of its value, mixed with a uniform share (exploration).
    `greedy`: the prompts nearest tau in a random pool (the rule of the paper), plus the uniform share.
    `history`: weight p (1 - p) of the last measured group accuracy p, one quarter while unseen; same mixture.
    `uniform` and `dynamic`: uniform; `dynamic` differs in what the trainer does with the groups.
    """

    def __init__(self, num_prompts: int, config: SchedulerConfig, *, seed: int, device: torch.device) -> None:
        """A scheduler over `num_prompts` prompts; `seed` fixes every draw."""
        self.config, self.seed, self.num_prompts = config, seed, num_prompts
        self.tree = PriorityTree(num_prompts, seed=stream_seed(seed, 0, "schedule"), device=device)
        self.last_accuracy = torch.full((num_prompts,), 0.5, device=device)
        self.visits = torch.zeros(num_prompts, dtype=torch.int64, device=device)

    def draw(self, count: int, step: int, values: Tensor | None, round_: int = 0) -> Tensor:
        """`count` distinct prompts i64[count]; `values` f32[N] is the estimate of every prompt's accuracy.

        `round_` numbers repeated draws within one step (`dynamic`). With `count` above N prompts repeat.
        """
        rule = self.config.rule
        learned = rule in ("tree", "greedy")
        blind = rule in ("uniform", "dynamic") or step <= self.config.warmup_steps or (learned and values is None)
        if blind or count > self.num_prompts:
            return self._uniform(count, step, f"uniform/{round_}")
        if rule == "greedy":
            assert values is not None
            return self._nearest(count, step, values)
        if rule == "history":
            weight = self.last_accuracy * (1 - self.last_accuracy) * 4
        else:
            assert values is not None
            weight = torch.exp(-0.5 * ((values - self.config.tau) / self.config.bandwidth).square())
        self.tree.rebuild(self._mixture(weight))
        self.tree.step.fill_(step)  # the draw belongs to the step, not to the number of draws before it
        # A race finds `count` prompts even when a few of them carry nearly all the weight.
        return self.tree.sample_distinct(count, method="race").idx

    def _mixture(self, weight: Tensor) -> Tensor:
        """`weight` mixed with the uniform distribution so that exploration is its share of all draws, largest 1.

        No prompt gets less than the tree's smallest weight, so there are always enough to draw.
        """
        share = self.config.exploration
        total = weight.sum().clamp(min=1e-30)
        mixed = (1 - share) * weight / total + share / self.num_prompts
        return (mixed / mixed.max().clamp(min=1e-30)).clamp(min=2.0**-27)

    def _uniform(self, count: int, step: int, stream: str) -> Tensor:
        """Distinct while the table lasts, then again from its start in another order."""
        source = torch.Generator().manual_seed(stream_seed(self.seed, step, stream))
        orders = [torch.randperm(self.num_prompts, generator=source) for _ in range(-(-count // self.num_prompts))]
        return torch.cat(orders)[:count].to(self.last_accuracy.device)

    def _nearest(self, count: int, step: int, values: Tensor) -> Tensor:
        pool_size = min(self.num_prompts, max(count, self.config.pool_factor * count))
        pool = self._uniform(pool_size, step, "pool")
        explore = min(round(self.config.exploration * count), count)
        nearest = (values[pool] - self.config.tau).abs().argsort(stable=True)
        chosen, rest = nearest[: count - explore], nearest[count - explore :]
        # The pool is in random order, so its first members among the rest are a uniform draw.
        return torch.cat([pool[chosen], pool[rest.sort().values[:explore]]])

    def observe(self, prompt_index: Tensor, accuracy: Tensor) -> None:
        """Record the measured group accuracy f32[P] of prompts i64[P]."""
        self.last_accuracy[prompt_index] = accuracy
        self.visits.index_add_(0, prompt_index, torch.ones_like(prompt_index))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        tree = {f"tree.{name}": value for name, value in self.tree.state_dict().items()}
        return {**tree, "last_accuracy": self.last_accuracy, "visits": self.visits}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.tree.load_state_dict({k.removeprefix("tree."): v for k, v in state.items() if k.startswith("tree.")})
        self.last_accuracy.copy_(state["last_accuracy"])
        self.visits.copy_(state["visits"])

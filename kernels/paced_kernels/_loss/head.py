"""Projection to the vocabulary as the row engines use it, and its split over ranks.

T = packed tokens, H = hidden size, V = rows of the weight (of this rank's shard, where the vocabulary is split).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """Weight, bias, temperature, and the position of the weight's rows in the vocabulary."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    group: Any = None  # ProcessGroup of a split vocabulary
    start: int = 0  # id of the first row

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of log-probs and of sums: float64 for a float64 head, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def num_ranks(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def owned_targets(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local index of each token [R] (0 if another rank owns it) and whether this rank owns it [R]."""
        local = token_ids.long() - self.start
        is_owned = (local >= 0) & (local < self.weight.shape[0])
        return torch.where(is_owned, local, 0), is_owned

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """All-reduce in place; the value itself where the vocabulary is whole."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """All-reduce in place; the value itself where the vocabulary is whole."""
        if self.group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def stack_ranks(self, value: Tensor) -> Tensor:
        """Return [ranks, *shape], the values of all ranks in rank order; equal on every rank."""
        if self.group is None:
            return value[None]
        ranks = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(ranks, value, group=self.group)
        return torch.stack(ranks)

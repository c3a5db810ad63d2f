"""Launches of the tree's kernels on the state of a `PriorityTree`.

N = capacity, B = elements of a call.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from . import _tree_kernels as kernels
from ._tree_reference import MODES
from ._triton_rows import launch

UPDATE_BLOCK = 256
SAMPLE_BLOCK = 32
SAMPLE_WARPS = 4
# Entries of the highest stored level, which a draw adds up itself: one tile of 32 x 32.
TOP_ENTRIES = 1024


class TritonTree:
    """Leaves are the tree's; sums of every level and the tickets are kept here."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf
        counts = level_counts(leaf.shape[0])
        self.num_levels = len(counts)
        self.sums = torch.zeros(sum(counts), dtype=torch.int64, device=leaf.device)
        # Levels above the second are added up by atomics, on zeros.
        self._upper = self.sums[sum(counts[:2]) :]
        self._top = self.sums[sum(counts[:-1]) :]
        self.tickets = torch.zeros(2, dtype=torch.int32, device=leaf.device)

    def total(self) -> Tensor:
        """Sum of all weights, i64 []."""
        return self._top.sum()

    def rebuild(self, weights: Tensor, status: Tensor) -> None:
        """All leaves and sums from weights [N], in one pass."""
        self._upper.zero_()
        block = kernels.FANOUT.value**2
        launch(
            kernels.tree_rebuild_kernel,
            (triton.cdiv(self.leaf.shape[0], block),),
            weights_ptr=weights,
            leaf_ptr=self.leaf,
            sums_ptr=self.sums,
            status_ptr=status,
            capacity=self.leaf.shape[0],
            NUM_LEVELS=self.num_levels,
            IS_FLOAT=weights.is_floating_point(),
        )

    def update(self, idx: Tensor, weights: Tensor, sequence: Tensor, status: Tensor) -> None:
        """Leaves `idx` [B], or the range that starts at `idx` if that is one integer without a dimension."""
        launch(
            kernels.tree_update_kernel,
            (triton.cdiv(weights.shape[0], UPDATE_BLOCK),),
            idx_ptr=idx,
            weights_ptr=weights,
            leaf_ptr=self.leaf,
            sums_ptr=self.sums,
            sequence_ptr=sequence,
            ticket_ptr=self.tickets,
            status_ptr=status,
            capacity=self.leaf.shape[0],
            num_elements=weights.shape[0],
            NUM_LEVELS=self.num_levels,
            IS_FLOAT=weights.is_floating_point(),
            HAS_INDEX=idx.ndim == 1,
            BLOCK=UPDATE_BLOCK,
        )

    def sample(self, num_draws: int, mode: str, state: dict[str, Tensor], status: Tensor) -> tuple[Any, ...]:
        """Indices, weights, probabilities [B] and the total []; advances the step in `state`."""
        device = self.leaf.device
        idx, q = torch.empty(2, num_draws, dtype=torch.int64, device=device)
        prob = torch.empty(num_draws, dtype=torch.float32, device=device)
        total = torch.empty((), dtype=torch.int64, device=device)
        launch(
            kernels.tree_sample_kernel,
            (max(1, triton.cdiv(num_draws, SAMPLE_BLOCK)),),
            leaf_ptr=self.leaf,
            sums_ptr=self.sums,
            seed_ptr=state["seed"],
            stream_ptr=state["stream"],
            step_ptr=state["step"],
            size_ptr=state["size"],
            ticket_ptr=self.tickets[1:],
            status_ptr=status,
            idx_ptr=idx,
            q_ptr=q,
            prob_ptr=prob,
            total_ptr=total,
            capacity=self.leaf.shape[0],
            num_draws=num_draws,
            NUM_LEVELS=self.num_levels,
            MODE=MODES.index(mode),
            BLOCK=SAMPLE_BLOCK,
            num_warps=SAMPLE_WARPS,
        )
        return idx, q, prob, total

    def is_sound(self) -> Tensor:
        """Whether every sum is that of its children, bool []."""
        below = self.leaf & kernels.WEIGHT_MASK.value
        sound = torch.ones((), dtype=torch.bool, device=below.device)
        start = 0
        for count in level_counts(self.leaf.shape[0]):
            padded = torch.nn.functional.pad(below, (0, count * 32 - below.shape[0]))
            below = self.sums[start : start + count]
            sound &= (padded.view(count, 32).sum(1) == below).all()
            start += count
        return sound


def level_counts(capacity: int) -> list[int]:
    """Entries of each stored level, from level 1 to a top of at most 1024."""
    counts = [triton.cdiv(capacity, 32)]
    while counts[-1] > TOP_ENTRIES:
        counts.append(triton.cdiv(counts[-1], 32))
    return counts

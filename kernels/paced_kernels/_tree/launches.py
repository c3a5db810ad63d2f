"""Launches of the tree's kernels on the state of a `PriorityTree`.

N = capacity, B = elements per call.
"""

import struct
from typing import Any

import torch
import triton
from torch import Tensor

from .._grid import launch
from . import kernels
from .arithmetic import MODES, Bell, index_mask_of

UPDATE_BLOCK = 256
RACE_BLOCK = 1024
SAMPLE_BLOCK = 32
SAMPLE_WARPS = 4
# Most entries of the highest stored level; each draw sums them itself, as one tile of 32 x 32.
TOP_ENTRIES = 1024


class TritonTree:
    """Sums of every level, and tickets; the leaves belong to the `PriorityTree`."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf
        counts = level_counts(leaf.shape[0])
        self.num_levels = len(counts)
        self.sums = torch.zeros(sum(counts), dtype=torch.int64, device=leaf.device)
        # Levels above the second are summed by atomics and must start at 0.
        self._upper = self.sums[sum(counts[:2]) :]
        self._top = self.sums[sum(counts[:-1]) :]
        self.tickets = torch.zeros(2, dtype=torch.int32, device=leaf.device)

    def total(self) -> Tensor:
        """Sum of all weights, i64 []."""
        return self._top.sum()

    def rebuild(self, weights: Tensor, status: Tensor, *, bell: Bell | None, allowed: Tensor | None) -> None:
        """Set all leaves and sums from weights [N], or from statistics [N] and a bell, in one pass."""
        self._upper.zero_()
        block = kernels.FANOUT.value**2
        launch(
            kernels.tree_rebuild_kernel,
            (triton.cdiv(self.leaf.shape[0], block),),
            weights_ptr=weights,
            allowed_ptr=self.leaf if allowed is None else allowed,
            leaf_ptr=self.leaf,
            sums_ptr=self.sums,
            status_ptr=status,
            capacity=self.leaf.shape[0],
            center_bits=0 if bell is None else float64_bits(bell.center),
            width_bits=0 if bell is None else float64_bits(bell.width),
            NUM_LEVELS=self.num_levels,
            IS_FLOAT=weights.is_floating_point(),
            IS_BELL=bell is not None,
            HAS_ALLOWED=allowed is not None,
            enable_fp_fusion=False,
        )

    def race(self, state: dict[str, Tensor], status: Tensor, *, exploration: float) -> tuple[Tensor, Tensor]:
        """Return keys i64 [N] of a race, and the total []; counts an empty tree and does not advance the step."""
        device, capacity = self.leaf.device, self.leaf.shape[0]
        keys = torch.empty(capacity, dtype=torch.int64, device=device)
        total = torch.empty((), dtype=torch.int64, device=device)
        is_mixed = exploration > 0.0
        num_live = total  # not read
        if is_mixed:
            q = self.leaf & kernels.WEIGHT_MASK.value
            # An empty tree uses its live prefix, every leaf of which counts as positive.
            is_live = torch.where(self.total() == 0, torch.arange(capacity, device=device) < state["size"], q > 0)
            num_live = is_live.sum()
        launch(
            kernels.tree_race_kernel,
            (triton.cdiv(capacity, RACE_BLOCK),),
            leaf_ptr=self.leaf,
            sums_ptr=self.sums,
            seed_ptr=state["seed"],
            stream_ptr=state["stream"],
            step_ptr=state["step"],
            size_ptr=state["size"],
            ticket_ptr=self.tickets[1:],
            status_ptr=status,
            num_live_ptr=num_live,
            keys_ptr=keys,
            total_ptr=total,
            capacity=capacity,
            index_mask=index_mask_of(capacity),
            exploration_bits=float64_bits(exploration),
            NUM_LEVELS=self.num_levels,
            IS_MIXED=is_mixed,
            BLOCK=RACE_BLOCK,
            enable_fp_fusion=False,
        )
        return keys, total

    def update(self, idx: Tensor, weights: Tensor, sequence: Tensor, status: Tensor) -> None:
        """Set leaves `idx` [B], or the range that starts at `idx` if that is 0-d."""
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
        """Return indices, weights and probabilities [B], and the total []; advances the step in `state`."""
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
        """Return whether every sum equals that of its children, bool []."""
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


def float64_bits(value: float) -> int:
    """Return the bits of a float64 as a signed 64-bit integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]

"""Sums of the leaves on a CPU, in two levels: prefix sums of rows of leaves for few draws, of all leaves for many.

A write of B leaves makes at most B rows stale, which the next draw sums again. It goes through those rows and the sums
of N / ROW rows, and not through N leaves; then it searches the rows' sums, and the leaves of the row it found.

N = capacity, R = rows of leaves, B = elements per call.
"""

import torch
from torch import Tensor

from .arithmetic import WEIGHT_MASK
from .bits import HOST_BLOCK

ROW = 32
# Draws of at most one leaf in so many, of a tree of at least so many, go by rows; else all sums cost less than rows do.
_FEW, _MANY = 256, 2**17
_ROWS_OF_BLOCK = HOST_BLOCK // ROW


def leaves(capacity: int) -> Tensor:
    """Return i64[N] of zeros, with memory of zeros to the end of its last row."""
    return torch.zeros(-(-capacity // ROW) * ROW, dtype=torch.int64)[:capacity]


class HostSums:
    """Sums of rows and of leaves, each made when a draw asks for them, and kept until a write."""

    def __init__(self, leaf: Tensor) -> None:
        """Sum the leaves i64[N] of `leaves`; of other tensors, whose last row may end too early, leaf by leaf."""
        self._leaf = leaf
        rows = -(-leaf.shape[0] // ROW)
        room = leaf.untyped_storage().nbytes() // leaf.element_size() - leaf.storage_offset()
        # i64[R, ROW]; few leaves are summed whole
        self._table = leaf.as_strided((rows, ROW), (ROW, 1)) if leaf.shape[0] >= _MANY and room >= rows * ROW else None
        self._has_sequences = True
        self._is_all_stale = True
        self._stale: list[Tensor] = []  # rows written since their sums were made, if not all are stale
        self._num_stale = 0
        # Sums of rows i64[R] and prefix sums of those i64[R], from the first few draws on.
        self._of_rows: tuple[Tensor, Tensor] | None = None
        self._are_rows_summed = False
        self._prefix: Tensor | None = None  # i64[N], from the first many draws on
        self._is_prefix_summed = False

    def nbytes(self) -> int:
        """Return the bytes of the sums."""
        held = (*(self._of_rows or ()), self._prefix)
        return sum(array.nbytes for array in held if array is not None)

    def wrote_all(self, *, has_sequences: bool) -> None:
        """Note that any leaf may have changed; `has_sequences`: some hold more than their weight."""
        self._has_sequences = has_sequences
        self._is_all_stale, self._stale, self._num_stale = True, [], 0
        self._are_rows_summed = self._is_prefix_summed = False

    def wrote(self, idx: Tensor) -> None:
        """Note that the leaves idx i64[B], all inside, have changed."""
        if self._notes(idx.shape[0]):
            self._stale.append(idx.long() >> ROW.bit_length() - 1)

    def wrote_range(self, start: int, stop: int) -> None:
        """Note that the leaves from `start` to before `stop`, all inside, have changed."""
        first, behind = start // ROW, -(-stop // ROW)
        if start < stop and self._notes(behind - first):
            self._stale.append(torch.arange(first, behind))

    def _notes(self, num_rows: int) -> bool:
        """Return whether the rows of a write are to be noted; past half of all, sums of all are as cheap."""
        self._has_sequences = True
        self._are_rows_summed = self._is_prefix_summed = False
        self._num_stale += num_rows
        if self._table is None or 2 * self._num_stale > self._table.shape[0]:
            self._is_all_stale = True
            self._stale = []
        return not self._is_all_stale

    def find_in(self, num_draws: int) -> Tensor:
        """Return the inclusive prefix sums that `find` of `num_draws` targets searches, read only; the last is all."""
        return self._ends() if self._takes_rows(num_draws) else self._prefix_sums()

    def find(self, targets: Tensor) -> Tensor:
        """Return `arithmetic.select(q, targets)` for targets i64[B] in [0, total), after `find_in` of B."""
        if not self._takes_rows(targets.shape[0]):
            return torch.searchsorted(self._prefix_sums(), targets, right=True)
        if targets.shape[0] <= _ROWS_OF_BLOCK:
            return self._find_by_rows(targets)
        return torch.cat([self._find_by_rows(part) for part in targets.split(_ROWS_OF_BLOCK)])

    def _takes_rows(self, num_draws: int) -> bool:
        return self._table is not None and num_draws * _FEW <= self._leaf.shape[0]

    def _find_by_rows(self, targets: Tensor) -> Tensor:
        assert self._of_rows is not None
        row_sums, row_ends = self._of_rows
        row = torch.searchsorted(row_ends, targets, right=True)
        # What is left of a target inside its row.
        rest = row_sums.index_select(0, row).sub_(row_ends.index_select(0, row)).add_(targets)
        inside = self._weights_of(row).cumsum_(1)
        return torch.searchsorted(inside, rest.unsqueeze(1), right=True).squeeze(1).add_(row.mul_(ROW))

    def _weights_of(self, rows: Tensor) -> Tensor:
        """Return the weights i64[K, ROW] of rows i64[K]."""
        assert self._table is not None
        taken = self._table.index_select(0, rows)
        return taken.bitwise_and_(WEIGHT_MASK) if self._has_sequences else taken

    def _ends(self) -> Tensor:
        assert self._table is not None
        if self._of_rows is None:
            self._of_rows = (self._leaf.new_empty(len(self._table)), self._leaf.new_empty(len(self._table)))
        row_sums, row_ends = self._of_rows
        if self._are_rows_summed:
            return row_ends
        if self._is_all_stale:
            for part, sums in zip(self._table.split(_ROWS_OF_BLOCK), row_sums.split(_ROWS_OF_BLOCK), strict=True):
                torch.sum(part & WEIGHT_MASK if self._has_sequences else part, 1, out=sums)
        elif self._stale:
            for rows in (self._stale[0] if len(self._stale) == 1 else torch.cat(self._stale)).split(_ROWS_OF_BLOCK):
                row_sums.index_copy_(0, rows, self._weights_of(rows).sum(1))
        self._is_all_stale, self._stale, self._num_stale = False, [], 0
        torch.cumsum(row_sums, 0, out=row_ends)
        self._are_rows_summed = True
        return row_ends

    def _prefix_sums(self) -> Tensor:
        whole = self._prefix = torch.empty_like(self._leaf) if self._prefix is None else self._prefix
        if self._is_prefix_summed:
            return whole
        if not self._has_sequences:
            torch.cumsum(self._leaf, 0, out=whole)
        elif self._table is None:
            torch.bitwise_and(self._leaf, WEIGHT_MASK, out=whole).cumsum_(0)
        else:
            before = None
            for leaf, prefix in zip(self._leaf.split(HOST_BLOCK), whole.split(HOST_BLOCK), strict=True):
                torch.bitwise_and(leaf, WEIGHT_MASK, out=prefix)
                if before is not None:
                    prefix[0].add_(before)
                before = prefix.cumsum_(0)[-1]
        self._is_prefix_summed = True
        return whole

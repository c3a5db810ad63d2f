"""The tree's writes and draws on a CPU: the bits of `arithmetic`, `exact` and `bits`, many times as fast.

Work goes through blocks that stay in the cache, in place, and with scalars where a value is one for all leaves. What
few leaves need is computed for few: the formula of a bell where torch's exp2 comes near the edge between two integers,
logarithms of a race (`host_race`) for leaves that can win.

N = capacity, B = elements per call.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .arithmetic import ONE, SCALE_BITS, WEIGHT_BITS, WEIGHT_MASK, Bell, quantise
from .bits import HOST_BLOCK, HostBits, host_bits, host_start, multiply_high_of
from .exact import LOG2_E
from .host_race import race

BLOCK = HOST_BLOCK
# A float64 from 2^52 on is an integer: adding 2^52 rounds, ties to even, and leaves the integer in the lower bits.
_ROUNDER = 2.0**52
_ROUNDER_BITS = 0x433 << 52
_LEAST = 1.0 / ONE
# Elements whose places fit beside the weights in the lower 52 bits.
_MAX_WRITTEN = 2**23 - 1
# Far above what exp2, its argument and the bell's own formula are off by, together below 3e-7 of an integer.
_EDGE = 0.5 - 2.0**-20


Sampled = tuple[Tensor, Tensor]


def blocks(num: int) -> Iterator[slice]:
    """Yield slices of at most `BLOCK` that cover 0..num-1."""
    for start in range(0, num, BLOCK):
        yield slice(start, min(start + BLOCK, num))


class HostTree:
    """Sums and scratch memory of a tree on a CPU; the leaves belong to the `PriorityTree`."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf
        self.is_summed = False  # whether `_prefix` holds the sums of the leaves as they are
        self._prefix: Tensor | None = None  # i64[N], from the first draw on
        self._places = torch.empty(0, dtype=torch.float64)
        self._rows = torch.empty(2, min(leaf.shape[0], BLOCK), dtype=torch.float64)
        self._bits = HostBits(leaf.shape[0])
        # log2 of the largest weight.
        self._top = torch.tensor(float(SCALE_BITS), dtype=torch.float64)

    def nbytes(self) -> int:
        """Return the bytes held between calls, without the leaves."""
        held = (self._places, self._rows, *self._bits.arrays)
        return self.leaf.nbytes + sum(array.nbytes for array in held)

    def write(self, idx: Tensor, w: Tensor, sequence: int) -> bool:
        """Write leaves `idx` [B], or the range from a 0-d `idx`, if all are inside and valid; return whether they are.

        `sequence` is the number of elements written before.
        """
        self.is_summed = False
        num, capacity = w.shape[0], self.leaf.shape[0]
        if not 0 < num <= _MAX_WRITTEN or not w.is_floating_point():
            return False
        least, most = map(float, w.aminmax())  # NaN if there is one
        if not (least >= 0.0 and most <= 1.0):
            return False
        if idx.ndim == 1:
            first, last = idx.aminmax()
            if int(first) < 0 or int(last) >= capacity:
                return False
        if least < _LEAST:
            w = _at_least(w, least, _LEAST)
        if self._places.shape[0] != num:
            self._places = torch.arange(1, num + 1).mul_(1 << WEIGHT_BITS).double().add_(_ROUNDER)
        rounded = torch.add(self._places, w, alpha=ONE)
        codes = rounded.view(torch.int64).add_((sequence << WEIGHT_BITS) - _ROUNDER_BITS)
        if idx.ndim == 1:
            self.leaf.scatter_reduce_(0, idx.long(), codes, "amax")  # the largest code is the last in the call
            return True
        start = int(idx) % capacity
        before_end = self.leaf[start : start + num]
        before_end.copy_(codes[: before_end.shape[0]])
        self.leaf[: num - before_end.shape[0]].copy_(codes[before_end.shape[0] :])
        return True

    def rebuild(
        self,
        source: Tensor,  # [N], weights or the bell's statistics
        bell: Bell | None,
        allowed: Tensor | None,  # bool[N]
        counts: Tensor,  # i64[3], added to
    ) -> None:
        """Write quantised weights as `Bell` and `quantise` make them."""
        self.is_summed = False
        for block in blocks(source.shape[0]):
            given, leaf = source[block], self.leaf[block]
            mask = None if allowed is None else allowed[block]
            rows = self._rows[:, : given.shape[0]]
            if bell is None:
                if mask is not None:
                    given = torch.where(mask, given, 0)
                is_done = _quantise_valid(given, rows, leaf)
            else:
                is_done = _shape_valid(given, bell, rows, self._top, leaf)
                if is_done and mask is not None:
                    leaf.mul_(mask)
            if not is_done:
                made = given if bell is None else bell(given)
                q, found = quantise(made if mask is None else torch.where(mask, made, 0))
                leaf.copy_(q)
                counts += found

    def prefix_sums(self) -> Tensor:
        """Inclusive prefix sums of the weights, i64[N], read only; made anew after a write."""
        if self._prefix is None:
            self._prefix = torch.empty_like(self.leaf)
        if not self.is_summed:
            torch.bitwise_and(self.leaf, WEIGHT_MASK, out=self._prefix).cumsum_(0)
            self.is_summed = True
        return self._prefix

    def sample(self, num_draws: int, mode: str, *, seed: Tensor, stream: Tensor, step: Tensor) -> Sampled | None:
        """Return indices [B] as `arithmetic.select` of `arithmetic.draw_targets` has them, and the total [].

        None if that is 0.
        """
        prefix = self.prefix_sums()
        sum_q = prefix[-1].clone()
        total, divisor = int(sum_q), max(num_draws, 1)
        if total == 0:
            return None
        start = host_start(seed=seed, stream=stream, step=step)
        if mode == "iid":
            targets = multiply_high_of(self._bits.first(start, num_draws), total, total)
            return torch.searchsorted(prefix, targets, right=True), sum_q
        quotient, remainder = divmod(total, divisor)
        if mode == "systematic":
            samples = torch.arange(num_draws)
            offset = host_bits(0, start) * total >> 64
            targets = (samples * remainder).add_(offset).div_(divisor, rounding_mode="floor")
            targets.add_(samples.mul_(quotient))
        else:
            edges = torch.arange(num_draws + 1)
            carried = (edges * remainder).div_(divisor, rounding_mode="floor")
            edges.mul_(quotient).add_(carried)
            targets = multiply_high_of(self._bits.first(start, num_draws), edges[1:] - edges[:-1], quotient + 1)
            targets.add_(edges[:-1])
        return torch.searchsorted(prefix, targets, right=True), sum_q

    def race(
        self,
        q: Tensor,  # [N]
        sum_q: Tensor,  # []
        num_draws: int,
        *,
        seed: Tensor,
        stream: Tensor,
        step: Tensor,
        exploration: float,
    ) -> Tensor:
        """Return `race_winners(race_keys(q, ...), num_draws)`, [B]."""
        start = host_start(seed=seed, stream=stream, step=step)
        return race(q, int(sum_q), num_draws, self._bits, start, exploration)

    def weights_of(self, idx: Tensor, total: Tensor, *, is_whole: bool) -> tuple[Tensor, Tensor]:
        """Return the weights i64[B] of leaves, and their shares f32[B] of a positive total; 0 for an index of -1.

        `is_whole`: no index is -1.
        """
        q = self.leaf.index_select(0, idx if is_whole else idx.clamp(min=0)).bitwise_and_(WEIGHT_MASK)
        if not is_whole:
            q.mul_(idx >= 0)
        return q, q.double().div_(float(total)).float()


def _at_least(w: Tensor, least: float, unit: float) -> Tensor:
    """Raise positive weights below `unit` to it; the least of all decides whether there are zeros, which stay."""
    return w.clamp(min=unit) if least > 0.0 else torch.maximum(w, w.sign().mul_(unit))


def _quantise_valid(weights: Tensor, rows: Tensor, out: Tensor) -> bool:
    """Write the fixed-point weights where all are valid; return whether they are."""
    if weights.shape[0] == 0:
        return True
    least, most = weights.aminmax()
    if not weights.is_floating_point():
        if int(least) < 0 or int(most) > ONE:
            return False
        out.copy_(weights)
        return True
    if not (float(least) >= 0.0 and float(most) <= 1.0):  # NaN if there is one
        return False
    scaled = rows[0].copy_(weights).mul_(ONE)
    if float(least) < _LEAST:
        scaled = _at_least(scaled, float(least), 1.0)
    _integers(scaled, rows[1], out)
    return True


def _integers(scaled: Tensor, rounded: Tensor, out: Tensor) -> None:
    """Write float64 from 0 to 2^51, rounded, ties to even, to `rounded` with 2^52 above, and as integers to `out`."""
    torch.add(scaled, _ROUNDER, out=rounded)
    torch.bitwise_and(rounded.view(torch.int64), 2**52 - 1, out=out)


def _shape_valid(statistics: Tensor, bell: Bell, rows: Tensor, top: Tensor, out: Tensor) -> bool:
    """Write the bell's fixed-point weights where no statistic is NaN; return whether none is."""
    if statistics.shape[0] == 0:
        return True
    scaled, rounded = rows
    scaled.copy_(statistics).sub_(bell.center).mul_((0.5 * LOG2_E) ** 0.5 / bell.width)
    torch.addcmul(top, scaled, scaled, value=-1.0, out=scaled).exp2_().clamp_(min=1.0)
    _integers(scaled, rounded, out)
    off = rounded.sub_(_ROUNDER).sub_(scaled)
    least, most = map(float, off.aminmax())
    if least != least:
        return False
    if max(-least, most) > _EDGE:
        near = (off.abs_() > _EDGE).nonzero()[:, 0]
        out[near] = quantise(bell(statistics[near]))[0]
    return True

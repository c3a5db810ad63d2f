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
from .host_sums import HostSums

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
        self.sums = HostSums(leaf)
        self._places = torch.empty(0, dtype=torch.float64)
        self._rows = torch.empty(2, min(leaf.shape[0], BLOCK), dtype=torch.float64)
        self._bits = HostBits(leaf.shape[0])
        # log2 of the largest weight.
        self._top = torch.tensor(float(SCALE_BITS), dtype=torch.float64)

    def nbytes(self) -> int:
        """Return the bytes held between calls, without the leaves."""
        held = (self._places, self._rows, *self._bits.arrays)
        return self.sums.nbytes() + sum(array.nbytes for array in held)

    def write(self, idx: Tensor, w: Tensor, sequence: int) -> bool:
        """Write leaves `idx` [B], or the range from a 0-d `idx`, if all are inside and valid; return whether they are.

        `sequence` is the number of elements written before. Where not all are, the caller writes.
        """
        codes = self._codes(idx, w, sequence)
        if codes is None:
            self.sums.wrote_all(has_sequences=True)
        elif idx.ndim == 1:
            self.leaf.scatter_reduce_(0, idx.long(), codes, "amax")  # the largest code is the last in the call
            self.sums.wrote(idx)
        else:
            start = int(idx) % self.leaf.shape[0]
            before_end = self.leaf[start : start + w.shape[0]]
            before_end.copy_(codes[: before_end.shape[0]])
            after_start = self.leaf[: w.shape[0] - before_end.shape[0]]
            after_start.copy_(codes[before_end.shape[0] :])
            self.sums.wrote_range(start, start + before_end.shape[0])
            self.sums.wrote_range(0, after_start.shape[0])
        return codes is not None

    def _codes(self, idx: Tensor, w: Tensor, sequence: int) -> Tensor | None:
        """Return what the leaves become, i64[B]; None unless all are inside and valid."""
        num = w.shape[0]
        if not 0 < num <= _MAX_WRITTEN or not w.is_floating_point():
            return None
        least, most = map(float, w.aminmax())  # NaN if there is one
        if not (least >= 0.0 and most <= 1.0):
            return None
        if idx.ndim == 1:
            first, last = idx.aminmax()
            if int(first) < 0 or int(last) >= self.leaf.shape[0]:
                return None
        if least < _LEAST:
            w = _at_least(w, least, _LEAST)
        if self._places.shape[0] != num:
            self._places = torch.arange(1, num + 1).mul_(1 << WEIGHT_BITS).double().add_(_ROUNDER)
        rounded = torch.add(self._places, w, alpha=ONE)
        return rounded.view(torch.int64).add_((sequence << WEIGHT_BITS) - _ROUNDER_BITS)

    def rebuild(
        self,
        source: Tensor,  # [N], weights or the bell's statistics
        bell: Bell | None,
        allowed: Tensor | None,  # bool[N]
        counts: Tensor,  # i64[3], added to
    ) -> None:
        """Write quantised weights as `Bell` and `quantise` make them."""
        self.sums.wrote_all(has_sequences=False)
        least = None if bell is not None or allowed is not None else _least_if_valid(source)
        if least is not None:
            _quantise_valid(source, least, self._rows, self.leaf)
            return
        for block in blocks(source.shape[0]):
            given, leaf = source[block], self.leaf[block]
            mask = None if allowed is None else allowed[block]
            if bell is None:
                given = given if mask is None else torch.where(mask, given, 0)
                least = _least_if_valid(given)
                if least is not None:
                    _quantise_valid(given, least, self._rows, leaf)
                    continue
            elif _shape_valid(given, bell, self._rows[:, : given.shape[0]], self._top, leaf):
                if mask is not None:
                    leaf.mul_(mask)
                continue
            made = given if bell is None else bell(given)
            q, found = quantise(made if mask is None else torch.where(mask, made, 0))
            leaf.copy_(q)
            counts += found

    def sample(self, num_draws: int, mode: str, *, seed: Tensor, stream: Tensor, step: Tensor) -> Sampled | None:
        """Return indices [B] as `arithmetic.select` of `arithmetic.draw_targets` has them, and the total [].

        None if that is 0.
        """
        sum_q = self.sums.find_in(num_draws)[-1].clone()
        total, divisor = int(sum_q), max(num_draws, 1)
        if total == 0:
            return None
        start = host_start(seed=seed, stream=stream, step=step)
        if mode == "iid":
            targets = multiply_high_of(self._bits.first(start, num_draws), total, total)
            return self.sums.find(targets), sum_q
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
        return self.sums.find(targets), sum_q

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


def _least_if_valid(weights: Tensor) -> float | None:
    """Return the least of some weights; None if one of them is not valid."""
    least, most = map(float, weights.aminmax())  # NaN if there is one
    return least if least >= 0 and most <= (1 if weights.is_floating_point() else ONE) else None


def _quantise_valid(weights: Tensor, least: float, rows: Tensor, out: Tensor) -> None:
    """Write the fixed-point weights of valid ones, of which none is below `least`."""
    if not weights.is_floating_point():
        out.copy_(weights)
    elif weights.dtype == torch.float64:
        for block in blocks(weights.shape[0]):
            given = weights[block]
            scaled, spare = rows[:, : given.shape[0]]
            _raise(torch.mul(given, ONE, out=scaled), given, least, spare)
            _integers(scaled, spare, out[block])
    else:
        # Twice as many fit into a register and into `rows`. Products with 2^27 are exact, and most of them integers.
        size = min(2 * rows.shape[1], weights.shape[0])
        scaled, spare = rows.view(torch.float32).view(2, -1)[:, :size]
        for given, leaf in zip(weights.split(size), out.split(size), strict=True):
            if given.shape[0] < size:
                scaled, spare = scaled[: given.shape[0]], spare[: given.shape[0]]
            given = given if given.dtype == torch.float32 else spare.copy_(given)
            _raise(torch.mul(given, ONE, out=scaled).round_(), given, least, spare)
            leaf.copy_(spare.view(torch.int32).copy_(scaled))


def _raise(scaled: Tensor, weights: Tensor, least: float, spare: Tensor) -> None:
    """Raise what positive weights became to 1; where none is below `least`. `spare` may be `weights` themselves."""
    if 0.0 < least < _LEAST:
        scaled.clamp_(min=1.0)
    elif least == 0.0:
        torch.maximum(scaled, torch.sign(weights, out=spare), out=scaled)


def _integers(scaled: Tensor, rounded: Tensor, out: Tensor) -> None:
    """Write float64 from 0 to 2^51, rounded, ties to even, to `rounded` with 2^52 above, and as integers to `out`."""
    torch.add(scaled, _ROUNDER, out=rounded)
    torch.bitwise_and(rounded.view(torch.int64), 2**52 - 1, out=out)


def _shape_valid(statistics: Tensor, bell: Bell, rows: Tensor, top: Tensor, out: Tensor) -> bool:
    """Write the bell's fixed-point weights where no statistic is NaN; return whether none is."""
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

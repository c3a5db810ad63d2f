"""A race on a CPU: the winners of `arithmetic.race_keys`, with logarithms for the few leaves that can win.

A key is -log(u) / p, and -log(u) is never below 1 - u. Leaves whose 1 - u is above p times a limit have keys above the
limit, so a limit with at least B keys below it spares all others. Such a limit is known beforehand, but for chance:
the number of keys below L is sum(1 - exp(-L p)) on average, which is at least L sum p - L^2 sum p^2 / 2. Where L max p
is small, one comparison of the bits with a number comes first. The keys found say whether they were enough; if not,
all leaves take part.

torch's logarithm orders the keys, unless two are so near that its last bits, or the index in those of a key, could
matter; then the formula of the keys does.

N = capacity, B = draws, K = leaves that can win.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import NO_KEY, index_mask_of
from .bits import HOST_BLOCK, HostBits, unit_interval
from .exact import log_of_unit

# 1 - u is exact, and a logarithm, a quotient and a limit are off by a few units in the last place.
_MARGIN = 1.0 + 1e-12
# Largest L max p for which one number is worth a comparison: beyond, it spares too few.
_FEW = 0.125
# 2^63 without the bits of a word that `HostBits.unfinished` leaves open, and without what float64 cuts off.
_NEARLY_ALL = float(2**63 - 2**33 - 2**13)


class _Chances:
    """What leaves are drawn by: q, or the mixture with even chances, in the operations of `race_keys`."""

    def __init__(self, q: Tensor, sum_q: int, exploration: float) -> None:
        least, most = map(int, q.aminmax())
        self.q, self.exploration = q, exploration
        self.num_live = q.shape[0] if least > 0 else int(q.count_nonzero())
        self.even = 1.0 / max(self.num_live, 1) * exploration
        self.sum_q = max(sum_q, 1)
        # p is about slope * q + even.
        self.slope = (1.0 - exploration) / self.sum_q if exploration > 0.0 else 1.0
        self.sum_p = 1.0 if exploration > 0.0 else float(self.sum_q)
        self.most = self.slope * most + self.even

    def sum_of_squares(self) -> float:
        """Return the sum of all p^2, to a few digits."""
        squares = 0.0
        for first in range(0, self.q.shape[0], HOST_BLOCK):
            wide = self.q[first : first + HOST_BLOCK].double()
            squares += float(wide.dot(wide))
        crossed = 2.0 * self.slope * self.even * self.sum_q
        return self.slope**2 * squares + crossed + self.num_live * self.even**2

    def of(self, leaves: Tensor) -> Tensor:
        """Return p float64 [K] of leaves i64 [K], 0 where q is."""
        p = self.q.index_select(0, leaves).double()
        if self.exploration > 0.0:
            even = self.even if self.num_live == self.q.shape[0] else (p > 0.0).double().mul_(self.even)
            p.div_(float(self.sum_q)).mul_(1.0 - self.exploration).add_(even)
        return p


def race(q: Tensor, sum_q: int, num_draws: int, bits: HostBits, start: int, exploration: float) -> Tensor:
    """Return `race_winners(race_keys(q, ...), num_draws)`, [B], for q [N], its sum, and `bits` from `start`."""
    chances = _Chances(q, sum_q, exploration)
    wanted = min(num_draws, chances.num_live)
    winners = _winners_below(chances, wanted, bits, start) if wanted > 0 else q[:0]
    if winners is None:
        every = torch.arange(q.shape[0]) if chances.num_live == q.shape[0] else (q > 0).nonzero()[:, 0]
        winners = _winners(bits.at(start, every), chances.of(every), every, wanted, math.inf, q.shape[0])
        assert winners is not None
    return winners if wanted == num_draws else torch.nn.functional.pad(winners, (0, num_draws - wanted), value=-1)


def _winners_below(chances: _Chances, wanted: int, bits: HostBits, start: int) -> Tensor | None:
    """Return the winners [B] from the leaves below a limit, or None if there is no such limit or B may be above it."""
    num_leaves = chances.q.shape[0]
    # Room for chance: the number of keys below a limit spreads by less than the root of its expectation.
    enough = wanted + 4 * math.isqrt(wanted) + 16
    limit = enough / chances.sum_p
    share = limit * chances.most
    if share <= _FEW:
        limit *= 1.0 + share
        least = _least_word(limit * chances.most * _MARGIN)
        found = _few(_judged(bits, start, num_leaves, lambda word, _, out: torch.ge(word, least, out=out)))
        words, p = bits.at(start, found), chances.of(found)
        near = (1.0 - unit_interval(words) <= p * (limit * _MARGIN)).nonzero()[:, 0]
        words, p, found = (value.index_select(0, near) for value in (words, p, found))
    else:
        squares = chances.sum_of_squares()
        room = chances.sum_p**2 - 2.0 * squares * enough
        if enough >= chances.num_live or room <= 0.0:
            return None
        limit = (chances.sum_p - math.sqrt(room)) / squares
        scale = limit * 2.0**64 * (1.0 + 1e-9)
        slope, even = chances.slope * scale, chances.even * scale
        wide = torch.empty(min(num_leaves, HOST_BLOCK), dtype=torch.float64)

        def is_near(word: Tensor, block: slice, out: Tensor) -> None:
            reach = wide[: word.shape[0]].copy_(chances.q[block]).mul_(slope)
            torch.ge((reach.add_(even) if even > 0.0 else reach).add_(word), _NEARLY_ALL, out=out)

        found = _judged(bits, start, num_leaves, is_near).nonzero()[:, 0]
        words, p = bits.again(start, found, num_leaves), chances.of(found)
    return _winners(words, p, found, wanted, limit, num_leaves) if found.shape[0] >= wanted else None


def _least_word(most: float) -> int:
    """Return the least word, as `HostBits.unfinished` has it, of a leaf for which 1 - u may be at most `most`, below 1.

    u is near 1 where the word, read as a signed number, is near its largest.
    """
    return (math.floor(2**52 - 1 - 2**53 * most) >> 22) << 33


def _judged(bits: HostBits, start: int, num_leaves: int, judge: Callable[[Tensor, slice, Tensor], object]) -> Tensor:
    """Return what `judge(words, block, out)` writes, given words before `finish`: bool [N], padded to eights."""
    out = torch.zeros((num_leaves + 7) // 8 * 8, dtype=torch.bool)
    for first in range(0, num_leaves, HOST_BLOCK):
        block = slice(first, min(first + HOST_BLOCK, num_leaves))
        judge(bits.unfinished(start, first, block.stop - first), block, out[block])
    return out


def _few(is_found: Tensor) -> Tensor:
    """Return the indices i64[K] of what is True, fast if little is: eights at a time, then those that hold any."""
    eights = is_found.view(torch.int64).nonzero()[:, 0]
    row, column = is_found.view(-1, 8).index_select(0, eights).nonzero().unbind(1)
    return eights.index_select(0, row).mul_(8).add_(column)


def _winners(words: Tensor, p: Tensor, found: Tensor, wanted: int, limit: float, num_leaves: int) -> Tensor | None:
    """Return the B leaves of the smallest keys in order, or None if one whose quotient is above `limit` could win.

    `found` i64[K] are the leaves, with random bits `words` i64[K] and chances p float64[K].
    """
    mask = index_mask_of(num_leaves)
    u = unit_interval(words)
    smallest, places = u.log().div_(p).neg_().topk(min(wanted + 1, found.shape[0]), largest=False, sorted=True)
    # Twice what a key loses to its index, and the last bits of two logarithms and a quotient.
    gap = 1.0 + 2.0 * mask * 2.0**-52 + 1e-14
    if bool((smallest[:-1] * gap < smallest[1:]).all()):
        is_sure = float(smallest[wanted - 1]) * gap < limit / _MARGIN
        return found.index_select(0, places[:wanted]) if is_sure else None
    keys = (0.0 - log_of_unit(u)).div_(p).view(torch.int64).bitwise_and_(~mask).bitwise_or_(found)
    keys = torch.where(p > 0.0, keys, NO_KEY)
    keys = keys.topk(wanted, largest=False, sorted=True).values
    if limit < math.inf:
        edge = torch.tensor(limit / _MARGIN, dtype=torch.float64).view(torch.int64)
        if int(keys[-1]) & ~mask >= int(edge) & ~mask:
            return None
    return keys & mask

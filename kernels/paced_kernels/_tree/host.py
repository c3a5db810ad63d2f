"""The tree's arithmetic on a CPU: the bits of `arithmetic`, `exact` and `philox`, several times as fast.

Work goes through blocks that stay in the cache, in place, and with scalars where a value is one for all leaves. A race
computes the logarithm of the leaves that can win only: -log u is never below 1 - u.

N = capacity, B = draws.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .arithmetic import BELL_END, ONE, Bell, index_mask_of, quantise
from .exact import EXP_TERMS, EXPONENT_BIAS, LN2_HIGH, LN2_LOW, LOG2_E, MANTISSA_BITS, log_of_unit
from .philox import HOST_BLOCK, HostPhilox

BLOCK = HOST_BLOCK
# The bound 1 - u is exact, and a logarithm and a quotient are off by a few units in the last place.
_MARGIN = 1.0 + 1e-12


def blocks(num: int) -> Iterator[slice]:
    """Yield slices of at most `BLOCK` that cover 0..num-1."""
    for start in range(0, num, BLOCK):
        yield slice(start, min(start + BLOCK, num))


def rebuild(
    source: Tensor,  # [N], weights or the bell's statistics
    bell: Bell | None,
    allowed: Tensor | None,  # bool[N]
    leaf: Tensor,  # i64[N], written
    counts: Tensor,  # i64[3], added to
) -> None:
    """Write quantised weights as `Bell` and `quantise` make them."""
    shape = _Shape(bell, min(source.shape[0], BLOCK)) if bell is not None else None
    for block in blocks(source.shape[0]):
        weights = source[block] if shape is None else shape.weights(source[block])
        if allowed is not None:
            weights = torch.where(allowed[block], weights, 0)
        if not _quantise_valid(weights, leaf[block], may_overwrite=shape is not None):
            q, found = quantise(weights)
            leaf[block] = q
            counts += found


def race(
    q: Tensor,  # [N]
    num_draws: int,
    *,
    seed: Tensor,
    stream: Tensor,
    step: Tensor,
    exploration: float,
) -> Tensor:
    """Return `race_winners(race_keys(q, ...), num_draws)`, [B]."""
    num_leaves = q.shape[0]
    num_live = total = 0
    if exploration > 0.0:
        total, num_live = int(q.sum()), int(q.count_nonzero())
    source = HostPhilox(int(seed), int(stream), int(step), min(num_leaves, BLOCK))
    bits, weights = torch.empty(num_leaves, dtype=torch.int64), torch.empty(num_leaves, dtype=torch.float64)
    bounds = torch.empty(num_leaves, dtype=torch.float64)
    for block in blocks(num_leaves):
        uniform, weight, bound = bits[block], weights[block], bounds[block]
        source.write(block.start, uniform)
        uniform.bitwise_right_shift_(11).bitwise_and_(2**53 - 1)  # u = (this + 1) / 2^53
        weight.copy_(q[block])
        if exploration > 0.0:
            is_live = None if num_live == num_leaves else weight > 0.0
            weight.div_(float(max(total, 1))).mul_(1.0 - exploration)
            even = (1.0 / max(num_live, 1)) * exploration
            weight.add_(even if is_live is None else is_live.double().mul_(even))
        bound.copy_(uniform).neg_().add_(float(2**53 - 1)).mul_(2.0**-53).div_(weight)  # (1 - u) / weight
        # Weights of 0 give infinity, or NaN where u is 1: neither is below a limit.
    found = _candidates(bounds, weights, min(num_draws, num_leaves))
    keys = _keys(bits, weights, found, num_leaves)
    wanted = min(num_draws, keys.shape[0])
    if wanted:
        smallest = keys.topk(wanted, largest=False, sorted=True).values
        limit = (smallest[-1:] | index_mask_of(num_leaves)).view(torch.float64) * _MARGIN
        more = (bounds <= limit).nonzero()[:, 0]
        if more.shape[0] > found.shape[0]:
            smallest = _keys(bits, weights, more, num_leaves).topk(wanted, largest=False, sorted=True).values
        winners = smallest & index_mask_of(num_leaves)
    else:
        winners = keys
    return torch.nn.functional.pad(winners, (0, num_draws - winners.shape[0]), value=-1)


def _candidates(bounds: Tensor, weights: Tensor, num_draws: int) -> Tensor:
    """Return the indices of at least `num_draws` leaves with the smallest bounds, or of all that can be drawn."""
    num_leaves = bounds.shape[0]
    if num_leaves > 64 * 1024 and 8 * num_draws < num_leaves:
        # The limit that one leaf in 16 suggests, with room for chance; a few more than asked for cost little.
        sample = bounds[::16]
        wanted = num_draws // 16 + 4 * int(num_draws**0.5) + 16
        limit = sample.kthvalue(min(wanted, sample.shape[0])).values
        found = (bounds <= limit).nonzero()[:, 0]
        if found.shape[0] >= num_draws and bool(limit < torch.inf):
            return found
    found = (weights > 0.0).nonzero()[:, 0]
    if found.shape[0] > num_draws:
        found = found[bounds[found].topk(num_draws, largest=False, sorted=False).indices]
    return found


def _keys(bits: Tensor, weights: Tensor, found: Tensor, num_leaves: int) -> Tensor:
    """Return the keys of the leaves `found`, as `race_keys` has them."""
    uniform = (bits[found] + 1).double() * 2.0**-53
    keys = (0.0 - log_of_unit(uniform)) / weights[found]
    return (keys.view(torch.int64) & ~index_mask_of(num_leaves)) | found


def _quantise_valid(weights: Tensor, out: Tensor, *, may_overwrite: bool) -> bool:
    """Write the fixed-point weights where all are from 0 to 1; return whether they are."""
    if not weights.is_floating_point():
        return False
    least, largest = map(float, weights.aminmax())  # NaN if there is one
    if not (least >= 0.0 and largest <= 1.0):
        return False
    scaled = weights.mul_(ONE) if may_overwrite else weights.double() * ONE
    if least > 0.0:
        out.copy_(scaled.round_().clamp_(min=1.0))
    else:
        is_positive = scaled > 0
        out.copy_(torch.maximum(scaled.round_(), is_positive.double()))
    return True


class _Shape:
    """`Bell` for blocks, in arrays that are used again."""

    def __init__(self, bell: Bell, size: int) -> None:
        self.bell = bell
        self.arrays = [torch.empty(size, dtype=torch.float64) for _ in range(3)]
        self.exponents = torch.empty(size, dtype=torch.int64)

    def weights(self, statistics: Tensor) -> Tensor:
        """Return the bell's weights, valid until the next call: `exp_of_negative` in place."""
        num = statistics.shape[0]
        r, k, result = (array[:num] for array in self.arrays)
        exponent = self.exponents[:num]
        r.copy_(statistics).sub_(self.bell.center).div_(self.bell.width)
        torch.mul(r, r, out=r).mul_(0.5).clamp_(max=BELL_END)
        torch.mul(r, LOG2_E, out=k).add_(0.5).floor_()
        r.sub_(torch.mul(k, LN2_HIGH, out=result)).sub_(torch.mul(k, LN2_LOW, out=exponent.view(torch.float64)))
        torch.mul(r, EXP_TERMS[0], out=result).add_(EXP_TERMS[1])
        for term in EXP_TERMS[2:]:
            result.mul_(r).add_(term)
        # A NaN is one whatever it is multiplied by.
        exponent.copy_(k).neg_().add_(EXPONENT_BIAS).bitwise_left_shift_(MANTISSA_BITS)
        return result.mul_(exponent.view(torch.float64))

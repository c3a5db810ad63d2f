"""Integer arithmetic of the priority tree in plain PyTorch: quantisation, targets, selection.

A weight w in [0, 1] is stored as q = round(w * 2^27). The oracle of every draw is
``searchsorted(cumsum(q), target, right=True)`` in int64, with integer targets in [0, total). No floats are involved, so
devices, ranks and kernels that use the same formulas return the same indices.

N = capacity, B = draws.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from .bits import multiply_high, random_bits, unit_interval
from .exact import exp_of_negative, log_of_unit

SCALE_BITS = 27
ONE = 1 << SCALE_BITS
# A leaf packs (sequence number << 28) | q, so the last write to a leaf has the largest code.
WEIGHT_BITS = SCALE_BITS + 1
WEIGHT_MASK = (1 << WEIGHT_BITS) - 1
MAX_SEQUENCE = (1 << 35) - 1

# Beyond this exponent a weight is far below 2^-28 and becomes the smallest positive weight.
BELL_END = 40.0
# Key of a leaf that is excluded from a race.
NO_KEY = 2**63 - 1

MODES = ("systematic", "stratified", "iid")
DISTINCT_METHODS = ("first", "race")
STATUS_FIELDS = ("nan", "negative", "saturated", "out_of_range", "empty", "short", "repeats", "reserved")


def quantise(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return fixed-point weights int64 in [0, 2^27], and counts (nan, negative, saturated) as int64 [3].

    Floats: NaN and negative become 0, above 1 becomes 1, and a positive weight never rounds to 0. Integers are q.
    """
    weights = weights.detach()
    if not weights.is_floating_point():
        q = weights.long()
        is_nan = torch.zeros_like(q, dtype=torch.bool)
        is_negative, is_saturated = q < 0, q > ONE
        q = q.clamp(0, ONE)
    else:
        # float64 keeps the scaling exact, denormals included, on devices that flush float32 denormals.
        weights = weights.double()
        is_nan, is_negative, is_saturated = weights.isnan(), weights < 0, weights > 1
        scaled = torch.where(is_nan, 0.0, weights).clamp(0.0, 1.0) * ONE
        q = torch.where(scaled > 0, scaled.round().clamp(min=1.0), 0.0).long()
    return q, torch.stack([is_nan.sum(), is_negative.sum(), is_saturated.sum()])


@dataclasses.dataclass(frozen=True, slots=True)
class Bell:
    """Weight exp(-((x - center) / width)^2 / 2) of a statistic x, for `PriorityTree.rebuild`.

    Uses only basic IEEE operations, so that every device computes the same integers from the same statistics.

    Raises:
        ValueError: `center` is not finite, or `width` is not above 0.
    """

    center: float
    width: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.center):
            raise ValueError(f"center must be finite, got {self.center!r}")
        if not 0.0 < self.width < math.inf:
            raise ValueError(f"width must be positive and finite, got {self.width!r}")

    def __call__(self, statistics: Tensor) -> Tensor:
        """Return weights in (0, 1], float64 in the shape of `statistics`; NaN stays NaN, and no weight is 0."""
        wide = statistics.double()
        # Divide by a tensor: on a GPU, torch divides by a number as a product with its reciprocal.
        distance = (wide - self.center) / torch.full_like(wide, self.width)
        return exp_of_negative((distance * distance * 0.5).clamp(max=BELL_END))


def draw_targets(mode: str, num_draws: int, total: Tensor, *, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return [B] integer targets in [0, total) (0 if total is 0); exact for total < 2^62 and B < 2^31.

    iid: floor(r_i * total / 2^64). stratified: stratum i is [floor(i total / B), floor((i + 1) total / B)), one
    uniform target in each (its first integer if the stratum is empty). systematic: floor((o + i total) / B) with one
    uniform offset o in [0, total).
    """
    bits = functools.partial(random_bits, seed=seed, stream=stream, step=step)
    samples = torch.arange(num_draws, device=total.device)  # [B]
    if mode == "iid":
        return multiply_high(bits(samples), total.expand_as(samples))
    divisor = max(num_draws, 1)
    # i * total // B, split so that no product exceeds B^2 or total.
    quotient, remainder = total // divisor, total % divisor
    if mode == "systematic":
        offset = multiply_high(bits(samples[:1]), total.reshape(1))
        return samples * quotient + (offset + samples * remainder) // divisor
    edges = torch.arange(num_draws + 1, device=total.device)
    edges = edges * quotient + edges * remainder // divisor  # [B + 1]
    return edges[:-1] + multiply_high(bits(samples), edges[1:] - edges[:-1])


def select(q: Tensor, targets: Tensor) -> Tensor:
    """Return [B], the index of the leaf whose interval of the cumulative sum holds each target."""
    return torch.searchsorted(q.cumsum(0), targets, right=True)


def first_occurrences(indices: Tensor, num_draws: int) -> Tensor:
    """Return [B], the first B distinct values of `indices` [M] in order, padded with -1. A value of -1 is ignored."""
    # A stable sort puts equal values next to each other in their original order, for any N.
    ordered, positions = indices.sort(stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    is_first = torch.zeros_like(starts).scatter_(0, positions, starts) & (indices >= 0)
    rank = torch.where(is_first, is_first.cumsum(0) - 1, num_draws).clamp(max=num_draws)
    out = torch.full((num_draws + 1,), -1, dtype=torch.int64, device=indices.device)
    # Slot B receives every repeat and every surplus draw.
    return out.scatter_(0, rank, indices)[:num_draws]


def race_keys(
    q: Tensor,  # [N]
    *,
    seed: Tensor,
    stream: Tensor,
    step: Tensor,
    exploration: float = 0.0,
) -> Tensor:
    """Return keys i64 [N] in the order of Exp(1) / p over the leaves with q > 0; `NO_KEY` for the others.

    p = (1 - exploration) q / sum q + exploration / L, with L leaves of q > 0. The sample of a leaf is its index, so
    shards agree. A key is the bit pattern of the float64 quotient, whose order is that of the positive numbers. Its
    lowest bits are replaced by the index, so keys are distinct and their order is deterministic.
    """
    leaves = torch.arange(q.shape[0], device=q.device)
    is_live = q > 0
    weight = q.double()
    if exploration > 0.0:
        near = (weight / q.sum().clamp(min=1).double()) * (1.0 - exploration)
        weight = near + (is_live.double() / is_live.sum().clamp(min=1).double()) * exploration
    uniform = unit_interval(random_bits(leaves, seed=seed, stream=stream, step=step))
    is_live &= weight > 0.0
    keys = (0.0 - log_of_unit(uniform)) / torch.where(is_live, weight, 1.0)
    return torch.where(is_live, (keys.view(torch.int64) & ~index_mask_of(q.shape[0])) | leaves, NO_KEY)


def index_mask_of(capacity: int) -> int:
    """Return a mask of the bits that hold an index below `capacity`."""
    return (1 << (capacity - 1).bit_length()) - 1


def race_winners(keys: Tensor, num_draws: int) -> Tensor:
    """Return [B], indices of the B smallest keys i64 [N], smallest first, padded with -1 if fewer leaves take part."""
    found = min(num_draws, keys.shape[0])
    smallest = keys.topk(found, largest=False, sorted=True).values
    winners = torch.where(smallest < NO_KEY, smallest & index_mask_of(keys.shape[0]), -1)
    return torch.nn.functional.pad(winners, (0, num_draws - found), value=-1)

"""Statistics of paired runs: intervals by bootstrap over seeds, and the share of the rollouts to reach a level.

n = seeds. Everything is a function of its arguments: the resamples are seeded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.9
"""Level of every interval."""
RESAMPLES = 10_000
"""Bootstrap resamples of the seeds."""


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; ends are None with a single seed, or where the level is not reached."""

    mean: float | None
    low: float | None
    high: float | None

    @property
    def claim(self) -> str:
        """What the interval says of a difference: ahead, behind, or not told apart from 0."""
        if self.low is not None and self.low > 0:
            return "ahead"
        if self.high is not None and self.high < 0:
            return "behind"
        return "not told apart" if self.low is not None else "one seed"


def paired(differences: Sequence[float]) -> Interval:
    """Mean of the differences [n] of paired runs, with its interval.

    The percentile bootstrap over seeds, widened about the mean by t(n - 1) / (z sqrt((n - 1) / n)): without it the
    interval would be too short for few seeds, as resamples scatter by the deviation over n, and as that deviation is
    itself an estimate. Of normal differences it covers the mean in 86 % of cases with three seeds, 90 % from five on.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = values.size
    if not count:
        return Interval(None, None, None)
    mean = float(values.mean())
    if count == 1:
        return Interval(mean, None, None)
    tail = (1 - LEVEL) / 2
    wide = -t_quantile(tail, count - 1) / (-NormalDist().inv_cdf(tail) * math.sqrt((count - 1) / count))
    low, high = np.quantile(resamples(count) @ values, [tail, 1 - tail])
    return Interval(mean, mean + wide * (float(low) - mean), mean + wide * (float(high) - mean))


@functools.cache
def resamples(count: int) -> Floats:
    """Share of each seed in each resample, [RESAMPLES, count]."""
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    return (drawn[:, :, None] == np.arange(count)).mean(1)


@functools.cache
def t_quantile(share: float, degrees: int) -> float:
    """Quantile of Student's t.

    With t = sqrt(d) tan(a) the density of the angle a is proportional to cos(a)^(d - 1), which is integrated by sums.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    steps = (density[1:] + density[:-1]) / 2
    below = np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum()
    return math.sqrt(degrees) * math.tan(float(np.interp(share, below, angles)))


def isotonic(values: Floats) -> Floats:
    """Return the non-decreasing sequence closest to `values` in squared error (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, few), (high, many) = blocks[-2], blocks[-1]
            blocks[-2:] = [((low * few + high * many) / (few + many), few + many)]
    return np.concatenate([np.full(count, mean) for mean, count in blocks])


def share_to_reach(grid: Floats, curve: Floats, level: float) -> float | None:
    """Return where the isotonic fit of `curve` on `grid` first reaches `level`, as a share of grid[-1], or None."""
    fitted = isotonic(curve)
    if fitted[-1] < level:
        return None
    k = int(np.argmax(fitted >= level))
    if k == 0:
        return float(grid[0] / grid[-1])
    low, high = fitted[k - 1], fitted[k]
    return float((grid[k - 1] + (level - low) / (high - low) * (grid[k] - grid[k - 1])) / grid[-1])


def share_interval(grid: Floats, curves: Floats, base: Floats) -> Interval:
    """Share of grid[-1] at which the mean of `curves` [n, grid] reaches the end of the mean of `base` [n, grid].

    Both ends by the fitted, non-decreasing curves. The interval resamples pairs; its levels are set further out for few
    seeds (the expanded percentile interval), because a share cannot be widened about its mean. An end that is None is
    beyond the budget.
    """

    def share(weights: Floats) -> float:
        level = float(isotonic(weights @ base)[-1])
        found = share_to_reach(grid, weights @ curves, level)
        return math.inf if found is None else found

    count = len(curves)
    found = share(np.full(count, 1 / count))
    if count == 1:
        return Interval(_finite(found), None, None)
    distinct, which = np.unique(resamples(count)[:2000], axis=0, return_inverse=True)  # few, of few seeds
    each = np.array([share(weights) for weights in distinct])[which.ravel()]
    tail = NormalDist().cdf(math.sqrt(count / (count - 1)) * t_quantile((1 - LEVEL) / 2, count - 1))
    low, high = np.quantile(each, [tail, 1 - tail], method="nearest")
    return Interval(_finite(found), _finite(float(low)), _finite(float(high)))


def at(run: dict[str, Any], axis: str, where: Floats) -> Floats:
    """Interpolate a run's accuracy linearly at the points `where` of `axis` (rollouts, tokens or train_seconds).

    Beyond the end of the run it is that of the last point.
    """
    points = run["curve"]
    return np.interp(where, [point[axis] for point in points], [point["accuracy"] for point in points])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

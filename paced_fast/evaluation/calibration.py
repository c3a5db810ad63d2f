"""Calibration of the value as a prediction of accuracy: Brier score, calibration error, rank correlation.

Nothing here needs a tensor library, so neither does a reader of run folders. P = prompts.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def brier_score(values: ArrayLike, accuracies: ArrayLike, group_size: ArrayLike = 1) -> float:
    """Mean squared error of `values` [P] against every single outcome, not against the group's accuracy.

    A group with accuracy a contributes a (1 - v)^2 + (1 - a) v^2, which is the mean over its 0/1 outcomes; hence a
    perfect forecaster scores a (1 - a), not 0. A scalar `group_size` has no effect; an array [P] weighs unequal groups
    by their outcomes. nan when P = 0.
    """
    v, a = _pair(values, accuracies)
    sizes = np.broadcast_to(np.asarray(group_size, dtype=np.float64), v.shape)
    return float(np.average(a * (1.0 - v) ** 2 + (1.0 - a) * v**2, weights=sizes)) if v.size else math.nan


def expected_calibration_error(values: ArrayLike, accuracies: ArrayLike, bins: int = 10) -> float:
    """Mean of |mean value - mean accuracy| over equal bins of the value, each weighted by its number of groups.

    A bin owns its lower edge; the last one owns 1.0 too. nan when P = 0 or a value is not finite.
    """
    v, a = _pair(values, accuracies)
    if bins < 1:
        raise ValueError(f"bins must be 1 or more, not {bins}")
    if not v.size or not np.all(np.isfinite(v)):
        return math.nan
    index = np.clip(np.floor(v * bins).astype(np.int64), 0, bins - 1)
    gap = np.bincount(index, weights=v, minlength=bins) - np.bincount(index, weights=a, minlength=bins)
    return float(np.abs(gap).sum() / v.size)


def rank_correlation(values: ArrayLike, accuracies: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties averaged; None when a side is constant or not finite, or P < 2."""
    v, a = _pair(values, accuracies)
    if v.size < 2 or not (np.all(np.isfinite(v)) and np.all(np.isfinite(a))) or np.ptp(v) == 0 or np.ptp(a) == 0:
        return None
    return float(np.corrcoef(_average_ranks(v), _average_ranks(a))[0, 1])


def mixed_group_share(accuracies: ArrayLike) -> float:
    """Share of the groups [P] that are neither all correct nor all wrong. nan when P = 0."""
    a = np.asarray(accuracies, dtype=np.float64)
    return _mean((a > 0.0) & (a < 1.0))


def _mean(x: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    return float(x.mean()) if x.size else math.nan


def _pair(values: ArrayLike, accuracies: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    v = np.asarray(values, dtype=np.float64).reshape(-1)
    a = np.asarray(accuracies, dtype=np.float64).reshape(-1)
    if v.shape != a.shape:
        raise ValueError(f"values and accuracies disagree on P: {v.size} vs {a.size}")
    return v, a


def _average_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]

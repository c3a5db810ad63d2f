"""Estimators from several samples per prompt: pass@k, majority votes, and confidence intervals of their means.

A benchmark's prompts are taken as drawn from all prompts like them, so intervals are about that population: resampling
is over prompts, and the samples of a prompt are its measurement.

P = prompts, n = samples of a prompt, c = correct ones among them, R = resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_RESAMPLES = 2000
_FEW = 10
"""Prompts that must differ from an end of [0, 1] before resampling can say how far the mean is from that end."""
_SAME = 1e-9
"""Tolerance for equality: two estimators of one share differ in their last digits."""


def pass_at_each(num_samples: ArrayLike, num_correct: ArrayLike, max_k: int) -> Floats:
    """Unbiased pass@k for every k up to `max_k`, [P, max_k]: 1 - C(n - c, k) / C(n, k), arXiv:2107.03374 eq. 1.

    `num_samples` (n) and `num_correct` (c) broadcast against each other, [P] or a scalar.
    Raises ValueError when max_k < 1, n < max_k, or c lies outside 0..n.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples, dtype=np.float64), np.asarray(num_correct, dtype=np.float64))
    if max_k < 1 or np.any(n < max_k):
        raise ValueError(f"pass@k needs 1 <= k <= num_samples, got k={max_k} and num_samples down to {n.min():g}")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError("pass@k needs 0 <= num_correct <= num_samples")
    # One factor at a time, as the binomials overflow; k > n - c meets the factor 0.
    drawn = np.arange(max_k)
    all_wrong = np.cumprod((n[..., None] - c[..., None] - drawn) / (n[..., None] - drawn), axis=-1)
    return np.asarray(1.0 - all_wrong, dtype=np.float64)


def majority_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer among k of the n samples is correct, exact over all subsets of size k.

    A sample votes for `votes[i]`; None abstains, and if all abstain the answer counts as wrong. Tied answers share the
    outcome evenly. Where samples of one answer were judged differently, the answer counts with their share of correct
    ones.
    """
    if not 1 <= k <= len(votes) == len(correct):
        raise ValueError(f"majority_at_k needs 1 <= k <= samples, got k={k}, {len(votes)} votes, {len(correct)} marks")
    tally: dict[Hashable, list[bool]] = {}
    for vote, mark in zip(votes, correct, strict=True):
        if vote is not None:
            tally.setdefault(vote, []).append(mark)
    if not tally:
        return 0.0
    counts = tuple(sorted(len(marks) for marks in tally.values()))
    wins = _win_chances(counts, len(votes) - sum(counts), k)
    chance = math.fsum(wins[len(marks)] * sum(marks) / len(marks) for marks in tally.values())
    return min(max(chance, 0.0), 1.0)


@functools.lru_cache(maxsize=1 << 14)  # prompts of one benchmark share few patterns of counts
def _win_chances(counts: tuple[int, ...], abstaining: int, k: int) -> dict[int, float]:
    """Chance, by its count, that an answer wins the vote of k samples; an answer tied with t others has 1 / (t + 1).

    Chances are coefficients of z^k: an answer with m samples contributes sum_d C(m, d) z^d, and for the vote to be won
    with d = w, every other answer contributes its terms d < w and, marked by a factor y, the one of a tie; the integral
    of y^t over [0, 1] is 1 / (t + 1), and Gauss's rule has it exactly. Binomial probabilities in place of the C(m, d)
    change no ratio and keep numbers near 1; the coefficient is read off at roots of unity.
    """
    n = sum(counts) + abstaining
    if k == n:
        best = counts.count(counts[-1])
        return {m: float(m == counts[-1]) / best for m in counts}
    sizes, repeats = np.unique(np.asarray(counts), return_counts=True)
    share = k / n
    # The coefficients are real, so roots come in conjugate pairs and one of each is enough.
    circle = np.exp(2j * np.pi * np.arange(n + 1) / (n + 1))
    roots = circle[: (n + 1) // 2 + 1]  # [H]
    powers = circle[np.outer(np.arange(len(roots)), np.arange(counts[-1] + 1)) % (n + 1)]
    pairs = np.full(len(roots), 2.0 / (n + 1))
    pairs[0] /= 2.0
    if n % 2:  # the last one is -1, its own conjugate
        pairs[-1] /= 2.0
    terms = [_binomial(m, share) * powers[:, : m + 1] for m in sizes]  # [H, m + 1] each
    low, high = _likely(counts[-1], n, k)
    below = [t[:, : low - 1].sum(1) for t in terms]  # the terms d < w of each, added up
    spare = (1.0 - share + share * roots) ** abstaining * roots ** (-k % (n + 1))
    chances = dict.fromkeys((int(m) for m in sizes), 0.0)
    for w in range(low, high + 1):
        for total, t in zip(below, terms, strict=True):
            if w <= t.shape[1]:
                total += t[:, w - 1]
        most_tied = min(int(repeats[sizes >= w].sum()), k // w) - 1
        nodes, weights = _rule(most_tied // 2 + 1)
        y = nodes[:, None]  # [Y, 1]
        each = [total + (y * t[:, w] if w < t.shape[1] else 0.0) for total, t in zip(below, terms, strict=True)]
        before = [spare * np.ones_like(y)]  # [Y, H], products over the sizes before each
        for factor, repeat in zip(each, repeats, strict=True):
            before.append(before[-1] * factor ** int(repeat))
        after = np.ones_like(before[0])
        for i in reversed(range(len(sizes))):
            if sizes[i] < w:
                break
            others = before[i] * each[i] ** int(repeats[i] - 1) * after
            chances[int(sizes[i])] += float(((weights @ others) @ (terms[i][:, w] * pairs)).real)
            after = after * each[i] ** int(repeats[i])
    scale = _binomial(n, share)[k]
    return {m: chance / scale for m, chance in chances.items()}


def _likely(count: int, n: int, k: int) -> tuple[int, int]:
    """Least and most votes, from 1 on, that k of n samples give an answer of `count`, but for chances below 1e-20.

    For the commonest answer these bound the winner's votes: it has no fewer than that one, and no other is likelier to
    have more.
    """
    d = np.arange(max(0, k - (n - count)), min(count, k) + 1)
    chances = _binomial(count, k / n)[d] * _binomial(n - count, k / n)[k - d] / _binomial(n, k / n)[k]
    kept = d[chances > 1e-20 / n]
    return max(1, int(kept[0])), max(1, int(kept[-1]))


@functools.lru_cache(maxsize=64)
def _rule(nodes: int) -> tuple[Floats, Floats]:
    """Nodes and weights of Gauss's rule over [0, 1]."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return (places + 1.0) / 2.0, weights / 2.0


def _binomial(count: int, share: float) -> Floats:
    """Probabilities of 0..count successes; 0 < share < 1."""
    d = np.arange(count + 1)
    logs = np.array([math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in d])
    return np.exp(logs + d * math.log(share) + (count - d) * math.log1p(-share))


def mean_intervals(figures: Floats, *, level: float = 0.95, seed: int) -> tuple[Floats, Floats]:
    """Limits of a confidence interval for the population mean of each column of `figures` [P, K], which lie in [0, 1].

    The studentised bootstrap over prompts: its error shrinks with P where the percentile bootstrap's is felt at P = 30,
    on skewed figures above all. It cannot know of prompts that no sample shows: towards an end of [0, 1] from which
    fewer than ten prompts differ the limit is Wilson's score for a binomial share, and it never lies beyond that, as no
    figures in [0, 1] spread more than zeros and ones of the same mean.
    """
    num_prompts = len(figures)
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    mean = figures.mean(0)
    centre = (mean + z * z / (2 * num_prompts)) / (1 + z * z / num_prompts)
    half = np.sqrt(mean * (1 - mean) / num_prompts + (z / (2 * num_prompts)) ** 2) * z / (1 + z * z / num_prompts)
    widest: tuple[Floats, Floats] = (np.clip(centre - half, 0.0, mean), np.clip(centre + half, mean, 1.0))
    if num_prompts < _FEW:
        return widest
    centred = figures - mean  # the mean of squares loses no digits then
    times = _resampled(num_prompts, seed)
    shift = times @ centred / num_prompts  # [R, K]
    spread = np.sqrt(np.maximum(times @ centred**2 / num_prompts - shift**2, 0.0))
    spread[spread < _SAME] = 0.0  # a resample of equal figures
    with np.errstate(divide="ignore", invalid="ignore"):
        # In units of the standard error; equal figures say nothing of their error, so its end of the scale is open.
        ratio = np.where(np.abs(shift) < _SAME, 0.0, shift / spread)
    ratio.sort(axis=0)
    tail = round((_RESAMPLES - 1) * (1 - level) / 2)
    deviation = np.sqrt((centred**2).mean(0))
    with np.errstate(invalid="ignore"):
        low = mean - np.where(deviation > _SAME, deviation * ratio[-1 - tail], 0.0)
        high = mean - np.where(deviation > _SAME, deviation * ratio[tail], 0.0)
    low = np.where((figures < 1.0 - _SAME).sum(0) < _FEW, widest[0], np.clip(low, widest[0], mean))
    high = np.where((figures > _SAME).sum(0) < _FEW, widest[1], np.clip(high, mean, widest[1]))
    return low, high


def _resampled(num_prompts: int, seed: int) -> Floats:
    """Number of draws of each prompt in each resample, [R, P]."""
    source = np.random.default_rng(seed)
    blocks: list[Floats] = []
    per_block = max(1, (1 << 20) // num_prompts)  # the draws of all would take as much memory again
    for start in range(0, _RESAMPLES, per_block):
        count = min(per_block, _RESAMPLES - start)
        drawn = source.integers(0, num_prompts, (count, num_prompts)) + np.arange(count)[:, None] * num_prompts
        times = np.bincount(drawn.ravel(), minlength=count * num_prompts)
        blocks.append(times.reshape(count, num_prompts).astype(np.float64))
    return np.concatenate(blocks)

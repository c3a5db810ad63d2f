"""Estimators against enumeration and simulation: pass@k, majority votes, and how often intervals hold the truth."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steady import takes_less

from paced_fast.evaluation.estimates import majority_at_k, mean_intervals, pass_at_each

VOTES = st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.booleans()), min_size=1, max_size=8)


def share_with_a_correct_one(n: int, c: int, k: int) -> float:
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_each_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    found = pass_at_each(n, np.arange(n + 1), n)
    wanted = [[share_with_a_correct_one(n, c, k) for k in range(1, n + 1)] for c in range(n + 1)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_pass_at_each_broadcasts_and_stays_exact_where_binomials_overflow() -> None:
    exact = [1 - math.comb(99_990, k) / math.comb(100_000, k) for k in range(1, 501)]
    found = pass_at_each([100_000] * 3, [0, 10, 99_600], 500)
    np.testing.assert_allclose(found[:2], [[0.0] * 500, exact], rtol=1e-9)
    assert found[2, 400:].tolist() == [1.0] * 100, "more samples than wrong ones"
    assert pass_at_each([16, 4], [0, 4], 4).tolist() == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2), ([8, 4], [1, 1], 5)])
def test_pass_at_each_refuses_impossible_counts(n: object, c: object, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_each(n, c, k)  # type: ignore[arg-type]


def test_pass_at_each_is_unbiased() -> None:
    """Prompts of known accuracies, sampled 40000 times: the mean is 1 - (1 - p)^k for every k, as with fresh samples.

    The naive 1 - (1 - c/n)^k is off by nine times what is allowed here.
    """
    source, accuracies, n = np.random.default_rng(0), np.array([0.05, 0.3, 0.8]), 10
    correct = source.binomial(n, accuracies, size=(40_000, 3))
    found = pass_at_each(n, correct, n).mean(0)
    wanted = 1 - (1 - accuracies[:, None]) ** np.arange(1, n + 1)
    assert np.abs(found - wanted).max() < 0.008
    naive = 1 - (1 - correct / n) ** 5
    assert np.abs(naive.mean(0) - wanted[:, 4]).max() > 0.07


def vote(votes: list[str | None], correct: list[bool], k: int) -> float:
    """Every subset of k samples votes; tied answers share, and an answer is as right as its samples are on average."""
    marks = {v: [c for other, c in zip(votes, correct, strict=True) if other == v] for v in set(votes) - {None}}
    outcomes = []
    for subset in itertools.combinations(votes, k):
        counts = {v: subset.count(v) for v in subset if v is not None}
        first = [v for v, count in counts.items() if count == max(counts.values())]
        outcomes.append(sum(sum(marks[v]) / len(marks[v]) for v in first) / len(first) if first else 0.0)
    return sum(outcomes) / len(outcomes)


@given(VOTES)
def test_majority_at_k_is_the_mean_over_subsets(samples: list[tuple[str | None, bool]]) -> None:
    votes, correct = [v for v, _ in samples], [c for _, c in samples]
    for k in range(1, len(samples) + 1):
        assert majority_at_k(votes, correct, k) == pytest.approx(vote(votes, correct, k), abs=1e-12)


def test_majorities_worked_by_hand() -> None:
    votes, correct = ["7", "7", "9", "9", "8"], [True, True, False, False, False]
    assert majority_at_k(votes, correct, 5) == 0.5, "7 and 9 are tied"
    assert majority_at_k(votes, correct, 1) == pytest.approx(0.4), "one sample decides: the accuracy"
    assert majority_at_k([*votes, "7"], [*correct, True], 6) == 1.0
    assert majority_at_k([None, None, "9"], [False, False, True], 3) == 1.0, "who has no answer does not vote"
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    with pytest.raises(ValueError, match="majority_at_k needs 1 <= k <= samples, got k=6"):
        majority_at_k(votes, correct, 6)


def test_majority_of_many_samples_agrees_with_drawing_them() -> None:
    source = random.Random(0)
    votes = source.choices(["a", "b", "c", None, *range(30)], weights=[9, 7, 5, 6, *[1] * 30], k=128)
    correct = [v == "a" for v in votes]
    drawn = 0.0
    for _ in range(20_000):
        subset = [v for v in source.sample(votes, 32) if v is not None]
        counts = [subset.count(v) for v in dict.fromkeys(subset)]
        drawn += ("a" in subset and subset.count("a") == max(counts)) / counts.count(max(counts))
    assert majority_at_k(votes, correct, 32) == pytest.approx(drawn / 20_000, abs=0.012)


def coverage(a: float, b: float, prompts: int, simulations: int) -> np.ndarray:
    """How often the 95 % interval holds the population's pass@k, k = 1, 4, 16 of 16; accuracies are Beta(a, b)."""
    ks, source = np.array([1, 4, 16]), np.random.default_rng(prompts)

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    truth = np.array([1 - math.exp(log_beta(a, b + k) - log_beta(a, b)) for k in ks])
    held = np.zeros(len(ks))
    for simulation in range(simulations):
        correct = source.binomial(16, source.beta(a, b, prompts))
        low, high = mean_intervals(pass_at_each(16, correct, 16)[:, ks - 1], seed=simulation)
        held += (low <= truth) & (truth <= high)
    return held / simulations


def assert_covers(found: np.ndarray, simulations: int, floor: float, ceiling: float) -> None:
    noise = 3 * math.sqrt(0.05 * 0.95 / simulations)
    assert found.min() > floor - noise, found
    assert found.max() < ceiling + noise, found


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.0, 3.0)])
def test_intervals_hold_the_truth_at_their_rate(a: float, b: float) -> None:
    assert_covers(coverage(a, b, 40, 600), 600, 0.94, 0.97)


def test_intervals_of_skewed_figures_do_not_undercover() -> None:
    """Mostly zeros, or mostly ones: there the percentile bootstrap holds the truth in 72 to 90 % of cases."""
    assert coverage(0.1, 2.0, 30, 400).min() > 0.91
    assert coverage(2.0, 1.0, 30, 400).min() > 0.91


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [30, 100])
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.3, 2.0)])
def test_intervals_hold_the_truth_at_their_rate_in_many_simulations(a: float, b: float, prompts: int) -> None:
    assert_covers(coverage(a, b, prompts, 1000), 1000, 0.94, 0.97)


def test_intervals_are_the_same_for_the_same_seed_and_lie_around_the_mean() -> None:
    figures = np.random.default_rng(3).beta(0.3, 0.6, size=(25, 7))
    low, high = mean_intervals(figures, seed=4)
    again = mean_intervals(figures, seed=4)
    assert np.array_equal(low, again[0])
    assert np.array_equal(high, again[1])
    assert not np.array_equal(low, mean_intervals(figures, seed=5)[0])
    assert np.all((low >= 0) & (low < figures.mean(0)) & (figures.mean(0) < high) & (high <= 1))
    wide = mean_intervals(figures, level=0.99, seed=4)
    assert np.all((wide[0] < low) & (high < wide[1]))


def test_what_no_prompt_shows_is_allowed_for() -> None:
    """All of 50 prompts solved leaves room for others: Wilson's score has its lower end at 50 / (50 + 1.96^2)."""
    low, high = mean_intervals(np.array([[1.0, 0.0]] * 50), seed=0)
    assert low.tolist() == pytest.approx([0.92865, 0.0], abs=1e-4)
    assert high.tolist() == pytest.approx([1.0, 0.07135], abs=1e-4)
    low, high = mean_intervals(np.array([[1.0]]), seed=0)
    assert (low[0], high[0]) == (pytest.approx(0.2065, abs=1e-4), 1.0)
    low, high = mean_intervals(np.full((12, 1), 0.5), seed=0)
    assert (low[0], high[0]) == (0.5, 0.5), "figures that do not vary have a mean that does not"


def test_figures_that_differ_by_rounding_have_the_same_interval() -> None:
    """Five of 50 prompts are half solved and five unsolved: 1 - 1e-16 does not count as below 1."""
    figures = np.array([1.0] * 40 + [0.5] * 5 + [0.0] * 5)
    noisy = figures + np.random.default_rng(0).uniform(-1e-15, 1e-15, 50)
    low, high = mean_intervals(np.stack([figures, noisy, 1.0 - figures, 1.0 - noisy], 1), seed=0)
    assert low[1] == pytest.approx(low[0], abs=1e-9)
    assert high[1] == pytest.approx(high[0], abs=1e-9)
    assert low[3] == pytest.approx(low[2], abs=1e-9)
    assert high[3] == pytest.approx(high[2], abs=1e-9)
    equal = np.full(12, 0.5)
    low, high = mean_intervals(np.stack([equal, equal + np.arange(12) * 1e-16], 1), seed=0)
    assert [*low, *high] == pytest.approx([0.5] * 4, abs=1e-9)


def test_many_samples_of_two_answers_are_counted_out() -> None:
    """Of 1024 samples 600 say a and 424 say b: a wins with more than half of k draws, by the hypergeometric law."""
    votes = ["a"] * 600 + ["b"] * 424
    for k in (1, 2, 33, 512, 1000):
        ways = [math.comb(600, d) * math.comb(424, k - d) for d in range(k + 1)]
        won = sum(w for d, w in enumerate(ways) if 2 * d > k) + (ways[k // 2] / 2 if k % 2 == 0 else 0)
        assert majority_at_k(votes, [v == "a" for v in votes], k) == pytest.approx(won / math.comb(1024, k), abs=1e-11)
        assert majority_at_k(votes, [v == "b" for v in votes], k) == pytest.approx(
            1 - won / math.comb(1024, k), abs=1e-11
        )


def test_majority_of_a_thousand_samples_takes_no_seconds() -> None:
    source = random.Random(1)
    votes = [int(source.expovariate(0.3)) for _ in range(1024)]
    found: list[float] = []

    def work() -> None:
        found[:] = [majority_at_k(votes, [v == 0 for v in votes], 2**i) for i in range(11)]

    assert takes_less(2.0, work)
    assert found[-1] == 1.0
    assert found[0] == pytest.approx(votes.count(0) / 1024)
    assert found == sorted(found)

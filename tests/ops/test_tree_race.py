"""Bells and races: weights and keys that every device makes alike, and the law that a mixture is drawn by."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from paced_kernels import Bell, PriorityTree
from paced_kernels._tree import arithmetic as tree_reference
from paced_kernels._tree.exact import exp_of_negative, log_of_unit

ONE = 2**27


def ulps(found: float, exact: Decimal) -> float:
    """Distance in units of the last place of the exact value."""
    return abs(float((Decimal(found) - exact) / Decimal(math.ulp(float(exact)))))


def test_exp_and_log_are_right_to_a_few_units_in_the_last_place() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([torch.rand(2000, generator=generator, dtype=torch.float64) * 40, torch.tensor([0.0, 1e-300, 40.0])])
    random = torch.rand(2000, generator=generator, dtype=torch.float64)
    powers = 2.0 ** -torch.arange(1, 54, dtype=torch.float64)
    u = torch.cat([random[random > 0], powers, 1.0 - powers, torch.tensor([math.sqrt(0.5), math.sqrt(2) / 2])])
    with localcontext() as context:
        context.prec = 50
        exps = zip(t.tolist(), exp_of_negative(t).tolist(), strict=True)
        assert max(ulps(found, (-Decimal(x)).exp()) for x, found in exps) < 2
        logs = zip(u.tolist(), log_of_unit(u).tolist(), strict=True)
        assert max(ulps(found, Decimal(x).ln()) for x, found in logs) < 3
    assert exp_of_negative(torch.zeros(1, dtype=torch.float64)).item() == 1.0
    assert log_of_unit(torch.ones(1, dtype=torch.float64)).item() == 0.0
    assert math.isnan(exp_of_negative(torch.tensor([math.nan], dtype=torch.float64)).item())


def test_a_bell_weighs_what_its_formula_says_and_nothing_so_little_that_it_vanishes() -> None:
    values = torch.tensor([0.5, 0.6, 0.3, 0.0, 1.0, -7.0, math.inf, math.nan])
    tree = PriorityTree(8, seed=0)
    tree.rebuild(Bell(0.5, 0.1), values)
    exact = [math.exp(-0.5 * ((v - 0.5) / 0.1) ** 2) for v in values[:6].tolist()]
    wanted = [max(1, round(w * ONE)) for w in exact]
    assert wanted[5] == 1
    assert tree.get(torch.arange(8)).tolist() == [*wanted, 1, 0]
    assert tree.status()["nan"] == 1


def test_a_leaf_that_is_not_allowed_weighs_nothing_and_is_not_judged() -> None:
    allowed = torch.tensor([True, False, True, False])
    tree = PriorityTree(4, seed=0)
    tree.rebuild(Bell(0.5, 0.1), torch.tensor([0.5, 0.5, 0.5, math.nan]), allowed=allowed)
    assert tree.get(torch.arange(4)).tolist() == [ONE, 0, ONE, 0]
    tree.rebuild(torch.tensor([0.5, -1.0, 1.0, 2.0]), allowed=allowed)
    assert tree.get(torch.arange(4)).tolist() == [ONE // 2, 0, ONE, 0]
    assert set(tree.status().values()) == {0}


def state(seed: int) -> dict[str, Tensor]:
    return {"seed": torch.tensor([seed]), "stream": torch.tensor([0]), "step": torch.tensor([3])}


def test_keys_are_distinct_and_carry_the_index_of_their_leaf() -> None:
    q = torch.randint(0, 3, (5000,), generator=torch.Generator().manual_seed(2))
    keys = tree_reference.race_keys(q, **state(1))
    live = keys[q > 0]
    assert live.unique().numel() == live.numel() == int((q > 0).sum())
    assert torch.equal(live & 8191, (q > 0).nonzero()[:, 0])
    assert (keys[q == 0] == tree_reference.NO_KEY).all()
    assert (keys >= 0).all()


def test_equal_quotients_leave_the_order_to_the_index() -> None:
    """The bits that make way for the index are the last 20 of 52 for a million leaves: a relative 2e-10 is left."""
    assert [tree_reference.index_mask_of(n) for n in (1, 2, 3, 1024, 1025, 10**6)] == [0, 1, 3, 1023, 2047, 2**20 - 1]
    assert tree_reference.race_winners(torch.tensor([9 << 2 | 0, 9 << 2 | 1, 8 << 2 | 2]), 3).tolist() == [2, 0, 1]


@pytest.mark.parametrize("exploration", [0.0, 0.4, 1.0])
def test_a_race_has_the_law_of_successive_sampling_by_the_mixture(exploration: float) -> None:
    """Leaf 5 weighs nothing, so it is not drawn however much it is explored."""
    q = [1, 2, 3, 5, 9, 0]
    p = [(1 - exploration) * w / sum(q) + exploration * (w > 0) / 5 for w in q]
    num_calls = 1500
    tree = PriorityTree(6, seed=8)
    tree.rebuild(torch.tensor(q, dtype=torch.int32))
    counts = dict.fromkeys(itertools.permutations([i for i in range(6) if p[i] > 0], 2), 0)
    for _ in range(num_calls):
        sample = tree.sample_distinct(2, "race", exploration=exploration)
        counts[tuple(sample.idx.tolist())] += 1
    statistic = 0.0
    for (first, second), count in counts.items():
        expected = num_calls * p[first] * p[second] / (1 - p[first])
        statistic += (count - expected) ** 2 / expected
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_leaves_that_weigh_nothing_are_not_drawn_when_all_is_exploration() -> None:
    tree = PriorityTree(4, seed=0)
    tree.rebuild(torch.tensor([0.0, 1.0, 0.0, 0.5]))
    drawn = tree.sample_distinct(4, "race", exploration=1.0)
    assert sorted(drawn.idx.tolist()) == [-1, -1, 1, 3]
    assert tree.status()["short"] == 1

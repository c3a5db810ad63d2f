"""Draws: distinct, in the promised proportions, and a function of (seed, step)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor

from paced_fast.config import SchedulerConfig
from paced_fast.paced.scheduler import PromptScheduler
from paced_kernels import PriorityTree

CPU = torch.device("cpu")
RULES = ["tree", "greedy", "mopps", "history", "uniform", "dynamic"]


def scheduler(count: int, seed: int = 0, **settings: Any) -> PromptScheduler:
    return PromptScheduler(count, SchedulerConfig(**{"warmup_steps": 0} | settings), seed=seed, device=CPU)


def spread(count: int) -> Tensor:
    return torch.linspace(0.0, 1.0, count)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 7, 20])
def test_draws_are_distinct_prompts(rule: str, count: int) -> None:
    chooser = scheduler(20, rule=rule)
    for step in range(1, 30):
        drawn = chooser.draw(count, step, spread(20)).tolist()
        assert len(drawn) == len(set(drawn)) == count
        assert set(drawn) <= set(range(20))


@pytest.mark.parametrize("rule", RULES)
def test_more_draws_than_prompts_repeat_as_little_as_possible(rule: str) -> None:
    drawn = scheduler(5, rule=rule).draw(13, 1, spread(5))
    assert drawn.bincount(minlength=5).sort().values.tolist() == [2, 2, 3, 3, 3]
    assert set(drawn[:5].tolist()) == set(drawn[5:10].tolist()) == set(range(5))


@pytest.mark.parametrize("rule", ["tree", "history"])
@pytest.mark.parametrize("exploration", [0.0, 0.1])
def test_few_prompts_with_all_the_weight_do_not_leave_places_empty(rule: str, exploration: float) -> None:
    """Two prompts near tau among two thousand at which the bell vanishes: the rest of the batch is still prompts."""
    values = torch.full((2000,), 1.0)
    values[[3, 1500]] = 0.5
    chooser = scheduler(2000, rule=rule, bandwidth=0.01, exploration=exploration)
    chooser.observe(torch.arange(2000), values)
    for step in range(1, 6):
        drawn = chooser.draw(64, step, values).tolist()
        assert len(set(drawn)) == 64
        assert min(drawn) >= 0
        assert {3, 1500} <= set(drawn)


def test_values_far_from_tau_everywhere_still_give_a_batch() -> None:
    chooser = scheduler(50, rule="tree", bandwidth=0.001, exploration=0.0)
    drawn = chooser.draw(16, 1, torch.full((50,), 0.99)).tolist()
    assert len(set(drawn)) == 16
    assert set(chooser.tree.status().values()) == {0}, "nothing had to be repaired"


def weights(values: Tensor, tau: float, bandwidth: float, exploration: float) -> Tensor:
    bell = torch.tensor([math.exp(-((v - tau) ** 2) / (2 * bandwidth**2)) for v in values.tolist()])
    return (1 - exploration) * bell / bell.sum() + exploration / len(values)


@pytest.mark.parametrize(("exploration", "tau"), [(0.0, 0.5), (0.3, 0.5), (0.1, 0.2), (1.0, 0.5)])
def test_single_draws_follow_the_mixture(exploration: float, tau: float) -> None:
    count, draws = 12, 2500
    values = spread(count)
    chooser = scheduler(count, rule="tree", exploration=exploration, tau=tau, bandwidth=0.2)
    seen = torch.zeros(count)
    for step in range(1, draws + 1):
        seen[chooser.draw(1, step, values)] += 1
    wanted = weights(values, tau, 0.2, exploration)
    z = (seen - draws * wanted) / (draws * wanted * (1 - wanted)).sqrt()
    assert float(z.abs().max()) < 4.5


def test_batches_follow_successive_draws_without_replacement() -> None:
    """Inclusion frequencies of three distinct draws, against the law computed by enumeration."""
    count, batch, draws = 7, 3, 2500
    values = spread(count)
    chooser = scheduler(count, rule="tree", exploration=0.1)
    seen = torch.zeros(count)
    for step in range(1, draws + 1):
        seen[chooser.draw(batch, step, values)] += 1
    share = weights(values, 0.5, 0.1, 0.1).double().tolist()
    inclusion = [0.0] * count

    def walk(taken: tuple[int, ...], probability: float) -> None:
        if len(taken) == batch:
            for i in taken:
                inclusion[i] += probability
            return
        rest = 1.0 - sum(share[i] for i in taken)
        for i in range(count):
            if i not in taken:
                walk((*taken, i), probability * share[i] / rest)

    walk((), 1.0)
    wanted = torch.tensor(inclusion)
    assert float(wanted.sum()) == pytest.approx(batch)
    z = (seen - draws * wanted) / (draws * wanted * (1 - wanted)).sqrt()
    assert float(z.abs().max()) < 4.5


def test_exploration_is_the_share_of_draws_that_ignores_the_estimate() -> None:
    values = torch.ones(1000)
    values[:100] = 0.5  # the others have a bell of exp(-5.6), so this is nearly all of the learned share
    chooser = scheduler(1000, rule="tree", exploration=0.25, bandwidth=0.05)
    drawn = torch.cat([chooser.draw(4, step, values) for step in range(1, 801)])
    useful, wanted = float((drawn < 100).float().mean()), 0.75 + 0.25 * 0.1
    assert abs(useful - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / len(drawn)) + 0.005


@pytest.mark.parametrize("tau", [0.5, 0.2])
def test_greedy_takes_the_nearest_of_its_pool_and_explores(tau: float) -> None:
    values = torch.rand(500, generator=torch.Generator().manual_seed(3))
    chooser = scheduler(500, rule="greedy", exploration=0.125, pool_factor=4, tau=tau)
    for step in range(1, 20):
        drawn = chooser.draw(16, step, values)
        pool = chooser._uniform(64, torch.tensor(step), 0, None)
        assert set(drawn.tolist()) <= set(pool.tolist())
        ranked = sorted(pool.tolist(), key=lambda i: abs(float(values[i]) - tau))
        assert set(drawn[:14].tolist()) == set(ranked[:14])
        assert not set(drawn[14:].tolist()) & set(ranked[:14])
    everything = scheduler(500, rule="greedy", exploration=0.0, pool_factor=1000)
    nearest = (values - 0.5).abs().argsort()[:16]
    assert set(everything.draw(16, 1, values).tolist()) == set(nearest.tolist())


def test_greedy_explores_the_rest_of_the_pool_evenly() -> None:
    values = spread(40)
    chooser = scheduler(40, rule="greedy", exploration=0.25, pool_factor=10)
    seen = torch.zeros(40)
    for step in range(1, 3001):
        seen[chooser.draw(4, step, values)[3:]] += 1
    rest = (values - 0.5).abs().argsort(stable=True)[3:]
    assert float(seen.sum()) == float(seen[rest].sum()) == 3000
    wanted = 3000 / len(rest)
    assert float((seen[rest] - wanted).abs().max()) < 4.5 * math.sqrt(wanted)


@pytest.mark.parametrize("rule", ["tree", "greedy", "history"])
def test_the_warm_up_is_uniform_and_as_long_as_it_says(rule: str) -> None:
    values = torch.zeros(60)
    values[:6] = 0.5
    chooser = scheduler(60, rule=rule, warmup_steps=40, exploration=0.0, pool_factor=10, bandwidth=0.05)
    uniform = scheduler(60, rule="uniform")
    chooser.observe(torch.arange(60), values)
    for step in range(1, 41):
        assert torch.equal(chooser.draw(6, step, values), uniform.draw(6, step, None))
    assert sorted(chooser.draw(6, 41, values).tolist()) == list(range(6))


def test_uniform_draws_are_uniform() -> None:
    chooser = scheduler(10, rule="uniform")
    seen = torch.stack([chooser.draw(3, step, None) for step in range(1, 3001)]).flatten().bincount(minlength=10)
    assert float((seen - 900.0).abs().max()) < 4.5 * math.sqrt(900 * 0.7)


@pytest.mark.parametrize("rule", ["uniform", "greedy", "mopps", "tree"])
def test_a_uniform_draw_writes_no_tree(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are always equal are written once, and are in nobody's way; `tree` draws so beyond its table."""
    chooser, same = scheduler(20, rule=rule), scheduler(20, rule=rule)
    count = 25 if rule == "tree" else 4
    first = chooser.draw(count, 1, spread(20))
    same._even.load_state_dict(chooser._even.state_dict())
    rebuilt = []
    original = PriorityTree.rebuild
    monkeypatch.setattr(PriorityTree, "rebuild", lambda tree, *given, **named: rebuilt.append(tree))
    assert torch.equal(chooser.draw(count, 1, spread(20)), first)
    assert not rebuilt
    monkeypatch.setattr(PriorityTree, "rebuild", original)
    # As from a tree of ones that is written anew.
    same._even.rebuild(torch.ones(20))
    assert torch.equal(same.draw(count, 1, spread(20)), first)


def test_a_state_of_another_seed_brings_its_uniform_draws() -> None:
    one, other = scheduler(50, rule="uniform"), scheduler(50, rule="uniform", seed=1)
    assert not torch.equal(one.draw(8, 2, None), other.draw(8, 2, None))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.draw(8, 3, None), other.draw(8, 3, None))


def test_history_weighs_by_the_last_measured_variance() -> None:
    chooser = scheduler(6, rule="history", exploration=0.0)
    chooser.observe(torch.tensor([0, 1, 2, 3]), torch.tensor([0.5, 0.5, 0.5, 0.5]))
    chooser.observe(torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0, 0.25]))
    assert chooser.visits.tolist() == [2, 2, 2, 1, 0, 0]
    seen = torch.zeros(6)
    for step in range(1, 2001):
        seen[chooser.draw(1, step, None)] += 1
    share = torch.tensor([0.0, 0.0, 0.1875, 0.25, 0.25, 0.25]) / 0.9375
    assert float(seen[:2].sum()) <= 2
    z = (seen - 2000 * share)[2:] / (2000 * share * (1 - share)).sqrt()[2:]
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("rule", RULES)
def test_a_draw_depends_on_seed_and_step_alone(rule: str) -> None:
    values = spread(50)
    one, two, other = scheduler(50, rule=rule), scheduler(50, rule=rule), scheduler(50, rule=rule, seed=1)
    drawn = [one.draw(8, step, values).tolist() for step in range(1, 9)]
    assert two.draw(8, 5, values).tolist() == drawn[4], "draws that never happened have no part in it"
    # Seven draws of `greedy` are mostly the same, so two steps may agree.
    assert len({tuple(d) for d in drawn}) >= (6 if rule == "greedy" else 8)
    assert other.draw(8, 5, values).tolist() != drawn[4]
    again = [one.draw(8, 5, values, round_).tolist() for round_ in (0, 1)]
    assert again[0] == drawn[4]
    assert again[1] != again[0]
    on_device = [two.draw(8, torch.tensor(step), values).tolist() for step in range(1, 9)]
    assert on_device == drawn, "the step may live on the device"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("max_visits", [1, 2])
def test_an_epoch_draws_no_prompt_more_often_than_allowed(rule: str, max_visits: int) -> None:
    """23 prompts, 5 a draw: an epoch has room for four draws, and the next one begins with the fifth."""
    values = spread(23)
    chooser = scheduler(23, rule=rule, max_visits=max_visits, exploration=0.2)
    free = scheduler(23, rule=rule, exploration=0.2)
    batches, unbound = [], []
    for step in range(1, 41):
        for one, drawn in ((chooser, batches), (free, unbound)):
            index = one.draw(5, step, values)
            assert len(set(index.tolist())) == 5
            assert int(index.min()) >= 0
            one.observe(index, values[index])
            drawn.append(index)

    def most(drawn: list[Tensor]) -> int:
        epochs = [torch.cat(drawn[start : start + 4]) for start in range(0, 40, 4)]
        return max(int(epoch.bincount(minlength=23).max()) for epoch in epochs)

    assert most(batches) == max_visits
    assert most(unbound) > max_visits


@pytest.mark.parametrize("rule", RULES)
def test_the_state_restores_the_next_batch(rule: str) -> None:
    values = spread(50)
    one = scheduler(50, rule=rule)
    for step in range(1, 5):
        drawn = one.draw(8, step, values)
        one.observe(drawn, torch.rand(8))
    two = scheduler(50, rule=rule)
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    two.load_state_dict(state)
    for name, tensor in two.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(one.draw(8, 5, values), two.draw(8, 5, values))
    assert torch.equal(two.visits, one.visits)


def test_greedy_asks_for_the_values_of_its_pool_and_of_no_other_prompt() -> None:
    chooser = scheduler(200, rule="greedy", exploration=0.0, pool_factor=4)
    values, current, asked = torch.zeros(200), spread(200), []

    def refresh(pool: Tensor) -> None:
        asked.append(pool)
        values[pool] = current[pool]

    drawn = chooser.draw(8, 1, values, refresh=refresh)
    (pool,) = asked
    assert pool.unique().numel() == 32
    nearest = (current[pool] - 0.5).abs().sort().values[:8]
    assert torch.equal((current[drawn] - 0.5).abs(), nearest)


def test_values_of_a_window_draw_what_all_values_draw(tmp_path: Path) -> None:
    rewards, drawn = tiny_run.write_rewards(tmp_path), {}
    for window in (0, 3):
        config = tiny_run.config(rewards, log_z__scored_per_step=window, scheduler__pool_factor=2)
        run = tiny_run.build(config, tmp_path / str(window))
        log_z = run.trainer.log_z
        assert log_z is not None
        assert log_z.is_windowed == bool(window)
        steps = [run.stepper.step().result.fresh.prompt_index.tolist() for _ in range(6)]
        drawn[window] = steps, log_z.all_values().tolist()
    assert drawn[0] == drawn[3]


def test_a_state_that_was_saved_with_the_steps_of_last_visits_is_read() -> None:
    """Earlier versions kept `last_visit`, which nothing read."""
    values, one, two = spread(50), scheduler(50, rule="history"), scheduler(50, rule="history")
    one.observe(one.draw(8, 1, values), torch.rand(8))
    state = one.state_dict()
    two.load_state_dict({**state, "last_visit": torch.arange(50)})
    assert "last_visit" not in state
    assert two.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in two.state_dict().items())
    assert torch.equal(one.draw(8, 2, values), two.draw(8, 2, values))

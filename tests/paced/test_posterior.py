"""The Beta posterior of MoPPS (arXiv 2507.04632): its update by hand, its draws against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from paced_fast.config import SchedulerConfig
from paced_fast.paced.posterior import BetaPosterior
from paced_fast.paced.scheduler import PromptScheduler

CPU = torch.device("cpu")


def posterior(alpha: float, beta: float, count: int) -> BetaPosterior:
    made = BetaPosterior(count, seed=0, device=CPU)
    made.alpha.fill_(alpha)
    made.beta.fill_(beta)
    return made


def now(step: int) -> Tensor:
    return torch.tensor(step)


def test_outcomes_are_added_and_half_of_the_old_is_forgotten_for_the_prior() -> None:
    """lambda = 1/2, alpha0 = beta0 = 1: 1, 1 with 6 of 8 right is .5 + .5 + 6 and .5 + .5 + 2; then 1 of 8 right gives
    3.5 + .5 + 1 and 1.5 + .5 + 7."""
    made = BetaPosterior(3, seed=0, device=CPU)
    made.observe(torch.tensor([1]), torch.tensor([6.0]), torch.tensor([2.0]))
    assert (made.alpha.tolist(), made.beta.tolist()) == ([1, 7, 1], [1, 3, 1])
    made.observe(torch.tensor([1, 0]), torch.tensor([1.0, 0.0]), torch.tensor([7.0, 8.0]))
    assert (made.alpha.tolist(), made.beta.tolist()) == ([1, 5, 1], [9, 9, 1])
    assert made.mean.tolist() == pytest.approx([1 / 10, 5 / 14, 1 / 2])


def test_a_prompt_drawn_twice_counts_both_groups_and_one_without_a_verdict_none() -> None:
    made = posterior(3.0, 5.0, 3)
    made.observe(torch.tensor([0, 0, 2]), torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    assert made.alpha.tolist() == [0.5 * 3 + 0.5 + 3, 3, 3]
    assert made.beta.tolist() == [0.5 * 5 + 0.5 + 1, 5, 5]


def test_the_scheduler_counts_scored_completions() -> None:
    """Accuracy 3/4 of 4 scored, of none, and of 8: 3 and 1, nothing, 6 and 2."""
    chooser = PromptScheduler(3, SchedulerConfig(rule="mopps"), seed=0, device=CPU)
    chooser.observe(torch.arange(3), torch.full((3,), 0.75), torch.tensor([4, 0, 8]))
    assert chooser.posterior is not None
    assert chooser.posterior.alpha.tolist() == [1 + 3, 1, 1 + 6]
    assert chooser.posterior.beta.tolist() == [1 + 1, 1, 1 + 2]


@pytest.mark.parametrize(
    ("alpha", "beta", "below"),
    [
        (1.0, 1.0, lambda x: x),
        (2.0, 1.0, lambda x: x**2),
        (1.0, 3.0, lambda x: 1 - (1 - x) ** 3),
        (3.0, 2.0, lambda x: 4 * x**3 - 3 * x**4),
        (5.0, 5.0, lambda x: x**5 * (126 - 420 * x + 540 * x**2 - 315 * x**3 + 70 * x**4)),
    ],
)
def test_draws_follow_the_beta_distribution(alpha: float, beta: float, below: Callable[[Tensor], Tensor]) -> None:
    """Kolmogorov and Smirnov's distance; its 0.1 % point is 1.95 / sqrt(n)."""
    count = 20_000
    drawn = posterior(alpha, beta, count).draw(torch.arange(count), now(7)).sort().values
    places = torch.arange(1, count + 1) / count
    distance = (below(drawn) - places + 0.5 / count).abs().max()
    assert float(distance) < 1.95 / count**0.5


def test_draws_of_prompts_steps_and_seeds_are_independent_and_can_be_repeated() -> None:
    made, index = posterior(2.0, 2.0, 5000), torch.arange(5000)
    rows = [made.draw(index, now(step)) for step in (1, 2, 3, 2**40 + 1)]
    rows.append(BetaPosterior(5000, seed=1, device=CPU).draw(index, now(1)))
    for i, row in enumerate(rows):
        for other in (*rows[:i], row.roll(1), row.roll(2)):
            assert abs(float(torch.corrcoef(torch.stack([row, other]))[0, 1])) < 4.5 / 5000**0.5
    assert torch.equal(made.draw(index, now(2)), rows[1])
    assert torch.equal(made.draw(torch.tensor([4000, 3]), now(2)), rows[1][[4000, 3]]), "whatever else is asked for"


def test_the_rule_takes_the_draws_nearest_to_tau_of_its_pool() -> None:
    chooser = PromptScheduler(400, SchedulerConfig(rule="mopps", pool_factor=1000, tau=0.3), seed=3, device=CPU)
    source = torch.Generator().manual_seed(0)
    for step in range(1, 30):
        index = chooser.draw(16, step, None)
        if chooser.posterior is not None and step > 1:
            drawn = chooser.posterior.draw(torch.arange(400), now(step))
            assert set(index.tolist()) == set((drawn - 0.3).abs().argsort()[:16].tolist())
            gaps = (drawn[index] - 0.3).abs().tolist()
            assert all(a <= b for a, b in pairwise(gaps))
        chooser.observe(index, torch.rand(16, generator=source), torch.full((16,), 8))
    part = PromptScheduler(400, SchedulerConfig(rule="mopps", pool_factor=4, tau=0.3), seed=3, device=CPU)
    index = part.draw(16, 1, None)
    assert part.posterior is not None
    better = (part.posterior.draw(torch.arange(400), now(1)) - 0.3).abs().argsort()[:16]
    assert set(index.tolist()) != set(better.tolist()), "64 prompts are looked at, not all"


def test_prompts_of_the_wanted_accuracy_are_drawn_more_and_more() -> None:
    """400 prompts of accuracies 0 to 1, in order: of uniform draws a fifth lies within .1 of tau."""
    chooser = PromptScheduler(400, SchedulerConfig(rule="mopps", pool_factor=16), seed=0, device=CPU)
    truth, source = torch.linspace(0, 1, 400), torch.Generator().manual_seed(0)
    near = []
    for step in range(1, 201):
        index = chooser.draw(8, step, None)
        near.append(float(((truth[index] - 0.5).abs() < 0.1).float().mean()))
        right = torch.rand(8, 8, generator=source) < truth[index][:, None]
        chooser.observe(index, right.float().mean(1), torch.full((8,), 8))
    assert sum(near[100:]) / 100 > 0.4
    assert sum(near[:5]) / 5 < 0.4

"""The head on problems whose answer is known, and what it must ignore."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paced_fast.config import LogZConfig
from paced_fast.config.resolve import resolve_log_z
from paced_fast.evaluation.calibration import rank_correlation
from paced_fast.paced.log_z import LogZ, Outcomes, PastGroups, posterior_mean
from paced_fast.policy.optimizer import load_optimizer_tensors, optimizer_tensors

PROMPTS, WIDTH, GROUP = 400, 32, 8


def settings(**changes: Any) -> LogZConfig:
    """Settings of the head alone, as a run resolves them; memory="on" adds the rest."""
    return resolve_log_z(LogZConfig(**changes), remembers=False)


def problem() -> tuple[Tensor, Tensor]:
    """Embeddings [N, H] on odd scales, and the accuracies [N] that they determine."""
    source = torch.Generator().manual_seed(1)
    features = torch.randn(PROMPTS, WIDTH, generator=source)
    direction = torch.randn(WIDTH, generator=source) / math.sqrt(WIDTH)
    accuracy = torch.sigmoid(2.0 * features @ direction - 0.5)
    return features * torch.logspace(-2, 2, WIDTH) + 3.0, accuracy


def fitted(loss: str, rate: float, steps: int = 150) -> tuple[Tensor, Tensor]:
    embeddings, accuracy = problem()
    head = LogZ(embeddings, settings(loss=loss, learning_rate=rate), seed=0, bounded=True)
    source = torch.Generator().manual_seed(2)
    for _ in range(steps):
        index = torch.randperm(PROMPTS, generator=source)[:64].repeat_interleave(GROUP)
        head.fit(index, torch.bernoulli(accuracy[index], generator=source))
    return head.all_values(), accuracy


@pytest.mark.parametrize("loss", ["tb", "bce"])
def test_the_head_recovers_known_accuracies(loss: str) -> None:
    values, accuracy = fitted(loss, 1e-3)
    correlation = rank_correlation(values.tolist(), accuracy.tolist())
    assert correlation is not None
    assert correlation > 0.9
    assert abs(float((values - accuracy).mean())) < 0.03
    assert float((values - accuracy).square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("loss", ["tb", "bce"])
def test_at_the_policys_learning_rate_it_does_not(loss: str) -> None:
    values, accuracy = fitted(loss, 1e-6)
    assert float(values.std()) < 0.1 * float(accuracy.std()), "it has hardly left one half"
    assert float((values - 0.5).abs().max()) < 0.15


@pytest.mark.parametrize("loss", ["tb", "bce"])
def test_one_step_descends_the_stated_loss(loss: str) -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings, settings(loss=loss, max_grad_norm=1e9), seed=0, bounded=True)
    index = torch.tensor([0, 0, 5, 9])
    target = torch.tensor([1.0, 0.0, 1.0, 0.0])
    values = head.value(index).double()
    if loss == "tb":
        wanted = (values - target).square().mean()
    else:
        wanted = -(target * values.log() + (1 - target) * (1 - values).log()).mean()
    got, norm = head.fit(index, target)
    assert got == pytest.approx(float(wanted), rel=1e-5)
    gradients = [p.grad for p in head.mlp.parameters() if p.grad is not None]
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=1e-4)
    assert torch.equal(head.optimizer.param_groups[0]["params"][0], next(iter(head.mlp.parameters())))


def test_an_unbounded_head_regresses_on_log_z_with_weights() -> None:
    """FlowRL's case: targets outside (0, 1); a weight of zero takes a sequence away."""
    embeddings, _ = problem()
    head = LogZ(embeddings[:4], settings(learning_rate=1e-2), seed=0, bounded=False)
    index, target = torch.tensor([0, 1, 2, 3]), torch.tensor([-4.0, 7.0, 2.0, 1e6])
    for _ in range(600):
        head.fit(index, target, torch.tensor([1.0, 1.0, 0.5, 0.0]))
    assert head.value(index)[:3].tolist() == pytest.approx([-4.0, 7.0, 2.0], abs=0.3)


def test_values_of_other_prompts_use_the_tables_scale() -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings, settings(), seed=0, bounded=True)
    with torch.no_grad():
        head.mlp[-1].weight.mul_(100.0)  # type: ignore[operator, union-attr]
    assert float(head.all_values().std()) > 0.1
    torch.testing.assert_close(head.value_of(embeddings[7:9]), head.all_values()[7:9])
    torch.testing.assert_close(head.value(torch.tensor([8, 7])), head.all_values()[[8, 7]])


def test_it_starts_at_one_half_the_same_for_the_same_seed() -> None:
    embeddings, _ = problem()
    ambient = torch.get_rng_state()
    one, two, other = (LogZ(embeddings, settings(), seed=seed, bounded=True).all_values() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), ambient)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert float((one - 0.5).abs().max()) < 0.15


def test_a_window_goes_round_the_table_and_what_is_drawn_is_always_new() -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings[:10], settings(scored_per_step=4), seed=0, bounded=True)
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    old, new = head.values.clone(), head.all_values()
    assert not old.isclose(new, atol=1e-4).any()

    def current(values: Tensor) -> list[int]:
        return [i for i in range(10) if math.isclose(head.values[i], values[i], abs_tol=1e-6)]

    for start in (0, 4, 8):
        head.score()
        done = set(range(min(start + 4, 10)))
        assert current(new) == sorted(done)
    assert head.cursor == 2, "it went round the end"
    again = LogZ(embeddings[:10], settings(scored_per_step=4), seed=0, bounded=True)
    again.load_state_dict({name: tensor.clone() for name, tensor in head.state_dict().items()})
    assert torch.equal(again.values, head.values)
    with torch.no_grad():
        head.mlp[-1].bias.add_(1.0)  # type: ignore[operator, union-attr]
    head.rescore(torch.tensor([9, 1]))
    newest = head.all_values()
    assert current(newest) == [1, 9]
    head.score()
    assert current(newest) == [1, 2, 3, 4, 5, 9]


def test_scoring_in_blocks_is_scoring_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings, settings(), seed=0, bounded=True)
    at_once = head.all_values()
    monkeypatch.setattr("paced_fast.paced.log_z._BLOCK", 7)
    torch.testing.assert_close(head.score(), at_once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_a_table_of_one_prompt_has_a_finite_value(number: int) -> None:
    head = LogZ(torch.full((number, WIDTH), 3.0), settings(), seed=0, bounded=True)
    for _ in range(3):
        head.fit(torch.tensor([0]), torch.tensor([1.0]))
    assert bool(head.all_values().isfinite().all())


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_target_leaves_the_head_as_it_was(poison: float, bounded: bool) -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings, settings(), seed=0, bounded=bounded)
    index = torch.tensor([0, 1, 2])
    head.fit(index, torch.tensor([1.0, 0.0, 1.0]))

    def state() -> list[Tensor]:
        moments = [value for entry in head.optimizer.state.values() for value in entry.values()]
        return [tensor.clone() for tensor in [*head.mlp.state_dict().values(), *moments]]

    before = state()
    head.fit(index, torch.tensor([1.0, poison, 1.0]))
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    head.fit(index, torch.tensor([1.0, 0.0, 1.0]))
    assert not all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))


def test_a_value_is_the_mean_of_prediction_and_outcomes_by_their_numbers() -> None:
    predicted, correct, samples = torch.tensor([0.5, 0.5, 0.9]), torch.tensor([0.0, 8.0, 0.0]), torch.tensor([0, 8, 24])
    wanted = [0.5, (8 * 0.5 + 8) / 16, 8 * 0.9 / 32]
    assert posterior_mean(predicted, correct, samples, 8.0).tolist() == pytest.approx(wanted)


def test_outcomes_fade_by_the_step_and_add_up_within_one() -> None:
    outcomes = Outcomes(4, 0.5, torch.device("cpu"))
    outcomes.add(torch.tensor([1, 2, 1]), torch.tensor([4.0, 0.0, 2.0]), torch.tensor([8.0, 8.0, 8.0]))
    outcomes.add(torch.tensor([2]), torch.tensor([8.0]), torch.tensor([8.0]))
    assert outcomes.correct.tolist() == [0.0, 3.0, 8.0, 0.0]
    assert outcomes.samples.tolist() == [0.0, 8.0, 12.0, 0.0]


def test_the_ring_holds_the_latest_groups_and_draws_none_that_is_empty() -> None:
    past = PastGroups(5, 0, torch.device("cpu"))
    assert past.draw(9)[2].tolist() == [0.0] * 9, "of an empty ring"
    past.insert(torch.tensor([7, 8]), torch.tensor([0.25, 0.5]), torch.tensor([8.0, 8.0]))
    index, target, _ = past.draw(200)
    assert set(zip(index.tolist(), target.tolist(), strict=True)) == {(7, 0.25), (8, 0.5)}
    assert 60 < int((index == 7).sum()) < 140, "evenly: five standard deviations are 35"
    past.insert(
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([0.3, math.nan, 0.5, 0.6]),
        torch.tensor([8.0, 8.0, 4.0, 0.0]),
    )
    index, target, samples = past.draw(200)
    assert set(index.tolist()) == {8, 1, 3}, "7 was the oldest; 2 has no number and 4 no verdict"
    assert set(samples[index == 3].tolist()) == {4.0}
    past.insert(torch.arange(20, 30), torch.arange(10) / 10, torch.full((10,), 8.0))
    assert set(past.draw(200)[0].tolist()) == {25, 26, 27, 28, 29}


def remembering(**changes: Any) -> LogZ:
    embeddings, _ = problem()
    return LogZ(embeddings, settings(memory="on", **changes), seed=0, bounded=True)


def observed(head: LogZ, accuracy: Tensor, steps: int) -> None:
    """Train on `steps` batches of 8 groups of one fixed stream."""
    source = torch.Generator().manual_seed(2)
    for _ in range(steps):
        groups = torch.randperm(PROMPTS, generator=source)[:8]
        reward = torch.bernoulli(accuracy[groups, None].expand(8, GROUP), generator=source)
        samples = torch.full((8,), float(GROUP))
        head.observe(groups, reward.sum(1), samples, reward.mean(1))
        head.fit(groups.repeat_interleave(GROUP), reward.flatten(), groups=8)


def test_the_memory_makes_more_of_the_same_rollouts() -> None:
    embeddings, accuracy = problem()
    alone = [LogZ(embeddings, settings(updates_per_step=k), seed=0, bounded=True) for k in (1, 4)]
    with_memory = remembering()
    errors = []
    for head in (with_memory, *alone):
        observed(head, accuracy, 30)
        errors.append(float((head.value_of(embeddings) - accuracy).square().mean().sqrt()))
    assert errors[0] < 0.75 * min(errors[1:]), "the predictions alone are better, too"
    assert with_memory.outcomes is not None
    unseen = with_memory.outcomes.samples == 0
    assert bool(unseen.any())
    torch.testing.assert_close(with_memory.all_values()[unseen], with_memory.value_of(embeddings)[unseen])


def test_a_prompts_own_outcomes_move_its_value_and_no_other() -> None:
    embeddings, _ = problem()
    head = remembering(updates_per_step=1, learning_rate=0.0)
    eight = torch.tensor([8.0])
    head.observe(torch.tensor([3]), eight, eight, torch.ones(1))
    head.fit(torch.full((8,), 3), torch.ones(8), groups=1)
    predicted, values = head.value_of(embeddings), head.all_values()
    assert values[3] == pytest.approx((8 * float(predicted[3]) + 8) / 16, rel=1e-5)
    assert head.value(torch.tensor([3])) == values[3]
    others = torch.arange(PROMPTS) != 3
    torch.testing.assert_close(values[others], predicted[others])
    assert predicted[3] < 0.8, "a prompt outside the table has no outcomes, even with the same text"


def test_what_was_remembered_is_part_of_the_state() -> None:
    _, accuracy = problem()
    one, two = remembering(), remembering()
    observed(one, accuracy, 5)
    moments = {name: tensor.clone() for name, tensor in optimizer_tensors(one.optimizer).items()}
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    load_optimizer_tensors(two.optimizer, moments)
    assert torch.equal(one.all_values(), two.all_values())
    fresh = (torch.arange(8).repeat_interleave(GROUP), torch.ones(8 * GROUP))
    for head in (one, two):
        head.fit(*fresh, groups=8)
    assert torch.equal(one.all_values(), two.all_values())


def test_a_step_with_a_memory_descends_the_mean_over_fresh_and_past_groups() -> None:
    """Of one past group that fills the ring, the gradient is (fresh + 2 past) / 3 by hand."""
    head = remembering(loss="tb", past_groups=1, past_per_fresh=2, updates_per_step=1, max_grad_norm=1e9)
    with torch.no_grad():
        head.mlp[-1].weight.mul_(30.0)  # type: ignore[operator, union-attr]
    index, target = torch.tensor([5, 5, 9, 9]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    head.observe(torch.tensor([200]), torch.tensor([8.0]), torch.tensor([8.0]), torch.tensor([1.0]))
    parameters = list(head.mlp.parameters())

    def predicted(prompts: Tensor) -> Tensor:
        return torch.sigmoid(head.mlp(head.inputs[prompts].float())[:, 0])

    fresh = (predicted(index) - target).square().mean()
    past = (predicted(torch.tensor([200])) - 1.0).square().mean()
    wanted = torch.autograd.grad((fresh + 2 * past) / 3, parameters)
    loss, _ = head.fit(index, target, groups=2)
    assert loss == pytest.approx(fresh.item(), rel=1e-5), "what is reported is the loss on the fresh groups"
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)

"""The head on problems whose answer is known, and what it must ignore."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paced_fast.config import LogZConfig
from paced_fast.evaluation.calibration import rank_correlation
from paced_fast.paced.log_z import LogZ

PROMPTS, WIDTH, GROUP = 400, 32, 8


def problem() -> tuple[Tensor, Tensor]:
    """Embeddings [N, H] on odd scales, and the accuracies [N] that they determine."""
    source = torch.Generator().manual_seed(1)
    features = torch.randn(PROMPTS, WIDTH, generator=source)
    direction = torch.randn(WIDTH, generator=source) / math.sqrt(WIDTH)
    accuracy = torch.sigmoid(2.0 * features @ direction - 0.5)
    return features * torch.logspace(-2, 2, WIDTH) + 3.0, accuracy


def fitted(loss: str, rate: float, steps: int = 150) -> tuple[Tensor, Tensor]:
    embeddings, accuracy = problem()
    head = LogZ(embeddings, LogZConfig(loss=loss, learning_rate=rate), seed=0, bounded=True)  # type: ignore[arg-type]
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
    head = LogZ(embeddings, LogZConfig(loss=loss, max_grad_norm=1e9), seed=0, bounded=True)  # type: ignore[arg-type]
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
    head = LogZ(embeddings[:4], LogZConfig(learning_rate=1e-2), seed=0, bounded=False)
    index, target = torch.tensor([0, 1, 2, 3]), torch.tensor([-4.0, 7.0, 2.0, 1e6])
    for _ in range(600):
        head.fit(index, target, torch.tensor([1.0, 1.0, 0.5, 0.0]))
    assert head.value(index)[:3].tolist() == pytest.approx([-4.0, 7.0, 2.0], abs=0.3)


def test_values_of_other_prompts_use_the_tables_scale() -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings, LogZConfig(), seed=0, bounded=True)
    with torch.no_grad():
        head.mlp[-1].weight.mul_(100.0)  # type: ignore[operator, union-attr]
    assert float(head.all_values().std()) > 0.1
    torch.testing.assert_close(head.value_of(embeddings[7:9]), head.all_values()[7:9])
    torch.testing.assert_close(head.value(torch.tensor([8, 7])), head.all_values()[[8, 7]])


def test_it_starts_at_one_half_the_same_for_the_same_seed() -> None:
    embeddings, _ = problem()
    ambient = torch.get_rng_state()
    one, two, other = (LogZ(embeddings, LogZConfig(), seed=seed, bounded=True).all_values() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), ambient)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert float((one - 0.5).abs().max()) < 0.15


def test_a_window_goes_round_the_table_and_what_is_drawn_is_always_new() -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings[:10], LogZConfig(scored_per_step=4), seed=0, bounded=True)
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
    again = LogZ(embeddings[:10], LogZConfig(scored_per_step=4), seed=0, bounded=True)
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
    head = LogZ(embeddings, LogZConfig(), seed=0, bounded=True)
    at_once = head.all_values()
    monkeypatch.setattr("paced_fast.paced.log_z._BLOCK", 7)
    torch.testing.assert_close(head.score(), at_once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_a_table_of_one_prompt_has_a_finite_value(number: int) -> None:
    head = LogZ(torch.full((number, WIDTH), 3.0), LogZConfig(), seed=0, bounded=True)
    for _ in range(3):
        head.fit(torch.tensor([0]), torch.tensor([1.0]))
    assert bool(head.all_values().isfinite().all())


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_target_leaves_the_head_as_it_was(poison: float, bounded: bool) -> None:
    embeddings, _ = problem()
    head = LogZ(embeddings, LogZConfig(), seed=0, bounded=bounded)
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

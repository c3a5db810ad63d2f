"""Each algorithm's loss against a formula written a second time, and updates that must not happen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_policy
import torch
from torch import Tensor

from paced_fast.config import Config
from paced_fast.data import packing
from paced_fast.data.records import Rollouts, Targets, UpdateResult
from paced_fast.paced import losses
from paced_fast.paced.losses import POLICY_LOSSES
from paced_fast.paced.targets import group_accuracy, group_advantage
from paced_fast.paced.update import learning_rate, make_optimizer, rate_note, update_policy
from paced_fast.policy import Policy
from paced_fast.policy import policy as policy_module
from paced_fast.policy.optimizer import GuardedAdamW

LENGTHS = [3, 5, 1, 2, 4, 1, 2, 6]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def made(seed: int = 0) -> tuple[Policy, Rollouts]:
    return tiny_policy.policy(), tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS, seed=seed)


def made_targets(**fields: Tensor) -> Targets:
    """Targets whose weights are 1 unless given."""
    return Targets(**{"weights": torch.ones_like(fields["signal"])} | fields)


def sums(values: Tensor, batch: Rollouts) -> Tensor:
    return torch.stack([part.sum() for part in values.split(batch.lengths)])


def means(values: Tensor, batch: Rollouts) -> Tensor:
    return torch.stack([part.mean() for part in values.split(batch.lengths)])


def loss_of(algorithm: str, policy: Policy, batch: Rollouts, targets: Targets, config: Config) -> Any:
    policy.model.zero_grad()
    out = POLICY_LOSSES[algorithm](policy.hidden(batch), policy, batch, targets, config, batch.num_sequences)
    out.loss.backward()
    return out


def assert_same_gradients(policy: Policy, loss: Tensor) -> None:
    """The gradients in `policy` are those of `loss`, which hangs on the same parameters."""
    got = tiny_policy.gradients(policy.model)
    policy.model.zero_grad()
    loss.backward()
    wanted = tiny_policy.gradients(policy.model)
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 1e-3
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=2e-5 * scale, msg=name)


def test_the_loss_gets_its_offsets_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """They plan the chunks there; with those of the device long batches would be projected twice."""
    policy, batch = made()
    real, seen = losses.trajectory_balance_loss, []
    monkeypatch.setattr(
        losses, "trajectory_balance_loss", lambda *args, **options: seen.append(args[3]) or real(*args, **options)
    )
    zeros = torch.zeros(batch.num_tokens)
    targets = made_targets(signal=batch.rewards, intercept=batch.rewards, old_logprobs=zeros, ref_logprobs=zeros)
    loss_of("paced", policy, batch, targets, tiny_policy.settings("paced"))
    assert seen[0] is not batch.cu_seqlens
    assert seen[0].device.type == "cpu"
    assert torch.equal(seen[0], batch.cu_seqlens)


@pytest.mark.parametrize("algorithm", ["paced", "flowrl", "grpo"])
def test_every_loss_may_leave_out_what_the_settings_say(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = made()
    seen = []

    def noted(function: Any) -> Any:
        return lambda *args, **options: seen.append(options["skipped_share"]) or function(*args, **options)

    monkeypatch.setattr(losses, "trajectory_balance_loss", noted(losses.trajectory_balance_loss))
    monkeypatch.setattr(policy_module, "linear_logprobs", noted(policy_module.linear_logprobs))
    zeros = torch.zeros(batch.num_tokens)
    targets = made_targets(signal=batch.rewards, intercept=batch.rewards, old_logprobs=zeros, ref_logprobs=zeros)
    loss_of(algorithm, policy, batch, targets, tiny_policy.settings(algorithm, loss__skipped_share=0.125))
    assert seen == [0.125]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.05, 0.4])
def test_trajectory_balance_is_the_mean_weighted_square(temperature: float, beta: float) -> None:
    policy, batch = made()
    config = tiny_policy.settings("paced", loss__beta=beta, generation__temperature=temperature)
    logprobs = tiny_policy.naive_logprobs(policy.model, batch, temperature)
    old = logprobs.detach() + torch.linspace(-0.4, 0.3, batch.num_tokens)
    value = torch.linspace(0.1, 0.8, 8)
    targets = made_targets(signal=batch.rewards, intercept=value, old_logprobs=old, ref_logprobs=old)
    out = loss_of("paced", policy, batch, targets, config)

    log_ratio = sums(logprobs, batch) - sums(old, batch)
    weight = log_ratio.detach().exp().clamp(max=1.28)
    assert float(weight.min()) < 1.0
    assert float(weight.max()) == pytest.approx(1.28)
    u = value + beta * log_ratio - batch.rewards
    loss = (weight * u.square()).mean() / (2 * beta)
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(out.log_ratio, log_ratio.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.weight, weight, rtol=1e-4, atol=0)
    assert_same_gradients(policy, loss)


def test_the_temperature_divides_the_bias_of_the_output_layer_in_the_loss() -> None:
    policy, batch = Policy(tiny_policy.biased(), max_tokens=4096), tiny_policy.rollouts([3, 1, 4, 2])
    config = tiny_policy.settings("tb", generation__temperature=0.6)
    logprobs = tiny_policy.naive_logprobs(policy.model, batch, 0.6)
    value = torch.linspace(0.1, 0.8, 4)
    old = logprobs.detach()
    targets = made_targets(signal=batch.rewards, intercept=value, old_logprobs=old, ref_logprobs=old)
    out = loss_of("tb", policy, batch, targets, config)
    torch.testing.assert_close(out.log_ratio, torch.zeros(4), rtol=0, atol=1e-4)
    assert_same_gradients(policy, ((value - batch.rewards) * sums(logprobs, batch)).mean())


def test_at_the_old_policy_the_gradient_is_reinforce_with_the_value_as_baseline() -> None:
    policy, batch = made()
    old, value = policy.logprobs(batch, 1.0), torch.linspace(0.1, 0.8, 8)
    targets = made_targets(signal=batch.rewards, intercept=value, old_logprobs=old, ref_logprobs=old)
    loss_of("tb", policy, batch, targets, tiny_policy.settings("tb"))
    logprobs = tiny_policy.naive_logprobs(policy.model, batch)
    assert_same_gradients(policy, ((value - batch.rewards) * sums(logprobs, batch)).mean())


def test_one_token_a_sequence_on_average_is_not_read_as_log_probs_of_tokens() -> None:
    """Four sequences with four tokens in all: per-token and per-sequence tensors have the same shape."""
    policy, batch = tiny_policy.policy(), tiny_policy.rollouts([2, 2, 0, 0], rewards=[1.0, 0.0, 0.0, 1.0])
    beta, value = 0.05, torch.tensor([0.3, 0.6, 0.2, 0.4])
    logprobs = tiny_policy.naive_logprobs(policy.model, batch)
    old = logprobs.detach() + torch.tensor([0.5, 0.3, 0.1, 0.1])
    targets = made_targets(signal=batch.rewards, intercept=value, old_logprobs=old, ref_logprobs=old)
    out = loss_of("paced", policy, batch, targets, tiny_policy.settings("paced"))
    log_ratio = torch.tensor([-0.8, -0.2, 0.0, 0.0])
    u = value + beta * log_ratio - batch.rewards
    wanted = (log_ratio.exp() * u.square()).mean() / (2 * beta)
    assert float(out.loss.detach()) == pytest.approx(float(wanted), rel=1e-4)


def test_grpo_is_the_clipped_surrogate_averaged_over_tokens_then_sequences() -> None:
    policy, batch = made()
    config = tiny_policy.settings("grpo", loss__grpo_clip=0.15)
    advantage = group_advantage(batch.rewards, torch.ones_like(batch.rewards, dtype=torch.bool), 4)
    logprobs = tiny_policy.naive_logprobs(policy.model, batch)
    old = logprobs.detach() + torch.linspace(-0.5, 0.5, batch.num_tokens)[torch.randperm(batch.num_tokens)]
    zeros = torch.zeros(8)
    out = loss_of(
        "grpo",
        policy,
        batch,
        made_targets(signal=advantage, intercept=zeros, old_logprobs=old, ref_logprobs=old),
        config,
    )

    total, clipped_above, clipped_below = torch.zeros(()), 0, 0
    parts = zip(logprobs.split(batch.lengths), old.split(batch.lengths), advantage.tolist(), strict=True)
    for new, reference, a in parts:
        tokens = []
        for now, then in zip(new, reference, strict=True):
            ratio = (now - then).exp()
            if a > 0 and ratio.item() > 1.15:
                clipped_above += 1
                tokens.append(torch.tensor(1.15 * a))
            elif a < 0 and ratio.item() < 0.85:
                clipped_below += 1
                tokens.append(torch.tensor(0.85 * a))
            else:
                tokens.append(ratio * a)
        total = total + torch.stack(tokens).sum() / len(tokens)
    assert clipped_above > 1
    assert clipped_below > 1
    loss = -total / 8
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_same_gradients(policy, loss)


def test_flowrl_has_means_inside_the_residual_and_a_capped_sum_in_the_weight() -> None:
    policy, batch = made()
    config = tiny_policy.settings("flowrl")
    scaled = 15.0 * group_advantage(batch.rewards, torch.ones_like(batch.rewards, dtype=torch.bool), 4)
    log_z = torch.linspace(-1.0, 2.0, 8)
    logprobs = tiny_policy.naive_logprobs(policy.model, batch)
    old = logprobs.detach() + torch.linspace(-1.5, 0.8, batch.num_tokens)
    ref = logprobs.detach() + torch.linspace(0.6, -0.2, batch.num_tokens)
    targets = made_targets(signal=scaled, intercept=log_z, old_logprobs=old, ref_logprobs=ref)
    out = loss_of("flowrl", policy, batch, targets, config)
    weight = sums(logprobs.detach() - old, batch).exp().clamp(max=10.0)
    assert float(weight.max()) == 10.0
    assert float(weight.min()) < 1.0
    delta = log_z + means(logprobs, batch) - scaled - means(ref, batch)
    loss = (weight * delta.square()).sum() / 8
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(out.weight, weight, rtol=1e-4, atol=0)
    assert_same_gradients(policy, loss)


def test_group_figures() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert group_accuracy(rewards, torch.ones_like(rewards, dtype=torch.bool), 3).tolist() == pytest.approx(
        [1 / 3, 1.0, 1 / 3]
    )
    deviation = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)  # of a sample: G - 1 below
    high, low = (2 / 3) / (deviation + 1e-6), (-1 / 3) / (deviation + 1e-6)
    assert group_advantage(rewards, torch.ones_like(rewards, dtype=torch.bool), 3).tolist() == pytest.approx(
        [high, low, low, 0, 0, 0, high, low, low], abs=1e-6
    )


def test_the_learning_rate_rises_over_the_updates_of_the_warm_up_steps() -> None:
    config = tiny_policy.settings(
        optimizer__learning_rate=0.2,
        optimizer__warmup_steps=5,
        optimizer__minibatches=2,
        optimizer__epochs=2,
        optimizer__decay="none",
    ).optimizer
    assert learning_rate(config, torch.tensor([0, 1, 9, 18, 19, 20, 999]), steps=30).tolist() == pytest.approx(
        [0.01, 0.02, 0.1, 0.19, 0.2, 0.2, 0.2]
    )
    without = tiny_policy.settings(
        optimizer__learning_rate=0.2, optimizer__warmup_steps=0, optimizer__decay="none"
    ).optimizer
    assert learning_rate(without, torch.tensor(0), steps=30) == 0.2


def test_a_linear_decay_ends_with_the_last_update() -> None:
    config = tiny_policy.settings(
        optimizer__learning_rate=0.2, optimizer__warmup_steps=2, optimizer__minibatches=2, optimizer__decay="linear"
    ).optimizer
    # 6 steps of 2 updates, the first 4 of them rising; the other 8 fall by a ninth each, as the tenth would be 0
    expected = [0.05, 0.1, 0.15, 0.2, *(0.2 * left / 9 for left in range(8, 0, -1)), 0.0, 0.0]
    assert learning_rate(config, torch.arange(14), steps=6).tolist() == pytest.approx(expected)
    without = tiny_policy.settings(
        optimizer__learning_rate=0.2, optimizer__warmup_steps=0, optimizer__decay="linear"
    ).optimizer
    assert learning_rate(without, torch.arange(4), steps=2).tolist() == pytest.approx([0.2, 0.15, 0.1, 0.05])
    short = learning_rate(config, torch.arange(2), steps=1)  # a run that ends within its warm-up
    assert short.tolist() == pytest.approx([0.05, 0.1])


def test_what_is_said_of_a_rate_that_is_not_as_one_would_expect() -> None:
    def noted(steps: int, done: int, **changes: Any) -> str:
        named = {"optimizer__learning_rate": 0.2, "optimizer__warmup_steps": 10, "optimizer__decay": "linear"}
        return rate_note(tiny_policy.settings(steps=steps, **{**named, **changes}), done)

    assert noted(20, 0) == "", "a warm-up of half the steps"
    assert noted(5, 0) == (
        "the learning rate reaches 0.1: its warm-up takes 10 steps, and the run has 5; "
        "--optimizer.warmup-steps shortens it"
    )
    assert noted(110, 60) == "the learning rate is 0.0995 now and falls to 0 at step 110"
    assert noted(15, 5).startswith("the learning rate reaches 0.2: its warm-up takes 10 steps, and the run has 15; ")
    assert noted(15, 5).endswith("; the learning rate is 0.11 now and falls to 0 at step 15")
    assert noted(110, 60, optimizer__decay="none") == noted(110, 110) == ""


def rate_after(config: Config, num_updates: int) -> float:
    return learning_rate(config.optimizer, torch.tensor(num_updates), steps=config.steps).item()


def run(policy: Policy, batch: Rollouts, optimizer: GuardedAdamW, config: Config, **changes: Tensor) -> UpdateResult:
    old = policy.logprobs(batch, 1.0)
    given = {"signal": batch.rewards, "intercept": torch.full((8,), 0.4), "old_logprobs": old, "ref_logprobs": old}
    return update_policy(policy, optimizer, batch, made_targets(**given | changes), config, step=1, num_updates=0)


def test_every_sequence_is_trained_on_once_an_epoch_and_minibatches_keep_groups_whole() -> None:
    policy, batch = made()
    config = tiny_policy.settings("paced", optimizer__micro_batch_tokens=10)
    seen: list[list[tuple[int, ...]]] = []
    hidden = policy.hidden

    def counted(rollouts: Rollouts) -> Tensor:
        seen.append([*rollouts.prompt_ids])
        return hidden(rollouts)

    optimizer = make_optimizer(policy, config.optimizer)
    old = policy.logprobs(batch, 1.0)
    policy.hidden = counted  # type: ignore[method-assign]
    targets = made_targets(signal=batch.rewards, intercept=torch.full((8,), 0.4), old_logprobs=old, ref_logprobs=old)
    result = update_policy(policy, optimizer, batch, targets, config, step=1, num_updates=0)
    assert (result.taken, result.skipped) == (2, 0)
    assert len(seen) > 2, "the budget asks for several micro-batches"
    assert sorted(prompt for part in seen for prompt in part) == sorted(batch.prompt_ids)
    # The first minibatch is on policy, the second sees the parameters that the first moved.
    first = [i for i in range(8) if batch.prompt_ids[i] == seen[0][0]]
    assert all(abs(float(result.log_ratio[i])) < 1e-4 for i in first)
    assert all(float(result.log_ratio[i]) != 0 for i in range(8) if i not in first)
    assert optimizer.learning_rate.item() == pytest.approx(rate_after(config, 1))
    wanted = result.log_ratio.exp().clamp(max=config.loss.importance_cap)
    torch.testing.assert_close(result.weight, wanted, rtol=1e-5, atol=0)


def test_one_update_is_adamw_on_the_clipped_gradient_of_the_whole_minibatch() -> None:
    policy, batch = made()
    config = tiny_policy.settings("tb", optimizer__minibatches=1, optimizer__micro_batch_tokens=16)
    value, logprobs = torch.full((8,), 0.4), tiny_policy.naive_logprobs(policy.model, batch)
    ((value - batch.rewards) * sums(logprobs, batch)).mean().backward()
    wanted = tiny_policy.gradients(policy.model)
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    assert norm > 1.0
    policy.model.zero_grad()
    optimizer = make_optimizer(policy, config.optimizer)
    result = run(policy, batch, optimizer, config)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert result.loss == pytest.approx(float(((value - batch.rewards) ** 2).mean() / 0.1), rel=1e-4)
    assert optimizer.learning_rate.item() == pytest.approx(2e-4 / 10)
    for name, parameter in policy.model.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * wanted[name] / norm, rtol=0, atol=1e-5, msg=name)


def snapshot(policy: Policy, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*policy.model.state_dict().values(), *moments]]


@pytest.mark.parametrize("algorithm", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("place", ["signal", "intercept", "old_logprobs"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_number_changes_nothing(algorithm: str, place: str, poison: float) -> None:
    if algorithm == "grpo" and place == "intercept":
        return
    policy, batch = made()
    config = tiny_policy.settings(algorithm, optimizer__minibatches=1)
    optimizer = make_optimizer(policy, config.optimizer)
    assert run(policy, batch, optimizer, config).taken == 1
    before, rate = snapshot(policy, optimizer), optimizer.learning_rate.item()
    old = policy.logprobs(batch, 1.0)
    spoilt = {"signal": batch.rewards, "intercept": torch.full((8,), 0.4), "old_logprobs": old}[place].clone()
    spoilt[1] = -poison  # what a token of probability 0 has for an old log-prob
    changes = {place: spoilt} | ({"ref_logprobs": spoilt} if place == "old_logprobs" else {})
    result = run(policy, batch, optimizer, config, **changes)
    assert (result.taken, result.skipped) == (0, 1)
    assert optimizer.learning_rate.item() == rate
    after = snapshot(policy, optimizer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_finite_loss_with_a_broken_gradient_changes_nothing() -> None:
    policy, batch = made()
    config = tiny_policy.settings("paced", optimizer__minibatches=2)
    optimizer = make_optimizer(policy, config.optimizer)
    weight = policy.model.get_input_embeddings().weight
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    before = snapshot(policy, optimizer)
    result = run(policy, batch, optimizer, config)
    assert math.isfinite(result.loss)
    assert (result.taken, result.skipped) == (0, 2)
    after = snapshot(policy, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))
    assert all(not moment.any() for moment in after[len(before) :]), "moments and step counts have not begun"
    handle.remove()
    assert run(policy, batch, optimizer, config).taken == 2


def test_a_minibatch_left_out_leaves_the_others_and_the_schedule() -> None:
    policy, batch = made()
    config = tiny_policy.settings("paced", optimizer__minibatches=2)
    optimizer = make_optimizer(policy, config.optimizer)
    signal = batch.rewards.clone()
    signal[0] = math.nan
    result = run(policy, batch, optimizer, config, signal=signal)
    assert (result.taken, result.skipped) == (1, 1)
    assert optimizer.learning_rate.item() == pytest.approx(rate_after(config, 0))
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())


def test_replayed_sequences_join_their_prompts_minibatch() -> None:
    policy, batch = made()
    replayed = packing.select(batch, [2, 6])
    both = packing.concat(batch, replayed)
    config = tiny_policy.settings("paced")
    old = policy.logprobs(both, 1.0)
    targets = made_targets(signal=both.rewards, intercept=torch.full((10,), 0.4), old_logprobs=old, ref_logprobs=old)
    result = update_policy(
        policy, make_optimizer(policy, config.optimizer), both, targets, config, step=1, num_updates=0
    )
    assert result.log_ratio[8:].tolist() == pytest.approx(result.log_ratio[[2, 6]].tolist(), abs=1e-5)


@pytest.mark.parametrize("algorithm", sorted(POLICY_LOSSES))
def test_a_weight_of_two_counts_a_sequence_twice_and_one_of_zero_not_at_all(algorithm: str) -> None:
    policy, batch = made()
    config = tiny_policy.settings(algorithm)
    old = policy.logprobs(batch, 1.0) + 0.01
    given = {"signal": batch.rewards, "intercept": torch.full((8,), 0.4), "old_logprobs": old, "ref_logprobs": old}
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0])
    out = loss_of(algorithm, policy, batch, made_targets(**given, weights=weights), config)
    got = tiny_policy.gradients(policy.model)
    repeated = [i for i, w in enumerate(weights.tolist()) for _ in range(int(w))]
    tokens = packing.token_positions(batch, repeated)
    twice = {name: t[tokens] if len(t) == batch.num_tokens else t[repeated] for name, t in given.items()}
    same = loss_of(algorithm, policy, packing.select(batch, repeated), made_targets(**twice), config)
    assert float(out.loss.detach()) == pytest.approx(float(same.loss.detach()), rel=1e-5)
    for name, gradient in tiny_policy.gradients(policy.model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

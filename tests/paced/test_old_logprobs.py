"""Old log-probs of the first optimiser step: taken from its own forward pass instead of a pass before it."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_policy
import torch

from paced_fast.config import Config
from paced_fast.data import packing
from paced_fast.data.distributed import ALONE
from paced_fast.data.records import Fresh, Rollouts, StepResult, Targets, UpdateResult
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.generation.over_ranks import SharedGenerator, samples_exactly
from paced_fast.paced import losses
from paced_fast.paced import targets as targets_module
from paced_fast.paced.losses import POLICY_LOSSES
from paced_fast.paced.targets import group_accuracy, make_targets
from paced_fast.paced.update import make_optimizer, minibatches, update_policy
from paced_fast.policy import Policy
from paced_fast.run.record.step_figures import fetch

LENGTHS = [3, 5, 1, 2, 4, 1, 2, 6]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def batch(config: Config, policy: Policy) -> tuple[Rollouts, Fresh]:
    """Eight sampled sequences of two prompts, one of them without a verdict, and two replayed ones where the
    algorithm may replay; the generator's log-probs are off by up to .3 nats a token."""
    sampled = tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS)
    own = policy.logprobs(sampled, config.generation.temperature)
    sampled = dataclasses.replace(
        sampled,
        generator_logprobs=own - torch.linspace(-0.3, 0.25, sampled.num_tokens),
        scored=(*sampled.scored[:5], False, *sampled.scored[6:]),
    )
    scored = torch.tensor(sampled.scored)
    fresh = Fresh(
        rollouts=sampled,
        groups=[],
        dropped=[],
        prompt_index=torch.tensor([0, 1]),
        accuracy=group_accuracy(sampled.rewards, scored, 4),
        scored=scored,
    )
    if not config.traits.may_replay:
        return sampled, fresh
    return packing.concat(sampled, packing.select(sampled, [2, 6])), fresh


def updated(
    config: Config, *, asked: list[int] | None = None, generator_is_policy: bool = False
) -> tuple[Policy, Rollouts, Targets, UpdateResult]:
    """The policy after a step of `config`; `asked` gets the sequences of every pass of the model."""
    policy = tiny_policy.policy()
    initial = tiny_policy.policy(seed=7) if config.traits.keeps_initial_policy else None
    rollouts, fresh = batch(config, policy)
    hidden = policy.hidden

    def counted(part: Rollouts) -> torch.Tensor:
        if asked is not None:
            asked.append(part.num_sequences)
        return hidden(part)

    policy.hidden = counted  # type: ignore[method-assign]
    made = make_targets(
        config,
        policy,
        initial,
        rollouts,
        fresh,
        torch.tensor([0.3, 0.6]),
        step=3,
        generator_is_policy=generator_is_policy,
    )
    optimizer = make_optimizer(policy, config.optimizer)
    return policy, rollouts, made, update_policy(policy, optimizer, rollouts, made, config, step=3, num_updates=0)


def settings(algorithm: str, mismatch: str, *, count: int = 2, epochs: int = 2) -> Config:
    return tiny_policy.settings(
        algorithm,
        generation__group_size=4,
        generation__prompts_per_step=2,
        generation__temperature=0.8,
        optimizer__minibatches=count,
        optimizer__epochs=epochs,
        optimizer__learning_rate=1e-3,
        optimizer__warmup_steps=0,
        optimizer__micro_batch_tokens=12,
        mismatch__mode=mismatch,
        mismatch__cap=1.2,
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mismatch", ["off", "sequence_truncate", "token_mask"])
@pytest.mark.parametrize("algorithm", sorted({"paced", "flowrl", "grpo"}))
def test_an_update_is_the_same_as_with_every_sequence_scored_before_it(
    algorithm: str, mismatch: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(algorithm, mismatch, count=count)
    policy, rollouts, made, result = updated(config)
    monkeypatch.setattr(targets_module, "minibatches", lambda *_, **__: [])
    other, _, scored, wanted = updated(config)
    assert not scored.unscored
    assert set(made.unscored) == set(minibatches(rollouts, config, step=3, epoch=0)[0])
    if mismatch != "off":
        assert float((scored.weights[:8] - 1).abs().max()) > 0.1, "the weights have to matter"
    assert bool((scored.weights[8:] == 1).all())
    for name in ("signal", "intercept", "old_logprobs", "ref_logprobs", "weights"):
        torch.testing.assert_close(getattr(made, name), getattr(scored, name), rtol=0, atol=2e-6, msg=name)
    for name in ("loss", "grad_norm", "log_ratio", "weight"):
        torch.testing.assert_close(getattr(result, name), getattr(wanted, name), rtol=1e-4, atol=2e-5, msg=name)
    assert (result.taken, result.skipped) == (wanted.taken, wanted.skipped) == (2 * count, 0)
    assert float(wanted.log_ratio.abs().max()) > 1e-3, "the second epoch has to see another policy"
    start = tiny_policy.policy().model.state_dict()
    for name, tensor in other.model.state_dict().items():
        assert float((tensor - start[name]).abs().max()) > 5e-4, name
        # AdamW divides by the size of a gradient, so one that is all rounding may step the other way.
        close = (policy.model.state_dict()[name] - tensor).abs() < 5e-5
        assert float(close.float().mean()) > 0.98, name


def test_the_first_minibatch_is_passed_through_once_and_what_is_left_out_is_scored() -> None:
    """Nine sequences are trained on in one optimiser step; only the one without a verdict takes a pass of its own."""
    asked: list[int] = []
    _, rollouts, made, _ = updated(settings("paced", "off", count=1, epochs=1), asked=asked)
    assert set(range(10)) - made.unscored == {5}
    assert (asked[0], sum(asked)) == (1, 10)
    policy = tiny_policy.policy()
    torch.testing.assert_close(made.old_logprobs, policy.logprobs(rollouts, 0.8), rtol=0, atol=2e-6)


@pytest.mark.parametrize("algorithm", sorted(POLICY_LOSSES))
def test_each_micro_batch_is_projected_once(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten sequences in one optimiser step, then in two: the loss takes over the log-probs that are the old ones."""
    projected: list[str] = []
    scored, fused = Policy.token_logprobs, losses.trajectory_balance_loss
    monkeypatch.setattr(Policy, "token_logprobs", lambda *a, **k: projected.append("scored") or scored(*a, **k))
    monkeypatch.setattr(losses, "trajectory_balance_loss", lambda *a, **k: projected.append("fused") or fused(*a, **k))
    for count in (1, 2):
        asked: list[int] = []
        monkeypatch.setattr(Policy, "pass_logprobs", lambda self, part, _: torch.zeros(part.num_tokens))
        projected.clear()
        updated(settings(algorithm, "off", count=count, epochs=1), asked=asked)
        assert len(projected) == len(asked) > 1
        is_fused = count == 2 and losses.POLICY_LOSSES[algorithm] is losses.trajectory_balance
        assert ("fused" in projected) == is_fused


@pytest.mark.parametrize("algorithm", sorted(POLICY_LOSSES))
def test_log_ratios_on_policy_are_zero(algorithm: str) -> None:
    _, _, _, result = updated(settings(algorithm, "off", count=1, epochs=1))
    torch.testing.assert_close(result.log_ratio, torch.zeros_like(result.log_ratio), rtol=0, atol=5e-6)


def test_the_other_fresh_sequences_have_the_generators_log_probs_where_it_is_the_policy() -> None:
    asked: list[int] = []
    _, rollouts, made, result = updated(settings("paced", "off", epochs=1), asked=asked, generator_is_policy=True)
    first = minibatches(rollouts, settings("paced", "off"), step=3, epoch=0)[0]
    assert made.unscored == set(first)
    assert made.from_generator == set(range(8)) - made.unscored, "the one without a verdict too"
    replayed = {8, 9} - made.unscored
    assert (asked[0], sum(asked)) == (len(replayed), len(replayed) + 9), "a pass for replayed ones, then the update's"
    own = tiny_policy.policy().logprobs(rollouts, 0.8)
    for i in range(10):
        at = slice(int(rollouts.cu_seqlens[i]), int(rollouts.cu_seqlens[i + 1]))
        wanted = rollouts.generator_logprobs if i in made.from_generator else own
        torch.testing.assert_close(made.old_logprobs[at], wanted[at], rtol=0, atol=2e-6)
    assert result.taken == 2


def test_the_generators_log_probs_are_the_policys_to_rounding_and_trusted_for_no_other() -> None:
    policy = tiny_policy.policy()
    generator = TransformersGenerator(policy.model, stop_ids=[tiny_policy.STOP], max_batch_sequences=16)
    prompts = [(2, 5, 7, 3), (4, 6)]
    sampling = Sampling(samples=4, max_completion_tokens=20, temperature=0.8, seed=1)
    completions = generator.generate(prompts, sampling)
    each = [prompt for prompt in prompts for _ in range(4)]
    rollouts = packing.pack(completions, each, [0] * 4 + [1] * 4, [1.0] * 8, 0, tiny_policy.CPU)
    assert rollouts.num_tokens > 30
    torch.testing.assert_close(rollouts.generator_logprobs, policy.logprobs(rollouts, 0.8), rtol=0, atol=2e-5)
    assert samples_exactly(generator, policy.model)
    assert samples_exactly(SharedGenerator(generator, ALONE), policy.model)
    assert not samples_exactly(generator, tiny_policy.model())
    rounded = tiny_policy.model(dtype=torch.bfloat16)
    other = TransformersGenerator(rounded, stop_ids=[1], max_batch_sequences=16)
    assert not samples_exactly(other, rounded)


def test_the_mismatch_on_record_is_that_of_sequences_whose_log_probs_were_computed() -> None:
    """The generator's are off by up to .3 nats; where they were taken over they would show no difference at all."""
    config = settings("paced", "off", epochs=1)
    _, rollouts, made, result = updated(config, generator_is_policy=True)
    _, fresh = batch(config, tiny_policy.policy())
    step = StepResult(
        fresh=fresh,
        rollouts=rollouts,
        replayed=None,
        targets=made,
        update=result,
        learning_rate=torch.tensor(0.1),
        visits=torch.zeros(2),
        values=None,
        head=None,
    )
    found = fetch(step, None, mismatch_cap=2.0)
    own = tiny_policy.policy().logprobs(fresh.rollouts, 0.8)
    difference = (own - fresh.rollouts.generator_logprobs).abs()
    tokens = packing.token_positions(fresh.rollouts, sorted(i for i in made.unscored if i < 8))
    assert 0 < len(tokens) < fresh.rollouts.num_tokens
    assert found["generator_mismatch_mean"] == pytest.approx(float(difference[tokens].mean()), abs=1e-5)
    assert found["generator_mismatch_max"] == pytest.approx(float(difference[tokens].max()), abs=1e-5)

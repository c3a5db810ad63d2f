"""Batches at the edge: each gives a finite loss and the gradient of its formula over the sequences that have a verdict.

The oracle is autograd in float64 on separate sequences, with the formulas of each algorithm written out once more.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import tiny_policy
import torch
from torch import Tensor

from paced_fast.config import Config
from paced_fast.data import packing
from paced_fast.data.records import Completion, Rollouts, Targets
from paced_fast.paced.losses import POLICY_LOSSES
from paced_fast.paced.targets import group_accuracy, group_advantage
from paced_fast.paced.update import make_optimizer, update_policy
from paced_fast.policy import Policy
from paced_fast.policy.optimizer import GuardedAdamW

SIZE = 4  # completions of a prompt
VALUE = 0.4
ALGORITHMS = ("paced", "tb_group", "flowrl", "grpo")  # tb has the loss and the intercept of paced

BATCHES: dict[str, tuple[list[int], list[float | None]]] = {
    "usual": ([3, 5, 1, 2, 4, 1, 2, 6], [1, 0, 1, 0, 0, 0, 1, 0]),
    "one token each": ([1] * 8, [1, 0, 1, 0, 0, 0, 1, 0]),
    "some without tokens": ([0, 3, 0, 2, 4, 0, 1, 1], [1, 0, 1, 0, 0, 0, 1, 0]),
    "a group without tokens": ([0, 0, 0, 0, 4, 2, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0]),
    "no tokens at all": ([0] * 8, [0, 0, 0, 0, 0, 0, 0, 0]),
    "all right": ([3, 5, 1, 2, 4, 1, 2, 6], [1] * 8),
    "all wrong": ([3, 5, 1, 2, 4, 1, 2, 6], [0] * 8),
    "one group all right": ([3, 5, 1, 2, 4, 1, 2, 6], [1, 1, 1, 1, 0, 0, 1, 0]),
    "some unscored": ([3, 5, 1, 2, 4, 1, 2, 6], [1, None, 1, 0, None, None, 1, 0]),
    "a group unscored": ([3, 5, 1, 2, 4, 1, 2, 6], [None] * 4 + [0, 0, 1, 0]),
    "one scored": ([3, 5, 1, 2, 4, 1, 2, 6], [None] * 5 + [1, None, None]),
    "one scored, without tokens": ([3, 5, 1, 2, 4, 0, 2, 6], [None] * 5 + [0, None, None]),
    "left out: no tokens and no verdict": ([3, 0, 1, 2, 4, 1, 0, 6], [1, None, 1, 0, 0, 0, None, 0]),
    "one long among short": ([40, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0, 1, 0]),
    "between right and wrong": ([3, 5, 1, 2, 4, 1, 2, 6], [0.5, 0.25, 1, 0, 0, 0.125, 1, 0]),
}
"""Lengths and rewards of two groups of four; None is no verdict."""


@functools.cache
def _policy() -> Policy:
    """Nothing here moves its parameters."""
    return tiny_policy.policy()


@functools.cache
def _exact_model() -> Any:
    return tiny_policy.model(dtype=torch.float64)


def _packed(lengths: list[int], rewards: list[float | None]) -> Rollouts:
    source = torch.Generator().manual_seed(0)
    completions = [
        Completion(
            token_ids=torch.randint(0, tiny_policy.VOCAB, (n,), generator=source).tolist(),
            logprobs=[-1.0] * n,
            stopped=i % 2 == 0,  # every other one was cut at the limit, which changes nothing
        )
        for i, n in enumerate(lengths)
    ]
    index = [i // SIZE for i in range(len(lengths))]
    return packing.pack(completions, [(2 + i, 5, 3) for i in index], index, rewards, 0, torch.device("cpu"))


def _targets(algorithm: str, batch: Rollouts, old: Tensor) -> Targets:
    scored = torch.tensor(batch.scored)
    signal = batch.rewards
    if algorithm in ("grpo", "flowrl"):
        signal = group_advantage(batch.rewards, scored, SIZE)
    intercept = torch.full_like(signal, VALUE)
    if algorithm == "tb_group":
        intercept = group_accuracy(batch.rewards, scored, SIZE).repeat_interleave(SIZE)
    ref = old - 0.02 if algorithm == "flowrl" else old
    return Targets(
        signal=signal, intercept=intercept, old_logprobs=old, ref_logprobs=ref, weights=torch.ones_like(signal)
    )


def _oracle(algorithm: str, batch: Rollouts, targets: Targets, config: Config) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients over the scored sequences in float64, one forward pass per sequence."""
    model = _exact_model()
    model.zero_grad()
    logprobs = tiny_policy.naive_logprobs(model, batch).split(batch.lengths)
    old, ref = (x.double().split(batch.lengths) for x in (targets.old_logprobs, targets.ref_logprobs))
    losses, beta = [], config.loss.beta
    for i, is_scored in enumerate(batch.scored):
        if not is_scored:
            continue
        gap, signal, intercept = (logprobs[i] - old[i]), float(targets.signal[i]), float(targets.intercept[i])
        count = max(1, batch.lengths[i])
        if algorithm == "grpo":
            ratio = gap.exp()
            eps = config.loss.grpo_clip
            losses.append(-torch.minimum(ratio * signal, ratio.clamp(1 - eps, 1 + eps) * signal).sum() / count)
        elif algorithm == "flowrl":
            weight = min(math.exp(float(gap.detach().sum())), config.loss.flowrl_importance_cap)
            losses.append(weight * (intercept + (logprobs[i].sum() - ref[i].sum()) / count - signal) ** 2)
        else:
            weight = min(math.exp(float(gap.detach().sum())), config.loss.importance_cap)
            losses.append(weight * (intercept + beta * gap.sum() - signal) ** 2 / (2 * beta))
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach()), tiny_policy.gradients(model)


def test_the_table_has_every_loss() -> None:
    assert {POLICY_LOSSES[name] for name in ALGORITHMS} == set(POLICY_LOSSES.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", BATCHES)
def test_an_edge_batch_has_a_finite_loss_and_the_gradient_of_its_formula(
    name: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def keep(self: GuardedAdamW, loss: Tensor, norm: Tensor) -> Tensor:
        seen.update(loss=float(loss), norm=float(norm), gradients=tiny_policy.gradients(policy.model))
        return torch.isfinite(loss) & torch.isfinite(norm)

    monkeypatch.setattr(GuardedAdamW, "guarded_step", keep)
    policy, batch = _policy(), _packed(*BATCHES[name])
    config = tiny_policy.settings(algorithm, optimizer__minibatches=1, optimizer__max_grad_norm=1e9)
    old = policy.logprobs(batch, 1.0) + 0.01
    targets = _targets(algorithm, batch, old)
    update = update_policy(
        policy, make_optimizer(policy, config.optimizer), batch, targets, config, step=1, num_updates=0
    )
    loss, wanted = _oracle(algorithm, batch, targets, config)
    assert int(update.taken) == 1
    assert math.isfinite(seen["loss"])
    assert math.isfinite(seen["norm"])
    assert seen["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    scale = max(float(g.abs().max()) for g in wanted.values())
    for key, gradient in wanted.items():
        torch.testing.assert_close(seen["gradients"][key].double(), gradient, rtol=1e-4, atol=2e-5 * scale + 1e-9)
    scored_tokens = sum(n for n, is_scored in zip(batch.lengths, batch.scored, strict=True) if is_scored)
    if scored_tokens == 0 or (algorithm == "grpo" and name in ("all right", "all wrong")):
        assert scale == 0.0
        assert seen["norm"] == 0.0  # nothing to learn, to the bit
    assert [w for w, is_scored in zip(update.weight.tolist(), batch.scored, strict=True) if not is_scored and w] == []

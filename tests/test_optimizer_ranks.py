"""The policy's optimiser on one rank and spread over two and four: the same steps, whatever the spread.

R = ranks. The model has a vocabulary of 11, which neither 2 nor 4 divides; its other matrices have 16 or 24 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_policy
import torch
import torch.distributed as dist
from rank_pool import RankPool, pools
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from paced_fast import pack
from paced_fast.optimizer import PolicyOptimizer
from paced_fast.policy import Policy
from paced_fast.update import POLICY_LOSSES, Targets, make_optimizer

LENGTHS = [3, 5, 1, 2, 4, 1, 2, 6]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
MICRO_BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7]]
"""Three, so that of four ranks one has none."""
STEPS, RATE = 3, 1e-2


@pytest.fixture(scope="module")
def new_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], RankPool]]:
    with pools(4, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


@pytest.fixture
def ranks(new_pool: Callable[[], RankPool]) -> RankPool:
    return new_pool()


def made_policy(*, tied: bool, dtype: torch.dtype = torch.float32) -> Policy:
    model = tiny_policy.model(sharpness=4.0)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True
    return Policy(model.to(dtype), max_tokens=4096)


def made_optimizer(policy: Policy, mesh: Any = None) -> PolicyOptimizer:
    config = tiny_policy.settings(optimizer__learning_rate=RATE, optimizer__weight_decay=0.1).optimizer
    return make_optimizer(policy, config, mesh)


def backward(policy: Policy, optimizer: PolicyOptimizer, mine: list[list[int]], poison: float = 1.0) -> Tensor:
    """Gradients and loss of these micro-batches, each divided by the sequences of all."""
    batch = tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS)
    config = tiny_policy.settings("tb")
    total = torch.zeros(())
    for k, chosen in enumerate(mine, start=1):
        part = pack.part(batch, chosen)
        old = torch.full((part.rollouts.num_tokens,), -2.0)
        signal = part.rollouts.rewards * poison
        count = len(signal)
        targets = Targets(
            signal=signal,
            intercept=torch.full((count,), 0.4),
            old_logprobs=old,
            ref_logprobs=old,
            weights=torch.ones(count),
        )
        out = POLICY_LOSSES["tb"](policy.hidden(part.rollouts), policy, part.rollouts, targets, config, len(LENGTHS))
        optimizer.before_backward(is_last=k == len(mine))
        out.loss.backward()
        total += out.loss.detach()
    return total


def trained(policy: Policy, optimizer: PolicyOptimizer, rank: int, size: int, max_norm: float) -> list[Any]:
    """Loss and gradient norm of each of the steps."""
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = backward(policy, optimizer, MICRO_BATCHES[rank::size])
        step = optimizer.clip_and_step(loss, max_norm)
        assert bool(step.taken)
        found.append((float(step.loss), float(step.grad_norm)))
    return found


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in full.items()}


def parameters(policy: Policy) -> dict[str, Tensor]:
    return whole(dict(policy.named_parameters()))


def reference(tied: bool, dtype: torch.dtype, max_norm: float) -> tuple[list[Any], dict[str, Tensor], Policy]:
    policy = made_policy(tied=tied, dtype=dtype)
    optimizer = made_optimizer(policy)
    found = trained(policy, optimizer, 0, 1, max_norm)
    return found, whole(optimizer.named_state()), policy


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        atol = tolerance * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        everywhere = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, value.contiguous())
        assert all(torch.equal(other, value) for other in everywhere), name


def check_replicated(rank: int, tied: bool, dtype: torch.dtype, max_norm: float) -> None:
    size = dist.get_world_size()
    steps, state, alone = reference(tied, dtype, max_norm)
    policy = made_policy(tied=tied, dtype=dtype)
    before = {name: parameter.data_ptr() for name, parameter in policy.named_parameters().items()}
    optimizer = made_optimizer(policy, init_device_mesh("cpu", (size,)))
    for found, wanted in zip(trained(policy, optimizer, rank, size, max_norm), steps, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4 if dtype == torch.float32 else 2e-2)
    assert_near(whole(optimizer.named_state()), state, 2e-5 if dtype == torch.float32 else 2e-2)
    assert_near(parameters(policy), parameters(alone), 2e-5 if dtype == torch.float32 else 2e-2)
    assert_same_on_all_ranks(parameters(policy))
    assert before == {name: parameter.data_ptr() for name, parameter in policy.named_parameters().items()}
    if dtype == torch.bfloat16:
        for name, parameter in policy.named_parameters().items():
            assert torch.equal(parameter, whole(optimizer.named_state())[f"policy.{name}"].bfloat16())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_replicated_ranks_take_the_steps_of_one(ranks: RankPool, size: int, dtype: torch.dtype, tied: bool) -> None:
    ranks.run(size, check_replicated, tied, dtype, 0.5)

"""The policy's optimiser on one rank and spread over two and four: the same steps, whatever the spread.

R = ranks. The model has a vocabulary of 11, which neither 2 nor 4 divides; its other matrices have 16 or 24 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import tiny_policy
import torch
import torch.distributed as dist
from rank_pool import RankPool, pools
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from paced_fast import pack
from paced_fast.distributed import World
from paced_fast.optimizer import PolicyOptimizer
from paced_fast.policy import Policy
from paced_fast.sharding import shards_mesh
from paced_fast.update import Targets, _micro_loss, make_optimizer

LENGTHS = [3, 5, 1, 2, 4, 1, 2, 6]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
MICRO_BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7]]
"""Three, so that of four ranks one has none."""
STEPS, RATE, MAX_NORM = 3, 1e-2, 0.2


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
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Policy(model, max_tokens=4096)


def made_optimizer(policy: Policy, mesh: Any = None) -> PolicyOptimizer:
    config = tiny_policy.settings(optimizer__learning_rate=RATE, optimizer__weight_decay=0.1).optimizer
    return make_optimizer(policy, config, mesh)


def backward(policy: Policy, optimizer: PolicyOptimizer, rank: int, size: int, poison: float = 1.0) -> Tensor:
    """Gradients and loss of this rank's micro-batches, each divided by the sequences of all."""
    batch = tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS)
    config = tiny_policy.settings("tb")
    total = torch.zeros(())
    mine = [(chosen, 1.0) for chosen in MICRO_BATCHES[rank::size]]
    if policy.lockstep:
        longest = -(-len(MICRO_BATCHES) // size)
        mine += [(MICRO_BATCHES[0], 0.0)] * (longest - len(mine))
    for k, (chosen, weight) in enumerate(mine, start=1):
        part = pack.part(batch, chosen)
        old = torch.full((part.rollouts.num_tokens,), -2.0)
        count = len(chosen)
        targets = Targets(
            signal=part.rollouts.rewards * poison,
            intercept=torch.full((count,), 0.4),
            old_logprobs=old,
            ref_logprobs=old,
            weights=torch.full((count,), weight),
        )
        out = policy.run(partial(_micro_loss, policy, part.rollouts, targets, config, len(LENGTHS)))
        optimizer.before_backward(is_last=k == len(mine))
        out.loss.backward()
        total += out.loss.detach()
    return total


def trained(policy: Policy, optimizer: PolicyOptimizer, rank: int, size: int, steps: int = STEPS) -> list[Any]:
    """Loss and gradient norm of each of the steps."""
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = backward(policy, optimizer, rank, size)
        step = optimizer.clip_and_step(loss, MAX_NORM)
        assert bool(step.taken)
        found.append((float(step.loss), float(step.grad_norm)))
    return found


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in full.items()}


def parameters(policy: Policy) -> dict[str, Tensor]:
    return whole(dict(policy.named_parameters()))


def reference(*, tied: bool, dtype: torch.dtype, steps: int = STEPS) -> tuple[list[Any], dict[str, Tensor], Policy]:
    """What one rank finds: figures of the steps, the state after them, and the policy."""
    policy = made_policy(tied=tied, dtype=dtype)
    optimizer = made_optimizer(policy)
    found = trained(policy, optimizer, 0, 1, steps)
    return found, whole(optimizer.named_state()), policy


def spread(way: str, *, tied: bool, dtype: torch.dtype) -> tuple[Policy, PolicyOptimizer]:
    """The same policy over all ranks."""
    size, policy = dist.get_world_size(), made_policy(tied=tied, dtype=dtype)
    if way == "replicated":
        return policy, made_optimizer(policy, init_device_mesh("cpu", (size,)))
    local = size // 2 if way == "hybrid" else size
    world = World(dist.get_rank(), size, dist.get_rank() % local, local)
    policy.shard(shards_mesh(world, policy.device), dtype)
    return policy, made_optimizer(policy)


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


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def check_same_steps(rank: int, way: str, tied: bool, dtype: torch.dtype) -> None:
    steps, state, alone = reference(tied=tied, dtype=dtype)
    assert steps[0][1] > 2 * MAX_NORM, "the gradient is clipped"
    policy, optimizer = spread(way, tied=tied, dtype=dtype)
    before = {name: parameter.data_ptr() for name, parameter in policy.named_parameters().items()}
    for found, wanted in zip(trained(policy, optimizer, rank, dist.get_world_size()), steps, strict=True):
        assert found == pytest.approx(wanted, rel=5 * TOLERANCE[dtype])
    found = whole(optimizer.named_state())
    assert_near(found, state, TOLERANCE[dtype])
    parameters = whole(dict(policy.named_parameters()))
    assert_same_on_all_ranks(parameters)
    if way == "replicated":
        assert_near(parameters, whole(dict(alone.named_parameters())), TOLERANCE[dtype])
        assert before == {name: parameter.data_ptr() for name, parameter in policy.named_parameters().items()}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, found[f"policy.{name}"].to(parameter.dtype))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("way", "size"), [("replicated", 2), ("replicated", 4), ("sharded", 2), ("sharded", 4), ("hybrid", 4)]
)
def test_any_spread_takes_the_steps_of_one_rank(
    ranks: RankPool, way: str, size: int, dtype: torch.dtype, tied: bool
) -> None:
    ranks.run(size, check_same_steps, way, tied, dtype)

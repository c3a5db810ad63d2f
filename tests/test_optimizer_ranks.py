"""The policy's optimiser on one rank and spread over two and four: the same steps, whatever the spread.

R = ranks. The model has a vocabulary of 11, which neither 2 nor 4 divides; its other matrices have 16 or 24 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
import torch.distributed as dist
from rank_pool import RankPool, pools
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from paced_fast import pack
from paced_fast.distributed import World
from paced_fast.generate import TransformersGenerator
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


@pytest.mark.parametrize(
    ("way", "size", "dtype", "tied"),
    [
        ("replicated", 2, torch.float32, True),
        ("replicated", 2, torch.bfloat16, False),
        ("replicated", 4, torch.float32, False),
        ("replicated", 4, torch.bfloat16, True),
        ("sharded", 2, torch.float32, False),
        ("sharded", 2, torch.bfloat16, True),
        ("sharded", 4, torch.float32, True),
        ("sharded", 4, torch.bfloat16, False),
        ("hybrid", 4, torch.float32, True),
        ("hybrid", 4, torch.bfloat16, False),
    ],
)
def test_any_spread_takes_the_steps_of_one_rank(
    ranks: RankPool, way: str, size: int, dtype: torch.dtype, tied: bool
) -> None:
    ranks.run(size, check_same_steps, way, tied, dtype)


def snapshot(optimizer: PolicyOptimizer, policy: Policy) -> dict[str, Tensor]:
    return {**whole(optimizer.named_state()), **whole(dict(policy.named_parameters()))}


def check_poison(rank: int, way: str) -> None:
    """A loss, then a gradient, that is not finite on rank 1 leaves every rank as it was."""
    size = dist.get_world_size()
    policy, optimizer = spread(way, tied=True, dtype=torch.bfloat16 if way == "replicated" else torch.float32)
    trained(policy, optimizer, rank, size, steps=1)
    before, is_bad = snapshot(optimizer, policy), rank == 1
    for poison, spoils_gradient in ((math.nan, False), (math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        loss = backward(policy, optimizer, rank, size, poison=poison if is_bad else 1.0)
        if spoils_gradient and is_bad:
            assert loss.isfinite()
            vector = optimizer._parts[-2].parameter
            assert vector.dim() == 1
            assert vector.grad is not None
            grad = vector.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(math.nan)
        step = optimizer.clip_and_step(loss, MAX_NORM)
        assert not step.taken
        assert not (step.grad_norm if spoils_gradient else step.loss).isfinite()
        after = snapshot(optimizer, policy)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    trained(policy, optimizer, rank, size, steps=1)
    assert not torch.equal(snapshot(optimizer, policy)["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize(("way", "size"), [("replicated", 2), ("sharded", 2), ("hybrid", 4)])
def test_a_number_that_is_not_finite_on_one_rank_stops_the_step_of_all(ranks: RankPool, way: str, size: int) -> None:
    ranks.run(size, check_poison, way)


def check_saves(rank: int, way: str, dtype: torch.dtype, folder: str) -> dict[str, Tensor]:
    policy, optimizer = spread(way, tied=True, dtype=dtype)
    trained(policy, optimizer, rank, dist.get_world_size(), steps=2)
    writer = HuggingFaceStorageWriter(folder, save_distributed=True)
    save(optimizer.named_state(), storage_writer=writer)
    return whole(optimizer.named_state())


def check_loads(rank: int, way: str, dtype: torch.dtype, folder: str, saved: dict[str, Tensor]) -> None:
    size = dist.get_world_size()
    policy, optimizer = spread(way, tied=True, dtype=dtype)
    load(optimizer.named_state(), storage_reader=HuggingFaceStorageReader(folder))
    optimizer.publish()
    found = whole(optimizer.named_state())
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    parameters = whole(dict(policy.named_parameters()))
    assert all(torch.equal(value, saved[f"policy.{name}"].to(value.dtype)) for name, value in parameters.items())
    # Going on is the third step of a run that was never interrupted.
    trained(policy, optimizer, rank, size, steps=1)
    assert_near(whole(optimizer.named_state()), reference(tied=True, dtype=dtype)[1], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_what_two_ranks_save_goes_on_with_one_and_with_four_in_either_mode(
    ranks: RankPool, way: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = ranks.run(2, check_saves, way, dtype, str(tmp_path / "state"))[0]
    other = "sharded" if way == "replicated" else "replicated"
    ranks.run(4, check_loads, other, dtype, str(tmp_path / "state"), saved)
    ranks.run(1, check_loads, "replicated", dtype, str(tmp_path / "state"), saved)


def check_passes(rank: int) -> None:
    """Passes without gradients: together, and of different number where everything is gathered."""
    alone, (policy, optimizer) = made_policy(tied=True), spread("sharded", tied=True, dtype=torch.float32)
    batch = tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS)
    wanted = alone.logprobs(batch, 0.7)
    torch.testing.assert_close(policy.logprobs(batch, 0.7), wanted, rtol=0, atol=1e-4)
    prompts = [(1, 2, 3), (4, 5)]
    torch.testing.assert_close(policy.embed(prompts), alone.embed(prompts), rtol=0, atol=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in policy.named_parameters().values())
    with policy.whole():
        generators = [
            TransformersGenerator(one.model, stop_ids=[tiny_policy.STOP], max_batch_sequences=8)
            for one in (policy, alone)
        ]
        found, expected = (
            one.generate(
                [(1, 2), (3, 4, 5)][: rank + 1],
                group_size=2,
                max_completion_tokens=5 * rank + 3,
                temperature=1.0,
                seed=1,
            )
            for one in generators
        )
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        for _ in range(rank):
            torch.testing.assert_close(policy.logprobs(batch, 0.7), wanted, rtol=0, atol=1e-4)
    assert all(isinstance(parameter, DTensor) for parameter in policy.named_parameters().values())
    assert trained(policy, optimizer, rank, 2) == pytest.approx(trained(alone, made_optimizer(alone), 0, 1), rel=1e-4)


def test_sharded_ranks_sample_as_long_as_each_likes(ranks: RankPool) -> None:
    ranks.run(2, check_passes)

"""The policy's optimiser on one rank and spread over two and four: the same steps, whatever the spread.

R = ranks. The model has a vocabulary of 11, which neither 2 nor 4 divides; its other matrices have 16 or 24 rows.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_policy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.ranks import import_ahead, on_ranks
from paced_fast.config import LoraConfig
from paced_fast.data import packing
from paced_fast.data.distributed import World
from paced_fast.data.records import Targets
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.paced.update import _micro_loss, make_optimizer
from paced_fast.policy import Policy, adapt, plain_parameters
from paced_fast.policy.optimizer import GuardedAdamW, PolicyOptimizer
from paced_fast.policy.sharding import replicas_mesh, shards_mesh
from paced_fast.run.plan import memory
from paced_kernels import _backend

import_ahead("pytest", "tiny_policy", "paced_fast.paced.update", "paced_fast.generation", "torch._dynamo")

LENGTHS = [3, 5, 1, 2, 4, 1, 2, 6]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
MICRO_BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7]]
"""Three, so that of four ranks one has none."""
STEPS, RATE, MAX_NORM = 3, 1e-2, 0.2


def made_policy(*, tied: bool, dtype: torch.dtype = torch.float32) -> Policy:
    model = tiny_policy.model(sharpness=4.0)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Policy(model, max_tokens=4096)


def made_optimizer(policy: Policy, mesh: Any = None, *, split_gradients: bool = False) -> PolicyOptimizer:
    config = tiny_policy.settings(optimizer__learning_rate=RATE, optimizer__weight_decay=0.1).optimizer
    return make_optimizer(policy, config, mesh, split_gradients=split_gradients)


def backward(policy: Policy, optimizer: Any, rank: int, size: int, poison: float = 1.0, is_last: bool = True) -> Tensor:
    """Gradients and loss of this rank's micro-batches, each divided by the sequences of all."""
    batch = tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS)
    config = tiny_policy.settings("tb")
    total = torch.zeros(())
    mine = [(chosen, 1.0) for chosen in MICRO_BATCHES[rank::size]]
    if policy.lockstep:
        longest = -(-len(MICRO_BATCHES) // size)
        mine += [(MICRO_BATCHES[0], 0.0)] * (longest - len(mine))
    for k, (chosen, weight) in enumerate(mine, start=1):
        part = packing.part(batch, chosen)
        old = torch.full((part.rollouts.num_tokens,), -2.0)
        count = len(chosen)
        targets = Targets(
            signal=part.rollouts.rewards * poison,
            intercept=torch.full((count,), 0.4),
            old_logprobs=old,
            ref_logprobs=old,
            weights=torch.full((count,), weight),
        )
        compute = partial(_micro_loss, policy, part.rollouts, targets, config, len(LENGTHS))
        out, _ = policy.run(partial(compute, sampled=torch.ones(count, dtype=torch.bool), scores=False))
        optimizer.before_backward(is_last=is_last and k == len(mine))
        out.loss.backward()
        total += out.loss.detach()
        if getattr(optimizer, "split_gradients", False):
            whole_ones = [p for p in policy.parameters() if p.dim() > 1 and p.shape[0] >= size and p.grad is not None]
            assert not whole_ones, "a rank keeps its part of a sum and no whole gradient"
    if getattr(optimizer, "split_gradients", False):
        for _ in range(-(-len(MICRO_BATCHES) // size) - len(mine)):
            optimizer.skip_backward()
    return total


def trained(policy: Policy, optimizer: PolicyOptimizer, rank: int, size: int, steps: int = STEPS) -> list[Any]:
    """Loss and gradient norm of each of the steps; the loss multiplies in float32, whatever this processor has, because
    roundings of its products are not what is compared."""
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        with mock.patch.object(_backend, "HAS_UNITS", False):
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


def spread(world: World, way: str, *, tied: bool, dtype: torch.dtype) -> tuple[Policy, PolicyOptimizer]:
    """The same policy over all ranks."""
    policy = made_policy(tied=tied, dtype=dtype)
    if way in REPLICATED:
        mesh = replicas_mesh(world, policy.device)
        return policy, made_optimizer(policy, mesh, split_gradients=way == "split gradients")
    if way == "hybrid":
        half = world.size // 2
        world = World(world.rank, world.size, world.rank % half, half)
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


rest = partial(pytest.param, marks=pytest.mark.exhaustive)
REPLICATED = ("replicated", "split gradients")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def check_same_steps(world: World, way: str, tied: bool, dtype: torch.dtype) -> None:
    steps, state, alone = reference(tied=tied, dtype=dtype)
    assert steps[0][1] > 2 * MAX_NORM, "the gradient is clipped"
    policy, optimizer = spread(world, way, tied=tied, dtype=dtype)
    before = {name: parameter.data_ptr() for name, parameter in policy.named_parameters().items()}
    for found, wanted in zip(trained(policy, optimizer, world.rank, world.size), steps, strict=True):
        assert found == pytest.approx(wanted, rel=5 * TOLERANCE[dtype])
    found = whole(optimizer.named_state())
    assert_near(found, state, TOLERANCE[dtype])
    parameters = whole(dict(policy.named_parameters()))
    assert_same_on_all_ranks(parameters)
    if way in REPLICATED:
        assert_near(parameters, whole(dict(alone.named_parameters())), TOLERANCE[dtype])
        assert before == {name: parameter.data_ptr() for name, parameter in policy.named_parameters().items()}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, found[f"policy.{name}"].to(parameter.dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "size", "dtype", "tied"),
    [
        ("replicated", 2, torch.float32, True),
        ("replicated", 4, torch.bfloat16, True),
        ("split gradients", 2, torch.float32, True),
        ("split gradients", 4, torch.bfloat16, False),
        ("sharded", 2, torch.bfloat16, True),
        ("sharded", 4, torch.float32, True),
        ("hybrid", 4, torch.bfloat16, False),
        rest("replicated", 2, torch.bfloat16, False),
        rest("replicated", 4, torch.float32, False),
        rest("sharded", 2, torch.float32, False),
        rest("sharded", 4, torch.bfloat16, False),
        rest("hybrid", 4, torch.float32, True),
    ],
)
def test_any_spread_takes_the_steps_of_one_rank(way: str, size: int, dtype: torch.dtype, tied: bool) -> None:
    on_ranks(size, check_same_steps, way, tied, dtype)


def check_adapters(world: World, dtype: torch.dtype) -> None:
    """Low-rank matrices in shards beside frozen weights in shards."""

    def adapted() -> Policy:
        policy = made_policy(tied=False, dtype=dtype)
        adapt(policy.model, LoraConfig(rank=3, alpha=6), seed=3)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1)
        return policy

    torch.manual_seed(1)
    alone = adapted()
    optimizer = made_optimizer(alone)
    start = whole(optimizer.named_state())
    steps = trained(alone, optimizer, 0, 1)
    wanted = whole(optimizer.named_state())
    names = [name for name in wanted if name.startswith("policy.")]
    assert len(names) == 2 * 2 * 7
    assert all(not torch.equal(wanted[name], start[name]) for name in names)
    torch.manual_seed(1)
    policy = adapted()
    policy.shard(shards_mesh(world, policy.device), dtype)
    optimizer = made_optimizer(policy)
    for found, expected in zip(trained(policy, optimizer, world.rank, world.size), steps, strict=True):
        assert found == pytest.approx(expected, rel=5 * TOLERANCE[dtype])
    assert_near(whole(optimizer.named_state()), wanted, TOLERANCE[dtype])
    merged, plain = (
        {name: value.float() for name, value in whole(dict(plain_parameters(one.model))).items()}
        for one in (policy, alone)
    )
    assert_near(merged, plain, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, rest(torch.bfloat16)])
def test_adapters_in_shards_take_the_steps_of_one_rank(dtype: torch.dtype) -> None:
    on_ranks(2, check_adapters, dtype)


def check_computed_again(world: World, dtype: torch.dtype) -> None:
    """Layers whose parameters are gathered once more, for the second time that they are computed."""
    steps, wanted, _ = reference(tied=True, dtype=dtype)
    calls = {}
    for again in (False, True):
        made = made_policy(tied=True, dtype=dtype)
        policy = Policy(made.model, max_tokens=4096, checkpoint=again)
        policy.shard(shards_mesh(world, policy.device), dtype)
        optimizer = made_optimizer(policy)
        seen: list[int] = []
        layer: Any = policy.model.model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        for found, expected in zip(trained(policy, optimizer, world.rank, world.size), steps, strict=True):
            assert found == pytest.approx(expected, rel=5 * TOLERANCE[dtype])
        assert_near(whole(optimizer.named_state()), wanted, TOLERANCE[dtype])
        calls[again] = len(seen)
    assert calls == {False: 2 * STEPS, True: 4 * STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [rest(torch.float32), torch.bfloat16])
def test_layers_in_shards_are_computed_again_for_the_steps_of_one_rank(dtype: torch.dtype) -> None:
    on_ranks(2, check_computed_again, dtype)


def snapshot(optimizer: PolicyOptimizer, policy: Policy) -> dict[str, Tensor]:
    return {**whole(optimizer.named_state()), **whole(dict(policy.named_parameters()))}


def check_poison(world: World, way: str) -> None:
    """A loss, then a gradient, that is not finite on rank 1 leaves every rank as it was."""
    policy, optimizer = spread(world, way, tied=True, dtype=torch.bfloat16 if way in REPLICATED else torch.float32)
    trained(policy, optimizer, world.rank, world.size, steps=1)
    before, is_bad = snapshot(optimizer, policy), world.rank == 1
    for poison, spoils_gradient in ((math.nan, False), (math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        loss = backward(policy, optimizer, world.rank, world.size, poison=poison if is_bad else 1.0)
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
    trained(policy, optimizer, world.rank, world.size, steps=1)
    assert not torch.equal(snapshot(optimizer, policy)["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("way", "size"), [("replicated", 2), ("split gradients", 2), ("sharded", 2), ("hybrid", 4)])
def test_a_number_that_is_not_finite_on_one_rank_stops_the_step_of_all(way: str, size: int) -> None:
    on_ranks(size, check_poison, way)


def with_idle_parameters(policy: Policy) -> Policy:
    """Trainable ones that no pass uses: a matrix of many rows, of few, and a vector; `late` is used by hand."""
    model: Any = policy.model
    model.late = torch.nn.Parameter(torch.full((12, 3), 2.0))
    model.idle_matrix = torch.nn.Parameter(torch.full((9, 3), 3.0))
    model.idle_row = torch.nn.Parameter(torch.full((1, 3), 4.0))
    model.model.layers[0].idle_vector = torch.nn.Parameter(torch.full((7,), 5.0))
    return policy


def trained_with_idle(policy: Policy, optimizer: PolicyOptimizer, rank: int, size: int) -> None:
    """Three steps; `late` has a gradient in the second, replicated on one rank only."""
    model: Any = policy.model
    for step in range(3):
        optimizer.zero_grad()
        loss = backward(policy, optimizer, rank, size, is_last=step != 1)
        if step == 1 and (policy.lockstep or rank == size - 1):
            share = 1.0 / size if policy.lockstep else 1.0
            extra = policy.run(lambda share=share: (share * model.late.square().sum(),))[0]
            optimizer.before_backward(is_last=True)
            extra.backward()
        elif step == 1 and optimizer.split_gradients:
            optimizer.skip_backward()
        assert bool(optimizer.clip_and_step(loss, MAX_NORM).taken)


def check_idle(world: World, way: str) -> None:
    alone = with_idle_parameters(made_policy(tied=False))
    optimizer = made_optimizer(alone)
    trained_with_idle(alone, optimizer, 0, 1)
    wanted = whole(optimizer.named_state())
    for name, value in (("idle_matrix", 3.0), ("idle_row", 4.0), ("model.layers.0.idle_vector", 5.0)):
        assert bool((wanted[f"policy.{name}"] == value).all()), "not decayed"
        assert wanted[f"optimizer.{name}.step"] == 0
    assert wanted["optimizer.late.step"] == 1
    policy = with_idle_parameters(made_policy(tied=False))
    if way in REPLICATED:
        mesh = replicas_mesh(world, policy.device)
        optimizer = made_optimizer(policy, mesh, split_gradients=way == "split gradients")
    else:
        policy.shard(shards_mesh(world, policy.device), torch.float32)
        optimizer = made_optimizer(policy)
    trained_with_idle(policy, optimizer, world.rank, world.size)
    assert_near(whole(optimizer.named_state()), wanted, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "size"), [rest("replicated", 2), ("replicated", 4), ("split gradients", 4), ("sharded", 2)]
)
def test_a_parameter_without_a_gradient_is_left_alone_in_every_mode(way: str, size: int) -> None:
    """As torch's AdamW leaves it: no decay, no step counted. Of four ranks one has no gradient at all."""
    on_ranks(size, check_idle, way)


def check_saves(world: World, way: str, dtype: torch.dtype, folder: str) -> dict[str, Tensor]:
    policy, optimizer = spread(world, way, tied=True, dtype=dtype)
    trained(policy, optimizer, world.rank, world.size, steps=2)
    writer = HuggingFaceStorageWriter(folder, save_distributed=True)
    save(optimizer.named_state(), storage_writer=writer)
    return whole(optimizer.named_state())


def check_loads(world: World, way: str, dtype: torch.dtype, folder: str, saved: dict[str, Tensor]) -> None:
    policy, optimizer = spread(world, way, tied=True, dtype=dtype)
    load(optimizer.named_state(), storage_reader=HuggingFaceStorageReader(folder))
    optimizer.publish()
    found = whole(optimizer.named_state())
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    parameters = whole(dict(policy.named_parameters()))
    assert all(torch.equal(value, saved[f"policy.{name}"].to(value.dtype)) for name, value in parameters.items())
    # Going on is the third step of a run that was never interrupted.
    trained(policy, optimizer, world.rank, world.size, steps=1)
    assert_near(whole(optimizer.named_state()), reference(tied=True, dtype=dtype)[1], TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("replicated", torch.bfloat16),
        ("sharded", torch.float32),
        rest("replicated", torch.float32),
        rest("sharded", torch.bfloat16),
    ],
)
def test_what_two_ranks_save_goes_on_with_one_and_with_four_in_either_mode(
    way: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = on_ranks(2, check_saves, way, dtype, str(tmp_path / "state"))[0]
    other = "sharded" if way == "replicated" else "replicated"
    on_ranks(4, check_loads, other, dtype, str(tmp_path / "state"), saved)
    on_ranks(1, check_loads, "replicated", dtype, str(tmp_path / "state"), saved)


def check_passes(world: World) -> None:
    """Passes without gradients: together, and of different number where everything is gathered."""
    alone, (policy, optimizer) = made_policy(tied=True), spread(world, "sharded", tied=True, dtype=torch.float32)
    batch = tiny_policy.rollouts(LENGTHS, group_size=4, rewards=REWARDS)
    wanted = alone.logprobs(batch, 0.7)
    torch.testing.assert_close(policy.logprobs(batch, 0.7), wanted, rtol=0, atol=1e-4)
    prompts = [(1, 2, 3), (4, 5), *((*[2, 9, 5] * 15, k) for k in range(6))]
    torch.testing.assert_close(policy.embed(prompts), alone.embed(prompts), rtol=0, atol=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in policy.named_parameters().values())
    reference = alone.frozen_copy()
    reference.shard(init_device_mesh("cpu", (2,)), torch.float32)
    torch.testing.assert_close(reference.logprobs(batch, 0.7), wanted, rtol=0, atol=1e-4)
    with policy.whole():
        generators = [
            TransformersGenerator(one.model, stop_ids=[tiny_policy.STOP], max_batch_sequences=8)
            for one in (policy, alone)
        ]
        found, expected = (
            one.generate(
                [(1, 2), (3, 4, 5)][: world.rank + 1],
                Sampling(samples=2, max_completion_tokens=5 * world.rank + 3, temperature=1.0, seed=1),
            )
            for one in generators
        )
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        for _ in range(world.rank):
            torch.testing.assert_close(policy.logprobs(batch, 0.7), wanted, rtol=0, atol=1e-4)
    assert all(isinstance(parameter, DTensor) for parameter in policy.named_parameters().values())
    wanted_steps = trained(alone, made_optimizer(alone), 0, 1)
    for figures, expected_figures in zip(trained(policy, optimizer, world.rank, 2), wanted_steps, strict=True):
        assert figures == pytest.approx(expected_figures, rel=1e-4)


@pytest.mark.slow
def test_sharded_ranks_sample_as_long_as_each_likes() -> None:
    on_ranks(2, check_passes)


def step_by_hand(policy: Policy, optimizer: Told) -> None:
    loss = backward(policy, optimizer, 0, 1)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
    optimizer.guarded_step(loss, norm)
    optimizer.zero_grad()


class Told(GuardedAdamW):
    """Plain AdamW that may be told which backward pass is the last."""

    def before_backward(self, *, is_last: bool) -> None:
        pass


def test_one_rank_in_float32_is_plain_adamw_to_the_bit() -> None:
    policy, plain = made_policy(tied=True), made_policy(tied=True)
    optimizer = made_optimizer(policy)
    other = Told(plain.parameters(), learning_rate=RATE, weight_decay=0.1)
    for _ in range(STEPS):
        trained(policy, optimizer, 0, 1, steps=1)
        step_by_hand(plain, other)
    for name, parameter in plain.named_parameters().items():
        own = policy.named_parameters()[name]
        assert torch.equal(own, parameter), name
        for key, value in other.state[parameter].items():
            assert torch.equal(optimizer.state[own][key], value), (name, key)


def test_small_updates_of_bfloat16_parameters_add_up() -> None:
    """A step of 1e-6 is far below the spacing of bfloat16 under 1, which is 2^-8."""
    parameter = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer({"weight": parameter}, learning_rate=1e-6)
    master = optimizer.named_state()["policy.weight"]
    for number in range(1, 521):
        parameter.grad = torch.ones(4, 3)
        optimizer.clip_and_step(torch.zeros(()), 100.0)
        if number == 500:  # each step is rounded to the spacing of float32, 2^-24
            torch.testing.assert_close(master, torch.full((4, 3), 1 - 5e-4), rtol=0, atol=500 * 2**-25)
            assert torch.equal(parameter, torch.ones_like(parameter))
            optimizer.learning_rate.fill_(1e-4)
    assert torch.equal(parameter, torch.full_like(parameter, 1 - 2**-8))  # the nearest to 1 - 25e-4


def test_micro_batches_add_up_in_float32_where_parameters_are_bfloat16() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer({"weight": parameter}, learning_rate=0.0)
    for _ in range(512):
        (parameter / 512).sum().backward()
    step = optimizer.clip_and_step(torch.zeros(()), 10.0)
    assert step.grad_norm.item() == pytest.approx(1.0)  # bfloat16 would have stopped at 1/2


def check_slices(world: World, dtype: torch.dtype, rows: tuple[int, int]) -> None:
    """Parameters that are rows of an engine's larger matrices change there, and only there."""
    size = world.size
    engine = torch.full((sum(rows) + 3, 5), 7.0, dtype=dtype)
    cuts = (slice(0, rows[0]), slice(rows[0], sum(rows)))
    parameters = {}
    for name, cut in zip("qk", cuts, strict=True):
        parameters[name] = torch.nn.Parameter(torch.zeros(1))
        parameters[name].data = engine[cut]
    optimizer = PolicyOptimizer(parameters, learning_rate=0.5, mesh=replicas_mesh(world, engine.device))
    for _ in range(2):
        for sign, parameter in zip((1.0, -1.0), parameters.values(), strict=True):
            parameter.grad = torch.full_like(parameter, sign * (world.rank + 1), dtype=torch.float32)
        step = optimizer.clip_and_step(torch.tensor(world.rank + 1.0), 1e9)
        assert step.loss == world.size * (size + 1) / 2
        assert step.grad_norm == pytest.approx(world.size * (size + 1) / 2 * math.sqrt(5 * sum(rows)))
    wanted = torch.tensor([6.0] * rows[0] + [8.0] * rows[1] + [7.0] * 3)
    torch.testing.assert_close(engine[:, 0].float(), wanted, rtol=0, atol=1e-5)
    for cut, parameter in zip(cuts, parameters.values(), strict=True):
        assert parameter.data_ptr() == engine[cut].data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(8, 4), (5, 6), (2, 5)])  # even over 4; rank 3 has fewer or none; too few to split
def test_rows_of_an_engines_matrix_are_stepped_where_they_lie(rows: tuple[int, int]) -> None:
    on_ranks(4, check_slices, torch.bfloat16, rows)
    on_ranks(1, check_slices, torch.float32, rows)


@pytest.mark.parametrize(
    ("itemsize", "split", "is_sharded", "wanted"),
    [  # bytes a parameter: what computes, gradients with the rank's sum of them, moments, masters
        (4, 1, False, [4, 4, 8]),
        (2, 1, False, [2, 4, 8, 4]),
        (4, 4, False, [4, 4 + 1, 2]),
        (2, 4, False, [2, 4 + 1, 2, 1]),
        (4, 4, True, [1, 1, 2]),
        (2, 4, True, [1, 1, 2]),
    ],
)
def test_bytes_of_a_parameter_by_mode(itemsize: int, split: int, is_sharded: bool, wanted: list[int]) -> None:
    found = memory.state_bytes(1000, 1000, itemsize, split=split, is_sharded=is_sharded)
    assert [size // 1000 for size in found.values()] == wanted
    if split > 1 and not is_sharded:
        less = memory.state_bytes(1000, 1000, itemsize, split=split, is_sharded=False, in_flight=500)
        assert less == found | {"gradients": 4 * 500 + 4 * 1000 // split}

"""The tree's kernels draw, write and count exactly as the reference does, bit for bit.

The interpreter runs programs one after another, so no race can show here; `tests/gpu` looks for those.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paced_kernels import Bell, PriorityTree, Sample
from paced_kernels._tree import arithmetic, launches
from paced_kernels._tree import kernels as _tree_kernels
from paced_kernels._tree.bits import random_bits
from paced_kernels._tree.exact import exp_of_negative, log_of_unit

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter"
)
MODES = ("systematic", "stratified", "iid")


def pair(capacity: int, *, seed: int = 7, stream: int = 0) -> list[PriorityTree]:
    return [PriorityTree(capacity, seed=seed, stream=stream, backend=name) for name in ("triton", "reference")]


def random_weights(num: int, seed: int, zeros: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num, generator=generator)
    return torch.where(torch.rand(num, generator=generator) < zeros, 0.0, weights)


def assert_same_sample(found: Sample, expected: Sample) -> None:
    for name, value, reference in zip(Sample._fields, found, expected, strict=True):
        assert torch.equal(value, reference), name


def assert_same_state(trees: list[PriorityTree]) -> None:
    kernels, reference = trees
    assert kernels.check()
    assert torch.equal(kernels.leaf, reference.leaf)
    assert torch.equal(kernels.total(), reference.total())
    assert kernels.status() == reference.status()
    for name in ("step", "sequence", "size"):
        assert torch.equal(getattr(kernels, name), getattr(reference, name)), name


@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 1024, 1025, 32_769])
def test_everything_equals_the_reference(capacity: int) -> None:
    trees = pair(capacity, seed=2**64 - 3, stream=5)
    weights = random_weights(capacity, capacity)
    weights[0], weights[-1] = float("nan"), 2.0
    num = min(capacity, 300)
    idx = torch.randint(-3, capacity + 3, (num,))
    idx[: num // 3] = capacity // 2
    values = 1.4 * torch.rand(num) - 0.2
    values[:3] = torch.tensor([float("inf"), 1e-12, -0.0])[: min(3, num)]
    for tree in trees:
        tree.rebuild(weights)
        tree.update(idx, values)
    assert_same_state(trees)
    for mode in MODES:
        assert_same_sample(*(tree.sample(70, mode) for tree in trees))
    for tree in trees:
        tree.write_range(torch.tensor(capacity - 1), values)
    assert_same_state(trees)
    assert_same_sample(*(tree.sample_distinct(20) for tree in trees))
    allowed = weights_of_bell(capacity) > 0.1
    for tree in trees:
        tree.rebuild(Bell(0.4, 0.07), weights_of_bell(capacity), allowed=allowed)
    assert_same_state(trees)
    for exploration in (0.0, 0.2, 0.7):
        assert_same_sample(*(tree.sample_distinct(20, "race", exploration=exploration) for tree in trees))
    assert_same_state(trees)


def weights_of_bell(num: int) -> Tensor:
    """Statistics on both sides of the center, far beyond it, and such as no estimate should be."""
    values = torch.linspace(-0.5, 1.5, num)
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -0.0])
    values[num // 2 : num // 2 + 5] = strange[: max(0, min(5, num - num // 2))]
    return values


@triton.jit
def exact_kernel(t_ptr, u_ptr, exp_ptr, log_ptr, NUM: tl.constexpr):
    o = tl.arange(0, NUM)
    tl.store(exp_ptr + o, _tree_kernels.exp_of_negative(tl.load(t_ptr + o)))
    tl.store(log_ptr + o, _tree_kernels.log_of_unit(tl.load(u_ptr + o)))


def test_exp_and_log_have_the_bits_of_the_reference() -> None:
    """Keys do not show the last bits of a logarithm: the index is there."""
    num = 4096
    t = torch.linspace(0, 40, num, dtype=torch.float64)
    u = torch.rand(num, dtype=torch.float64).clamp(min=2.0**-53)
    u[:54] = 2.0 ** -torch.arange(54, dtype=torch.float64)
    exps, logs = torch.zeros(2, num, dtype=torch.float64)
    exact_kernel[(1,)](t, u, exps, logs, NUM=num, enable_fp_fusion=False)
    assert torch.equal(exps, exp_of_negative(t))
    assert torch.equal(logs, log_of_unit(u))


@triton.jit
def bits_kernel(out_ptr, seed, stream, step, first, NUM: tl.constexpr):
    o = tl.arange(0, NUM)
    drawn = _tree_kernels.random_bits(first + o.to(tl.int64), seed, stream, step)
    tl.store(out_ptr + o, drawn.to(tl.int64, bitcast=True))


@pytest.mark.parametrize("first", [0, 2**31 - 9])
def test_random_bits_are_those_of_the_reference(first: int) -> None:
    """Draws show the upper bits only."""
    num, out = 64, torch.zeros(64, dtype=torch.int64)
    state = {"seed": torch.tensor(-12345), "stream": torch.tensor(2**32 - 5), "step": torch.tensor(2**40 + 3)}
    bits_kernel[(1,)](out, *(value.item() for value in state.values()), first, NUM=num)
    assert torch.equal(out, random_bits(torch.arange(first, first + num), **state))


@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_keys_of_a_race_are_those_of_the_reference_to_the_last_bit(exploration: float) -> None:
    tree = pair(3000, seed=2**63 + 1, stream=9)[0]
    tree.rebuild(random_weights(3000, 5))
    tree.step.fill_(2**33 + 5)
    assert tree._kernels is not None
    keys, total = tree._kernels.race(tree._counters(), tree.status_counts, exploration=exploration)
    q = tree.get(torch.arange(3000))
    wanted = arithmetic.race_keys(q, **tree._random_state(), exploration=exploration)
    assert torch.equal(keys, wanted)
    assert total == q.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bell_of_any_dtype_and_an_allowed_mask_of_plain_weights(dtype: torch.dtype) -> None:
    trees = pair(1500)
    for tree in trees:
        tree.rebuild(Bell(0.3, 0.2), weights_of_bell(1500).to(dtype))
    assert_same_state(trees)
    quantised = torch.arange(1500, dtype=torch.int32) * 90_000
    for tree in trees:
        tree.rebuild(quantised, allowed=quantised % 3 > 0)
    assert_same_state(trees)


def test_an_empty_tree_races_its_live_prefix_with_and_without_exploration() -> None:
    trees = pair(50)
    for size in (50, 7, 0):
        for tree in trees:
            tree.size.fill_(size)
        for exploration in (0.0, 0.4, 1.0):
            assert_same_sample(*(tree.sample_distinct(9, "race", exploration=exploration) for tree in trees))
    assert_same_state(trees)
    assert trees[0].status()["empty"] == 9


@pytest.mark.parametrize("top_entries", [1, 3])
def test_any_number_of_levels(top_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four and five levels, which take more than 10^6 leaves otherwise."""
    monkeypatch.setattr(launches, "TOP_ENTRIES", top_entries)
    capacity = 40_000
    assert len(launches.level_counts(capacity)) == {1: 4, 3: 3}[top_entries]
    trees = pair(capacity)
    for tree in trees:
        tree.rebuild(random_weights(capacity, 1, zeros=0.9))
        tree.update(torch.arange(0, capacity, 97), torch.rand(413, generator=torch.Generator().manual_seed(2)))
        tree.rebuild(random_weights(capacity, 3, zeros=0.9))  # sums of a second rebuild start from zero again
    assert_same_state(trees)
    for mode in MODES:
        assert_same_sample(*(tree.sample(33, mode) for tree in trees))
    for tree in trees:
        tree.rebuild(Bell(0.5, 0.1), weights_of_bell(capacity))
    assert_same_sample(*(tree.sample_distinct(33, "race", exploration=0.1) for tree in trees))
    assert_same_state(trees)


@settings(max_examples=15)
@given(
    weights=st.lists(st.sampled_from([0, 0, 1, 2, 7, 2**20, 2**27]), min_size=1, max_size=80),
    num_draws=st.integers(0, 70),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**64 - 1),
    step=st.sampled_from([0, 1, 2**32 - 1, 2**40 + 3]),
)
def test_draws_equal_the_two_line_oracle(weights: list[int], num_draws: int, mode: str, seed: int, step: int) -> None:
    trees = pair(len(weights), seed=seed)
    for tree in trees:
        tree.rebuild(torch.tensor(weights, dtype=torch.int32))
        tree.step.fill_(step)
    found, expected = (tree.sample(num_draws, mode) for tree in trees)
    assert_same_sample(found, expected)
    if sum(weights):
        assert (found.q > 0).all()
        assert torch.equal(found.q, torch.tensor(weights)[found.idx])
    assert_same_state(trees)


def test_an_empty_tree_draws_from_the_live_prefix() -> None:
    trees = pair(50)
    for size in (50, 7, 0):
        for tree in trees:
            tree.size.fill_(size)
        for mode in MODES:
            assert_same_sample(*(tree.sample(40, mode) for tree in trees))
        assert_same_sample(*(tree.sample_distinct(5) for tree in trees))
    assert_same_state(trees)
    assert trees[0].status()["empty"] == 12


def test_last_writer_wins_across_programs() -> None:
    """More duplicates than one program holds, in two dtypes."""
    num = 2 * launches.UPDATE_BLOCK + 5
    trees = pair(10)
    idx = torch.arange(num) % 3
    for tree in trees:
        tree.update(idx, torch.linspace(0, 1, num, dtype=torch.float64))
        tree.update(torch.tensor([1, 1, -1, 10], dtype=torch.int32), torch.tensor([5, 9, 1, 1], dtype=torch.int32))
    assert_same_state(trees)
    assert trees[0].get(torch.tensor([1])).item() == 9


def test_a_resumed_tree_draws_the_same_next_batch_under_either_backend() -> None:
    kernels, reference = pair(500)
    for tree in (kernels, reference):
        tree.rebuild(random_weights(500, 4))
        tree.sample(10)
    state = kernels.state_dict()
    resumed = pair(500, seed=99)
    for tree in resumed:
        addresses = tree.leaf.data_ptr()
        tree.load_state_dict(state)
        assert tree.leaf.data_ptr() == addresses
        assert_same_sample(tree.sample(64), kernels.sample(64) if tree is resumed[0] else reference.sample(64))


def test_sequence_numbers_start_again_before_they_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paced_kernels.priority_tree.MAX_SEQUENCE", 100)
    trees = pair(20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        idx, values = torch.randint(0, 20, (30,), generator=generator), torch.rand(30, generator=generator)
        for tree in trees:
            tree.update(idx, values)
        assert_same_state(trees)


def test_random_operations_leave_no_drift() -> None:
    trees = pair(3000)
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        idx = torch.randint(0, 3000, (1000,), generator=generator)
        values = random_weights(1000, i, zeros=0.5)
        for tree in trees:
            tree.update(idx, values)
    assert_same_state(trees)
    for tree in trees:
        tree.update(torch.arange(3000), torch.zeros(3000))
    assert trees[0].total() == 0
    assert (trees[0]._kernels.sums == 0).all()


def test_check_finds_a_wrong_sum() -> None:
    tree = pair(100)[0]
    tree.rebuild(torch.ones(100))
    assert tree.check()
    tree._kernels.sums[1] += 1
    assert not tree.check()

"""What a tree on a CPU computes in blocks has the bits of the formulas for whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paced_kernels import Bell, PriorityTree
from paced_kernels._tree import arithmetic, host, philox

STATE = {
    "seed": torch.tensor([-(2**62) - 12345]),
    "stream": torch.tensor([4_000_000_000]),
    "step": torch.tensor([2**40 + 3]),
}
SIZES = (1, 3, host.BLOCK, host.BLOCK + 1, 140_000)
"""One block, one and a leaf, and so many that candidates come from a sample."""


@pytest.mark.parametrize("num", [0, *SIZES])
def test_random_bits_are_those_of_philox(num: int) -> None:
    found = philox.bits_of_range(num, device=torch.device("cpu"), **STATE)
    assert torch.equal(found, philox.random_bits(torch.arange(num), **STATE))


def test_samples_beyond_32_bits_repeat_as_philox_has_them() -> None:
    start, found = 2**32 - 5, torch.empty(10, dtype=torch.int64)
    philox.HostPhilox(*(int(value) for value in STATE.values()), 10).write(start, found)
    assert torch.equal(found, philox.random_bits(torch.arange(start, start + 10), **STATE))
    assert torch.equal(found[5:], philox.random_bits(torch.arange(5), **STATE))


def weights(kind: str, num: int) -> Tensor:
    drawn = torch.rand(num, generator=torch.Generator().manual_seed(num))
    made = {
        "even": drawn,
        "peaked": drawn**40,
        "few": torch.where(drawn < 0.999, 0.0, drawn),
        "none": torch.zeros(num),
        "equal": torch.ones(num),
        "one leads": torch.where(torch.arange(num) == num // 2, 1.0, 2.0**-27),
    }
    return made[kind]


@pytest.mark.parametrize("kind", ["even", "peaked", "few", "none", "equal", "one leads"])
@pytest.mark.parametrize("num", SIZES)
def test_a_race_has_the_winners_of_all_keys(num: int, kind: str) -> None:
    q = arithmetic.quantise(weights(kind, num))[0]
    for exploration in (0.0, 0.1, 1.0) if num < 10**5 else (0.1,):
        keys = arithmetic.race_keys(q, **STATE, exploration=exploration)
        for draws in (0, 1, 40, 1024, num + 3):
            found = host.race(q, draws, **STATE, exploration=exploration)
            assert torch.equal(found, arithmetic.race_winners(keys, draws)), (exploration, draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, float("nan"), -1.0, 2.0])
def test_a_rebuild_has_the_weights_and_counts_of_the_formulas(dtype: torch.dtype, bad: float | None) -> None:
    num = host.BLOCK + 100
    source = weights("few", num).to(dtype)
    source[5] = 1e-30  # positive, and below a half unit
    if bad is not None:
        source[host.BLOCK + 7] = bad
        source[9] = bad
    allowed = torch.ones(num, dtype=torch.bool)
    allowed[9] = False
    for bell in (None, Bell(0.5, 0.15)):
        for mask in (None, allowed):
            made = source if bell is None else bell(source)
            wanted, counts = arithmetic.quantise(made if mask is None else torch.where(mask, made, 0))
            leaf, found = torch.full((num,), -1), torch.zeros(3, dtype=torch.int64)
            host.rebuild(source, bell, mask, leaf, found)
            assert torch.equal(leaf, wanted)
            assert torch.equal(found, counts)


def test_whole_weights_are_taken_as_they_are() -> None:
    source = torch.tensor([0, 1, arithmetic.ONE, arithmetic.ONE + 1, -1])
    leaf, found = torch.empty(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    host.rebuild(source, None, None, leaf, found)
    assert leaf.tolist() == [0, 1, arithmetic.ONE, arithmetic.ONE, 0]
    assert found.tolist() == [0, 1, 1]


def test_a_schedule_on_a_cpu_is_that_of_the_formulas() -> None:
    num, values = 100_000, torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    tree = PriorityTree(num, seed=11, stream=3)
    tree.rebuild(Bell(0.5, 0.1), values)
    q = arithmetic.quantise(Bell(0.5, 0.1)(values))[0]
    state = {"seed": tree.seed, "stream": tree.stream, "step": tree.step.clone()}
    wanted = arithmetic.race_winners(arithmetic.race_keys(q, **state, exploration=0.1), 1024)
    found = tree.sample_distinct(1024, "race", exploration=0.1)
    assert torch.equal(found.idx, wanted)
    assert torch.equal(found.q, q[wanted])
    assert int(found.total) == int(q.sum())

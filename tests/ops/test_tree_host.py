"""A tree on a CPU, compiled, has the bits of plain PyTorch: the formulas, and trees of the backend `reference`."""

from __future__ import annotations

import copy
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paced_kernels import Bell, PriorityTree, Sample
from paced_kernels._tree import arithmetic, host

needs_a_compiler = pytest.mark.skipif(not host.IS_BUILT, reason="the package was built without a C compiler")

SEED, STREAM, STEP = 2**64 - 9, 4_000_000_000, 2**40 + 3
# A leaf, less than a row of leaves, a row, one level of sums and a leaf more, four levels, a last row that is short.
SIZES = (1, 15, 16, 17, 64, 65, 1000, 4099, 40_001)


def test_the_compiled_code_is_there_wherever_a_compiler_is() -> None:
    has_headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    if shutil.which("cc") is None or not has_headers:
        pytest.skip("needs a C compiler and Python.h")
    assert host.IS_BUILT, "install the package again: pip install -e ."


def pair(num: int, size: int | None = None) -> tuple[PriorityTree, PriorityTree]:
    """Return a compiled tree and a plain one, at the same late step."""
    quick = PriorityTree(num, seed=SEED, stream=STREAM)
    plain = PriorityTree(num, seed=SEED, stream=STREAM, backend="reference")
    assert (quick.backend, plain.backend) == ("compiled", "reference")
    for tree in (quick, plain):
        tree.step.fill_(STEP)
        if size is not None:
            tree.size.fill_(size)
    return quick, plain


def weights(kind: str, num: int) -> Tensor:
    drawn = torch.rand(num, generator=torch.Generator().manual_seed(num))
    made = {
        "even": drawn,
        "peaked": drawn**40,
        "few": torch.where(drawn < 0.999, 0.0, drawn),
        "none": torch.zeros(num),
        "equal": torch.ones(num),
        "one leads": torch.where(torch.arange(num) == num // 2, 1.0, 2.0**-27),
        "rising": torch.linspace(2.0**-27, 1.0, num),
    }
    return made[kind]


def drawn_from(tree: PriorityTree, sizes: tuple[int, ...]) -> Iterator[Sample]:
    for size in sizes:
        for mode in arithmetic.MODES:
            yield tree.sample(size, mode)
        yield tree.sample_distinct(size)
        for exploration in (0.0, 1e-9, 0.1, 1.0):
            yield tree.sample_distinct(size, "race", exploration=exploration)


def assert_same(quick: PriorityTree, plain: PriorityTree, sizes: tuple[int, ...] = (0, 1, 7, 100)) -> None:
    """Leaves, sums, every kind of draw, what was counted, and the step."""
    q = plain.get(torch.arange(plain.capacity))
    assert torch.equal(quick.leaf.long(), q)
    assert quick.total() == plain.total() == q.sum()
    for one, other in zip(drawn_from(quick, sizes), drawn_from(plain, sizes), strict=True):
        for name, value in one._asdict().items():
            wanted = getattr(other, name)
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted), name
    assert quick.status() == plain.status()
    assert torch.equal(quick.step, plain.step)
    assert quick.check()


@needs_a_compiler
@pytest.mark.parametrize("kind", ["even", "peaked", "few", "none", "equal", "one leads", "rising"])
@pytest.mark.parametrize("num", SIZES)
def test_every_draw_is_that_of_the_formulas(num: int, kind: str) -> None:
    """Few draws, about as many as there are leaves, and more."""
    trees = pair(num)
    for tree in trees:
        tree.rebuild(weights(kind, num))
    assert_same(*trees, sizes=(0, 1, 40, num // 8, num // 3 + 1, num + 3))


@needs_a_compiler
@pytest.mark.parametrize("num", [100_000, 600_000])
def test_large_tables_draw_as_the_formulas_do(num: int) -> None:
    trees = pair(num)
    for tree in trees:
        tree.rebuild(Bell(0.5, 0.1), weights("even", num))
    assert_same(*trees, sizes=(1024, 30_000))


@needs_a_compiler
@pytest.mark.parametrize("size", [0, 1, 40, 100])
def test_an_empty_tree_draws_evenly_from_its_live_prefix(size: int) -> None:
    trees = pair(100, size)
    assert_same(*trees)
    assert trees[0].status()["empty"] > 0
    for tree in trees:
        tree.update(torch.tensor([3, 70]), torch.tensor([0.5, 1.0]))
        tree.update(torch.tensor([70, 3]), torch.tensor([0.0, 0.0]))
    assert_same(*trees)


@needs_a_compiler
@pytest.mark.parametrize("num", SIZES)
def test_draws_after_every_kind_of_write_are_those_of_the_formulas(num: int) -> None:
    """Writes that are summed leaf by leaf, and so many that the levels above are summed again."""
    generator = torch.Generator().manual_seed(num)
    few = max(1, num // 200)

    def drawn(count: int) -> Tensor:
        return torch.rand(count, generator=generator) ** 4

    def places(count: int) -> Tensor:
        return torch.randint(0, num, (count,), generator=generator)

    trees, first, most, start = pair(num), places(few), places(2 * num), num // 2
    both = torch.stack([places(few), places(few)], 1)
    writes = (
        ("rebuild", (drawn(num),)),
        ("update", (first, drawn(few))),
        ("update", (most, drawn(2 * num))),
        ("update", (torch.tensor([num - 1, 0, 0]), torch.tensor([0.5, 0.0, 1.0]))),  # the last of duplicates wins
        ("update", (torch.tensor([num - 1, num, -1, -2]), torch.tensor([0.25, 1.0, 1.0, -1.0]))),  # one is inside
        ("update", (both[:, 0].int(), torch.stack([drawn(few), drawn(few)], 1)[:, 1])),  # neither is contiguous
        ("write_range", (num - 1, drawn(few))),  # round the end
        ("write_range", (torch.tensor([start]), drawn(num - start))),
        ("write_range", (-3, drawn(min(3, num)))),
        ("rebuild", ((torch.arange(num) == num - 1).float(),)),
        ("update", (torch.tensor([num // 3], dtype=torch.int32), torch.tensor([1.0]))),
        ("rebuild", (torch.randint(0, 3, (num,), generator=generator),)),  # every target is near an edge
        ("update", (torch.empty(0, dtype=torch.int64), torch.empty(0))),
    )
    for name, given in writes:
        for tree in trees:
            getattr(tree, name)(*given)
        assert_same(*trees, sizes=(7, 50))


BAD = {
    True: [float("nan"), -1.0, 2.0, float("inf"), -float("inf"), -0.0, 1e-30],
    False: [-5, arithmetic.ONE + 1, 2**31 - 1, 0],
}


@needs_a_compiler
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
)
def test_writes_of_every_kind_of_number_have_the_weights_and_counts_of_the_formulas(dtype: torch.dtype) -> None:
    """Weights below half a unit become one unit, zeros stay, what is wrong is counted where it is written."""
    num, bad = 700, torch.tensor(BAD[dtype.is_floating_point], dtype=dtype)
    drawn = weights("peaked", num) if dtype.is_floating_point else weights("even", num) * arithmetic.ONE
    w = drawn.to(dtype)
    w[: len(bad)], w[600 : 600 + len(bad)] = bad, bad
    idx = torch.randint(0, num, (num,), generator=torch.Generator().manual_seed(3))
    idx[1], idx[601] = -1, num  # their weights are not written, so they are not counted
    trees = pair(num)
    for tree in trees:
        tree.update(idx, w)
        tree.write_range(650, w[:100])
    assert_same(*trees)
    allowed = torch.rand(num, generator=torch.Generator().manual_seed(4)) < 0.5
    for mask in (None, allowed):
        for tree in trees:
            tree.rebuild(w, allowed=mask)
        assert_same(*trees)


@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bell", [Bell(0.5, 0.1), Bell(-1.3, 2.0), Bell(0.0, 1e-200), Bell(0.2, 1e30)])
def test_a_bell_has_the_weights_and_counts_of_its_formula(bell: Bell, dtype: torch.dtype) -> None:
    num = 2000
    statistics = torch.randn(num, generator=torch.Generator().manual_seed(5)).to(dtype)
    statistics[::97], statistics[1], statistics[2] = float("nan"), float("inf"), bell.center
    allowed = torch.arange(num) % 3 > 0
    trees = pair(num)
    for mask in (None, allowed):
        for tree in trees:
            tree.rebuild(bell, statistics, allowed=mask)
        assert_same(*trees)


@needs_a_compiler
def test_weights_at_the_edge_between_two_integers_are_those_of_the_formula() -> None:
    """Where the shorter formula, off by some 3e-5 of an integer, would round to the other side."""
    bell = Bell(0.3, 0.07)
    edges = torch.randint(1, arithmetic.ONE, (20_000,), generator=torch.Generator().manual_seed(0)).double() + 0.5
    statistics = bell.center + bell.width * (-2.0 * (edges / arithmetic.ONE).log()).sqrt()
    statistics[7], statistics[8] = float("inf"), -1e200
    tree = PriorityTree(len(statistics), seed=0)
    tree.rebuild(bell, statistics)
    assert torch.equal(tree.leaf.long(), arithmetic.quantise(bell(statistics))[0])
    near = (bell(statistics) * arithmetic.ONE - edges).abs()
    assert near.kthvalue(19_000).values < 1e-6


@needs_a_compiler
def test_a_tree_and_its_copy_draw_alike_and_apart() -> None:
    tree, _ = pair(100)
    tree.rebuild(weights("even", 100))
    twin = copy.deepcopy(tree)
    assert torch.equal(tree.sample(50, "iid").idx, twin.sample(50, "iid").idx)
    twin.rebuild(torch.eye(100)[3])
    assert twin.sample(4).idx.tolist() == [3] * 4
    assert len(set(tree.sample(50, "iid").idx.tolist())) > 10
    assert tree.check()
    assert twin.check()


@needs_a_compiler
def test_a_state_goes_from_one_backend_to_the_other() -> None:
    quick, plain = pair(300)
    plain.rebuild(weights("peaked", 300))
    plain.update(torch.arange(50), torch.ones(50))
    plain.sample(9)
    quick.load_state_dict(plain.state_dict())
    assert_same(quick, plain)
    plain.load_state_dict(quick.state_dict())
    assert_same(quick, plain)


@needs_a_compiler
def test_leaves_that_were_written_past_the_tree_are_noticed() -> None:
    tree, _ = pair(300)
    tree.rebuild(weights("even", 300))
    assert tree.check()
    tree.leaf[200] += 1
    assert not tree.check()


@needs_a_compiler
def test_a_weight_with_a_gradient_is_written_without_it() -> None:
    tree, _ = pair(3)
    tree.update(torch.tensor([1]), torch.tensor([0.5], requires_grad=True))
    tree.rebuild(torch.tensor([0.5, 0.25, 0.0], requires_grad=True).half())
    assert tree.leaf.tolist() == [arithmetic.ONE // 2, arithmetic.ONE // 4, 0]
    assert not tree.leaf.requires_grad


def test_without_a_compiler_trees_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paced_kernels.priority_tree.IS_BUILT", False)
    tree = PriorityTree(10, seed=0)
    assert tree.backend == "reference"
    tree.rebuild(torch.eye(10)[3])
    assert tree.sample(4).idx.tolist() == [3] * 4

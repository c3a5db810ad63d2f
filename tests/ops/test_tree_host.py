"""What a tree on a CPU computes in blocks has the bits of the formulas for whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paced_kernels import Bell, PriorityTree
from paced_kernels._tree import arithmetic, bits, host, host_race, host_sums
from paced_kernels._tree.exact import log_of_unit

STATE = {
    "seed": torch.tensor([-(2**62) - 12345]),
    "stream": torch.tensor([4_000_000_000]),
    "step": torch.tensor([2**40 + 3]),
}
SIZES = (1, 3, host.BLOCK, host.BLOCK + 1, 140_000)
"""One block, one and a leaf, and so many that candidates come from a sample."""


def start() -> int:
    return bits.host_start(**STATE)


@pytest.mark.parametrize("num", [0, 1, 50, 51, 1000])
def test_first_bits_are_those_of_the_formula(num: int) -> None:
    """Also of more draws than the arrays have room for, as of a tree with few leaves."""
    assert torch.equal(bits.HostBits(50).first(start(), num), bits.random_bits(torch.arange(num), **STATE))


@pytest.mark.parametrize("first", [0, 2**31 - 5, 2**32 - 5, 2**40])
def test_bits_of_any_samples_are_those_of_the_formula(first: int) -> None:
    samples = torch.arange(first, first + 10)
    wanted = bits.random_bits(samples, **STATE)
    source = bits.HostBits(10)
    assert torch.equal(source.at(start(), samples), wanted)
    unfinished = source.unfinished(start(), first, 10)
    assert torch.equal(unfinished >> 33, wanted >> 33)
    assert torch.equal(bits.finish(unfinished), wanted)


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
            found = host.HostTree(q).race(q, q.sum(), draws, **STATE, exploration=exploration)
            assert torch.equal(found, arithmetic.race_winners(keys, draws)), (exploration, draws)


@pytest.mark.parametrize("most", [0.0, 2.0**-40, 3e-5, 0.01, 0.125, 0.6, 0.999])
def test_one_comparison_of_words_keeps_all_that_it_should_and_little_else(most: float) -> None:
    num = 200_000
    found = bits.HostBits(num).unfinished(start(), 0, bits.HOST_BLOCK) >= host_race._least_word(most)
    off = 1.0 - bits.unit_interval(bits.random_bits(torch.arange(bits.HOST_BLOCK), **STATE))
    assert found[off <= most].all()
    assert (off[found] <= most + 2.0**-30).all()
    # At the edge itself: the largest 1 - u that is still in has all open bits of its word at 0.
    edge = host_race._least_word(most)
    assert 1.0 - bits.unit_interval(torch.tensor([edge - 1])).item() > most


@pytest.mark.parametrize("slack", [-1.5, -0.5, 0.0])
@pytest.mark.parametrize(("num", "draws"), [(10_000, 1024), (140_000, 1024)])
def test_a_limit_that_is_too_low_is_noticed(
    num: int, draws: int, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to find leaves, with less room for chance than chance takes."""
    monkeypatch.setattr(host_race.math, "isqrt", lambda wanted: slack * wanted**0.5)
    q = arithmetic.quantise(weights("even", num))[0]
    for exploration in (0.0, 0.1):
        wanted = arithmetic.race_winners(arithmetic.race_keys(q, **STATE, exploration=exploration), draws)
        assert torch.equal(host.HostTree(q).race(q, q.sum(), draws, **STATE, exploration=exploration), wanted)


def test_keys_that_are_nearly_equal_are_ordered_by_the_formula() -> None:
    """Quotients a few units in the last place apart: the index in the last bits of a key decides, not torch's log."""
    num = 500
    found = torch.randperm(num, generator=torch.Generator().manual_seed(1))
    words = torch.randint(-(2**63), 2**63 - 1, (5,), generator=torch.Generator().manual_seed(2)).repeat(num // 5)
    p = torch.ones(num, dtype=torch.float64) + (torch.arange(num) % 7) * 2.0**-50
    keys = (0.0 - log_of_unit(bits.unit_interval(words))) / p
    keys = (keys.view(torch.int64) & ~arithmetic.index_mask_of(num)) | found
    for draws in (1, 100, num):
        assert torch.equal(host_race._winners(words, p, found, draws, float("inf"), num), found[keys.argsort()[:draws]])
    # A leaf that nobody asked for could be as near as that to the last of them.
    last = keys.sort().values[99].view(torch.float64).item()
    assert host_race._winners(words, p, found, 100, last, num) is None


@pytest.mark.parametrize("mode", arithmetic.MODES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 2.0**-27])
@pytest.mark.parametrize("num", [5, 40_000])
def test_draws_on_a_cpu_are_those_of_the_formulas(mode: str, scale: float, num: int) -> None:
    """Totals from five to 2^41: random words are multiplied by them whole, by halves or by thirds."""
    tree = PriorityTree(num, seed=2**64 - 9, stream=7)
    tree.rebuild((weights("even", num) * scale).clamp(min=2.0**-27))
    q = tree.get(torch.arange(num))
    for draws in (0, 1, 7, 1024, 1000):
        state = {"seed": tree.seed, "stream": tree.stream, "step": tree.step.clone()}
        targets = arithmetic.draw_targets(mode, draws, q.sum(), **state)
        sample = tree.sample(draws, mode)
        assert torch.equal(sample.idx, arithmetic.select(q, targets))
        assert torch.equal(sample.q, q[sample.idx])
        assert torch.equal(sample.prob, (sample.q.double() / q.sum().double()).float())


def test_a_draw_after_a_write_is_from_the_sums_of_then() -> None:
    tree = PriorityTree(100, seed=0)
    writes = (
        lambda: tree.rebuild(torch.eye(100)[3]),
        lambda: tree.update(torch.tensor([3, 50, 50]), torch.tensor([0.0, 0.5, 1.0])),
        lambda: tree.write_range(50, torch.tensor([0.0, 1.0])),
        lambda: tree.update(torch.tensor([51, 8, -1]), torch.tensor([0.0, 1.0, 1.0])),
        lambda: tree.load_state_dict(tree.state_dict() | {"weights": torch.eye(100)[20].mul(2**27).int()}),
    )
    for write, leaf in zip(writes, (3, 50, 51, 8, 20), strict=True):
        write()
        assert tree.sample(5, "iid").idx.tolist() == [leaf] * 5
        assert tree.sample(5, "iid").total == arithmetic.ONE


# The last row has one leaf, all of its leaves, and none beyond; rows for more than one block of them.
@pytest.mark.parametrize("num", [1, 65, 96, 1000, 40_001])
def test_draws_by_rows_are_those_of_the_formulas_after_every_kind_of_write(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_sums, "_MANY", 1)
    monkeypatch.setattr(host_sums, "_FEW", 0)
    generator = torch.Generator().manual_seed(num)
    tree = PriorityTree(num, seed=5)
    few = max(1, num // 200)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) ** 4

    writes = (
        lambda: tree.rebuild(drawn(num)),
        lambda: tree.update(torch.randint(0, num, (few,), generator=generator), drawn(few)),
        lambda: tree.update(torch.randint(0, num, (num,), generator=generator), drawn(num)),
        lambda: tree.update(torch.tensor([num - 1, 0, 0]), torch.tensor([0.5, 0.0, 1.0])),
        lambda: tree.update(torch.tensor([num - 1, num, -1]), torch.tensor([0.25, 1.0, 1.0])),  # one of three is inside
        lambda: tree.write_range(num - 1, drawn(few)),  # round the end
        lambda: tree.write_range(num // 2, drawn(few)),
        lambda: tree.rebuild((torch.arange(num) == num - 1).float()),
        lambda: tree.update(torch.tensor([num // 3], dtype=torch.int32), torch.tensor([1.0])),
        lambda: tree.rebuild(torch.randint(0, 3, (num,), generator=generator)),  # every target is near an edge
    )
    for write in writes:
        for _ in range(2):  # two of a kind before a draw, and one
            write()
            q = tree.get(torch.arange(num))
            for mode in arithmetic.MODES:
                state = {"seed": tree.seed, "stream": tree.stream, "step": tree.step.clone()}
                sample = tree.sample(1100, mode)
                assert sample.total == q.sum()
                targets = arithmetic.draw_targets(mode, 1100, q.sum(), **state)
                assert torch.equal(sample.idx, arithmetic.select(q, targets))
            write()
    assert tree._host is not None
    assert tree._host.sums._takes_rows(1100)


def test_a_write_that_is_changed_afterwards_made_the_right_rows_stale() -> None:
    """The caller may fill its own index tensor anew before the next draw."""
    tree = PriorityTree(host_sums._MANY, seed=0)
    tree.rebuild(torch.eye(1, host_sums._MANY)[0])
    tree.sample(4)
    idx = torch.tensor([0, 5000])
    tree.update(idx, torch.tensor([0.0, 1.0]))
    idx.fill_(77)
    assert tree.sample(4).idx.tolist() == [5000] * 4


def test_leaves_without_room_for_a_last_row_are_summed_leaf_by_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_sums, "_MANY", 1)
    q = arithmetic.quantise(weights("even", 70))[0]
    sums = host_sums.HostSums(q)
    targets = torch.arange(0, int(q.sum()), int(q.sum()) // 50)[:1]
    assert int(sums.find_in(1)[-1]) == int(q.sum())
    assert torch.equal(sums.find(targets), arithmetic.select(q, targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("least", [0.0, 1e-9, 1e-3])
def test_writes_on_a_cpu_are_those_of_the_formulas(dtype: torch.dtype, least: float) -> None:
    """Weights below half a unit become one unit, zeros stay; several calls, duplicates, and ranges round the end."""
    generator = torch.Generator().manual_seed(3)
    quick, plain = PriorityTree(300, seed=0), PriorityTree(300, seed=0)
    plain._host = None
    for call in range(6):
        idx = torch.randint(0, 300, (200,), generator=generator)
        w = (torch.rand(200, generator=generator) ** 8).clamp(min=1e-10).to(dtype).clamp(min=least)
        if least == 0.0:
            w[::7] = 0.0
        for tree in (quick, plain):
            if call % 2:
                tree.write_range(torch.tensor(250 + call), w)
            else:
                tree.update(idx if call else idx.int(), w.requires_grad_())
        assert torch.equal(quick.leaf, plain.leaf)
        assert torch.equal(quick.sequence, plain.sequence)
        assert not quick.leaf.requires_grad


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
            host.HostTree(leaf).rebuild(source, bell, mask, found)
            assert torch.equal(leaf, wanted)
            assert torch.equal(found, counts)


def test_weights_at_the_edge_between_two_integers_are_those_of_the_formula() -> None:
    """Where torch's exp2, off by some 1e-8 of an integer, would round to the other side."""
    bell = Bell(0.3, 0.07)
    edges = torch.randint(1, arithmetic.ONE, (20_000,), generator=torch.Generator().manual_seed(0)).double() + 0.5
    statistics = bell.center + bell.width * (-2.0 * (edges / arithmetic.ONE).log()).sqrt()
    statistics[7], statistics[8] = float("inf"), -1e200
    tree = PriorityTree(len(statistics), seed=0)
    tree.rebuild(bell, statistics)
    assert torch.equal(tree.leaf, arithmetic.quantise(bell(statistics))[0])
    near = (bell(statistics) * arithmetic.ONE - edges).abs()
    assert near.kthvalue(19_000).values < 1e-6


def test_whole_weights_are_taken_as_they_are() -> None:
    source = torch.tensor([0, 1, arithmetic.ONE, arithmetic.ONE + 1, -1])
    leaf, found = torch.empty(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    host.HostTree(leaf).rebuild(source, None, None, found)
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


def test_many_draws_of_many_leaves_after_an_update_are_those_of_the_formulas() -> None:
    """Sums of all leaves, made block by block where leaves hold sequence numbers."""
    num = host_sums._MANY + 5
    tree = PriorityTree(num, seed=3)
    tree.rebuild(torch.randint(0, 3, (num,), generator=torch.Generator().manual_seed(0)))
    tree.update(torch.arange(0, num, 1000), torch.ones(num // 1000 + 1))
    q = tree.get(torch.arange(num))
    state = {"seed": tree.seed, "stream": tree.stream, "step": tree.step.clone()}
    targets = arithmetic.draw_targets("iid", 5000, q.sum(), **state)
    assert torch.equal(tree.sample(5000, "iid").idx, arithmetic.select(q, targets))

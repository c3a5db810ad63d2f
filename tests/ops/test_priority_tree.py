"""The priority tree against plain Python integers: the oracle is ``searchsorted(cumsum(q), target, right=True)``.

N = capacity, B = draws.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paced_kernels import PriorityTree, Sample
from paced_kernels._tree import arithmetic as tree_reference
from paced_kernels._tree.bits import multiply_high, random_bits, unit_interval
from paced_kernels._tree.philox import philox4x32

ONE = 2**27
MODES = ("systematic", "stratified", "iid")
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def python_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def python_bits(sample: int, seed: int, stream: int, step: int) -> int:
    words = python_philox((0, stream, step & MASK32, step >> 32), (seed & MASK32, seed >> 32))
    return python_splitmix(words[1] << 32 | words[0], sample + 1)


def python_splitmix(state: int, calls: int) -> int:
    """What the last of so many calls of SplitMix64 returns, as its authors wrote it: one call after another."""
    found = 0
    for _ in range(calls):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        found = state
        found = ((found ^ (found >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        found = ((found ^ (found >> 27)) * 0x94D049BB133111EB) & MASK64
        found ^= found >> 31
    return found


def python_unit(bits: int) -> float:
    """The word read as a signed number; the smallest is 2^-53, the largest 1."""
    return ((((bits + 2**63) & MASK64) >> 11) + 1) * 2.0**-53


def python_targets(mode: str, num_draws: int, total: int, seed: int, stream: int, step: int) -> list[int]:
    bits = [python_bits(i, seed, stream, step) for i in range(num_draws)]
    if mode == "iid":
        return [r * total >> 64 for r in bits]
    if mode == "systematic":
        offset = python_bits(0, seed, stream, step) * total >> 64
        return [(offset + i * total) // num_draws for i in range(num_draws)]
    edges = [i * total // num_draws for i in range(num_draws + 1)]
    return [edges[i] + (r * (edges[i + 1] - edges[i]) >> 64) for i, r in enumerate(bits)]


def python_pick(weights: list[int], target: int) -> int:
    for index, end in enumerate(itertools.accumulate(weights)):
        if target < end:
            return index
    raise AssertionError(target)


def integer_tree(weights: list[int], seed: int = 0, stream: int = 0, step: int = 0) -> PriorityTree:
    tree = PriorityTree(len(weights), seed=seed, stream=stream)
    tree.rebuild(torch.tensor(weights, dtype=torch.int32))
    tree.step.fill_(step)
    return tree


def state_tensors(seed: int, stream: int, step: int) -> dict[str, Tensor]:
    values = {"seed": seed, "stream": stream, "step": step}
    return {name: torch.tensor([v - 2**64 if v >= 2**63 else v]) for name, v in values.items()}


def test_philox_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10.
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        words = philox4x32(
            tuple(torch.tensor([c]) for c in counter),
            tuple(torch.tensor([k]) for k in key),
        )
        assert tuple(word.item() for word in words) == expected == python_philox(counter, key)


def test_splitmix_known_answers() -> None:
    """The first numbers of the published generator from the seeds 0 and 1234567."""
    cases = {
        0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
        1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423),
    }
    for start, expected in cases.items():
        assert tuple(python_splitmix(start, i) for i in (1, 2, 3)) == expected


@given(
    sample=st.integers(0, 100),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**63 - 1),
)
def test_bits_are_a_splitmix_from_a_start_that_philox_makes(sample: int, seed: int, stream: int, step: int) -> None:
    found = random_bits(torch.tensor([sample]), **state_tensors(seed, stream, step)).item()
    assert found & MASK64 == python_bits(sample, seed, stream, step)


def test_bits_are_even_and_neighbours_have_none_in_common() -> None:
    """Over samples of a step, steps of a stream, streams, and seeds: every bit is set half the time."""
    along, zero, num = torch.arange(4096), torch.zeros(1, dtype=torch.int64), 4096
    fixed = {"seed": zero + 5, "stream": zero, "step": zero + 9}
    places = torch.arange(64)
    for name in ("samples", "step", "stream", "seed"):
        samples = along if name == "samples" else zero.expand(num)
        drawn = random_bits(samples, **(fixed if name == "samples" else fixed | {name: along}))
        for words in (drawn, drawn[1:] ^ drawn[:-1], drawn[64:] ^ drawn[:-64]):
            ones = ((words[:, None] >> places) & 1).double().sum(0)
            # 64 numbers of standard deviation 1, twelve times.
            assert ((ones - len(words) / 2).abs() / (len(words) / 4) ** 0.5).max() < 4.5, name
        assert drawn.unique().numel() == num


@given(bits=st.integers(0, 2**64 - 1), limit=st.integers(0, 2**62 - 1))
def test_multiply_high_is_exact(bits: int, limit: int) -> None:
    signed = torch.tensor([bits - 2**64 if bits >= 2**63 else bits])
    assert multiply_high(signed, torch.tensor([limit])).item() == bits * limit >> 64


def test_unit_interval_is_open_at_zero() -> None:
    values = unit_interval(torch.tensor([-(2**63), -(2**63) + 2**11, 2**63 - 1]))
    assert values.tolist() == [2.0**-53, 2.0**-52, 1.0]


@given(
    mode=st.sampled_from(MODES),
    num_draws=st.integers(1, 70),
    total=st.one_of(st.integers(0, 100), st.integers(0, 2**62 - 1)),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**63 - 1),
)
@settings(max_examples=80, deadline=None)
def test_targets_equal_big_integers(mode: str, num_draws: int, total: int, seed: int, stream: int, step: int) -> None:
    found = tree_reference.draw_targets(mode, num_draws, torch.tensor(total), **state_tensors(seed, stream, step))
    assert found.tolist() == python_targets(mode, num_draws, total, seed, stream, step)


@given(
    weights=st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(0, ONE)), min_size=1, max_size=80),
    num_draws=st.integers(0, 40),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_sample_equals_the_oracle(
    weights: list[int], num_draws: int, mode: str, seed: int, stream: int, step: int
) -> None:
    tree = integer_tree(weights, seed, stream, step)
    sample = tree.sample(num_draws, mode)
    total = sum(weights)
    drawn_from = weights if total else [1] * len(weights)
    targets = python_targets(mode, num_draws, sum(drawn_from), seed, stream, step) if num_draws else []
    expected = [python_pick(drawn_from, target) for target in targets]
    assert sample.idx.tolist() == expected
    assert sample.q.tolist() == [weights[i] for i in expected]
    assert sample.total.item() == total == tree.total().item()
    assert sample.prob.tolist() == pytest.approx([drawn_from[i] / sum(drawn_from) for i in expected], rel=1e-6)
    assert [value.dtype for value in sample] == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert tree.step.item() == step + 1
    assert tree.status()["empty"] == (total == 0)


@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 1024, 32_769])
def test_capacities_around_powers_of_32(capacity: int) -> None:
    weights = torch.randint(0, ONE + 1, (capacity,), generator=torch.Generator().manual_seed(capacity))
    weights[torch.rand(capacity, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    weights[-1] = 7
    tree = PriorityTree(capacity, seed=11)
    tree.rebuild(weights.int())
    cumulative = weights.cumsum(0)
    for mode in MODES:
        step = tree.step.item()
        targets = tree_reference.draw_targets(mode, 257, weights.sum(), **state_tensors(11, 0, step))
        sample = tree.sample(257, mode)
        assert torch.equal(sample.idx, torch.searchsorted(cumulative, targets, right=True))
        assert (sample.q > 0).all()
    positive, total = weights.nonzero()[:, 0].tolist(), int(weights.sum())
    ends = tree_reference.select(weights, torch.tensor([0, total - 1, total - 7, max(total - 8, 0)]))
    assert ends.tolist() == [positive[0], capacity - 1, capacity - 1, positive[-2:][0]]
    assert tree.check()


def test_leaves_of_weight_zero_are_never_drawn_and_boundaries_belong_to_the_right() -> None:
    q = torch.tensor([0, 2, 0, 0, 3, 0])
    assert tree_reference.select(q, torch.arange(5)).tolist() == [1, 1, 4, 4, 4]
    tree = integer_tree([0, 0, 1, 0])
    for mode in MODES:
        assert tree.sample(9, mode).idx.tolist() == [2] * 9


def test_all_leaves_at_the_maximum() -> None:
    tree = integer_tree([ONE] * 1000)
    assert tree.total().item() == 1000 * ONE
    assert tree.sample(1000).idx.tolist() == list(range(1000))


def test_update_last_writer_wins_and_padding_is_ignored() -> None:
    tree = PriorityTree(5, seed=0)
    tree.update(torch.tensor([3, -1, 3, 0, 3, -1]), torch.tensor([1.0, 1.0, 0.25, 0.5, 0.125, 1.0]))
    assert tree.get(torch.arange(5)).tolist() == [ONE // 2, 0, 0, ONE // 8, 0]
    # A later call wins over an earlier one, also with a smaller weight; int32 weights are taken as they are.
    tree.update(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([3, 9], dtype=torch.int32))
    assert tree.get(torch.tensor([[0, 4], [-1, 7]])).tolist() == [[3, 9], [0, 0]]
    assert tree.total().item() == 3 + 9 + ONE // 8
    assert set(tree.status().values()) == {0}
    tree.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert tree.check()


def test_indices_outside_are_ignored_and_counted() -> None:
    tree = PriorityTree(4, seed=0)
    tree.update(torch.tensor([4, -5, -1, 1, 2**40]), torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0]))
    assert tree.get(torch.arange(4)).tolist() == [0, ONE, 0, 0]
    assert tree.status() == {
        "nan": 0,
        "negative": 0,
        "saturated": 0,
        "out_of_range": 3,
        "empty": 0,
        "short": 0,
        "repeats": 0,
    }


def test_bad_weights_are_neutralised_and_counted() -> None:
    values = [math.nan, -1.0, -math.inf, math.inf, 1.5, 1.0, 0.0, -0.0, 1e-45, 1e-20, 2.0**-27, 1.6 * 2.0**-27]
    expected = [0, 0, 0, ONE, ONE, ONE, 0, 0, 1, 1, 1, 2]
    for write in ("update", "write_range", "rebuild"):
        tree = PriorityTree(len(values), seed=0)
        arguments = {"update": (torch.arange(len(values)),), "write_range": (0,), "rebuild": ()}[write]
        getattr(tree, write)(*arguments, torch.tensor(values))
        assert tree.get(torch.arange(len(values))).tolist() == expected
        counts = tree.status()
        assert (counts["nan"], counts["negative"], counts["saturated"]) == (1, 2, 2)
        assert tree.check()
    tree = PriorityTree(3, seed=0)
    tree.update(torch.arange(3), torch.tensor([-4, ONE + 1, ONE], dtype=torch.int32))
    assert tree.get(torch.arange(3)).tolist() == [0, ONE, ONE]
    assert (tree.status()["negative"], tree.status()["saturated"]) == (1, 1)


@given(st.floats(0, 1, width=32))
def test_quantisation_error_is_at_most_half_a_unit(weight: float) -> None:
    q = tree_reference.quantise(torch.tensor([weight]))[0].item()
    assert abs(q - weight * ONE) <= 0.5 or (q == 1 and 0 < weight * ONE < 1)


def test_empty_tree_falls_back_to_the_live_prefix() -> None:
    tree = PriorityTree(10, seed=3)
    for mode in MODES:
        sample = tree.sample(4, mode)
        assert sample.q.tolist() == [0] * 4
        assert sample.total == 0
        assert sample.prob.tolist() == pytest.approx([0.1] * 4)
    tree.size.fill_(4)
    assert sorted(tree.sample(4, "systematic").idx.tolist()) == [0, 1, 2, 3]
    assert sorted(tree.sample_distinct(4, "race").idx.tolist()) == [0, 1, 2, 3]
    assert tree.sample(200, "iid").idx.unique().tolist() == [0, 1, 2, 3]
    tree.size.fill_(0)
    for sample in (*(tree.sample(3, mode) for mode in MODES), tree.sample_distinct(3), tree.sample_distinct(3, "race")):
        assert sample.idx.tolist() == [-1] * 3
        assert sample.prob.tolist() == [0.0] * 3
    assert tree.status()["empty"] == 11
    assert tree.status()["repeats"] == 0


def test_write_range_goes_round_and_takes_a_device_scalar() -> None:
    tree = PriorityTree(5, seed=0)
    tree.write_range(torch.tensor(3), torch.tensor([1, 2, 3, 4], dtype=torch.int32))
    assert tree.get(torch.arange(5)).tolist() == [3, 4, 0, 1, 2]
    tree.write_range(1, torch.tensor([9], dtype=torch.int32))
    assert tree.get(torch.arange(5)).tolist() == [3, 9, 0, 1, 2]


def test_rebuild_from_statistics_equals_updates() -> None:
    stats = torch.rand(50, generator=torch.Generator().manual_seed(0))
    rebuilt, updated = PriorityTree(50, seed=5), PriorityTree(50, seed=5)
    rebuilt.update(torch.arange(50), torch.ones(50))
    rebuilt.rebuild(lambda value: (-((value - 0.5) ** 2) / 0.02).exp(), stats)
    for part in torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(7):
        updated.update(part, (-((stats[part] - 0.5) ** 2) / 0.02).exp())
    everything = torch.arange(50)
    assert torch.equal(rebuilt.get(everything), updated.get(everything))
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.sample(20), updated.sample(20), strict=True))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 1000))
@settings(deadline=None)
def test_systematic_copies_are_floor_or_ceil_of_the_expectation(weights: list[int], num_draws: int, seed: int) -> None:
    tree = integer_tree(weights, seed)
    sample = tree.sample(num_draws)
    copies = torch.bincount(sample.idx, minlength=len(weights)).tolist()
    total = sum(weights)
    for weight, count in zip(weights, copies, strict=True):
        assert num_draws * weight // total <= count <= -(-num_draws * weight // total)
    is_distinct = num_draws * max(weights) <= total
    assert len(set(sample.idx.tolist())) == num_draws or not is_distinct
    assert tree.status()["repeats"] == num_draws - len(set(sample.idx.tolist()))


def test_every_rank_taking_every_rth_draw_has_a_systematic_sample() -> None:
    weights = torch.randint(1, 100, (64,), generator=torch.Generator().manual_seed(2)).int()
    tree = PriorityTree(64, seed=1)
    tree.rebuild(weights)
    drawn = tree.sample(16).idx
    total = int(weights.sum())
    for rank in range(4):
        copies = torch.bincount(drawn[rank::4], minlength=64).tolist()
        for weight, count in zip(weights.tolist(), copies, strict=True):
            assert 4 * weight // total <= count <= -(-4 * weight // total)
    # A quarter of the draws each, from all over the tree: nothing like the contiguous quarters of the batch.
    assert all(drawn[rank::4].max() - drawn[rank::4].min() > 32 for rank in range(4))


def test_strata_hold_one_draw_each() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randint(0, ONE, (500,), generator=generator)
    tree = PriorityTree(500, seed=9)
    tree.rebuild(weights.int())
    total, ends = int(weights.sum()), weights.cumsum(0).tolist()
    for _ in range(20):
        for i, index in enumerate(tree.sample(37, "stratified").idx.tolist()):
            low, high = i * total // 37, (i + 1) * total // 37
            assert ends[index] > low
            assert ends[index] - weights[index] < high


def test_iid_frequencies_pass_a_chi_square_test() -> None:
    weights = torch.arange(160) % 7
    tree = integer_tree((weights * 1_000_003).tolist(), seed=123)
    num_draws = 200_000
    counts = torch.bincount(tree.sample(num_draws, "iid").idx, minlength=160).double()
    assert counts[weights == 0].sum() == 0
    expected = num_draws * weights[weights > 0].double() / weights.sum()
    statistic = ((counts[weights > 0] - expected).square() / expected).sum().item()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("mode", ["systematic", "stratified"])
def test_inclusion_probabilities(mode: str) -> None:
    weights = torch.randint(1, 100, (40,), generator=torch.Generator().manual_seed(5))
    tree = integer_tree(weights.tolist(), seed=6)
    num_draws, num_calls = 10, 1000
    counts = torch.zeros(40)
    for _ in range(num_calls):
        counts += torch.bincount(tree.sample(num_draws, mode).idx, minlength=40)
    expected = num_draws * weights / weights.sum()
    deviation = (counts / num_calls - expected) / (expected * (1 - expected).clamp(min=0.05) / num_calls).sqrt()
    assert deviation.abs().max() < 4.5
    # Mean 1. One offset decides a systematic draw, so leaves deviate together: of 300 seeds of torch's generator,
    # 7 % are above 2.
    assert deviation.square().mean() < {"systematic": 4.0, "stratified": 2.0}[mode]


@pytest.mark.parametrize("method", ["first", "race"])
def test_distinct_draws_have_the_law_of_successive_sampling(method: str) -> None:
    weights = [1, 2, 3, 5, 9]
    tree = integer_tree(weights, seed=8)
    num_calls = 3000
    counts = dict.fromkeys(itertools.permutations(range(5), 2), 0)
    for _ in range(num_calls):
        counts[tuple(tree.sample_distinct(2, method).idx.tolist())] += 1
    statistic = 0.0
    for (first, second), count in counts.items():
        expected = num_calls * weights[first] / 20 * weights[second] / (20 - weights[first])
        statistic += (count - expected) ** 2 / expected
    assert abs(statistic - 19) < 4 * math.sqrt(2 * 19)


@pytest.mark.parametrize("method", ["first", "race"])
def test_distinct_draws_are_distinct_positive_and_padded(method: str) -> None:
    weights = torch.zeros(100, dtype=torch.int32)
    weights[::10] = torch.arange(1, 11).int()
    tree = PriorityTree(100, seed=2)
    tree.rebuild(weights)
    sample = tree.sample_distinct(6, method)
    assert sample.idx.unique().numel() == 6
    assert (sample.q > 0).all()
    torch.testing.assert_close(sample.prob, sample.q / 55)
    assert tree.status()["short"] == 0
    sample = tree.sample_distinct(150, method)
    found = sample.idx[sample.idx >= 0]
    assert found.unique().numel() == found.numel() == 10
    assert sample.idx[10:].tolist() == [-1] * 140
    assert tree.status()["short"] == 1
    assert tree.sample_distinct(0, method).idx.shape == (0,)


def test_first_takes_the_iid_draws_in_order_and_race_the_smallest_keys() -> None:
    weights = [4, 0, 1, 7, 2, 9]
    tree = integer_tree(weights, seed=2**63 + 5, stream=7, step=3)
    draws = [python_pick(weights, t) for t in python_targets("iid", 40, sum(weights), 2**63 + 5, 7, 3)]
    assert tree.sample_distinct(4).idx.tolist() == list(dict.fromkeys(draws))[:4]
    units = [python_unit(python_bits(i, 2**63 + 5, 7, 4)) for i in range(6)]
    keys = {i: -math.log(units[i]) / w for i, w in enumerate(weights) if w}
    assert tree.sample_distinct(5, "race").idx.tolist() == sorted(keys, key=keys.__getitem__)


@pytest.mark.parametrize("mode", MODES)
def test_four_shards_draw_what_one_tree_draws(mode: str) -> None:
    weights = torch.randint(0, 50, (1003,), generator=torch.Generator().manual_seed(0))
    tree = PriorityTree(1003, seed=4)
    tree.rebuild(weights.int())
    state = state_tensors(4, 0, 0)
    shards = weights.split(251)
    totals = torch.stack([shard.sum() for shard in shards])
    targets = tree_reference.draw_targets(mode, 64, totals.sum(), **state)
    combined = torch.full((64,), -1)
    for rank, shard in enumerate(shards):
        local = targets - totals[:rank].sum()
        is_here = (local >= 0) & (local < totals[rank])
        own = torch.where(is_here, tree_reference.select(shard, local) + 251 * rank, -1)
        combined = torch.maximum(combined, own)
    assert torch.equal(combined, tree.sample(64, mode).idx)


def test_race_of_shards_merges_to_the_race_of_one_tree() -> None:
    weights = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(1))
    tree = PriorityTree(400, seed=4)
    tree.rebuild(weights.int())
    expected = tree.sample_distinct(20, "race").idx.tolist()
    keys = {}
    for shard in torch.arange(400).split(100):
        masked = torch.zeros_like(weights)
        masked[shard] = weights[shard]
        shard_keys = tree_reference.race_keys(masked, **state_tensors(4, 0, 0))
        for index in tree_reference.race_winners(shard_keys, 20).tolist():
            unit = python_unit(python_bits(index, 4, 0, 0))
            keys[index] = -math.log(unit) / weights[index].item()
    assert sorted(keys, key=keys.__getitem__)[:20] == expected


def test_resume_draws_the_same_next_batch_in_place() -> None:
    tree = PriorityTree(300, seed=2**64 - 1, stream=5)
    tree.rebuild(torch.rand(300, generator=torch.Generator().manual_seed(0)))
    tree.size.fill_(200)
    tree.update(torch.tensor([1, 1, 400]), torch.tensor([math.nan, 0.5, 1.0]))
    for _ in range(3):
        tree.sample(16)
    state = tree.state_dict()
    expected = [tree.sample(16, mode) for mode in MODES] + [tree.sample_distinct(16, m) for m in ("first", "race")]
    other = PriorityTree(300, seed=0)
    other.update(torch.arange(300), torch.ones(300))
    addresses = {name: value.data_ptr() for name, value in vars(other).items() if isinstance(value, Tensor)}
    other.load_state_dict(state)
    assert other.status() == tree.status() | {"empty": 0}
    assert other.size.item() == 200
    found = [other.sample(16, mode) for mode in MODES] + [other.sample_distinct(16, m) for m in ("first", "race")]
    for own, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, own, wanted))
    # Updates after the load win over what was loaded.
    other.update(torch.tensor([0]), torch.tensor([1], dtype=torch.int32))
    assert other.get(torch.tensor(0)).item() == 1
    other.rebuild(torch.rand(300))
    after = {name: value.data_ptr() for name, value in vars(other).items() if isinstance(value, Tensor)}
    assert after == addresses
    assert state["weights"][1].item() == ONE // 2
    assert state["step"].item() == 3


def test_draws_depend_on_seed_step_and_stream_only() -> None:
    def draw(**arguments: int) -> Sample:
        tree = PriorityTree(1000, **arguments)
        tree.rebuild(torch.ones(1000))
        tree.sample(8, "iid")
        return tree.sample(8, "iid")

    first = draw(seed=1, stream=2)
    torch.manual_seed(99)
    assert torch.equal(first.idx, draw(seed=1, stream=2).idx)
    for other in (draw(seed=2, stream=2), draw(seed=1, stream=3), draw(seed=1 + 2**32, stream=2)):
        assert (first.idx != other.idx).sum() >= 6


def test_sequence_numbers_start_again_before_they_run_out() -> None:
    tree = PriorityTree(3, seed=0, backend="reference")
    tree.update(torch.arange(3), torch.tensor([5, 6, 7], dtype=torch.int32))
    tree.sequence.fill_(tree_reference.MAX_SEQUENCE - 1)
    tree._host_sequence = tree_reference.MAX_SEQUENCE - 1
    tree.update(torch.tensor([0]), torch.tensor([2], dtype=torch.int32))
    assert tree.check()
    tree.update(torch.tensor([1, 2]), torch.tensor([1, 1], dtype=torch.int32))
    assert tree.get(torch.arange(3)).tolist() == [2, 1, 1]
    assert tree.sequence.item() == 2
    assert tree.check()


@pytest.mark.parametrize(("backend", "leaf"), [("auto", -1), ("auto", ONE + 1), ("reference", (9 << 28) | 1)])
def test_check_finds_damage(backend: str, leaf: int) -> None:
    for made in {backend, "reference"}:
        tree = PriorityTree(3, seed=0, backend=made)
        assert tree.check()
        tree.leaf[1] = leaf
        assert not tree.check(), made


def test_a_hundred_thousand_random_writes_leave_no_drift() -> None:
    generator = torch.Generator().manual_seed(7)
    tree, mirror = PriorityTree(777, seed=0), [0] * 777
    for call in range(100):
        idx = torch.randint(-1, 777, (1000,), generator=generator)
        w = torch.rand(1000, generator=generator) * (torch.rand(1000, generator=generator) > 0.3)
        tree.update(idx, w)
        for i, value in zip(idx.tolist(), w.tolist(), strict=True):
            if i >= 0:
                mirror[i] = max(1, round(value * ONE)) if value > 0 else 0
        if call % 10 == 0:
            start, values = call * 7, torch.rand(50, generator=generator)
            tree.write_range(start, values)
            for i, value in enumerate(values.tolist()):
                mirror[(start + i) % 777] = max(1, round(value * ONE))
        if call % 25 == 0:
            tree.load_state_dict(tree.state_dict())
        assert tree.total().item() == sum(mirror)
    assert tree.get(torch.arange(777)).tolist() == mirror
    assert tree.check()

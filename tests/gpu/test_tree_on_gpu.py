"""The priority tree on a GPU: bits of the CPU reference, races, no host sync, graph capture, ten million leaves.

N = leaves, B = elements of a call.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paced_kernels import Bell, PriorityTree, Sample
from paced_kernels._tree import launches

DEVICE = torch.device("cuda")
BACKEND = "triton"
MODES = ("systematic", "stratified", "iid")
DRAWS = 5000
BATCH = 65536
REPEATS = 1000
REPLAYS = 100
STEP_CAPACITY = 100_000
STEP_BATCH = 1024
LARGE = 10_000_000


def weights_of(capacity: int, seed: int, zeros: float = 0.3) -> Tensor:
    """Weights f32 [N] on the CPU; those near 0 are the most, and some are 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(capacity, generator=generator) ** 3
    return torch.where(torch.rand(capacity, generator=generator) < zeros, 0.0, weights)


def pair(capacity: int, *, seed: int = 7, stream: int = 0) -> tuple[PriorityTree, PriorityTree]:
    """A tree on the GPU and the reference on the CPU."""
    return (
        PriorityTree(capacity, seed=seed, stream=stream, device=DEVICE, backend=BACKEND),
        PriorityTree(capacity, seed=seed, stream=stream, backend="reference"),
    )


def assert_same_sample(found: Sample, expected: Sample) -> None:
    for name, value, reference in zip(Sample._fields, found, expected, strict=True):
        assert torch.equal(value.cpu(), reference), name


def assert_same_state(found: PriorityTree, expected: PriorityTree) -> None:
    assert found.check()
    for name in ("leaf", "step", "sequence", "size"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert found.total().item() == expected.total().item()
    assert found.status() == expected.status()


def checksum(tree: PriorityTree) -> Tensor:
    """One number, i64 [], that changes with any bit of the leaves or of the sums of the kernels."""
    state = torch.cat([tree.leaf, tree._kernels.sums])
    return (state * (2 * torch.arange(len(state), device=state.device) + 1)).sum()


@pytest.mark.parametrize("capacity", [1, 33, 1024, 1025, 32_769, 1_000_003])
def test_draws_and_writes_equal_the_reference_on_the_cpu(capacity: int) -> None:
    trees = pair(capacity, seed=2**64 - 3, stream=5)
    weights = weights_of(capacity, capacity)
    weights[0], weights[-1] = float("nan"), 2.0
    idx = torch.randint(-3, capacity + 3, (DRAWS,))
    idx[: DRAWS // 3] = capacity // 2
    values = 1.4 * torch.rand(DRAWS) - 0.2
    values[:3] = torch.tensor([float("inf"), 1e-40, -0.0])
    for tree in trees:
        tree.rebuild(weights.to(tree.device))
        tree.update(idx.to(tree.device), values.to(tree.device))
    assert_same_state(*trees)
    for mode in MODES:
        for num_draws in (1, 33, DRAWS):
            assert_same_sample(*(tree.sample(num_draws, mode) for tree in trees))
    for tree in trees:
        tree.write_range(torch.tensor(capacity - 1, device=tree.device), values[: min(capacity, DRAWS)].to(tree.device))
        tree.update(idx.int().to(tree.device), torch.arange(DRAWS, dtype=torch.int32, device=tree.device))
    assert_same_state(*trees)
    for num_draws in (1, 20, DRAWS):
        assert_same_sample(*(tree.sample_distinct(num_draws) for tree in trees))
    statistics = 1.5 * weights_of(capacity, 3) - 0.2
    statistics[0] = float("nan")
    for tree in trees:
        where = tree.device
        tree.rebuild(Bell(0.4, 0.07), statistics.to(where), allowed=(statistics > -0.1).to(where))
    assert_same_state(*trees)
    for exploration in (0.0, 0.2):
        assert_same_sample(*(tree.sample_distinct(20, "race", exploration=exploration) for tree in trees))
    assert_same_state(*trees)


def test_an_empty_tree_draws_the_same_on_both_devices() -> None:
    trees = pair(1000)
    for size in (1000, 7, 0):
        for tree in trees:
            tree.size.fill_(size)
        for mode in MODES:
            assert_same_sample(*(tree.sample(40, mode) for tree in trees))
        assert_same_sample(*(tree.sample_distinct(5) for tree in trees))
    assert_same_state(*trees)


def test_writes_that_race_leave_the_same_bits_every_time() -> None:
    """Some 1000 writes per leaf in one call, from many programs, whose order changes; all land on few sums."""
    found, expected = pair(STEP_CAPACITY)
    generator = torch.Generator().manual_seed(0)
    few = torch.randperm(STEP_CAPACITY, generator=generator)[: max(2, BATCH // 1000)]
    idx = few[torch.randint(0, len(few), (BATCH,), generator=generator)]
    values = weights_of(BATCH, 1)
    start = weights_of(STEP_CAPACITY, 2)
    expected.rebuild(start)
    expected.update(idx, values)
    on_device = [value.to(DEVICE) for value in (start, idx, values)]
    checksums = torch.zeros(REPEATS, dtype=torch.int64, device=DEVICE)
    for repeat in range(REPEATS):
        found.rebuild(on_device[0])
        found.update(*on_device[1:])
        checksums[repeat] = checksum(found)
    assert_same_state_without_status(found, expected)
    assert len(checksums.unique()) == 1


def assert_same_state_without_status(found: PriorityTree, expected: PriorityTree) -> None:
    assert found.check()
    assert torch.equal(found.leaf.cpu(), expected.leaf)
    assert found.total().item() == expected.total().item()


def step_of(tree: PriorityTree) -> Callable[[], list[Tensor]]:
    """One step of training: draw, write, draw, on inputs that stay where they are."""
    device, batch = tree.device, min(STEP_BATCH, tree.capacity)
    generator = torch.Generator().manual_seed(3)
    idx = torch.randint(-1, tree.capacity, (batch,), generator=generator).to(device)
    values = weights_of(batch, 4).to(device)
    weights = weights_of(tree.capacity, 5).to(device)
    start = torch.tensor(tree.capacity - 3, device=device)
    tree.rebuild(weights)

    def step() -> list[Tensor]:
        drawn = [tree.sample(batch, mode).idx for mode in MODES]
        tree.update(idx, values)
        # What is written depends on what was drawn: a step that is left out shows in all later ones.
        tree.update(drawn[2], values.flip(0))
        start.add_(7)
        tree.write_range(start, values[: batch // 2])
        drawn.append(tree.sample_distinct(batch // 4).idx)
        return [*drawn, tree.total().clone()]

    return step


def test_the_host_never_waits() -> None:
    tree = pair(STEP_CAPACITY)[0]
    step, weights = step_of(tree), weights_of(STEP_CAPACITY, 6).to(DEVICE)

    def everything() -> None:
        step()
        tree.rebuild(weights)
        tree.rebuild(torch.square, weights)
        tree.rebuild(Bell(0.5, 0.1), weights, allowed=weights > 0.2)
        tree.sample_distinct(20, "race", exploration=0.1)
        tree.sample_distinct(20, "race")
        tree.write_range(3, weights[:10])
        tree.get(torch.arange(5, device=DEVICE))
        tree.check()
        tree.state_dict()

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_of_a_captured_step_equal_eager_steps() -> None:
    captured, eager = pair(STEP_CAPACITY)[0], pair(STEP_CAPACITY)[0]
    captured_step, eager_step = step_of(captured), step_of(eager)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured_step()
    torch.cuda.current_stream().wait_stream(side)
    eager_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured_step()
    for replay in range(REPLAYS):
        graph.replay()
        for found, expected in zip(results, eager_step(), strict=True):
            assert torch.equal(found, expected), replay
    for name in ("leaf", "step", "sequence", "status_counts"):
        assert torch.equal(getattr(captured, name), getattr(eager, name)), name
    assert captured.check()


def test_ten_million_leaves() -> None:
    assert len(launches.level_counts(LARGE)) == 3
    trees = pair(LARGE)
    weights = weights_of(LARGE, 8, zeros=0.9)
    idx = torch.randint(0, LARGE, (BATCH,))
    idx[: BATCH // 2] = torch.randint(LARGE - 100, LARGE, (BATCH // 2,))
    values = weights_of(BATCH, 9)
    for tree in trees:
        tree.rebuild(weights.to(tree.device))
        tree.update(idx.to(tree.device), values.to(tree.device))
    assert_same_state(*trees)
    for mode in MODES:
        found, expected = (tree.sample(BATCH, mode) for tree in trees)
        assert_same_sample(found, expected)
        assert (found.q > 0).all()
    for tree in trees:
        tree.write_range(torch.tensor(LARGE - 50, device=tree.device), values.to(tree.device))
    assert_same_state(*trees)
    assert_same_sample(*(tree.sample_distinct(BATCH // 4) for tree in trees))


def test_a_writer_and_a_reader_on_two_streams_meet_at_events() -> None:
    found, expected = pair(STEP_CAPACITY)
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    found.rebuild(weights_of(STEP_CAPACITY, 10).to(DEVICE))
    expected.rebuild(weights_of(STEP_CAPACITY, 10))
    batches = [(torch.randint(0, STEP_CAPACITY, (STEP_BATCH,)), weights_of(STEP_BATCH, 20 + i)) for i in range(20)]
    on_device = [(idx.to(DEVICE), values.to(DEVICE)) for idx, values in batches]
    torch.cuda.synchronize()
    drawn = []
    for idx, values in on_device:
        written, read = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.stream(writer):
            found.update(idx, values)
            written.record()
        with torch.cuda.stream(reader):
            reader.wait_event(written)
            drawn.append(found.sample(STEP_BATCH))
            read.record()
        writer.wait_event(read)
    torch.cuda.synchronize()
    for (idx, values), sample in zip(batches, drawn, strict=True):
        expected.update(idx, values)
        assert_same_sample(sample, expected.sample(STEP_BATCH))
    assert_same_state(found, expected)


@pytest.mark.real_empty
def test_the_benchmark_measures_the_kernels_in_a_graph() -> None:
    """Filled memory would count as a kernel more; a draw and a write are one each."""
    priority_tree = pytest.importorskip("benchmarks.tree.measure")
    given = priority_tree.Arguments(
        device="cuda", repetitions=5, only=("ours", "int64"), operations=("update random", "sample iid", "pair")
    )
    cell = priority_tree.Measurement(given).cell(STEP_CAPACITY, STEP_BATCH, True, lambda _: None)
    ours = next(row for row in cell["rows"] if row["name"] == "ours")
    for operation, num_kernels in (("update random", 1), ("sample iid", 1), ("pair", 2)):
        found = ours["operations"][operation]
        assert found["waits"] == 0
        assert found["kernels"] == num_kernels
        for measure in ("graph", "event", "wall", "host"):
            assert 0 < found[measure]["p10_ms"] <= found[measure]["p90_ms"], (operation, measure)
        assert 0 < found["copy_share"] < 2

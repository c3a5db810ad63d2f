"""The priority tree on several ranks and at scale: replicas, shards, a million writes, frequencies of both backends.

N = capacity, B = elements of a call.
"""

from __future__ import annotations

import datetime
import math
import multiprocessing as mp
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from paced_kernels import PriorityTree
from paced_kernels._tree import arithmetic as tree_reference

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs kernels in Triton's interpreter")
BACKENDS = ("reference", pytest.param("triton", marks=interpreted))
MODES = ("systematic", "stratified", "iid")
ONE = 2**27
WORLD_SIZE = 2
SECONDS = 600
N, B = 2000, 300


def quantised(weights: Tensor) -> Tensor:
    """What a rank sends: int32, so that another kind of device cannot round differently."""
    return tree_reference.quantise(weights)[0].int()


def batch_of(rank: int, call: int) -> tuple[Tensor, Tensor]:
    """Indices and weights [B] that one rank measured; ranks disagree on many leaves, and pad."""
    generator = torch.Generator().manual_seed(100 * call + rank)
    idx = torch.randint(-1, N // 8, (B,), generator=generator)
    return idx, torch.rand(B, generator=generator) * (torch.rand(B, generator=generator) > 0.3)


def replicate(tree: PriorityTree, rank: int, num_calls: int) -> list[Tensor]:
    """Writes of all ranks in rank order on this rank's replica; draws after each."""
    drawn = []
    for call in range(num_calls):
        own = torch.stack([value.int() for value in (batch_of(rank, call)[0], quantised(batch_of(rank, call)[1]))])
        gathered = [torch.empty_like(own) for _ in range(WORLD_SIZE)]
        dist.all_gather(gathered, own)
        tree.update(*torch.cat(gathered, dim=1))
        drawn += [tree.sample(64, MODES[call % 3]).idx, tree.sample_distinct(16).idx]
    return drawn


def serve(rank: int, meeting: str, backend: str, pipe: Connection) -> None:
    """One rank: sends its leaves and draws, or the traceback of its failure."""
    torch.set_num_threads(1)
    try:
        timeout = datetime.timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", f"file://{meeting}", timeout, rank=rank, world_size=WORLD_SIZE)
        tree = PriorityTree(N, seed=3, backend=backend)
        drawn = replicate(tree, rank, 6)
        assert tree.check()
        pipe.send([value.tolist() for value in (tree.leaf, tree.total(), *drawn)])
        dist.destroy_process_group()
    except BaseException:
        pipe.send(traceback.format_exc())


def run_ranks(folder: Path, backends: tuple[str, ...]) -> list[list]:
    """What each rank sends, one backend per rank; a rank that is late is killed."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank, backend in enumerate(backends):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, str(folder / "meeting"), backend, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        answers = []
        for rank, pipe in enumerate(pipes):
            answers.append(pipe.recv() if pipe.poll(SECONDS) else "no answer in time")
            assert not isinstance(answers[-1], str), f"rank {rank}: {answers[-1]}"
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.process
def test_replicas_on_two_ranks_are_equal_and_draw_the_same(tmp_path: Path) -> None:
    """One rank runs the kernels, the other the reference: not even the implementation splits them."""
    answers = run_ranks(tmp_path, ("triton" if IS_INTERPRETED else "reference", "reference"))
    assert answers[0] == answers[1]
    # By hand: the last of the gathered writes to a leaf is what it holds.
    expected = [0] * N
    for call in range(6):
        for rank in range(WORLD_SIZE):
            idx, weights = batch_of(rank, call)
            for i, q in zip(idx.tolist(), quantised(weights).tolist(), strict=True):
                if i >= 0:
                    expected[i] = q
    leaves, total = answers[0][:2]
    assert [leaf & (2**28 - 1) for leaf in leaves] == expected
    assert total == sum(expected)
    drawn = answers[0][2:]
    assert all(expected[i] > 0 for draws in drawn[-2:] for i in draws)  # after the last write
    assert len({tuple(draws) for draws in drawn}) == len(drawn)


def test_the_order_of_ranks_matters_to_replicas() -> None:
    """The test above would not see replicas that take the batches as they come, were there no conflicts."""
    first, second = (PriorityTree(N, seed=3) for _ in range(2))
    batches = [batch_of(rank, 0) for rank in range(2)]
    for tree, order in ((first, (0, 1)), (second, (1, 0))):
        tree.update(*(torch.cat([batches[rank][k] for rank in order]) for k in range(2)))
    assert (first.get(torch.arange(N)) != second.get(torch.arange(N))).sum() > 50


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_four_shards_draw_what_one_tree_draws(mode: str, backend: str) -> None:
    """Each shard resolves the targets in its interval of the total; a maximum over the ranks joins them."""
    weights = torch.randint(0, 50, (1003,), generator=torch.Generator().manual_seed(0)).int()
    whole = PriorityTree(1003, seed=4, backend=backend)
    whole.rebuild(weights)
    shards = []
    for part in weights.split(251):
        shards.append(PriorityTree(part.shape[0], seed=4, backend=backend))
        shards[-1].rebuild(part)
    for step in range(2):
        totals = torch.stack([shard.total() for shard in shards])
        state = {name: torch.tensor([value]) for name, value in (("seed", 4), ("stream", 0), ("step", step))}
        targets = tree_reference.draw_targets(mode, 64, totals.sum(), **state)
        combined = torch.full((64,), -1)
        for rank, shard in enumerate(shards):
            local = targets - totals[:rank].sum()
            is_here = (local >= 0) & (local < totals[rank])
            own = tree_reference.select(shard.get(torch.arange(shard.capacity)), local) + 251 * rank
            combined = torch.maximum(combined, torch.where(is_here, own, -1))
        assert torch.equal(combined, whole.sample(64, mode).idx)
        changed = torch.arange(step, 1003, 5)
        for tree, start in ((whole, 0), *((shard, 251 * rank) for rank, shard in enumerate(shards))):
            here = changed[(changed >= start) & (changed < start + tree.capacity)]
            tree.update(here - start, here.int() % 13)


@pytest.mark.parametrize(("backend", "num_calls"), [("reference", 250), pytest.param("triton", 10, marks=interpreted)])
def test_many_random_writes_leave_no_drift_and_draw_no_weightless_leaf(backend: str, num_calls: int) -> None:
    """4000 elements per call, a million for the reference; the mirror is a plain array of numbers."""
    capacity, size = 5000, 4000
    tree, mirror = PriorityTree(capacity, seed=1, backend=backend), torch.zeros(capacity, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    num_zero = 0
    for call in range(num_calls):
        idx = torch.randint(-1, capacity, (size,), generator=generator)
        weights = torch.rand(size, generator=generator) ** 8 * (torch.rand(size, generator=generator) > 0.5)
        if call % 5 == 4:  # a ring write now and then
            start = int(idx[0])
            tree.write_range(start, weights[: size // 2])
            mirror[(start + torch.arange(size // 2)) % capacity] = quantised(weights[: size // 2]).long()
        else:
            tree.update(idx, weights)
            last = torch.full((capacity,), -1).scatter_reduce_(0, idx.clamp(min=0), torch.arange(size), "amax")
            if (idx == -1).any():  # padding is no write to leaf 0
                here = (idx == 0).nonzero()[:, 0]
                last[0] = here[-1] if len(here) else -1
            mirror = torch.where(last >= 0, quantised(weights).long()[last.clamp(min=0)], mirror)
        sample = tree.sample(100, MODES[call % 3])
        num_zero += int((mirror[sample.idx] == 0).sum())
        assert tree.total() == mirror.sum()
    assert torch.equal(tree.get(torch.arange(capacity)), mirror)
    assert num_zero == 0
    assert tree.check()
    tree.update(torch.arange(capacity), torch.zeros(capacity))
    assert tree.total() == 0


@interpreted
def test_iid_frequencies_of_the_kernels_pass_a_chi_square_test() -> None:
    weights = torch.arange(40) % 5
    tree = PriorityTree(40, seed=123, backend="triton")
    tree.rebuild((weights * 1_000_003).int())
    counts = torch.bincount(torch.cat([tree.sample(1024, "iid").idx for _ in range(6)]), minlength=40).double()
    assert counts[weights == 0].sum() == 0
    expected = counts.sum() * weights[weights > 0].double() / weights.sum()
    statistic = ((counts[weights > 0] - expected).square() / expected).sum().item()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@interpreted
@pytest.mark.parametrize("mode", ["systematic", "stratified"])
def test_inclusion_probabilities_of_the_kernels(mode: str) -> None:
    weights = torch.randint(1, 100, (40,), generator=torch.Generator().manual_seed(5))
    tree = PriorityTree(40, seed=6, backend="triton")
    tree.rebuild(weights.int())
    num_draws, num_calls = 10, 150
    counts = torch.zeros(40)
    for _ in range(num_calls):
        counts += torch.bincount(tree.sample(num_draws, mode).idx, minlength=40)
    expected = num_draws * weights / weights.sum()
    deviation = (counts / num_calls - expected) / (expected * (1 - expected).clamp(min=0.05) / num_calls).sqrt()
    assert deviation.abs().max() < 4.5
    assert deviation.square().mean() < 2.0

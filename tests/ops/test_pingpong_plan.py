"""Order of tiles and barriers of the ping-pong projection, and its refusals; needs neither a GPU nor its compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pingpong_protocol import Cluster, Protocol, WrongBlock
from ptx_units import Deadlock, Fault

from paced_kernels import PriorityTree, linear_logprobs
from paced_kernels import _backend as backends
from paced_kernels._loss import engine, tiles
from paced_kernels._loss import pingpong_plan as plan

LARGEST_SHARED = 232448  # bytes a program may have on compute capability 9.0


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (257, 192), (512, 193), (4096, 2500), (300, 151936)])
def test_clusters_take_every_tile_once(num_rows: int, vocab_size: int) -> None:
    row_clusters, vocab_tiles = -(-num_rows // 256), -(-vocab_size // 192)
    num_tiles = plan.cluster_tiles(num_rows, vocab_size)
    assert num_tiles == row_clusters * vocab_tiles
    for num_clusters in (1, 7, 66):
        taken = [
            plan.tile_position(i, row_clusters, vocab_tiles)
            for cluster in range(num_clusters)
            for i in range(cluster, num_tiles, num_clusters)
        ]
        assert sorted(taken) == [(i, j) for i in range(row_clusters) for j in range(vocab_tiles)]


def test_tiles_next_to_each_other_share_the_weight() -> None:
    """66 clusters that run together need at most two panels of 8 vocabulary tiles."""
    row_clusters, vocab_tiles = 32, 792
    for start in range(0, row_clusters * vocab_tiles, 66):
        wave = [plan.tile_position(i, row_clusters, vocab_tiles) for i in range(start, min(start + 66, 32 * 792))]
        assert len({j // plan.GROUP_V for _, j in wave}) <= 2
        assert len({i for i, _ in wave}) <= 11


def test_shared_memory_and_registers_fit() -> None:
    assert plan.STAGE_BYTES == 40960
    ring, staging = plan.STAGES * plan.STAGE_BYTES, plan.CONSUMERS * 2 * plan.PIECE[0] * plan.PIECE[1]
    assert ring + staging + 1024 + 16 * plan.STAGES <= LARGEST_SHARED  # 1024: barriers, up to the alignment of blocks
    groups = plan.LOADER_REGISTERS + plan.CONSUMERS * plan.CONSUMER_REGISTERS
    assert groups * plan.GROUP_THREADS <= 65536
    assert plan.BLOCK_T * plan.BLOCK_V // plan.GROUP_THREADS == 192  # accumulators, of 240 registers
    assert plan.CONFIG.num_parts(151936) == 792
    assert plan.CONFIG.block_t == plan.BLOCK_T  # `finish_rows_kernel` flags row tiles of this height


@pytest.mark.parametrize("num_steps", [1, 2, 5, 6, 14])
def test_every_product_reads_its_own_blocks(num_steps: int) -> None:
    for num_tiles in (0, 1, 2, 3, 8):
        for seed in range(4):
            cluster = Cluster(num_tiles, num_steps, Protocol(), seed)
            cluster.run()
            expected = [
                (rank, tile, step) for rank in range(2) for tile in range(num_tiles) for step in range(num_steps)
            ]
            assert sorted(cluster.multiplied) == expected


@pytest.mark.parametrize(
    "fault",
    [
        {"empty_arrivals": plan.EMPTY_ARRIVALS + 1},
        {"empty_arrivals": plan.EMPTY_ARRIVALS - 1},
        {"empty_arrivals": plan.WARPS_PER_GROUP},  # does not wait for the other program
        {"full_arrivals": 2},
        {"takes_turns": False},
        {"releases_to_peer": False},
    ],
    ids=str,
)
def test_the_simulation_sees_a_barrier_that_is_off(fault: dict[str, int]) -> None:
    seen = 0
    for seed in range(20):
        try:
            Cluster(8, 7, replace(Protocol(), **fault), seed).run()
        except (Deadlock, Fault, WrongBlock):
            seen += 1
    assert seen > 10


def refusal(hidden: torch.Tensor) -> str:
    weight, token_ids = torch.zeros(5, 8, dtype=hidden.dtype), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError) as refused:
        linear_logprobs(hidden, weight, token_ids, backend="pingpong")
    message = str(refused.value)
    assert "\n" not in message
    assert 'use backend="auto"' in message
    return message


def test_what_is_missing_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.zeros(3, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(backends, "HAS_CUTLASS", False)
    assert "nvidia-cutlass-dsl, which is not installed" in refusal(hidden)
    monkeypatch.setattr(backends, "HAS_CUTLASS", True)
    assert "got torch.bfloat16 on cpu" in refusal(hidden)
    assert "got torch.float32" in refusal(hidden.float())
    with pytest.raises(ValueError, match="pingpong"):
        PriorityTree(8, seed=0, backend="pingpong")
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert "needs the package triton" in refusal(hidden)


def test_it_is_nobodys_default() -> None:
    for configs in tiles.SHIPPED.values():
        assert plan.CONFIG not in configs
    meta = torch.zeros(3, 8, dtype=torch.bfloat16, device="meta")
    assert backends.resolve_backend("auto", meta) != "pingpong"


def test_ranks_of_a_split_vocabulary_take_chunks_of_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 entries a rank holds 600 and the other 400; both must project as many rows at a time."""

    class Group:
        def size(self) -> int:
            return 2

    monkeypatch.setattr(engine, "_resolve_group", lambda _: Group())
    rows = []
    for num_own in (600, 400):
        weight = torch.zeros(num_own, 8, dtype=torch.bfloat16)
        workspace = engine.even_workspace(weight, weight, 200_000, "pingpong", "group", 1000)
        rows.append(tiles.rows_per_chunk(plan.CONFIG, num_own, torch.bfloat16, workspace))
    assert rows[0] == rows[1] == 200

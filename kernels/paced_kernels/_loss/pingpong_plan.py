"""Shapes, barriers and tile order of the ping-pong projection, without the package that compiles it.

`pingpong_kernel` is written in terms of these numbers, and so is the simulation that tests them.

T = rows, V = vocabulary of this rank.
"""

import dataclasses
from dataclasses import dataclass

from . import tiles

CLUSTER = 2
"""Programs that share a block of the weight: two row tiles of one vocabulary tile."""
CONSUMERS = 2
"""Warp groups that multiply, in turn."""
WARPS_PER_GROUP = 4
GROUP_THREADS = 32 * WARPS_PER_GROUP
THREADS = (1 + CONSUMERS) * GROUP_THREADS

BLOCK_T, BLOCK_V, BLOCK_H = 128, 192, 64
"""A tile holds 192 accumulators a thread: what two consumers of 240 registers leave room for."""
GROUP_V = 8
"""Vocabulary tiles that walk over all rows together, so that their panel of the weight stays in the L2 cache."""
STAGES = 5
STAGE_BYTES = 2 * BLOCK_H * (BLOCK_T + BLOCK_V)
PIECE = (64, 64)
"""Rows and columns that leave the registers together: 8 KiB, one row of the swizzle wide."""
ROWS_PER_THREAD = BLOCK_T // 32

LOADER_REGISTERS, CONSUMER_REGISTERS = 24, 240
FULL_ARRIVALS = 1
EMPTY_ARRIVALS = WARPS_PER_GROUP * CLUSTER
TURN = 1
"""The first of the named barriers by which consumers give each other leave to multiply."""
STAGING = TURN + CONSUMERS
"""The first of the named barriers around the consumers' staging buffers."""

# The target's logits come from the kernel, and the options, that sm_90 has without this stage.
CONFIG = dataclasses.replace(tiles.HOPPER, block_v=BLOCK_V, pieces=1, group_v=GROUP_V)


@dataclass(frozen=True, slots=True)
class Options:
    """What a compiled projection does; for the meaning see `gemm_kernels.project_kernel`."""

    stores: bool
    """EXPONENTIALS, or SUMS."""
    has_bias: bool
    with_entropy: bool
    gated: bool


def tile_position(i_tile: int, row_clusters: int, vocab_tiles: int) -> tuple[int, int]:
    """Return the pair of row tiles and the vocabulary tile that a cluster takes as its i-th."""
    tiles_per_group = row_clusters * GROUP_V
    first = i_tile // tiles_per_group * GROUP_V
    width = min(vocab_tiles - first, GROUP_V)
    within = i_tile % tiles_per_group
    return within // width, first + within % width


def cluster_tiles(num_rows: int, vocab_size: int) -> int:
    """Return the number of pieces of work for clusters."""
    return -(-num_rows // (BLOCK_T * CLUSTER)) * -(-vocab_size // BLOCK_V)

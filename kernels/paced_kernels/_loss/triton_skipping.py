"""Choice of the blocks of E' that the products on a GPU pass over, and launches of those products.

A block has the rows of a tile of `project_kernel` and the columns of one of its partial sums, which are therefore the
sums that a choice needs (`skipping` has the rule and the bound). Everything happens on the device: the host never
waits, and does not know how much is kept.

H = hidden size, V = vocabulary of this rank, R = rows of a chunk, P = partial sums per row, G = row tiles of a chunk.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .._grid import is_interpreted, launch
from . import matmul
from . import skipping_kernels as kernels
from .tiles import GemmConfig


class KeptBlocks(NamedTuple):
    """Blocks that the products take, and sums over the others."""

    blocks: Tensor  # [G, P] i32, kept blocks of each row tile first
    num_blocks: Tensor  # [G] i32
    tiles: Tensor  # [G, P] i32, in each column the row tiles that keep the block first
    num_tiles: Tensor  # [P] i32
    left_out: Tensor  # [R, P], sums of E' over blocks left out, 0 for others


def choose_blocks(
    sums: Tensor,  # [P, R] f32, sums of E over a block's columns without the target
    scale: Tensor,  # [R], dloss / dz = scale E'
    at_target: Tensor,  # [R], E' at the target, not positive
    target_block: Tensor,  # [R] i64, any if another rank has the target
    is_owned: Tensor,  # [R] bool
    *,
    share: float,
    tile_rows: int,
) -> KeptBlocks:
    """Leave out of each row tile as many blocks as the bound allows, those with the smallest sums first.

    What is not finite is never left out: every comparison with NaN is false.
    """
    num_rows = sums.shape[1]
    num_tiles = -(-num_rows // tile_rows)

    def tiled(values: Tensor) -> Tensor:  # [..., R] -> [..., G, rows of a tile]
        padded = F.pad(values, (0, num_tiles * tile_rows - num_rows))
        return padded.reshape(*values.shape[:-1], num_tiles, tile_rows)

    own = torch.where(is_owned, at_target, 0.0).to(sums.dtype)[None]
    entries = sums.scatter_add(0, target_block[None], own)
    sizes = sums.scatter_add(0, target_block[None], -own)
    weights = tiled(scale.abs())
    weights = weights / weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    masses = weights * tiled(-at_target)  # [G, rows]
    sizes = tiled(sizes) * weights  # [P, G, rows]
    order = sizes.sum(-1).argsort(dim=0)  # [P, G]
    left_out = sizes.gather(0, order[:, :, None].expand_as(sizes)).cumsum_(0)  # by how many blocks go
    may_go = left_out.sum(-1) <= share * masses.sum(-1)
    may_go &= torch.linalg.vector_norm(left_out, dim=-1) <= share * torch.linalg.vector_norm(masses, dim=-1)
    is_kept = torch.empty_like(may_go).scatter_(0, order, ~may_go)  # [P, G]
    of_rows = is_kept.repeat_interleave(tile_rows, dim=1)[:, :num_rows]
    blocks, num_blocks = _kept_first(is_kept.T)
    tiles, kept_tiles = _kept_first(is_kept)
    return KeptBlocks(blocks, num_blocks, tiles.T.contiguous(), kept_tiles, entries.masked_fill(of_rows, 0.0).T)


def _kept_first(is_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return [N, M] i32 numbers of the True entries of each row, ascending and before all others, and their counts."""
    places = torch.arange(is_kept.shape[1], dtype=torch.int32, device=is_kept.device)
    order = torch.where(is_kept, places, places + is_kept.shape[1]).sort(dim=1).values
    return order.contiguous(), is_kept.sum(1, dtype=torch.int32)


def block_means(weight: Tensor, config: GemmConfig) -> Tensor:
    """Return [P, H], the mean row of each block of the weight [V, H]; the last may be narrower, or beyond V and 0."""
    whole = weight.shape[0] // config.width
    means = weight.new_zeros(config.num_parts(weight.shape[0]), weight.shape[1], dtype=torch.float32)
    end = whole * config.width
    torch.mean(weight[:end].unflatten(0, (whole, config.width)), 1, dtype=torch.float32, out=means[:whole])
    if end < weight.shape[0]:
        torch.mean(weight[end:], 0, dtype=torch.float32, out=means[whole])
    return means.to(weight.dtype)


def multiply_kept_blocks(matrix: Tensor, weight: Tensor, kept: KeptBlocks, config: GemmConfig, means: Tensor) -> Tensor:
    """Return [R, H] float32 E' [R, V] @ weight of the kept blocks, with mean rows in the place of the others."""
    num_rows, hidden_size = matrix.shape[0], weight.shape[1]
    out = matmul.mm_float32(kept.left_out.to(matrix.dtype), means)
    product = torch.empty_like(out)
    blocks = block_constants(config)
    inner, block_h = blocks["BLOCK_INNER"], blocks["BLOCK_H"]
    left, right = _operands(config, (matrix, [config.block_t, inner]), (weight, [inner, block_h]))
    launch(
        kernels.kept_rows_kernel,
        (triton.cdiv(hidden_size, block_h), kept.num_blocks.shape[0]),
        matrix=left,
        weight=right,
        out_ptr=product,
        lists_ptr=kept.blocks,
        counts_ptr=kept.num_blocks,
        num_rows=num_rows,
        stride_weight=weight.stride(0),
        **_sizes(matrix, weight, kept, config),
    )
    return out.add_(product)


def add_kept_blocks(
    total: Tensor,  # [V, H]
    matrix: Tensor,  # [R, V]
    rows: Tensor,  # [R, H], in the dtype of the matrix
    kept: KeptBlocks,
    config: GemmConfig,
    *,
    begins: bool,
) -> None:
    """Add E'^T @ rows of the kept blocks to the total, or write it there if the sum begins with it."""
    blocks = block_constants(config)
    inner, block_h = blocks["BLOCK_INNER"], blocks["BLOCK_H"]
    left, right = _operands(config, (matrix, [inner, config.width]), (rows, [inner, block_h]))
    launch(
        kernels.kept_columns_kernel,
        (triton.cdiv(rows.shape[1], block_h), kept.num_tiles.shape[0]),
        matrix=left,
        rows=right,
        out_ptr=total,
        lists_ptr=kept.tiles,
        counts_ptr=kept.num_tiles,
        num_rows=matrix.shape[0],
        stride_rows=rows.stride(0),
        BEGINS=begins,
        **_sizes(matrix, rows, kept, config),
    )


def _sizes(matrix: Tensor, other: Tensor, kept: KeptBlocks, config: GemmConfig) -> dict[str, Any]:
    return {
        "vocab_size": matrix.shape[1],
        "hidden_size": other.shape[1],
        "num_blocks": kept.num_tiles.shape[0],
        "stride_matrix": matrix.stride(0),
        **block_constants(config),
        "UPCAST": is_interpreted(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def block_constants(config: GemmConfig) -> dict[str, Any]:
    """Return the constants of both products; BLOCK_INNER rows or columns of a block are multiplied at a time."""
    return {
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.width,
        "BLOCK_INNER": min(config.block_h, config.width, config.block_t),
        "BLOCK_H": min(config.block_v, 256),
        "USE_TMA": config.use_tma,
    }


def _operands(config: GemmConfig, *operands: tuple[Tensor, list[int]]) -> list[Any]:
    """Return pointers, or TMA descriptors of the given blocks."""
    if not config.use_tma:
        return [value for value, _ in operands]
    return [TensorDescriptor.from_tensor(value, block) for value, block in operands]

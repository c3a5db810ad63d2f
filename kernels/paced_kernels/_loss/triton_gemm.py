"""Stage 2 of the row engine: the vocabulary projection and the exponentials in one Triton kernel.

Exponentials are relative to the logit of the target, E_v = exp(z_v - z_y). z_y is computed before the projection, so
that one pass over the logits suffices, and by the instructions of the projection, so that what tensor cores cut off
cancels. p_v = p_y E_v, and log-probs near 0 are log1p of a small sum. A row with a log-prob below -44 would leave the
range of low precision: such rows are flagged on the device and their row tiles computed again, relative to their
log-sum-exp, by launches that return at once if nothing is flagged. Nothing saturates, and the host never synchronises.

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk, P = partial sums per row.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._grid import is_interpreted, launch
from . import gemm_kernels as gemm
from . import row_kernels as kernels
from . import tiles
from .head import Head
from .tiles import GemmConfig
from .torch_rows import Exponentials, RowStats, row_chunks
from .triton_rows import TritonRows
from .triton_skipping import KeptBlocks, add_kept_blocks, block_means, choose_blocks, multiply_kept_blocks

# Rows per launch that only needs partial sums, if the workspace is not bounded.
SCORED_ROWS = 16384


class GemmRows(TritonRows):
    """Row engine over `project_kernel`."""

    config: GemmConfig

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        token_ids: Tensor,  # [T]
        with_entropy: bool,
        workspace_bytes: int | None,
        config: GemmConfig,
    ) -> None:
        super().__init__(head, hidden, token_ids, with_entropy, workspace_bytes, config)
        self._means: Tensor | None = None  # [P, H], mean rows of blocks of the weight

    def score(self, rows: slice) -> RowStats:
        """Return log-probs and entropies of a range of rows: 2 R H V operations, nothing of size [R, V] is stored."""
        stats = self.empty_stats(rows.stop - rows.start)
        num_rows = SCORED_ROWS
        if self.workspace_bytes is not None:
            num_rows = max(1, self.workspace_bytes // (12 * self.config.num_parts(self.vocab_size)))
        for chunk in row_chunks(rows.start, rows.stop, num_rows):
            part = stats.narrow(chunk.start - rows.start, chunk.stop - rows.start)
            parts = self._new_parts(chunk)
            target = self._target_logits(chunk)
            self._project(chunk, parts, gemm.SUMS.value)
            self.finish(parts, target, part, has_maxima=True)
        return stats

    def exponentials(self, rows: slice, live: Tensor | None, known: RowStats | None = None) -> Exponentials:
        """Return exponentials of a chunk; the matrix is valid until the next call."""
        matrix = self.matrix_view(rows, self.hidden.dtype)
        parts = self._new_parts(rows)
        if known is not None:
            self._project(rows, parts, gemm.EXPONENTIALS.value, matrix=matrix, reference=known.lse)
            stats, factor, patch = known, torch.ones_like(known.logprobs), torch.expm1(known.logprobs)
        else:
            stats = self.empty_stats(rows.stop - rows.start)
            is_direct = self._exponentials_of_target(rows, parts, matrix, stats)
            factor = torch.where(is_direct, stats.logprobs.exp(), 1.0)
            patch = torch.where(is_direct, -torch.expm1(-stats.logprobs), torch.expm1(stats.logprobs))
        self.patch_targets(rows, matrix, patch, live)
        if live is not None:
            self._clear_dead_rows(matrix, live)
        return Exponentials(stats, matrix, factor, parts[0])

    def choose(self, chunk: Exponentials, rows: slice, scale: Tensor, share: float) -> KeptBlocks | None:
        """Return the blocks that the products of a chunk take if they may leave out `share` of its gradient."""
        if chunk.sums is None or scale.shape[0] == 0:
            return None
        target, is_owned = self.head.owned_targets(self.token_ids[rows])
        at_target = torch.expm1(chunk.stats.logprobs) / chunk.factor
        is_idle = scale == 0  # such a row may hold anything
        return choose_blocks(
            chunk.sums.masked_fill(is_idle, 0.0),
            scale,
            at_target.masked_fill(is_idle, 0.0),
            target // self.config.width,
            is_owned,
            share=share / self.head.num_ranks,  # what ranks leave out adds up
            tile_rows=self.config.block_t,
        )

    def back_project(self, matrix: Tensor, kept: KeptBlocks | None = None) -> Tensor:
        """See `TritonRows.back_project`; with `kept` of those blocks only."""
        if kept is None:
            return super().back_project(matrix)
        if self._means is None:
            self._means = block_means(self.head.weight, self.config)
        product = multiply_kept_blocks(matrix, self.head.weight, kept, self.config, self._means)
        return self.head.sum_over_ranks(product)

    def add_outer(
        self,
        accumulator: Tensor,
        matrix: Tensor,
        rows: Tensor,
        *,
        scale: Tensor | None = None,
        begins: bool = False,
        kept: KeptBlocks | None = None,
    ) -> None:
        """See `TritonRows.add_outer`; with `kept` from those blocks only."""
        if kept is None:
            super().add_outer(accumulator, matrix, rows, scale=scale, begins=begins)
        else:
            rows = rows if scale is None else rows * scale[:, None]
            add_kept_blocks(accumulator, matrix, rows.to(matrix.dtype), kept, self.config, begins=begins)

    def _clear_dead_rows(self, matrix: Tensor, live: Tensor) -> None:
        """Zero them afterwards: in the projection every element would be chosen, for rows that are rarely there."""
        launch(
            kernels.clear_dead_rows_kernel,
            (matrix.shape[0],),
            out_ptr=matrix,
            live_ptr=live.view(torch.uint8),
            vocab_size=self.vocab_size,
            stride_out=matrix.stride(0),
            BLOCK_V=8192,
            num_warps=8,
        )

    def _exponentials_of_target(self, rows: slice, parts: Tensor, matrix: Tensor, stats: RowStats) -> Tensor:
        """Store exponentials relative to the target, recompute rows out of range; return True for the other rows."""
        target = self._target_logits(rows)
        num_tiles = triton.cdiv(rows.stop - rows.start, self.config.block_t)
        gate = torch.zeros(1 + num_tiles, dtype=torch.int32, device=self.hidden.device)
        self._project(rows, parts, gemm.EXPONENTIALS.value, matrix=matrix, reference=target)
        self.finish(parts, target, stats, has_maxima=False, gate=gate)
        # NaN compares false: such a row is not recomputed, so its NaN stays visible.
        is_direct = ~(stats.logprobs < kernels.LOWEST_DIRECT_LOGPROB.value)
        self._project(rows, parts, gemm.SUMS.value, gate=gate)
        self.finish(parts, target, stats, has_maxima=True, gate=gate, is_gated=True)
        reference = torch.where(is_direct, target, stats.lse)
        self._project(rows, parts, gemm.EXPONENTIALS.value, matrix=matrix, reference=reference, gate=gate)
        return is_direct

    def _new_parts(self, rows: slice) -> Tensor:
        """Return an empty [3, P, R] tensor for sums, weighted sums and maxima."""
        return self.floats(3, self.config.num_parts(self.vocab_size), rows.stop - rows.start)

    def _target_logits(self, rows: slice) -> Tensor:
        hidden, target = self._states(rows), self.floats(rows.stop - rows.start)
        block_t = 64  # the fewest rows of a tensor-core instruction
        launch(
            kernels.target_logits_kernel,
            (triton.cdiv(target.shape[0], block_t),),
            hidden_ptr=hidden,
            weight_ptr=self.head.weight,
            token_ptr=self.token_ids[rows],
            target_ptr=target,
            num_rows=target.shape[0],
            hidden_size=hidden.shape[1],
            vocab_start=self.head.start,
            stride_hidden=hidden.stride(0),
            stride_weight=self.head.weight.stride(0),
            BLOCK_T=block_t,
            BLOCK_H=self.config.block_h,
            UPCAST=is_interpreted(),
            num_warps=4,
            num_stages=self.config.num_stages,
            **self.head_arguments,
        )
        return self.head.sum_over_ranks(target)

    def _states(self, rows: slice) -> Tensor:
        """Return the [R, H] hidden states of a chunk, at an aligned address: others would need kernels of their own."""
        hidden = self.hidden[rows]
        return hidden if tiles.is_aligned(hidden) else hidden.clone(memory_format=torch.contiguous_format)

    def _num_programs(self, num_tiles: int) -> int:
        device = self.hidden.device
        limit = tiles.device_facts(device.index or 0)[1] if device.type == "cuda" else 2
        return min(num_tiles, limit)

    def _project(
        self,
        rows: slice,
        parts: Tensor,  # [3, P, R]
        kind: int,  # SUMS or EXPONENTIALS
        *,
        matrix: Tensor | None = None,  # [R, V]
        reference: Tensor | None = None,  # [R]
        gate: Tensor | None = None,
    ) -> None:
        """Launch `project_kernel` on a chunk; without a matrix only partial sums are stored."""
        config, hidden, weight = self.config, self._states(rows), self.head.weight
        num_rows, hidden_size = hidden.shape
        if num_rows == 0:  # no sequence, or an empty one alone: TMA has no descriptor of nothing
            return
        sums, weighted, maxima = parts
        out = parts if matrix is None else matrix
        operands: dict[str, Any] = {"hidden": hidden, "weight": weight, "out": out}
        if config.use_tma:
            blocks = {
                "hidden": [config.block_t, config.block_h],
                "weight": [config.block_v, config.block_h],
                "out": [config.block_t, config.width],
            }
            for name in ("hidden", "weight") if matrix is None else blocks:
                operands[name] = TensorDescriptor.from_tensor(operands[name], blocks[name])
        num_tiles = triton.cdiv(num_rows, config.block_t) * triton.cdiv(self.vocab_size, config.block_v)
        launch(
            gemm.project_kernel,
            (self._num_programs(num_tiles),),
            **operands,
            token_ptr=self.token_ids[rows],
            reference_ptr=sums if reference is None else reference,
            gate_ptr=sums if gate is None else gate,
            sums_ptr=sums,
            weighted_ptr=weighted,
            maxima_ptr=maxima,
            num_rows=num_rows,
            hidden_size=hidden_size,
            vocab_start=self.head.start,
            stride_hidden=hidden.stride(0),
            stride_weight=weight.stride(0),
            # Without a matrix not read; the same number then, because another would need a kernel of its own.
            stride_out=tiles.row_stride(self.vocab_size) if matrix is None else matrix.stride(0),
            KIND=kind,
            BLOCK_T=config.block_t,
            BLOCK_V=config.block_v,
            BLOCK_H=config.block_h,
            PIECES=config.pieces,
            GROUP_V=config.group_v,
            USE_TMA=config.use_tma,
            UPCAST=is_interpreted(),
            FLAT=config.is_flat and gate is None,
            SPLIT=config.is_split and gate is None,
            WITH_ENTROPY=self.with_entropy,
            GATED=gate is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **self.head_arguments,
        )

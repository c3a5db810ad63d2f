"""Shared code of the two row engines in Triton: the methods of `TorchRows`, on a GPU or in the interpreter.

`triton_gemm.GemmRows` (stage 2) multiplies and exponentiates in one kernel; `triton_logits.LogitRows` (stage 1) works
on the float32 logits of a library GEMM. Their results agree up to rounding and their code is independent, so each is
an oracle for the other.

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk, P = partial sums per row.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .._grid import launch
from . import matmul, tiles
from . import row_kernels as kernels
from .head import Head
from .tiles import GemmConfig
from .torch_rows import Exponentials, RowStats


class TritonRows:
    """Row engine for float32, bfloat16 and float16; see `torch_rows.TorchRows` for what each method means."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        token_ids: Tensor,  # [T]
        with_entropy: bool,
        workspace_bytes: int | None,
        config: GemmConfig | None,
    ) -> None:
        self.head, self.hidden, self.token_ids = head, hidden, token_ids
        self.with_entropy, self.workspace_bytes, self.config = with_entropy, workspace_bytes, config
        self._buffer: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the weight on this rank."""
        return self.head.weight.shape[0]

    @property
    def bytes_per_row(self) -> int:
        """Workspace of one row of a chunk."""
        return tiles.bytes_per_row(self.config, self.vocab_size, self.hidden.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the workspace."""
        return self.rows_per_chunk * self.bytes_per_row if self.workspace_bytes is None else self.workspace_bytes

    @property
    def rows_per_chunk(self) -> int:
        """Rows R per chunk of exponentials."""
        return tiles.rows_per_chunk(self.config, self.vocab_size, self.hidden.dtype, self.workspace_bytes)

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """Dtype in which the gradient of the weight is summed."""
        return tiles.weight_gradient_dtype(self.hidden, self.head.weight, self.workspace_bytes)

    def entropy_gradient(
        self, chunk: Exponentials, rows: slice, coefficient: Tensor, entropy_coefficient: Tensor
    ) -> None:
        """Turn E' into dloss/dz, in place."""
        block_v = 4096
        grid = (chunk.matrix.shape[0], triton.cdiv(self.vocab_size, block_v))
        launch(
            kernels.entropy_gradient_kernel,
            grid,
            out_ptr=chunk.matrix,
            token_ptr=self.token_ids[rows],
            log_factor_ptr=chunk.factor.log(),
            logprobs_ptr=chunk.stats.logprobs,
            entropy_ptr=chunk.stats.entropy,
            coefficient_ptr=coefficient,
            entropy_coefficient_ptr=entropy_coefficient,
            vocab_size=self.vocab_size,
            vocab_start=self.head.start,
            stride_out=chunk.matrix.stride(0),
            BLOCK_V=block_v,
            num_warps=8,
        )

    def choose(self, chunk: Exponentials, rows: slice, scale: Tensor, share: float) -> Any:
        """Leave nothing out: this engine has no sums of blocks, which would cost a pass of their own."""
        del chunk, rows, scale, share

    def back_project(self, matrix: Tensor, kept: Any = None) -> Tensor:
        """Return [R, H] float32 matrix @ weight, summed over the ranks of a split vocabulary."""
        assert kept is None
        return self.head.sum_over_ranks(matmul.mm_float32(matrix, self.head.weight))

    def add_outer(
        self,
        accumulator: Tensor,
        matrix: Tensor,
        rows: Tensor,
        *,
        scale: Tensor | None = None,
        begins: bool = False,
        kept: Any = None,
    ) -> None:
        """Add matrix^T [V, R] @ (scale * rows [R, N]) to accumulator [V, N], or write it there if the sum begins with
        it; scaled rows are rounded to the dtype of the matrix."""
        assert kept is None
        if scale is not None:
            rows = rows * scale[:, None]
        if rows.shape[1] == 1 and matrix.dtype == torch.bfloat16:
            # Gradient of the bias: the rounding error is carried in a second column, at no cost.
            rounded = rows.to(torch.bfloat16)
            pair = torch.cat([rounded, (rows - rounded).to(torch.bfloat16)], dim=1)
            assert not begins
            accumulator += matmul.mm_float32(matrix.T, pair).sum(dim=1, keepdim=True)
            return
        if matrix.dtype != torch.float16:
            matmul.addmm_(accumulator, matrix.T, rows.to(matrix.dtype), begins=begins)
            return
        # float16's range is too small for arbitrary coefficients: scale the largest row entry to 1.
        largest = rows.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        product = matmul.mm_float32(matrix.T, (rows / largest).half())
        if begins:
            torch.mul(product, largest, out=accumulator)
        else:
            accumulator.addcmul_(product, largest)

    def matrix_view(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return an [R, V] view of the shared buffer, with aligned rows."""
        num_rows = rows.stop - rows.start
        if self._buffer is None or self._buffer.shape[0] < num_rows or self._buffer.dtype != dtype:
            self._buffer = None  # free the old buffer before allocating the new one
            shape = num_rows, tiles.row_stride(self.vocab_size)
            self._buffer = torch.empty(shape, dtype=dtype, device=self.hidden.device)
        return self._buffer[:num_rows, : self.vocab_size]

    def floats(self, *shape: int) -> Tensor:
        """Return an uninitialised float32 tensor on the device of the rows."""
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def empty_stats(self, num_rows: int) -> RowStats:
        """Return uninitialised statistics for the results of `finish`."""
        entropy = self.floats(num_rows) if self.with_entropy else None
        return RowStats(self.floats(num_rows), self.floats(num_rows), entropy)

    @property
    def head_arguments(self) -> dict[str, Any]:
        """Arguments of every kernel that computes logits."""
        bias = self.head.bias
        return {
            "bias_ptr": self.head.weight if bias is None else bias,
            "vocab_size": self.vocab_size,
            "inv_temperature": 1.0 / self.head.temperature,
            "HAS_BIAS": bias is not None,
        }

    def finish(
        self,
        parts: Tensor,  # [3, P, R]
        target: Tensor,  # [R]
        stats: RowStats,
        *,
        has_maxima: bool,
        gate: Tensor | None = None,
        is_gated: bool = False,
    ) -> None:
        """Merge partial sums of tiles, then of ranks, into `stats`; sets `gate`, or obeys it if `is_gated`."""
        if self.head.group is not None:
            own = self.floats(3, parts.shape[2])
            self._merge(parts, target, RowStats(own[0], own[2], own[1]), has_maxima=has_maxima, is_final=False)
            parts, has_maxima = self.head.stack_ranks(own).transpose(0, 1).contiguous(), True
        self._merge(parts, target, stats, has_maxima=has_maxima, gate=gate, is_gated=is_gated)

    def _merge(
        self,
        parts: Tensor,
        target: Tensor,
        stats: RowStats,
        *,
        has_maxima: bool,
        gate: Tensor | None = None,
        is_gated: bool = False,
        is_final: bool = True,
    ) -> None:
        sums, weighted, maxima = parts
        block_t = 64
        launch(
            kernels.finish_rows_kernel,
            (triton.cdiv(target.shape[0], block_t),),
            sums_ptr=sums,
            weighted_ptr=weighted,
            maxima_ptr=maxima,
            target_ptr=target,
            logprobs_ptr=stats.logprobs,
            lse_ptr=stats.lse,
            entropy_ptr=sums if stats.entropy is None else stats.entropy,
            gate_ptr=sums if gate is None else gate,
            num_rows=target.shape[0],
            num_parts=sums.shape[0],
            TILE_T=1 if self.config is None else self.config.block_t,
            HAS_MAXIMA=has_maxima,
            WITH_ENTROPY=self.with_entropy,
            FLAG=gate is not None and not is_gated,
            GATED=is_gated,
            FINAL=is_final,
            BLOCK_P=16,
            BLOCK_T=block_t,
        )

    def patch_targets(self, rows: slice, matrix: Tensor, patch: Tensor, live: Tensor | None) -> None:
        block_t = 128
        launch(
            kernels.patch_targets_kernel,
            (triton.cdiv(matrix.shape[0], block_t),),
            out_ptr=matrix,
            token_ptr=self.token_ids[rows],
            patch_ptr=patch,
            live_ptr=patch if live is None else live.view(torch.uint8),
            num_rows=matrix.shape[0],
            vocab_size=self.vocab_size,
            vocab_start=self.head.start,
            stride_out=matrix.stride(0),
            HAS_LIVE=live is not None,
            BLOCK_T=block_t,
        )

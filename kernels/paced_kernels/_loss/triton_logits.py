"""Stage 1 of the row engine: a library GEMM with float32 output, then two kernels over its rows.

The logits are read twice: for the part (M, S, D) of each row, and for the softmax, which overwrites them in the dtype
of a GEMM operand. A row is always relative to its own log-sum-exp, so nothing can overflow.

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk, P = partial sums per row.
"""

import torch
import triton
from torch import Tensor

from .._grid import launch
from . import matmul
from . import row_kernels as kernels
from .head import Head
from .torch_rows import Exponentials, RowStats, row_chunks
from .triton_rows import TritonRows


class LogitRows(TritonRows):
    """Row engine over logits in memory; for float16 and float32, and for chips without a fused GEMM configuration."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        token_ids: Tensor,  # [T]
        with_entropy: bool,
        workspace_bytes: int | None,
    ) -> None:
        super().__init__(head, hidden, token_ids, with_entropy, workspace_bytes, None)

    def score(self, rows: slice) -> RowStats:
        """Return log-probs and entropies of a range of rows: 2 R H V operations."""
        stats = self.empty_stats(rows.stop - rows.start)
        for chunk in row_chunks(rows.start, rows.stop, self.rows_per_chunk):
            self._logit_stats(chunk, stats.narrow(chunk.start - rows.start, chunk.stop - rows.start))
        return stats

    def exponentials(self, rows: slice, live: Tensor | None, known: RowStats | None = None) -> Exponentials:
        """Return the softmax of a chunk; the matrix is valid until the next call."""
        stats = known
        if stats is None:
            stats = self.empty_stats(rows.stop - rows.start)
            logits = self._logit_stats(rows, stats)
        else:
            logits = self._logits(rows)
        matrix = self._probabilities(rows, logits, stats.lse, live)
        self.patch_targets(rows, matrix, torch.expm1(stats.logprobs), live)
        return Exponentials(stats, matrix, torch.ones_like(stats.logprobs))

    def _logits(self, rows: slice) -> Tensor:
        """Return [R, V] float32 hidden W^T in the buffer, before temperature and bias."""
        logits = self.matrix_view(rows, torch.float32)
        return matmul.mm_float32(self.hidden[rows], self.head.weight.T, out=logits)

    def _logit_stats(self, rows: slice, stats: RowStats) -> Tensor:
        """Compute the logits, fill `stats` from them, and return the logits."""
        logits = self._logits(rows)
        target = self.floats(logits.shape[0])
        parts = self.floats(3, 1, logits.shape[0])
        launch(
            kernels.row_parts_kernel,
            (logits.shape[0],),
            logits_ptr=logits,
            token_ptr=self.token_ids[rows],
            target_ptr=target,
            sums_ptr=parts[0],
            weighted_ptr=parts[1],
            maxima_ptr=parts[2],
            vocab_start=self.head.start,
            stride=logits.stride(0),
            WITH_ENTROPY=self.with_entropy,
            BLOCK_V=_row_block(self.vocab_size),
            num_warps=8,
            **self.head_arguments,
        )
        self.finish(parts, self.head.sum_over_ranks(target), stats, has_maxima=True)
        return logits

    def _probabilities(self, rows: slice, logits: Tensor, lse: Tensor, live: Tensor | None) -> Tensor:
        """Overwrite the logits with their [R, V] softmax in the dtype of the operands."""
        dtype = self.hidden.dtype
        storage = self._buffer
        assert storage is not None
        matrix = storage.view(dtype)[: logits.shape[0], : self.vocab_size]
        launch(
            kernels.row_probabilities_kernel,
            (logits.shape[0],),
            logits_ptr=logits,
            out_ptr=matrix,
            lse_ptr=lse,
            live_ptr=lse if live is None else live.view(torch.uint8),
            stride=logits.stride(0),
            stride_out=matrix.stride(0),
            HAS_LIVE=live is not None,
            BLOCK_V=_row_block(self.vocab_size),
            num_warps=8,
            **self.head_arguments,
        )
        return matrix


def _row_block(vocab_size: int) -> int:
    """Return the columns per step over a row."""
    return min(8192, triton.next_power_of_2(vocab_size))

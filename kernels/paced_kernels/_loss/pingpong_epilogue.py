"""Epilogue of the ping-pong projection: a consumer's accumulators become exponentials, row sums and stored pieces.

A thread holds `plan.ROWS_PER_THREAD` rows of a tile, of each 2 columns in every 8: accumulator ((j, i % 2, pair),
i // 2, 0) is column 8 pair + j, counted from the thread's first one, of its i-th row. Four neighbouring threads share
a row.

T = rows, V = rows of the weight (of this rank's shard), P = vocabulary tiles.
"""

# Kernels are written in CuTe's language, which type checkers read as Python, from a package that may be absent.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from typing import Any

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from . import pingpong_plan as plan

LOG2_E = 1.4426950408889634
PAIRS = plan.BLOCK_V // 8


def tensor_cores(shape: tuple[int, int]) -> Any:
    """Return the products of [64, 16] by [16, n] blocks in shared memory, H contiguous in both, by one warp group."""
    major = OperandMajorMode.K
    return make_trivial_tiled_mma(cutlass.BFloat16, cutlass.BFloat16, major, major, cutlass.Float32, (1, 1, 1), shape)


@cute.jit
def exponentiate(
    options: cutlass.Constexpr,  # plan.Options
    logits: cute.Tensor,  # ((2, 2, PAIRS), BLOCK_T / 64, 1): products, which become E
    places: cute.Tensor,  # [row, column] of each within the tile
    tile: Any,  # first row, first column, number of the vocabulary tile
    pointers: Any,  # bias, tokens, references, gate, sums, weighted and maxima
    numbers: Any,  # num_rows, vocab_size, vocab_start, inv_temperature
    thread: cutlass.Int32,  # in the warp group
) -> None:
    """Turn products into exponentials in place, and write the partial sums of the tile's rows."""
    row_start, column_start, i_vocab = tile
    first_column = column_start + places[(0, 0, 0), 0, 0][1]
    rows = [row_start + places[(0, i % 2, 0), i // 2, 0][0] for i in range(plan.ROWS_PER_THREAD)]
    _leave_out(logits, rows, column_start, first_column, pointers[1], numbers)
    scale = numbers[3]
    if cutlass.const_expr(options.has_bias):
        _add_bias(logits, first_column, pointers[0], numbers)
        scale = cutlass.Float32(1.0)
    for i in cutlass.range_constexpr(plan.ROWS_PER_THREAD):
        _finish_row(options, logits, i, rows[i], i_vocab, scale, pointers, numbers, thread)


@cute.jit
def _leave_out(
    logits: cute.Tensor,
    rows: Any,
    column_start: cutlass.Int32,
    first_column: cutlass.Int32,
    token_ptr: cute.Pointer,
    numbers: Any,
) -> None:
    """Make the logits of targets, and of columns past the end, those of impossible tokens.

    The target is left out of the sums, so that 1 - p is never the difference of nearly equal numbers.
    """
    num_rows, vocab_size, vocab_start, _ = numbers
    tokens = cute.make_tensor(token_ptr, cute.make_layout(num_rows))
    targets = []
    is_needed = column_start + plan.BLOCK_V > vocab_size
    for i in cutlass.range_constexpr(plan.ROWS_PER_THREAD):
        token = cutlass.Int64(-1)
        if rows[i] < num_rows:
            token = tokens[rows[i]].to(cutlass.Int64)
        # Only columns of this shard can equal the difference: ids outside it leave every column counted.
        target = (token - vocab_start).to(cutlass.Int32) - first_column
        targets.append(target)
        is_needed = is_needed | ((target >= 0) & (target < plan.BLOCK_V))
    if is_needed:  # one tile in hundreds
        for i in cutlass.range_constexpr(plan.ROWS_PER_THREAD):
            for pair in cutlass.range_constexpr(PAIRS):
                for j in cutlass.range_constexpr(2):
                    at = (j, i % 2, pair), i // 2, 0
                    column = 8 * pair + j
                    is_out = (targets[i] == column) | (first_column + column >= vocab_size)
                    logits[at] = cutlass.select_(is_out, -cutlass.Float32.inf, logits[at])


@cute.jit
def _add_bias(logits: cute.Tensor, first_column: cutlass.Int32, bias_ptr: cute.Pointer, numbers: Any) -> None:
    """Products to logits; without a bias, the temperature is part of a later instruction."""
    _, vocab_size, _, inv_temperature = numbers
    # The bias goes on to the end of the last tile: with a condition each, 48 loads in flight spill 28 bytes.
    biases = cute.make_tensor(bias_ptr, cute.make_layout(cute.ceil_div(vocab_size, plan.BLOCK_V) * plan.BLOCK_V))
    for pair in cutlass.range_constexpr(PAIRS):
        for j in cutlass.range_constexpr(2):
            bias = biases[first_column + 8 * pair + j].to(cutlass.Float32)
            for i in cutlass.range_constexpr(plan.ROWS_PER_THREAD):
                at = (j, i % 2, pair), i // 2, 0
                logits[at] = cute.math.fma(logits[at], inv_temperature, bias)


@cute.jit
def _finish_row(
    options: cutlass.Constexpr,
    logits: cute.Tensor,
    i: cutlass.Constexpr,  # which of the thread's rows
    row: cutlass.Int32,
    i_vocab: cutlass.Int32,
    scale: cutlass.Float32,  # what logits still have to be multiplied with
    pointers: Any,
    numbers: Any,
    thread: cutlass.Int32,
) -> None:
    """Exponentials and sums of one row."""
    _, _, reference_ptr, _, sums_ptr, weighted_ptr, maxima_ptr = pointers
    num_rows, vocab_size, _, _ = numbers
    is_row = row < num_rows
    writes = is_row & (thread % 4 == 0)
    parts = cute.make_layout(cutlass.Int64(cute.ceil_div(vocab_size, plan.BLOCK_V)) * num_rows)
    index = cutlass.Int64(i_vocab) * num_rows + row
    if cutlass.const_expr(options.stores):
        reference = cutlass.Float32(0.0)
        if is_row:
            reference = cute.make_tensor(reference_ptr, cute.make_layout(num_rows))[row]
    else:
        reference = _largest(logits, i) * scale
        if writes:
            cute.make_tensor(maxima_ptr, parts)[index] = reference
        # Nothing to count: all terms are 0.
        reference = cutlass.select_(reference == -cutlass.Float32.inf, cutlass.Float32(0.0), reference)
    total, weighted = cutlass.Float32(0.0), cutlass.Float32(0.0)
    for pair in cutlass.range_constexpr(PAIRS):
        for j in cutlass.range_constexpr(2):
            at = (j, i % 2, pair), i // 2, 0
            # Subtracted before the change of base: of nearly equal logits the difference is exact.
            shifted = cute.math.fma(logits[at], scale, -reference)
            value = cute.math.exp2(shifted * LOG2_E, fastmath=True)
            total += value
            if cutlass.const_expr(options.with_entropy):
                # 0 * -inf is 0 here: p log p of an impossible token.
                weighted += cutlass.select_(value == 0.0, cutlass.Float32(0.0), value * shifted)
            logits[at] = value
    for offset in cutlass.range_constexpr(1, 3):
        total += cute.arch.shuffle_sync_bfly(total, offset=offset)
        if cutlass.const_expr(options.with_entropy):
            weighted += cute.arch.shuffle_sync_bfly(weighted, offset=offset)
    if writes:
        cute.make_tensor(sums_ptr, parts)[index] = total
        if cutlass.const_expr(options.with_entropy):
            cute.make_tensor(weighted_ptr, parts)[index] = weighted


@cute.jit
def _largest(logits: cute.Tensor, i: cutlass.Constexpr) -> Any:
    """Of the four threads that share the row."""
    largest = -cutlass.Float32.inf
    for pair in cutlass.range_constexpr(PAIRS):
        for j in cutlass.range_constexpr(2):
            largest = cute.arch.fmax(largest, logits[(j, i % 2, pair), i // 2, 0])
    for offset in cutlass.range_constexpr(1, 3):
        largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset))
    return largest


@cute.jit
def store_tile(
    exponentials: cute.Tensor,  # like `logits`
    operands: Any,  # products of a piece, TMA store, its tensor [T, V], staging buffer of this consumer
    tile: Any,
    numbers: Any,
    barrier: cutlass.Int32,  # named barrier of this consumer
    thread: cutlass.Int32,
) -> None:
    """Store a tile in pieces, rounded to bfloat16, through one buffer."""
    piece_products, store, out, staging = operands
    row_start, column_start, _ = tile
    num_rows, vocab_size, _, _ = numbers
    height, width = plan.PIECE
    pieces = cute.local_tile(out, plan.PIECE, (None, None))
    from_staging, to_out = cpasync.tma_partition(
        store, 0, cute.make_layout(1), cute.group_modes(staging, 0, 2), cute.group_modes(pieces, 0, 2)
    )
    copy = cute.make_tiled_copy_C(
        cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), cutlass.BFloat16), piece_products
    )
    to_staging = copy.get_slice(thread).partition_D(staging)
    shape = piece_products.partition_shape_C(plan.PIECE)
    wide, narrow = cute.make_rmem_tensor(shape, cutlass.Float32), cute.make_rmem_tensor(shape, cutlass.BFloat16)
    for m in cutlass.range_constexpr(plan.BLOCK_T // height):
        for n in cutlass.range_constexpr(plan.BLOCK_V // width):
            for pair in cutlass.range_constexpr(width // 8):
                for i in cutlass.range_constexpr(2):
                    for j in cutlass.range_constexpr(2):
                        wide[(j, i, pair), 0, 0] = exponentials[(j, i, n * (width // 8) + pair), m, 0]
            narrow.store(wide.load().to(cutlass.BFloat16))
            # The piece before this one, or the last of this consumer's previous tile, has left the buffer.
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.barrier(barrier_id=barrier, number_of_threads=plan.GROUP_THREADS)
            cute.copy(copy, copy.retile(narrow), to_staging)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.barrier(barrier_id=barrier, number_of_threads=plan.GROUP_THREADS)
            row, column = row_start + m * height, column_start + n * width
            if thread < 32:
                if (row < num_rows) & (column < vocab_size):
                    cute.copy(store, from_staging, to_out[None, row // height, column // width])
                cute.arch.cp_async_bulk_commit_group()

"""Vocabulary projection in Triton: a persistent GEMM whose epilogue turns logits into exponentials and row sums.

    z = hidden W^T / temperature + bias          never leaves the registers, always float32
    E[t, v] = exp(z[t, v] - reference[t])        stored in the dtype of a GEMM operand, 0 at the target
    sums[k, t] = sum of E over tile k            float32, before E is rounded

Two kinds share the main loop. `KIND = EXPONENTIALS` takes one reference per row, known beforehand (the logit of the
target, or the log-sum-exp), and stores E. `KIND = SUMS` stores nothing of size [T, V]: the reference of each tile is
its own largest logit, which is written next to the sum. Cost: 2 T H V floating-point operations; 2 T V bytes
of E for bfloat16, none for `SUMS`.

A row has one reference for all tiles, so there is no running maximum, no lock and no second pass, and the order of
every addition is fixed: two runs agree bit for bit.

T = rows, H = hidden size, V = rows of the weight (of this rank's shard, where the vocabulary is split).
"""

# Kernels are written in Triton's language, which type checkers read as Python.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from triton import knobs

from .._grid import batch_kernel

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
SUMS: tl.constexpr = tl.constexpr(0)
EXPONENTIALS: tl.constexpr = tl.constexpr(1)
# Whether Triton's interpreter was on when the kernels were first imported; a later change has no effect.
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round float32 to the nearest number of `dtype`; the interpreter's own cast to bfloat16 cuts digits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def tile_position(i_tile, num_row_tiles, num_vocab_tiles, GROUP_V: tl.constexpr):
    """Row and vocabulary tile of the i-th tile: groups of GROUP_V vocabulary tiles walk over all row tiles.

    The panel of the weight that a group needs (GROUP_V BLOCK_V H elements) then stays in the L2 cache.
    """
    tiles_per_group = num_row_tiles * GROUP_V
    i_group = i_tile // tiles_per_group
    first = i_group * GROUP_V
    width = tl.minimum(num_vocab_tiles - first, GROUP_V)
    within = i_tile - i_group * tiles_per_group
    return within // width, first + within % width


@triton.jit
def multiply_tile(
    hidden,
    weight,
    row_start,
    column_start,
    num_rows,
    vocab_size,
    hidden_size,
    stride_hidden,
    stride_weight,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK_T, BLOCK_V] float32 products of a tile; rows and columns past the end are 0."""
    products = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    if not USE_TMA:
        o_rows = row_start + tl.arange(0, BLOCK_T)
        o_columns = column_start + tl.arange(0, BLOCK_V)
        o_inner = tl.arange(0, BLOCK_H)
        m_rows = o_rows < num_rows
        m_columns = o_columns < vocab_size
        hidden_ptrs = hidden + o_rows.to(tl.int64)[:, None] * stride_hidden + o_inner[None, :]
        weight_ptrs = weight + o_columns.to(tl.int64)[:, None] * stride_weight + o_inner[None, :]
    for start in range(0, hidden_size, BLOCK_H):
        if USE_TMA:
            b_hidden = hidden.load([row_start, start])
            b_weight = weight.load([column_start, start])
        else:
            m_inner = o_inner < hidden_size - start
            b_hidden = tl.load(hidden_ptrs, mask=m_rows[:, None] & m_inner[None, :], other=0.0)
            b_weight = tl.load(weight_ptrs, mask=m_columns[:, None] & m_inner[None, :], other=0.0)
            hidden_ptrs += BLOCK_H
            weight_ptrs += BLOCK_H
        if UPCAST:
            b_hidden = b_hidden.to(tl.float32)
            b_weight = b_weight.to(tl.float32)
        products = tl.dot(b_hidden, tl.trans(b_weight), products, input_precision="ieee")
    return products


@triton.jit
def store_exponentials(
    logits,  # [BLOCK_T, WIDTH] f32, hidden W^T
    row_start,
    column_start,
    i_part,  # which of the partial sums this piece writes
    out,
    row_pointers,  # of bias, tokens, references, live, sums, weighted and maxima
    num_rows,
    vocab_size,
    vocab_start,
    stride_out,
    inv_temperature,
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Epilogue for one piece of a tile: exponentials, their sums and, for EXPONENTIALS, the store."""
    bias_ptr, token_ptr, reference_ptr, live_ptr, sums_ptr, weighted_ptr, maxima_ptr = row_pointers
    o_rows = row_start + tl.arange(0, BLOCK_T)
    o_columns = column_start + tl.arange(0, WIDTH)
    m_rows = o_rows < num_rows
    m_columns = o_columns < vocab_size
    logits = logits * inv_temperature
    if HAS_BIAS:
        logits += tl.load(bias_ptr + o_columns, mask=m_columns, other=0.0).to(tl.float32)[None, :]
    # Only columns of this shard can equal the difference: ids outside it leave every column counted.
    target = (tl.load(token_ptr + o_rows, mask=m_rows, other=-1) - vocab_start).to(tl.int32)
    # The target is left out of the sums, so that 1 - p is never the difference of nearly equal numbers.
    is_counted = m_columns[None, :] & (o_columns[None, :] != target[:, None])
    o_part = i_part.to(tl.int64) * num_rows + o_rows
    if KIND == SUMS:
        reference = tl.max(tl.where(is_counted, logits, float("-inf")), axis=1)
        tl.store(maxima_ptr + o_part, reference, mask=m_rows)
        reference = tl.where(reference == float("-inf"), 0.0, reference)  # nothing to count: all terms are 0
    else:
        reference = tl.load(reference_ptr + o_rows, mask=m_rows, other=0.0)
    shifted = logits - reference[:, None]
    exponentials = tl.where(is_counted, tl.exp2(shifted * LOG2_E), 0.0)
    tl.store(sums_ptr + o_part, tl.sum(exponentials, axis=1), mask=m_rows)
    if WITH_ENTROPY:
        # 0 * -inf is 0 here: p log p of an impossible token.
        products = tl.where(exponentials == 0.0, 0.0, exponentials * shifted)
        tl.store(weighted_ptr + o_part, tl.sum(products, axis=1), mask=m_rows)
    if KIND == EXPONENTIALS:
        if HAS_LIVE:
            is_live = tl.load(live_ptr + o_rows, mask=m_rows, other=0) != 0
            exponentials = tl.where(is_live[:, None], exponentials, 0.0)
        if USE_TMA:
            out.store([row_start, column_start], narrow(exponentials, out.dtype))
        else:
            out_ptrs = out + o_rows.to(tl.int64)[:, None] * stride_out + o_columns[None, :]
            b_out = narrow(exponentials, out.dtype.element_ty)
            tl.store(out_ptrs, b_out, mask=m_rows[:, None] & m_columns[None, :])


@batch_kernel
def project_kernel(
    hidden,  # [T, H], pointer or TMA descriptor of [BLOCK_T, BLOCK_H]
    weight,  # [V, H], pointer or TMA descriptor of [BLOCK_V, BLOCK_H]
    out,  # [T, stride_out], E: pointer or TMA descriptor of [BLOCK_T, BLOCK_V / PIECES]
    bias_ptr,  # [V]
    token_ptr,  # [T], ids of the whole vocabulary
    reference_ptr,  # [T] f32
    live_ptr,  # [T] u8, 0 = store zeros
    gate_ptr,  # [1 + number of row tiles] i32, see GATED
    sums_ptr,  # [vocabulary tiles * PIECES, T] f32
    weighted_ptr,  # like sums, of E (z - reference)
    maxima_ptr,  # like sums, only KIND = SUMS
    num_rows,
    vocab_size,
    hidden_size,
    vocab_start,  # id of the weight's first row
    stride_hidden,
    stride_weight,
    stride_out,
    inv_temperature,
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECES: tl.constexpr,  # 1 or 2 pieces in which a tile leaves the registers; 2 halves what the epilogue needs
    GROUP_V: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: for the interpreter, where bfloat16 products are wrong
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    GATED: tl.constexpr,  # do nothing unless gate[0], and only row tiles with gate[1 + i]
):
    """One program works on tiles `program_id`, `program_id + num_programs`, ..."""
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    row_pointers = (bias_ptr, token_ptr, reference_ptr, live_ptr, sums_ptr, weighted_ptr, maxima_ptr)
    num_row_tiles = tl.cdiv(num_rows, BLOCK_T)
    num_vocab_tiles = tl.cdiv(vocab_size, BLOCK_V)
    num_tiles = num_row_tiles * num_vocab_tiles
    if GATED:
        num_tiles = tl.where(tl.load(gate_ptr) != 0, num_tiles, 0)
    for i_tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        i_row, i_vocab = tile_position(i_tile, num_row_tiles, num_vocab_tiles, GROUP_V)
        row_start, column_start = i_row * BLOCK_T, i_vocab * BLOCK_V
        is_wanted = True
        if GATED:
            is_wanted = tl.load(gate_ptr + 1 + i_row) != 0
        if is_wanted:
            logits = multiply_tile(
                hidden,
                weight,
                row_start,
                column_start,
                num_rows,
                vocab_size,
                hidden_size,
                stride_hidden,
                stride_weight,
                BLOCK_T=BLOCK_T,
                BLOCK_V=BLOCK_V,
                BLOCK_H=BLOCK_H,
                USE_TMA=USE_TMA,
                UPCAST=UPCAST,
            )
            if PIECES == 2:
                halves = tl.permute(tl.reshape(logits, (BLOCK_T, 2, WIDTH)), (0, 2, 1))
                left, right = tl.split(halves)
            else:
                left = logits
                right = logits
            for i_piece in tl.static_range(PIECES):
                store_exponentials(
                    left if i_piece == 0 else right,
                    row_start,
                    column_start + i_piece * WIDTH,
                    i_vocab * PIECES + i_piece,
                    out,
                    row_pointers,
                    num_rows,
                    vocab_size,
                    vocab_start,
                    stride_out,
                    inv_temperature,
                    KIND=KIND,
                    BLOCK_T=BLOCK_T,
                    WIDTH=WIDTH,
                    USE_TMA=USE_TMA,
                    HAS_BIAS=HAS_BIAS,
                    HAS_LIVE=HAS_LIVE,
                    WITH_ENTROPY=WITH_ENTROPY,
                )

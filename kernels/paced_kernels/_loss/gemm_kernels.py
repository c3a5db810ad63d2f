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
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # lowest float32 number, times which 0 is 0
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
def load_blocks(
    hidden,
    weight,
    place,  # first row and column
    start,  # of the inner dimension
    sizes,  # T, V, H, stride_hidden, stride_weight
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK_T, BLOCK_H] and [BLOCK_V, BLOCK_H] operands of one step; what is past the end is 0."""
    row_start, column_start = place
    num_rows, vocab_size, hidden_size, stride_hidden, stride_weight = sizes
    if USE_TMA:
        b_hidden = hidden.load([row_start, start])
        b_weight = weight.load([column_start, start])
    else:
        o_rows = row_start + tl.arange(0, BLOCK_T)
        o_columns = column_start + tl.arange(0, BLOCK_V)
        o_inner = start + tl.arange(0, BLOCK_H)
        m_inner = (o_inner < hidden_size)[None, :]
        hidden_ptrs = hidden + o_rows.to(tl.int64)[:, None] * stride_hidden + o_inner[None, :]
        weight_ptrs = weight + o_columns.to(tl.int64)[:, None] * stride_weight + o_inner[None, :]
        b_hidden = tl.load(hidden_ptrs, mask=(o_rows < num_rows)[:, None] & m_inner, other=0.0)
        b_weight = tl.load(weight_ptrs, mask=(o_columns < vocab_size)[:, None] & m_inner, other=0.0)
    if UPCAST:
        b_hidden = b_hidden.to(tl.float32)
        b_weight = b_weight.to(tl.float32)
    return b_hidden, b_weight


@triton.jit
def write_piece(
    products,  # [BLOCK_T, WIDTH] f32, hidden W^T
    target,  # [BLOCK_T] i32, column of the target; outside [0, V) where the shard does not own it
    reference,  # [BLOCK_T] f32, only for EXPONENTIALS
    row_start,
    column_start,
    i_part,  # which of the partial sums this piece writes
    out,
    fixed,
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Exponentials of one piece of a tile, their sums and, for EXPONENTIALS, the store.

    Without MASKED every column is counted: none is past the end, and none is a target. Both ways round alike, so a row
    does not notice the targets of its neighbours.
    """
    bias_ptr, _, _, sums_ptr, weighted_ptr, maxima_ptr, num_rows, vocab_size, _, stride_out, inv_temperature = fixed
    o_rows = row_start + tl.arange(0, BLOCK_T)
    o_columns = column_start + tl.arange(0, WIDTH)
    m_rows = o_rows < num_rows
    m_columns = o_columns < vocab_size
    is_counted = m_columns
    if MASKED:
        # The target is left out of the sums, so that 1 - p is never the difference of nearly equal numbers.
        is_counted = m_columns[None, :] & (o_columns[None, :] != target[:, None])
    part = i_part.to(tl.int64) * num_rows
    if HAS_BIAS:
        if MASKED:
            bias = tl.load(bias_ptr + o_columns, mask=m_columns, other=0.0)
        else:
            bias = tl.load(bias_ptr + o_columns)
        products = tl.fma(products, inv_temperature, bias.to(tl.float32)[None, :])
    if KIND == SUMS:
        if MASKED:
            products = tl.where(is_counted, products, float("-inf"))
        reference = tl.max(products, axis=1)
        if not HAS_BIAS:
            reference *= inv_temperature  # the largest logit: rounding keeps order
        tl.store(maxima_ptr + part + o_rows, reference, mask=m_rows)
        reference = tl.where(reference == float("-inf"), 0.0, reference)  # nothing to count: all terms are 0
    if HAS_BIAS:
        shifted = products - reference[:, None]
    else:
        shifted = tl.fma(products, inv_temperature, -reference[:, None])
    if MASKED and KIND == EXPONENTIALS:  # afterwards, because an impossible target has a reference of -inf
        shifted = tl.where(is_counted, shifted, float("-inf"))
    exponentials = tl.exp2(shifted * LOG2_E)
    tl.store(sums_ptr + part + o_rows, tl.sum(exponentials, axis=1), mask=m_rows)
    if WITH_ENTROPY:
        # 0 * -inf is 0 here: p log p of an impossible token.
        weighted = exponentials * tl.maximum(shifted, LOWEST)
        tl.store(weighted_ptr + part + o_rows, tl.sum(weighted, axis=1), mask=m_rows)
    if KIND == EXPONENTIALS:
        if USE_TMA:
            out.store([row_start, column_start], narrow(exponentials, out.dtype))
        else:
            out_ptrs = out + o_rows.to(tl.int64)[:, None] * stride_out + o_columns[None, :]
            b_out = narrow(exponentials, out.dtype.element_ty)
            if MASKED:
                tl.store(out_ptrs, b_out, mask=m_rows[:, None] & m_columns[None, :])
            else:
                tl.store(out_ptrs, b_out, mask=m_rows[:, None])


@triton.jit
def write_tile(
    logits,  # [BLOCK_T, BLOCK_V] f32, hidden W^T
    place,  # first row and column
    out,
    fixed,  # pointers of bias, tokens, references, sums, weighted, maxima; T, V, vocab_start, stride_out, scale
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PIECES: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Epilogue of a tile, in PIECES pieces; with SPLIT, those that need no masks are spared them."""
    row_start, column_start = place
    _, token_ptr, reference_ptr, _, _, _, num_rows, vocab_size, vocab_start, _, _ = fixed
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    o_rows = row_start + tl.arange(0, BLOCK_T)
    m_rows = o_rows < num_rows
    # Only columns of this shard can equal the difference: ids outside it leave every column counted.
    target = (tl.load(token_ptr + o_rows, mask=m_rows, other=-1) - vocab_start).to(tl.int32)
    reference = target
    if KIND == EXPONENTIALS:
        reference = tl.load(reference_ptr + o_rows, mask=m_rows, other=0.0)
    if SPLIT:
        # Targets in each piece, 16 bits a count. Before the logits are used: the last product is still on its way.
        offset = target - column_start
        ones = tl.where(offset < WIDTH, 1, 1 << 16)
        num_targets = tl.sum(tl.where((offset >= 0) & (offset < BLOCK_V), ones, 0), axis=0)
    if PIECES == 2:
        halves = tl.permute(tl.reshape(logits, (BLOCK_T, 2, WIDTH)), (0, 2, 1))
        left, right = tl.split(halves)
    else:
        left = logits
        right = logits
    for i_piece in tl.static_range(PIECES):
        first = column_start + i_piece * WIDTH
        i_part = first // WIDTH
        needs_masks = True
        if SPLIT:
            needs_masks = ((num_targets >> (16 * i_piece)) & 0xFFFF) + tl.maximum(first + WIDTH - vocab_size, 0) > 0
        # What is stored is stored inside the branches: LLVM would compute both and choose between them otherwise.
        if needs_masks:
            write_piece(
                left if i_piece == 0 else right,
                target,
                reference,
                row_start,
                first,
                i_part,
                out,
                fixed,
                KIND=KIND,
                BLOCK_T=BLOCK_T,
                WIDTH=WIDTH,
                USE_TMA=USE_TMA,
                HAS_BIAS=HAS_BIAS,
                WITH_ENTROPY=WITH_ENTROPY,
                MASKED=True,
            )
        else:
            write_piece(
                left if i_piece == 0 else right,
                target,
                reference,
                row_start,
                first,
                i_part,
                out,
                fixed,
                KIND=KIND,
                BLOCK_T=BLOCK_T,
                WIDTH=WIDTH,
                USE_TMA=USE_TMA,
                HAS_BIAS=HAS_BIAS,
                WITH_ENTROPY=WITH_ENTROPY,
                MASKED=False,
            )


@batch_kernel
def project_kernel(
    hidden,  # [T, H], pointer or TMA descriptor of [BLOCK_T, BLOCK_H]
    weight,  # [V, H], pointer or TMA descriptor of [BLOCK_V, BLOCK_H]
    out,  # [T, stride_out], E: pointer or TMA descriptor of [BLOCK_T, BLOCK_V / PIECES]
    bias_ptr,  # [V]
    token_ptr,  # [T], ids of the whole vocabulary
    reference_ptr,  # [T] f32
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
    FLAT: tl.constexpr,  # one loop over the steps of all tiles, so that loads of the next begin before the epilogue
    SPLIT: tl.constexpr,  # an epilogue of its own for pieces that need no masks
    UPCAST: tl.constexpr,  # multiply in float32: for the interpreter, where bfloat16 products are wrong
    HAS_BIAS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    GATED: tl.constexpr,  # do nothing unless gate[0], and only row tiles with gate[1 + i]; excludes FLAT
):
    """One program works on tiles `program_id`, `program_id + num_programs`, ..."""
    pointers = (bias_ptr, token_ptr, reference_ptr, sums_ptr, weighted_ptr, maxima_ptr)
    numbers = (num_rows, vocab_size, vocab_start, stride_out, inv_temperature)
    fixed = pointers + numbers
    sizes = (num_rows, vocab_size, hidden_size, stride_hidden, stride_weight)
    num_row_tiles = tl.cdiv(num_rows, BLOCK_T)
    num_vocab_tiles = tl.cdiv(vocab_size, BLOCK_V)
    num_tiles = num_row_tiles * num_vocab_tiles
    stride = tl.num_programs(0)
    if FLAT:
        # By hand: tl.range(flatten=True) with a branch in the epilogue crashes Triton 3.6 and 3.8.
        num_steps = tl.cdiv(hidden_size, BLOCK_H)
        i_tile = tl.program_id(0) - stride
        i_step = num_steps - 1
        row_start, column_start = 0, 0
        products = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for _ in tl.range(0, tl.cdiv(num_tiles - tl.program_id(0), stride) * num_steps):
            i_step = tl.where(i_step == num_steps - 1, 0, i_step + 1)
            if i_step == 0:
                i_tile += stride
                i_row, i_vocab = tile_position(i_tile, num_row_tiles, num_vocab_tiles, GROUP_V)
                row_start, column_start = i_row * BLOCK_T, i_vocab * BLOCK_V
            place = row_start, column_start
            b_hidden, b_weight = load_blocks(
                hidden, weight, place, i_step * BLOCK_H, sizes, BLOCK_T, BLOCK_V, BLOCK_H, USE_TMA, UPCAST
            )
            products = tl.dot(b_hidden, tl.trans(b_weight), products, input_precision="ieee")
            if i_step == num_steps - 1:
                write_tile(
                    products, place, out, fixed, KIND, BLOCK_T, BLOCK_V, PIECES, USE_TMA, HAS_BIAS, WITH_ENTROPY, SPLIT
                )
                products = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    else:
        if GATED:
            num_tiles = tl.where(tl.load(gate_ptr) != 0, num_tiles, 0)
        for i_tile in tl.range(tl.program_id(0), num_tiles, stride):
            i_row, i_vocab = tile_position(i_tile, num_row_tiles, num_vocab_tiles, GROUP_V)
            place = i_row * BLOCK_T, i_vocab * BLOCK_V
            is_wanted = True
            if GATED:
                is_wanted = tl.load(gate_ptr + 1 + i_row) != 0
            if is_wanted:
                products = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
                for start in range(0, hidden_size, BLOCK_H):
                    b_hidden, b_weight = load_blocks(
                        hidden, weight, place, start, sizes, BLOCK_T, BLOCK_V, BLOCK_H, USE_TMA, UPCAST
                    )
                    products = tl.dot(b_hidden, tl.trans(b_weight), products, input_precision="ieee")
                write_tile(
                    products, place, out, fixed, KIND, BLOCK_T, BLOCK_V, PIECES, USE_TMA, HAS_BIAS, WITH_ENTROPY, SPLIT
                )

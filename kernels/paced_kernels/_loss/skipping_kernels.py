"""Products for dhidden and dweight in Triton that pass over blocks of E' which a choice leaves out.

    out[t, h]  = sum of E'[t, v] weight[v, h] over the kept blocks of columns of the tile of row t
    out[v, h] += sum of E'[t, v] rows[t, h] over the tiles of rows that keep the block of column v

A block has the rows of a tile and the columns of one partial sum of `project_kernel`. What is kept is a list of numbers
and its length, written on the device; cost: 2 H floating-point operations an element of a kept block. Each output is
summed by one program in the order of its list: two runs agree bit for bit.

T = rows, H = hidden size, V = rows of the weight (of this rank's shard, where the vocabulary is split).
"""

# Kernels are written in Triton's language, which type checkers read as Python.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from .._grid import batch_kernel
from .gemm_kernels import narrow


@triton.jit
def load_block(
    source,
    row_start,
    column_start,
    num_rows,
    num_columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix, 0 past its end."""
    if USE_TMA:
        block = source.load([row_start, column_start])
    else:
        o_rows = row_start + tl.arange(0, ROWS)
        o_columns = column_start + tl.arange(0, COLUMNS)
        mask = (o_rows < num_rows)[:, None] & (o_columns < num_columns)[None, :]
        block = tl.load(source + o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :], mask=mask, other=0.0)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@batch_kernel
def kept_rows_kernel(
    matrix,  # [T, V], E': pointer or TMA descriptor of [BLOCK_T, BLOCK_INNER]
    weight,  # [V, H], pointer or TMA descriptor of [BLOCK_INNER, BLOCK_H]
    out_ptr,  # [T, H] f32, contiguous
    lists_ptr,  # [row tiles, num_blocks] i32, kept blocks of a row tile first
    counts_ptr,  # [row tiles] i32
    num_rows,
    vocab_size,
    hidden_size,
    num_blocks,
    stride_matrix,
    stride_weight,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: for the interpreter, where bfloat16 products are wrong
):
    """One program computes [BLOCK_T, BLOCK_H] of the product with the weight."""
    STEPS: tl.constexpr = BLOCK_V // BLOCK_INNER
    i_tile = tl.program_id(1)
    row_start, column_start = i_tile * BLOCK_T, tl.program_id(0) * BLOCK_H
    list_ptr = lists_ptr + i_tile * num_blocks
    last = num_blocks - 1
    products = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    num_steps = tl.load(counts_ptr + i_tile) * STEPS
    # The number of the next block is read a step ahead: a load whose address waits for another one is not pipelined.
    following = tl.load(list_ptr)
    for i_step in tl.range(num_steps):
        start = following * BLOCK_V + i_step % STEPS * BLOCK_INNER
        following = tl.load(list_ptr + tl.minimum((i_step + 1) // STEPS, last))
        b_matrix = load_block(
            matrix,
            row_start,
            start,
            num_rows,
            vocab_size,
            stride_matrix,
            ROWS=BLOCK_T,
            COLUMNS=BLOCK_INNER,
            USE_TMA=USE_TMA,
            UPCAST=UPCAST,
        )
        b_weight = load_block(
            weight,
            start,
            column_start,
            vocab_size,
            hidden_size,
            stride_weight,
            ROWS=BLOCK_INNER,
            COLUMNS=BLOCK_H,
            USE_TMA=USE_TMA,
            UPCAST=UPCAST,
        )
        products = tl.dot(b_matrix, b_weight, products, input_precision="ieee")
    o_rows = row_start + tl.arange(0, BLOCK_T)
    o_columns = column_start + tl.arange(0, BLOCK_H)
    mask = (o_rows < num_rows)[:, None] & (o_columns < hidden_size)[None, :]
    tl.store(out_ptr + o_rows.to(tl.int64)[:, None] * hidden_size + o_columns[None, :], products, mask=mask)


@batch_kernel
def kept_columns_kernel(
    matrix,  # [T, V], E': pointer or TMA descriptor of [BLOCK_INNER, BLOCK_V]
    rows,  # [T, H], pointer or TMA descriptor of [BLOCK_INNER, BLOCK_H]
    out_ptr,  # [V, H], contiguous
    lists_ptr,  # [row tiles, num_blocks] i32, for each block the row tiles that keep it first
    counts_ptr,  # [num_blocks] i32
    num_rows,
    vocab_size,
    hidden_size,
    num_blocks,
    stride_matrix,
    stride_rows,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BEGINS: tl.constexpr,  # write the product instead of adding it
):
    """One program computes [BLOCK_V, BLOCK_H] of the product with the rows."""
    STEPS: tl.constexpr = BLOCK_T // BLOCK_INNER
    i_block = tl.program_id(1)
    block_start, column_start = i_block * BLOCK_V, tl.program_id(0) * BLOCK_H
    o_block = block_start + tl.arange(0, BLOCK_V)
    o_columns = column_start + tl.arange(0, BLOCK_H)
    mask = (o_block < vocab_size)[:, None] & (o_columns < hidden_size)[None, :]
    out_ptrs = out_ptr + o_block.to(tl.int64)[:, None] * hidden_size + o_columns[None, :]
    if BEGINS:
        products = tl.zeros((BLOCK_V, BLOCK_H), dtype=tl.float32)
    else:  # read before the products, which then need no second set of registers
        products = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    last = tl.cdiv(num_rows, BLOCK_T) - 1
    num_steps = tl.load(counts_ptr + i_block) * STEPS
    following = tl.load(lists_ptr + i_block)
    for i_step in tl.range(num_steps):
        start = following * BLOCK_T + i_step % STEPS * BLOCK_INNER
        following = tl.load(lists_ptr + tl.minimum((i_step + 1) // STEPS, last) * num_blocks + i_block)
        b_matrix = load_block(
            matrix,
            start,
            block_start,
            num_rows,
            vocab_size,
            stride_matrix,
            ROWS=BLOCK_INNER,
            COLUMNS=BLOCK_V,
            USE_TMA=USE_TMA,
            UPCAST=UPCAST,
        )
        b_rows = load_block(
            rows,
            start,
            column_start,
            num_rows,
            hidden_size,
            stride_rows,
            ROWS=BLOCK_INNER,
            COLUMNS=BLOCK_H,
            USE_TMA=USE_TMA,
            UPCAST=UPCAST,
        )
        products = tl.dot(tl.trans(b_matrix), b_rows, products, input_precision="ieee")
    tl.store(out_ptrs, narrow(products, out_ptr.dtype.element_ty), mask=mask)

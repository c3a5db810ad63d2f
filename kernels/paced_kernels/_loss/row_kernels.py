"""Row kernels around the vocabulary projection: target logits, row statistics, exponentials in place, patches.

All arithmetic on rows is float32. Let M be the largest counted logit of a row, y its target, and sums run over v != y:

    S = sum exp(z_v - M)        D = sum exp(z_v - M) (z_v - M)

(M, S, D) of one piece of the vocabulary are a "part". `finish_rows_kernel` merges parts, of tiles or of ranks, into
log-probs, log-sum-exps and entropies. The target is never part of S, so a log-prob near 0 is log1p of a small number.

T = rows, H = hidden size, V = rows of the weight (of this rank's shard, where the vocabulary is split), P = parts.
"""

# Kernels are written in Triton's language, which type checkers read as Python.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from .._grid import batch_kernel
from .gemm_kernels import LOG2_E, narrow

# Below this log-prob, exponentials relative to the target are too large (1e19), and p_y times a hidden state comes too
# close to the smallest bfloat16. Such a row is computed again with its log-sum-exp as the reference.
LOWEST_DIRECT_LOGPROB: tl.constexpr = tl.constexpr(-44.0)


@triton.jit
def log1p(x):
    """log(1 + x) with the relative accuracy of x for small x (Kahan's correction of the rounding of 1 + x)."""
    total = 1.0 + x
    rounded = total - 1.0
    corrected = tl.log(total) * (x / tl.where(rounded == 0.0, 1.0, rounded))
    return tl.where(rounded == 0.0, x, tl.where(total == float("inf"), total, corrected))


@triton.jit
def exp(x):
    """e^x by the power of two that the hardware computes."""
    return tl.exp2(x * LOG2_E)


@batch_kernel
def target_logits_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    token_ptr,  # [T]
    target_ptr,  # [T] f32, out
    num_rows,
    vocab_size,
    hidden_size,
    vocab_start,
    stride_hidden,
    stride_weight,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr,  # as in `project_kernel`
):
    """Logit of the target of each row, 0 where another shard owns it. One program per BLOCK_T rows.

    The diagonal of a product of the rows with their targets' rows of the weight, by the instructions and in the steps
    of `project_kernel`: tensor cores cut sums off instead of rounding them, and what both logits of a difference lose
    alike cancels. 2 T H BLOCK_T operations, BLOCK_T / V of the projection's.
    """
    o_rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = o_rows < num_rows
    target = tl.load(token_ptr + o_rows, mask=m_rows, other=-1).to(tl.int64) - vocab_start
    m_owned = m_rows & (target >= 0) & (target < vocab_size)
    target = tl.where(m_owned, target, 0)
    o_inner = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + o_rows.to(tl.int64)[:, None] * stride_hidden + o_inner[None, :]
    weight_ptrs = weight_ptr + target[:, None] * stride_weight + o_inner[None, :]
    products = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        mask = m_owned[:, None] & (o_inner < hidden_size - start)[None, :]
        b_hidden = tl.load(hidden_ptrs, mask=mask, other=0.0)
        b_weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        hidden_ptrs += BLOCK_H
        weight_ptrs += BLOCK_H
        if UPCAST:
            b_hidden = b_hidden.to(tl.float32)
            b_weight = b_weight.to(tl.float32)
        products = tl.dot(b_hidden, tl.trans(b_weight), products, input_precision="ieee")
    o_own = tl.arange(0, BLOCK_T)
    is_own = o_own[:, None] == o_own[None, :]
    logits = tl.sum(tl.where(is_own, products, 0.0), axis=1) * inv_temperature
    if HAS_BIAS:
        logits += tl.load(bias_ptr + target, mask=m_owned, other=0.0).to(tl.float32)
    tl.store(target_ptr + o_rows, tl.where(m_owned, logits, 0.0), mask=m_rows)


@triton.jit
def merge_part(top, total, weighted, part_top, part_total, part_weighted):
    """Merge two parts into one; a part without counted logits has top = -inf and sums 0."""
    new_top = tl.maximum(top, part_top)
    shift = tl.where(top == new_top, 0.0, top - new_top)
    part_shift = tl.where(part_top == new_top, 0.0, part_top - new_top)
    # exp(-inf) is 0, and 0 * -inf must be 0 as well
    shifted = tl.where(total == 0.0, 0.0, weighted + shift * total)
    part_shifted = tl.where(part_total == 0.0, 0.0, part_weighted + part_shift * part_total)
    scale, part_scale = exp(shift), exp(part_shift)
    weighted = tl.where(scale == 0.0, 0.0, scale * shifted) + tl.where(
        part_scale == 0.0, 0.0, part_scale * part_shifted
    )
    return new_top, scale * total + part_scale * part_total, weighted


@batch_kernel
def finish_rows_kernel(
    sums_ptr,  # [P, T] f32
    weighted_ptr,  # [P, T] f32
    maxima_ptr,  # [P, T] f32; without HAS_MAXIMA every part is relative to the target
    target_ptr,  # [T] f32
    logprobs_ptr,  # [T] f32, out
    lse_ptr,  # [T] f32, out
    entropy_ptr,  # [T] f32, out
    gate_ptr,  # [1 + tiles] i32: output if FLAG (rows to compute again), input if GATED
    num_rows,
    num_parts,
    TILE_T: tl.constexpr,  # rows of a tile of the gate
    HAS_MAXIMA: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    FLAG: tl.constexpr,  # open the gate of rows below LOWEST_DIRECT_LOGPROB
    GATED: tl.constexpr,  # only such rows, behind an open gate
    FINAL: tl.constexpr,  # False: write the merged part to (lse, logprobs, entropy) = (M, S, D)
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge the parts of BLOCK_T rows; the order of additions depends on P alone."""
    is_open = True
    if GATED:
        is_open = tl.load(gate_ptr) != 0
    if is_open:
        o_rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_rows = o_rows < num_rows
        if GATED:
            m_rows &= tl.load(gate_ptr + 1 + o_rows // TILE_T, mask=m_rows, other=0) != 0
            m_rows &= tl.load(logprobs_ptr + o_rows, mask=m_rows, other=0.0) < LOWEST_DIRECT_LOGPROB
        target = tl.load(target_ptr + o_rows, mask=m_rows, other=0.0)
        top = tl.where(m_rows, float("-inf"), 0.0)
        if not HAS_MAXIMA:
            top = target
        total = tl.zeros((BLOCK_T,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for start in range(0, num_parts, BLOCK_P):
            o_parts = start + tl.arange(0, BLOCK_P)
            mask = (o_parts < num_parts)[:, None] & m_rows[None, :]
            o_part = o_parts.to(tl.int64)[:, None] * num_rows + o_rows[None, :]
            part_total = tl.load(sums_ptr + o_part, mask, other=0.0)
            part_weighted = tl.zeros((BLOCK_P, BLOCK_T), dtype=tl.float32)
            if WITH_ENTROPY:
                part_weighted = tl.load(weighted_ptr + o_part, mask, other=0.0)
            if HAS_MAXIMA:
                part_top = tl.load(maxima_ptr + o_part, mask, other=float("-inf"))
                block_top = tl.max(part_top, axis=0)
                same = part_top == block_top[None, :]  # also where both are -inf
                shift = tl.where(same, 0.0, part_top - block_top[None, :])
                part_weighted = tl.where(part_total == 0.0, 0.0, part_weighted + shift * part_total)
                scale = exp(shift)
                part_weighted = tl.where(scale == 0.0, 0.0, scale * part_weighted)
                part_total = scale * part_total
                top, total, weighted = merge_part(
                    top, total, weighted, block_top, tl.sum(part_total, axis=0), tl.sum(part_weighted, axis=0)
                )
            else:
                total += tl.sum(part_total, axis=0)
                weighted += tl.sum(part_weighted, axis=0)
        if FINAL:
            others_top, others = top, total
            one = tl.full((BLOCK_T,), 1.0, dtype=tl.float32)
            top, total, weighted = merge_part(top, total, weighted, target, one, 0.0 * one)
            # With the target on top nothing is rounded against the 1: this is where log-probs are near 0.
            below = tl.where(others == 0.0, 0.0, others * exp(others_top - target))
            is_target_top = target >= others_top
            log_total = tl.where(is_target_top, log1p(below), tl.log(total))
            logprobs = tl.where(is_target_top, -log_total, (target - top) - log_total)
            tl.store(logprobs_ptr + o_rows, logprobs, mask=m_rows)
            tl.store(lse_ptr + o_rows, target - logprobs, mask=m_rows)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + o_rows, log_total - weighted / total, mask=m_rows)
            if FLAG:
                is_below = m_rows & (logprobs < LOWEST_DIRECT_LOGPROB)
                tl.store(gate_ptr + 1 + o_rows // TILE_T, 1, mask=is_below)
                tl.store(gate_ptr + 0 * o_rows, 1, mask=is_below)
        else:
            tl.store(lse_ptr + o_rows, top, mask=m_rows)
            tl.store(logprobs_ptr + o_rows, total, mask=m_rows)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + o_rows, weighted, mask=m_rows)


@batch_kernel
def row_parts_kernel(
    logits_ptr,  # [T, stride] f32, hidden W^T
    bias_ptr,  # [V]
    token_ptr,  # [T]
    target_ptr,  # [T] f32, out: 0 where another shard owns the target
    sums_ptr,  # [T] f32, out
    weighted_ptr,  # [T] f32, out
    maxima_ptr,  # [T] f32, out
    vocab_size,
    vocab_start,
    stride,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute one part per row from logits in memory, one program per row; reads 4 bytes per element."""
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(token_ptr + i_row).to(tl.int64) - vocab_start
    is_owned = (target >= 0) & (target < vocab_size)
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab_size, BLOCK_V):
        o_columns = start + tl.arange(0, BLOCK_V)
        m_columns = o_columns < vocab_size
        logits = tl.load(logits_ptr + i_row * stride + o_columns, mask=m_columns, other=0.0) * inv_temperature
        if HAS_BIAS:
            logits += tl.load(bias_ptr + o_columns, mask=m_columns, other=0.0).to(tl.float32)
        is_counted = m_columns & (o_columns != target)
        block_top = tl.max(tl.where(is_counted, logits, float("-inf")), axis=0)
        shifted = logits - tl.where(block_top == float("-inf"), 0.0, block_top)
        exponentials = tl.where(is_counted, exp(shifted), 0.0)
        products = tl.where(exponentials == 0.0, 0.0, exponentials * shifted)
        top, total, weighted = merge_part(
            top, total, weighted, block_top, tl.sum(exponentials, axis=0), tl.sum(products, axis=0)
        )
    logit = tl.load(logits_ptr + i_row * stride + target, mask=is_owned, other=0.0) * inv_temperature
    if HAS_BIAS:
        logit += tl.load(bias_ptr + target, mask=is_owned, other=0.0).to(tl.float32)
    tl.store(target_ptr + i_row, logit)
    tl.store(maxima_ptr + i_row, top)
    tl.store(sums_ptr + i_row, total)
    if WITH_ENTROPY:
        tl.store(weighted_ptr + i_row, weighted)


@batch_kernel
def row_probabilities_kernel(
    logits_ptr,  # [T, stride] f32, hidden W^T
    out_ptr,  # [T, stride_out]; may be the same memory, in a dtype that is not wider
    bias_ptr,  # [V]
    lse_ptr,  # [T] f32
    live_ptr,  # [T] u8, 0 = store zeros
    vocab_size,
    stride,
    stride_out,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Replace logits by exp(z - lse), one program per row; reads 4 and writes at most 4 bytes per element."""
    i_row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + i_row)
    is_live = True
    if HAS_LIVE:
        is_live = tl.load(live_ptr + i_row) != 0
    for start in range(0, vocab_size, BLOCK_V):
        o_columns = start + tl.arange(0, BLOCK_V)
        m_columns = o_columns < vocab_size
        logits = tl.load(logits_ptr + i_row * stride + o_columns, mask=m_columns, other=0.0) * inv_temperature
        if HAS_BIAS:
            logits += tl.load(bias_ptr + o_columns, mask=m_columns, other=0.0).to(tl.float32)
        probabilities = tl.where(is_live, exp(logits - lse), 0.0)
        # The narrower output overwrites logits of this block or an earlier one: all threads must have read them.
        tl.debug_barrier()
        tl.store(
            out_ptr + i_row * stride_out + o_columns, narrow(probabilities, out_ptr.dtype.element_ty), mask=m_columns
        )


@batch_kernel
def clear_dead_rows_kernel(
    out_ptr,  # [T, stride_out], E
    live_ptr,  # [T] u8
    vocab_size,
    stride_out,
    BLOCK_V: tl.constexpr,
):
    """Set E = 0 in rows that are not live, one program per row; whatever their hidden states made of them."""
    i_row = tl.program_id(0).to(tl.int64)
    if tl.load(live_ptr + i_row) == 0:
        for start in range(0, vocab_size, BLOCK_V):
            o_columns = start + tl.arange(0, BLOCK_V)
            zeros = tl.zeros((BLOCK_V,), dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + i_row * stride_out + o_columns, zeros, mask=o_columns < vocab_size)


@batch_kernel
def patch_targets_kernel(
    out_ptr,  # [T, stride_out], E
    token_ptr,  # [T]
    patch_ptr,  # [T] f32
    live_ptr,  # [T] u8
    num_rows,
    vocab_size,
    vocab_start,
    stride_out,
    HAS_LIVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Set E[t, y_t] = patch[t] in live rows whose target this shard owns."""
    o_rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = o_rows < num_rows
    target = tl.load(token_ptr + o_rows, mask=m_rows, other=-1).to(tl.int64) - vocab_start
    m_rows &= (target >= 0) & (target < vocab_size)
    if HAS_LIVE:
        m_rows &= tl.load(live_ptr + o_rows, mask=m_rows, other=0) != 0
    patch = tl.load(patch_ptr + o_rows, mask=m_rows, other=0.0)
    tl.store(out_ptr + o_rows.to(tl.int64) * stride_out + target, narrow(patch, out_ptr.dtype.element_ty), mask=m_rows)


@batch_kernel
def entropy_gradient_kernel(
    out_ptr,  # [T, stride_out], E in, dloss/dz out
    token_ptr,  # [T]
    log_factor_ptr,  # [T] f32, log p_v = log E_v + log_factor
    logprobs_ptr,  # [T] f32
    entropy_ptr,  # [T] f32
    coefficient_ptr,  # [T] f32, dloss/dlogprobs
    entropy_coefficient_ptr,  # [T] f32, dloss/dentropy
    vocab_size,
    vocab_start,
    stride_out,
    BLOCK_V: tl.constexpr,
):
    """dloss/dz_v = c (1[v = y] - p_v) - e p_v (log p_v + entropy), in place; one program per row, BLOCK_V columns."""
    i_row = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_columns = o_columns < vocab_size
    target = tl.load(token_ptr + i_row).to(tl.int64) - vocab_start
    coefficient = tl.load(coefficient_ptr + i_row)
    entropy_coefficient = tl.load(entropy_coefficient_ptr + i_row)
    entropy = tl.load(entropy_ptr + i_row)
    target_logprob = tl.load(logprobs_ptr + i_row)
    out_ptrs = out_ptr + i_row * stride_out + o_columns
    exponentials = tl.load(out_ptrs, mask=m_columns, other=0.0).to(tl.float32)
    is_target = o_columns == target
    # The stored entry of the target is the patch, so its probability comes from its log-prob.
    positive = tl.where(is_target, 1.0, exponentials)
    logprobs = tl.log(tl.where(positive == 0.0, 1.0, positive)) + tl.load(log_factor_ptr + i_row)
    logprobs = tl.where(is_target, target_logprob, logprobs)
    probabilities = tl.where(positive == 0.0, 0.0, exp(logprobs))
    products = tl.where(probabilities == 0.0, 0.0, probabilities * (logprobs + entropy))
    gradient = coefficient * (tl.where(is_target, 1.0, 0.0) - probabilities) - entropy_coefficient * products
    is_dead = (coefficient == 0.0) & (entropy_coefficient == 0.0)
    gradient = tl.where(is_dead, 0.0, gradient)
    tl.store(out_ptrs, narrow(gradient, out_ptr.dtype.element_ty), mask=m_columns)

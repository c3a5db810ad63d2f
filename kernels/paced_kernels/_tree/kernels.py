"""Priority tree in Triton: rebuild, update, sample and race, one launch each, with exact integer sums.

    leaf[i]   = (sequence << 28) | q           int64, q the fixed-point weight
    level 1   = sums of 32 leaves, level k = sums of 32 entries of level k - 1, int64, up to a top of at most 1024

Integer addition is associative, so atomics in any order give the same sums. A draw is the index that
``searchsorted(cumsum(q), target, right=True)`` finds, bit for bit as in `arithmetic`. A leaf is written by an atomic
maximum of its code: among duplicates, the last in the call wins, and the old value that the atomic returns makes the
change of the sums exact. An update costs one atomic per level and element, a draw 256 bytes per level.

Weights from a bell and keys of a race are float64, computed with the IEEE operations of `exact` in the same order.
Launched without fusing products into sums, they too equal the reference bit for bit.

The counters of draws and writes are on the device; the last program of a launch, determined by a ticket, advances
them. Atomics and tickets need no order between programs, and no program waits for another.

N = capacity, B = elements per call.
"""

# Kernels are written in Triton's language, which type checkers read as Python.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportInvalidTypeForm=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .._grid import batch_kernel
from . import bits as bits_module
from . import exact
from .arithmetic import BELL_END as BELL_END_VALUE
from .arithmetic import NO_KEY as NO_KEY_VALUE

FANOUT: tl.constexpr = tl.constexpr(32)
ONE: tl.constexpr = tl.constexpr(1 << 27)
WEIGHT_BITS: tl.constexpr = tl.constexpr(28)
WEIGHT_MASK: tl.constexpr = tl.constexpr((1 << 28) - 1)
SYSTEMATIC: tl.constexpr = tl.constexpr(0)
STRATIFIED: tl.constexpr = tl.constexpr(1)
IID: tl.constexpr = tl.constexpr(2)
# Positions in the status, as in `arithmetic.STATUS_FIELDS`.
STATUS_NAN: tl.constexpr = tl.constexpr(0)
STATUS_NEGATIVE: tl.constexpr = tl.constexpr(1)
STATUS_SATURATED: tl.constexpr = tl.constexpr(2)
STATUS_OUT_OF_RANGE: tl.constexpr = tl.constexpr(3)
STATUS_EMPTY: tl.constexpr = tl.constexpr(4)
STATUS_REPEATS: tl.constexpr = tl.constexpr(6)
# Adding and subtracting 2^52 rounds a float64 below it to an integer, ties to even.
ROUNDER: tl.constexpr = tl.constexpr(4503599627370496.0)
UNIT: tl.constexpr = tl.constexpr(2.0**-53)
UNIT_SHIFT: tl.constexpr = tl.constexpr(2**52 + 1)
BELL_END: tl.constexpr = tl.constexpr(BELL_END_VALUE)
NO_KEY: tl.constexpr = tl.constexpr(NO_KEY_VALUE)
GAMMA: tl.constexpr = tl.constexpr(bits_module.GAMMA)
SHIFTS: tl.constexpr = tl.constexpr(bits_module.SHIFTS)
MULTIPLIERS: tl.constexpr = tl.constexpr(bits_module.MULTIPLIERS)
LOG2_E: tl.constexpr = tl.constexpr(exact.LOG2_E)
LN2_HIGH: tl.constexpr = tl.constexpr(exact.LN2_HIGH)
LN2_LOW: tl.constexpr = tl.constexpr(exact.LN2_LOW)
SQRT_2: tl.constexpr = tl.constexpr(exact.SQRT_2)
MANTISSA_MASK: tl.constexpr = tl.constexpr(exact.MANTISSA_MASK)
EXP_TERMS: tl.constexpr = tl.constexpr(exact.EXP_TERMS)
LOG_TERMS: tl.constexpr = tl.constexpr(exact.LOG_TERMS)
NUM_EXP_TERMS: tl.constexpr = tl.constexpr(len(exact.EXP_TERMS))
NUM_LOG_TERMS: tl.constexpr = tl.constexpr(len(exact.LOG_TERMS))


@triton.jit
def level_place(capacity, LEVEL: tl.constexpr):
    """Offset and length of a level in the tensor of all sums; level 1 is the first."""
    offset = capacity * 0
    count = capacity
    for k in tl.static_range(LEVEL):
        if k > 0:
            offset += count
        count = (count + FANOUT - 1) // FANOUT
    return offset, count


@triton.jit
def quantise(weights, mask, status_ptr, IS_FLOAT: tl.constexpr):
    """Return fixed-point weights, and add counts of corrected values to the status."""
    if IS_FLOAT:
        wide = weights.to(tl.float64)
        is_nan = wide != wide
        is_negative = wide < 0.0
        is_saturated = wide > 1.0
        wide = tl.where(is_nan | is_negative, 0.0, tl.where(is_saturated, 1.0, wide))
        scaled = (wide * ONE + ROUNDER) - ROUNDER
        q = scaled.to(tl.int64)
        q = tl.where((wide > 0.0) & (q < 1), 1, q)
        num_nan = tl.sum((is_nan & mask).to(tl.int64))
        tl.atomic_add(status_ptr + STATUS_NAN, num_nan, mask=num_nan > 0, sem="relaxed")
    else:
        q = weights.to(tl.int64)
        is_negative = q < 0
        is_saturated = q > ONE
        q = tl.where(is_negative, 0, tl.where(is_saturated, ONE, q))
    num_negative = tl.sum((is_negative & mask).to(tl.int64))
    num_saturated = tl.sum((is_saturated & mask).to(tl.int64))
    tl.atomic_add(status_ptr + STATUS_NEGATIVE, num_negative, mask=num_negative > 0, sem="relaxed")
    tl.atomic_add(status_ptr + STATUS_SATURATED, num_saturated, mask=num_saturated > 0, sem="relaxed")
    return q


@triton.jit
def is_last_program(ticket_ptr):
    """Return whether all other programs of this launch are done; if so, the ticket is reset for the next launch."""
    tl.debug_barrier()  # every warp has read the counters that the last program advances
    is_last = tl.atomic_add(ticket_ptr, 1) == tl.num_programs(0) - 1
    tl.store(ticket_ptr, 0, mask=is_last)
    return is_last


@triton.jit
def exp_of_negative(t):
    """exp(-t), as in `exact.exp_of_negative`."""
    k = tl.floor(t * LOG2_E + 0.5)
    r = (t - k * LN2_HIGH) - k * LN2_LOW
    result = r * 0.0 + EXP_TERMS[0]
    for n in tl.static_range(1, NUM_EXP_TERMS):
        result = result * r + EXP_TERMS[n]
    power = (1023 - tl.where(t == t, k, 0.0).to(tl.int64)) << 52
    return result * power.to(tl.float64, bitcast=True)


@triton.jit
def log_of_unit(u):
    """log(u), as in `exact.log_of_unit`."""
    bits = u.to(tl.int64, bitcast=True)
    one = (bits & 0) + 1023
    mantissa = ((bits & MANTISSA_MASK) | (one << 52)).to(tl.float64, bitcast=True)
    is_high = mantissa > SQRT_2
    f = tl.where(is_high, mantissa * 0.5, mantissa) - 1.0
    e = ((bits >> 52) - 1023 + is_high.to(tl.int64)).to(tl.float64)
    s = f / (f + 2.0)
    z = s * s
    series = z * 0.0 + LOG_TERMS[0]
    for n in tl.static_range(1, NUM_LOG_TERMS):
        series = series * z + LOG_TERMS[n]
    return e * LN2_HIGH + (s * series + e * LN2_LOW)


@batch_kernel
def tree_rebuild_kernel(
    weights_ptr,  # [N] weights, or the statistics of a bell
    allowed_ptr,  # [N] bool, with HAS_ALLOWED: leaves that may weigh anything
    leaf_ptr,  # [N] i64
    sums_ptr,  # all levels, i64; those above the second are zero
    status_ptr,
    capacity,  # i64
    center_bits: tl.int64,  # bits of float64: a float argument would arrive as float32
    width_bits: tl.int64,
    NUM_LEVELS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_BELL: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """Compute every leaf and every sum from weights, 1024 leaves per program; reads and writes each once."""
    i_block = tl.program_id(0).to(tl.int64)
    o_rows = tl.arange(0, FANOUT)
    o_leaf = i_block * FANOUT * FANOUT + (o_rows[:, None] * FANOUT + tl.arange(0, FANOUT)[None, :])
    mask = o_leaf < capacity
    is_allowed = mask
    if HAS_ALLOWED:
        is_allowed = tl.load(allowed_ptr + o_leaf, mask=mask, other=0) != 0
    weights = tl.load(weights_ptr + o_leaf, mask=is_allowed, other=0)
    if IS_BELL:
        center = float64_of(center_bits)
        distance = (weights.to(tl.float64) - center) / float64_of(width_bits)
        exponent = distance * distance * 0.5
        weights = exp_of_negative(tl.where(exponent > BELL_END, BELL_END, exponent))  # a NaN stays one
    q = quantise(weights, is_allowed, status_ptr, IS_FLOAT or IS_BELL)
    q = tl.where(is_allowed, q, 0)
    tl.store(leaf_ptr + o_leaf, q, mask=mask)
    sums = tl.sum(q, axis=1)
    offset, count = level_place(capacity, 1)
    o_node = i_block * FANOUT + o_rows
    tl.store(sums_ptr + offset + o_node, sums, mask=o_node < count)
    total = tl.sum(sums, axis=0)
    node = i_block
    for k in tl.static_range(1, NUM_LEVELS):
        offset, count = level_place(capacity, k + 1)
        if k == 1:
            tl.store(sums_ptr + offset + node, total)
        else:
            tl.atomic_add(sums_ptr + offset + node, total, sem="relaxed")
        node = node // FANOUT


@batch_kernel
def tree_update_kernel(
    idx_ptr,  # [B]; without HAS_INDEX one integer, the first leaf of a range that goes round at the end
    weights_ptr,  # [B]
    leaf_ptr,  # [N] i64
    sums_ptr,  # all levels, i64
    sequence_ptr,  # i64, element updates so far
    ticket_ptr,  # i32
    status_ptr,
    capacity,  # i64
    num_elements,
    NUM_LEVELS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set weights of leaves; each sum changes by exactly the change of its leaves."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < num_elements
    if HAS_INDEX:
        idx = tl.load(idx_ptr + position, mask=mask, other=-1).to(tl.int64)
    else:
        idx = (tl.load(idx_ptr).to(tl.int64) + position) % capacity
        idx = tl.where(idx < 0, idx + capacity, idx)
    is_inside = mask & (idx >= 0) & (idx < capacity)
    num_outside = tl.sum((mask & ~is_inside & (idx != -1)).to(tl.int64))
    tl.atomic_add(status_ptr + STATUS_OUT_OF_RANGE, num_outside, mask=num_outside > 0, sem="relaxed")
    q = quantise(tl.load(weights_ptr + position, mask=is_inside, other=0), is_inside, status_ptr, IS_FLOAT)
    code = ((tl.load(sequence_ptr) + position + 1) << WEIGHT_BITS) | q
    idx = tl.where(is_inside, idx, 0)
    old = tl.atomic_max(leaf_ptr + idx, code, mask=is_inside, sem="relaxed")
    delta = q - (old & WEIGHT_MASK)
    has_won = is_inside & (code > old) & (delta != 0)
    node = idx
    for k in tl.static_range(NUM_LEVELS):
        offset, _ = level_place(capacity, k + 1)
        node = node // FANOUT
        tl.atomic_add(sums_ptr + offset + node, delta, mask=has_won, sem="relaxed")
    if is_last_program(ticket_ptr):
        tl.store(sequence_ptr, tl.load(sequence_ptr) + num_elements)


@triton.jit
def float64_of(bits):
    """Return the float64 with these bits, given as an integer of any width."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def scaled_share(i, total, num_draws):
    """Return i * total // B, split so that no product exceeds B^2 or total."""
    return i * (total // num_draws) + i * (total % num_draws) // num_draws


@triton.jit
def random_bits(samples, seed, stream, step):
    """Return 64 random bits (u64) per sample, as in `bits.random_bits`."""
    zero = (samples * 0).to(tl.uint32)  # a block: the interpreter warns of scalars whose products wrap
    step_low, step_high = (step & 0xFFFFFFFF).to(tl.uint32), ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low, high, _, _ = tl.philox(seed, zero, zero + stream.to(tl.uint32), zero + step_low, zero + step_high)
    word = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) + (samples.to(tl.uint64) + 1) * GAMMA
    for n in tl.static_range(2):
        word = (word ^ (word >> SHIFTS[n])) * MULTIPLIERS[n]
    return word ^ (word >> SHIFTS[2])


@triton.jit
def random_target(samples, limit, seed, stream, step):
    """Return floor(r limit / 2^64) for the 64 random bits r of each sample."""
    return tl.umulhi(random_bits(samples, seed, stream, step), limit.to(tl.uint64)).to(tl.int64)


@triton.jit
def pick(weights, target):
    """Return, per row, the column whose interval of the cumulative sum holds the target, and the remaining target."""
    prefix = tl.cumsum(weights, axis=1)
    is_before = prefix <= target[:, None]
    column = tl.sum(is_before.to(tl.int64), axis=1)
    return column, target - tl.max(tl.where(is_before, prefix, 0), axis=1)


@batch_kernel
def tree_sample_kernel(
    leaf_ptr,  # [N] i64
    sums_ptr,  # all levels, i64
    seed_ptr,
    stream_ptr,
    step_ptr,
    size_ptr,
    ticket_ptr,  # i32
    status_ptr,
    idx_ptr,  # [B] i64, out
    q_ptr,  # [B] i64, out
    prob_ptr,  # [B] f32, out
    total_ptr,  # [] i64, out
    capacity,  # i64
    num_draws,
    NUM_LEVELS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw, BLOCK draws per program: targets, descent to the leaves, results; the last program advances the step."""
    o_top = tl.arange(0, FANOUT)[:, None] * FANOUT + tl.arange(0, FANOUT)[None, :]
    offset, count = level_place(capacity, NUM_LEVELS)
    row_sums = tl.sum(tl.load(sums_ptr + offset + o_top, mask=o_top < count, other=0), axis=1)
    total = tl.sum(row_sums, axis=0)
    is_empty = total == 0
    limit = tl.where(is_empty, tl.load(size_ptr), total)
    samples = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = samples < num_draws
    seed, stream, step = tl.load(seed_ptr), tl.load(stream_ptr), tl.load(step_ptr)
    limits = limit + 0 * samples
    divisor = tl.maximum(num_draws, 1).to(tl.int64)
    following = limits  # target of the next draw, if the draws ascend
    if MODE == SYSTEMATIC:
        start = random_target(0 * samples, limits, seed, stream, step)
        share, rest = limit // divisor, limit % divisor
        target = samples * share + (start + samples * rest) // divisor
        following = (samples + 1) * share + (start + (samples + 1) * rest) // divisor
    elif MODE == STRATIFIED:
        low = scaled_share(samples, limit, divisor)
        width = scaled_share(samples + 1, limit, divisor) - low
        target = low + random_target(samples, width, seed, stream, step)
    else:
        target = random_target(samples, limits, seed, stream, step)

    m_descent = samples < tl.where(is_empty, 0, num_draws)
    zeros = tl.zeros((BLOCK, FANOUT), dtype=tl.int64)
    row, left = pick(zeros + row_sums[None, :], target)
    node = row
    for k in tl.static_range(NUM_LEVELS + 1):
        o_child = node[:, None] * FANOUT + tl.arange(0, FANOUT)[None, :]
        if k < NUM_LEVELS:
            offset, count = level_place(capacity, NUM_LEVELS - k)
            weights = tl.load(sums_ptr + offset + o_child, mask=m_descent[:, None] & (o_child < count), other=0)
        else:
            weights = tl.load(leaf_ptr + o_child, mask=m_descent[:, None] & (o_child < capacity), other=0) & WEIGHT_MASK
        column, left = pick(weights, left)
        node = node * FANOUT + column
    has_leaf = m_descent & (node < capacity)
    q = tl.load(leaf_ptr + node, mask=has_leaf, other=0) & WEIGHT_MASK
    idx = tl.where(is_empty, target, node)
    idx = tl.where(limit > 0, idx, -1)
    share_of_one = tl.where(is_empty, 1, q).to(tl.float64) / tl.maximum(limit, 1).to(tl.float64)
    prob = tl.where(idx >= 0, share_of_one, 0.0).to(tl.float32)
    tl.store(idx_ptr + samples, idx, mask=mask)
    tl.store(q_ptr + samples, q, mask=mask)
    tl.store(prob_ptr + samples, prob, mask=mask)
    if MODE == SYSTEMATIC:
        # The next draw hits the same leaf if its target is still inside: `left` is the offset of this one.
        width = tl.where(is_empty, 1, q)
        inside = tl.where(is_empty, 0, left)
        is_repeat = (samples < num_draws - 1) & (idx >= 0) & (inside + following - target < width)
        num_repeats = tl.sum(is_repeat.to(tl.int64))
        tl.atomic_add(status_ptr + STATUS_REPEATS, num_repeats, mask=num_repeats > 0, sem="relaxed")
    if is_last_program(ticket_ptr):
        tl.store(total_ptr, total)
        tl.store(step_ptr, step + 1)
        tl.store(status_ptr + STATUS_EMPTY, tl.load(status_ptr + STATUS_EMPTY) + is_empty.to(tl.int64))


@batch_kernel
def tree_race_kernel(
    leaf_ptr,  # [N] i64
    sums_ptr,  # all levels, i64
    seed_ptr,
    stream_ptr,
    step_ptr,
    size_ptr,
    ticket_ptr,  # i32
    status_ptr,
    num_live_ptr,  # [] i64, leaves of positive weight, with IS_MIXED
    keys_ptr,  # [N] i64, out
    total_ptr,  # [] i64, out
    capacity,  # i64
    index_mask,  # i64
    exploration_bits: tl.int64,  # bits of float64
    NUM_LEVELS: tl.constexpr,
    IS_MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys of a race as in `arithmetic.race_keys`, BLOCK leaves per program; an empty tree uses its live prefix."""
    o_top = tl.arange(0, FANOUT)[:, None] * FANOUT + tl.arange(0, FANOUT)[None, :]
    offset, count = level_place(capacity, NUM_LEVELS)
    total = tl.sum(tl.sum(tl.load(sums_ptr + offset + o_top, mask=o_top < count, other=0), axis=1), axis=0)
    is_empty = total == 0
    size = tl.load(size_ptr)
    leaves = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = leaves < capacity
    q = tl.load(leaf_ptr + leaves, mask=mask, other=0) & WEIGHT_MASK
    q = tl.where(is_empty, (leaves < size).to(tl.int64), q)
    weight = q.to(tl.float64)
    if IS_MIXED:
        exploration = float64_of(exploration_bits)
        sum_q = tl.maximum(tl.where(is_empty, size, total), 1).to(tl.float64)
        num_live = tl.maximum(tl.load(num_live_ptr), 1).to(tl.float64)
        near = (weight / sum_q) * (1.0 - exploration)
        weight = near + ((q > 0).to(tl.float64) / num_live) * exploration
    drawn = random_bits(leaves, tl.load(seed_ptr), tl.load(stream_ptr), tl.load(step_ptr)).to(tl.int64, bitcast=True)
    uniform = ((drawn >> 11) + UNIT_SHIFT).to(tl.float64) * UNIT
    is_live = (q > 0) & (weight > 0.0)
    keys = ((0.0 - log_of_unit(uniform)) / tl.where(is_live, weight, 1.0)).to(tl.int64, bitcast=True)
    tl.store(keys_ptr + leaves, tl.where(is_live, (keys & ~index_mask) | leaves, NO_KEY), mask=mask)
    if is_last_program(ticket_ptr):
        tl.store(total_ptr, total)
        tl.store(status_ptr + STATUS_EMPTY, tl.load(status_ptr + STATUS_EMPTY) + is_empty.to(tl.int64))

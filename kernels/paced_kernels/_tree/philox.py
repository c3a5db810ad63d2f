"""Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in integer arithmetic.

The words below equal the published ones, so a kernel with the same key and counter has the same. A word is a Python
integer, or an int64 tensor that holds unsigned 32-bit values; products of tensors may wrap, and masks keep them exact.
"""

from typing import Any

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Return four 32-bit words for each counter of four words, with a key of two words; all integers or all tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & MASK32) ^ c1 ^ k0, ((product0 >> 32) & MASK32) ^ c3 ^ k1
        c1, c3 = product1 & MASK32, product0 & MASK32
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK32, (k1 + KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3

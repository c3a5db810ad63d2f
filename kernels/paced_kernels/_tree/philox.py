"""Counter-based random numbers and exact integer range reduction, in int64 torch arithmetic.

Philox4x32-10 is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the words below equal the
published ones, so a kernel with the same key and counter draws the same numbers. Every draw is a function of (seed,
stream, step, sample): there is no generator state to save or to share between ranks.

Words are unsigned 32-bit values held in int64; a 64-bit word is the int64 with the same bits. Products may wrap: two's
complement keeps them exact modulo 2^64, and masks select the needed bits.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    product = word * multiplier
    return (product >> 32) & MASK32, product & MASK32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four 32-bit words for each counter of four words, with a key of two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + KEY_STEPS[0]) & MASK32
        k1 = (k1 + KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3


def random_bits(samples: Tensor, *, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return 64 random bits for each sample index: key = seed, counter = (sample, stream, low step, high step).

    `seed`, `stream` and `step` are int64 tensors that broadcast against `samples`. Word 0 is the low half.
    """
    counter = (
        samples & MASK32,
        (stream & MASK32).expand_as(samples),
        (step & MASK32).expand_as(samples),
        ((step >> 32) & MASK32).expand_as(samples),
    )
    low, high, _, _ = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    return (high << 32) | low


def multiply_high(bits: Tensor, limit: Tensor) -> Tensor:
    """floor(bits * limit / 2^64) with `bits` unsigned and 0 <= limit < 2^62: uniform on [0, limit), no float."""
    bits_low, bits_high = bits & MASK32, (bits >> 32) & MASK32
    limit_low, limit_high = limit & MASK32, (limit >> 32) & MASK32
    low_low = bits_low * limit_low
    low_high = bits_low * limit_high
    high_low = bits_high * limit_low
    middle = ((low_low >> 32) & MASK32) + (low_high & MASK32) + (high_low & MASK32)
    return bits_high * limit_high + ((low_high >> 32) & MASK32) + ((high_low >> 32) & MASK32) + (middle >> 32)


def unit_interval(bits: Tensor) -> Tensor:
    """Return float64 in (0, 1] from the upper 53 bits, so that its logarithm is finite."""
    return (((bits >> 11) & (2**53 - 1)) + 1).to(torch.float64) * 2.0**-53

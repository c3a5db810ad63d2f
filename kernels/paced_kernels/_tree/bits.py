"""Random bits as a function of (seed, stream, step, sample), and exact integer range reduction, in int64 arithmetic.

Philox makes one start of 64 bits from (seed, stream, step). The bits of sample i are those that SplitMix64 returns at
its i-th call from that start: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
There is no generator state to save or to share between ranks, and a sample costs two products instead of twenty.

A 64-bit word is the int64 with the same bits. Products may wrap: two's complement keeps them exact modulo 2^64, and
masks select the needed bits.
"""

import torch
from torch import Tensor

from .philox import MASK32, philox4x32

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)

_SIGNED_GAMMA, *_SIGNED_MULTIPLIERS = (word - 2**64 if word >= 2**63 else word for word in (GAMMA, *MULTIPLIERS))
_MASKS = tuple(2 ** (64 - shift) - 1 for shift in SHIFTS)
_MIXES = tuple(zip(SHIFTS, _MASKS, _SIGNED_MULTIPLIERS, strict=False))


def start_of(*, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return the start of a step's bits: words 1 and 0 of Philox with key = seed, counter = (0, stream, step)."""
    counter = (step & 0, stream & MASK32, step & MASK32, (step >> 32) & MASK32)
    low, high, _, _ = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    return (high << 32) | low


def random_bits(samples: Tensor, *, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return 64 random bits for each sample index; `seed`, `stream` and `step` are int64 tensors that broadcast."""
    word = start_of(seed=seed, stream=stream, step=step) + (samples + 1) * _SIGNED_GAMMA
    for shift, mask, multiplier in _MIXES:
        word = (word ^ ((word >> shift) & mask)) * multiplier
    return word ^ ((word >> SHIFTS[2]) & _MASKS[2])


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
    """Return float64 in (0, 1] from the upper 53 bits read as a signed number, so that its logarithm is finite."""
    return (bits >> 11).add_(2**52 + 1).to(torch.float64).mul_(2.0**-53)

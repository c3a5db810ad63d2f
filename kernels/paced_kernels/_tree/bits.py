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
_THIRD = 2**22 - 1

HOST_BLOCK = 2**15
"""Samples of a block on a CPU: a few arrays of 256 KiB."""


def signed(word: int) -> int:
    """Return the int64 with the bits of a 64-bit word, given modulo 2^64."""
    return ((word + 2**63) & (2**64 - 1)) - 2**63


def start_of(*, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return the start of a step's bits: words 1 and 0 of Philox with key = seed, counter = (0, stream, step)."""
    counter = (step & 0, stream & MASK32, step & MASK32, (step >> 32) & MASK32)
    low, high, _, _ = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    return (high << 32) | low


def host_start(*, seed: Tensor, stream: Tensor, step: Tensor) -> int:
    """`start_of` as an integer from 0 to 2^64 - 1, for tensors on a CPU."""
    key, now = int(seed), int(step)
    counter = (0, int(stream) & MASK32, now & MASK32, (now >> 32) & MASK32)
    low, high, _, _ = philox4x32(counter, (key & MASK32, (key >> 32) & MASK32))
    return (high << 32) | low


def random_bits(samples: Tensor, *, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return 64 random bits for each sample index; `seed`, `stream` and `step` are int64 tensors that broadcast."""
    word = start_of(seed=seed, stream=stream, step=step) + (samples + 1) * _SIGNED_GAMMA
    for shift, mask, multiplier in _MIXES:
        word = (word ^ ((word >> shift) & mask)) * multiplier
    return word ^ ((word >> SHIFTS[2]) & _MASKS[2])


def host_bits(sample: int, start: int) -> int:
    """Return the 64 random bits of one sample as an integer from 0 to 2^64 - 1."""
    word = (start + (sample + 1) * GAMMA) & (2**64 - 1)
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        word = ((word ^ (word >> shift)) * multiplier) & (2**64 - 1)
    return word ^ (word >> SHIFTS[2])


class HostBits:
    """`random_bits` on a CPU from a start known to the host, in arrays that are used again."""

    def __init__(self, size: int) -> None:
        """Prepare calls for at most `size` samples, and HOST_BLOCK."""
        self.size = min(size, HOST_BLOCK)
        self._multiples = torch.arange(1, self.size + 1).mul_(_SIGNED_GAMMA)
        self._words, self._spare = torch.empty(2, self.size, dtype=torch.int64)

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """What is held between calls."""
        return self._multiples, self._words, self._spare

    def unfinished(self, start: int, first: int, num: int) -> Tensor:
        """Return the bits of the samples first.. before `finish`, valid until the next call; the upper 31 are final."""
        word = self._words[:num]
        torch.add(self._multiples[:num], signed(start + first * GAMMA), out=word)
        return _mix(word, self._spare[:num])

    def first(self, start: int, num: int) -> Tensor:
        """Return the bits of the samples 0 to num - 1, i64 [num], of any number."""
        if num <= self.size:
            return finish(self.unfinished(start, 0, num))
        return self.at(start, torch.arange(num))

    def at(self, start: int, samples: Tensor) -> Tensor:
        """Return the bits of any samples, i64 [K]."""
        word = (samples * _SIGNED_GAMMA).add_(signed(start + GAMMA))
        return finish(_mix(word, torch.empty_like(word)))

    def again(self, start: int, samples: Tensor, num: int) -> Tensor:
        """Return the bits of some of the samples 0 to num - 1, all of which `unfinished` has just been asked for."""
        return finish(self._words.index_select(0, samples)) if num <= self.size else self.at(start, samples)


def _mix(word: Tensor, spare: Tensor) -> Tensor:
    """Mix words in place up to the last shift."""
    for shift, mask, multiplier in _MIXES:
        torch.bitwise_right_shift(word, shift, out=spare).bitwise_and_(mask)
        word.bitwise_xor_(spare).mul_(multiplier)
    return word


def finish(word: Tensor) -> Tensor:
    """Return, in other memory, the bits that `HostBits.unfinished` left a shift before their end."""
    return (word >> SHIFTS[2]).bitwise_and_(_MASKS[2]).bitwise_xor_(word)


def multiply_high(bits: Tensor, limit: Tensor) -> Tensor:
    """floor(bits * limit / 2^64) with `bits` unsigned and 0 <= limit < 2^62: uniform on [0, limit), no float."""
    bits_low, bits_high = bits & MASK32, (bits >> 32) & MASK32
    limit_low, limit_high = limit & MASK32, (limit >> 32) & MASK32
    low_low = bits_low * limit_low
    low_high = bits_low * limit_high
    high_low = bits_high * limit_low
    middle = ((low_low >> 32) & MASK32) + (low_high & MASK32) + (high_low & MASK32)
    return bits_high * limit_high + ((low_high >> 32) & MASK32) + ((high_low >> 32) & MASK32) + (middle >> 32)


def multiply_high_of(bits: Tensor, limit: Tensor | int, most: int) -> Tensor:
    """`multiply_high` with limits of at most `most`, which is known to the host."""
    if most < 2**31:  # a half at a time, without a product that wraps
        product = (bits & MASK32).mul_(limit).bitwise_right_shift_(32)
        return product.add_((bits >> 32).bitwise_and_(MASK32).mul_(limit)).bitwise_right_shift_(32)
    if most < 2**41:  # a third at a time, likewise; a floor of a floor is exact
        product = (bits & _THIRD).mul_(limit).bitwise_right_shift_(22)
        product.add_((bits >> 22).bitwise_and_(_THIRD).mul_(limit)).bitwise_right_shift_(22)
        return product.add_((bits >> 44).bitwise_and_(2**20 - 1).mul_(limit)).bitwise_right_shift_(20)
    bits_low, bits_high = bits & MASK32, (bits >> 32).bitwise_and_(MASK32)
    limit_low, limit_high = limit & MASK32, limit >> 32
    high_low = bits_high * limit_low
    middle = (bits_low * limit_low).bitwise_right_shift_(32).bitwise_and_(MASK32)
    middle.add_(high_low & MASK32).add_(bits_low.mul_(limit_high)).bitwise_right_shift_(32)
    high_low.bitwise_right_shift_(32).bitwise_and_(MASK32)
    return bits_high.mul_(limit_high).add_(high_low).add_(middle)


def unit_interval(bits: Tensor) -> Tensor:
    """Return float64 in (0, 1] from the upper 53 bits read as a signed number, so that its logarithm is finite."""
    return (bits >> 11).add_(2**52 + 1).to(torch.float64).mul_(2.0**-53)

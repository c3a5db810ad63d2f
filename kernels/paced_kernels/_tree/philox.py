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

HOST_BLOCK = 2**15
"""Samples of a block on a CPU: a few arrays of 256 KiB."""


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


def bits_of_range(num: int, *, device: torch.device, seed: Tensor, stream: Tensor, step: Tensor) -> Tensor:
    """Return `random_bits` of the samples 0 to num - 1, i64 [num]; on a CPU in blocks and in place."""
    if device.type != "cpu":
        return random_bits(torch.arange(num, device=device), seed=seed, stream=stream, step=step)
    out = torch.empty(num, dtype=torch.int64)
    source = HostPhilox(int(seed), int(stream), int(step), min(num, HOST_BLOCK))
    for start in range(0, num, HOST_BLOCK):
        source.write(start, out[start : start + HOST_BLOCK])
    return out


class HostPhilox:
    """Words of Philox4x32-10 for consecutive samples; only the first word of the counter differs between them."""

    def __init__(self, seed: int, stream: int, step: int, size: int) -> None:
        low, high = seed & MASK32, (seed >> 32) & MASK32
        self.keys = [((low + r * KEY_STEPS[0]) & MASK32, (high + r * KEY_STEPS[1]) & MASK32) for r in range(NUM_ROUNDS)]
        self.stream, self.step = stream & MASK32, (step & MASK32, (step >> 32) & MASK32)
        self.buffers = [torch.empty(size, dtype=torch.int64) for _ in range(4)]
        self.spare = torch.empty(size, dtype=torch.int64)

    def write(self, start: int, out: Tensor) -> None:
        """Write the 64 bits of the samples start.. to `out`, contiguous; what is above 32 bits is cut off late."""
        (first, second), keys, num = MULTIPLIERS, self.keys, out.shape[0]
        a, b, c, d = (buffer[:num] for buffer in self.buffers)
        spare = self.spare[:num]
        torch.arange(start, start + num, out=a)
        if start + num > MASK32:
            a.bitwise_and_(MASK32)
        # Round 1: the words 1 to 3 are numbers, and so are the new words 0 and 1.
        product = second * self.step[0]
        word0 = (product >> 32) ^ self.stream ^ keys[0][0]
        word1 = product & MASK32
        a.mul_(first)
        _high(a, c).bitwise_xor_(self.step[1] ^ keys[0][1]).bitwise_and_(MASK32)
        # Round 2: word 3 becomes a number; a, masked, is word 2.
        product = first * word0
        word3 = product & MASK32
        c.mul_(second)
        _high(c, b).bitwise_xor_(word1 ^ keys[1][0]).bitwise_and_(MASK32)
        a.bitwise_xor_((product >> 32) ^ keys[1][1]).bitwise_and_(MASK32)
        # Round 3: word 3 is still that number.
        b.mul_(first)
        a.mul_(second)
        c.bitwise_xor_(_high(a, d)).bitwise_xor_(keys[2][0]).bitwise_and_(MASK32)
        _high(b, d).bitwise_xor_(word3 ^ keys[2][1]).bitwise_and_(MASK32)
        words = [c, a, d, b]
        for key0, key1 in keys[3:-1]:
            word0, word1, word2, word3 = words
            word0.mul_(first)
            word2.mul_(second)
            word1.bitwise_xor_(_high(word2, spare)).bitwise_xor_(key0).bitwise_and_(MASK32)
            word3.bitwise_xor_(_high(word0, spare)).bitwise_xor_(key1).bitwise_and_(MASK32)
            words = [word1, word2, word3, word0]
        # Round 10: words 2 and 3 are not asked for.
        _, word1, word2, _ = words
        word2.mul_(second)
        _high(word2, spare).bitwise_xor_(word1).bitwise_xor_(keys[-1][0]).bitwise_and_(MASK32)
        torch.bitwise_or(word2.bitwise_left_shift_(32), spare, out=out)


def _high(product: Tensor, out: Tensor) -> Tensor:
    """Write the upper word of a product to `out`, with its sign above."""
    return torch.bitwise_right_shift(product, 32, out=out)


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

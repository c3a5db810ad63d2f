"""exp and log of float64 from additions, multiplications, divisions and bit operations only.

Every machine rounds these operations in the same way, while library functions differ in the last place between
processors. Weights and keys are therefore bit-identical on a CPU, in the interpreter and on a GPU, provided that no
product is fused into a sum: the kernels are launched without fusion. `kernels` has the same formulas in the same
order.
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
# ln 2 in two parts: a multiple of the first by an integer below 2^20 is exact.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = 1.9082149292705877e-10
MANTISSA_BITS = 52
EXPONENT_BIAS = 1023
MANTISSA_MASK = (1 << MANTISSA_BITS) - 1
SQRT_2 = math.sqrt(2.0)
# 1 / n! with alternating sign, highest power first: 13 powers reach 1e-17 for |r| <= ln 2 / 2.
EXP_TERMS = tuple((-1) ** n / math.factorial(n) for n in range(13, -1, -1))
# 2 / (2 n + 1), highest power first: atanh's series in s^2 <= 0.0295.
LOG_TERMS = tuple(2.0 / (2 * n + 1) for n in range(11, -1, -1))


def exp_of_negative(t: Tensor) -> Tensor:
    """exp(-t) for float64 t in [0, 700], to 2 units in the last place; NaN stays NaN."""
    k = (t * LOG2_E + 0.5).floor()
    r = (t - k * LN2_HIGH) - k * LN2_LOW
    result = torch.full_like(r, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        result = result * r + term
    # k of a NaN is not an integer; use 0, because the product is NaN for any power of two.
    power = (EXPONENT_BIAS - torch.where(t == t, k, 0.0).long()) << MANTISSA_BITS
    return result * power.view(torch.float64)


def log_of_unit(u: Tensor) -> Tensor:
    """log(u) for float64 u in [2^-1022, 1], to 3 units in the last place; exactly 0 at 1."""
    bits = u.view(torch.int64)
    mantissa = ((bits & MANTISSA_MASK) | (EXPONENT_BIAS << MANTISSA_BITS)).view(torch.float64)  # in [1, 2)
    is_high = mantissa > SQRT_2
    f = torch.where(is_high, mantissa * 0.5, mantissa) - 1.0
    e = ((bits >> MANTISSA_BITS) - EXPONENT_BIAS + is_high.long()).double()
    s = f / (f + 2.0)
    z = s * s
    series = torch.full_like(z, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        series = series * z + term
    return e * LN2_HIGH + (s * series + e * LN2_LOW)

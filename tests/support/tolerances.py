"""How far a fused operation may be from float64 autograd on the same rounded inputs: one table for every kernel test.

Log-probs and their sums are held to an absolute error in nats, whatever the dtype of the inputs: logits are float32
and never rounded. Gradients carry the rounding of one operand of a GEMM and are held to a Frobenius norm; for bfloat16
they must also be as good as the best dense computation, whose gradient of the logits is exact and rounded once.
"""

import math

import torch
from torch import Tensor

LOGPROB_NATS = 2e-5
"""Largest error of a log-prob while no logit exceeds `LOGIT_SCALE`; in proportion to the largest logit above it."""
LOGIT_SCALE = 25.0

SEQUENCE_NATS = 1e-4
"""Largest error of the log-prob of a sequence; four standard deviations of a random walk above 256 tokens."""

SCALAR_RELATIVE = 1e-5
"""Loss, gradient of log_z, entropies."""

GRADIENT_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Gradients of hidden states, weight and bias."""

YARDSTICK = 1.5
"""Times the error of the best dense computation in the same dtype, in gradients of hidden states, weight and bias."""


def logprob_nats(largest_logit: float) -> float:
    """Bound on the error of a log-prob."""
    return LOGPROB_NATS * max(1.0, largest_logit / LOGIT_SCALE)


def sequence_nats(length: int, largest_logit: float = 0.0) -> float:
    """Bound on the error of the log-prob of a sequence."""
    return max(SEQUENCE_NATS, 4 * SEQUENCE_NATS * math.sqrt(length / 4096)) * max(1.0, largest_logit / LOGIT_SCALE)


def cut_off(hidden_size: int, largest_logit: float) -> float:
    """Most that a logit loses on tensor cores of compute capability 9.0: a unit in the last place every 16 products."""
    return hidden_size / 16 * 2.0 ** (math.frexp(largest_logit)[1] - 24)


def tensor_core_nats(hidden_size: int, largest_logit: float) -> float:
    """Bound on the error of a log-prob from low-precision operands on tensor cores.

    It is a mean, weighted by probabilities, of differences between what the target and what another logit lost. Losses
    are half a unit of a sum on the way from 0 on average, a quarter of `cut_off`, and differences scatter about as much
    again. `test_truncating_products` finds up to a quarter.
    """
    return max(logprob_nats(largest_logit), cut_off(hidden_size, largest_logit) / 2)


def tensor_core_sequence_nats(length: int, hidden_size: int, largest_logit: float) -> float:
    """Bound on the error of a sum of `length` such log-probs, all of whose errors may have the same mean."""
    return sequence_nats(length, largest_logit) + length * cut_off(hidden_size, largest_logit) / 4


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected value; 0 where both are 0."""
    difference = (value.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-300) if difference else 0.0

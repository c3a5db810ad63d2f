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


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected value; 0 where both are 0."""
    difference = (value.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-300) if difference else 0.0

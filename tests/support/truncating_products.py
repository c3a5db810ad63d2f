"""Sums of bfloat16 products as tensor cores of compute capability 9.0 form them, to see what log-probs lose by it.

An instruction adds 16 products to a float32 accumulator. All 17 terms are cut off, towards 0, at the place that is
`EXTRA_BITS` behind the last of the largest term, and the sum is cut off to float32 (arXiv:2512.07004). Nothing is ever
rounded up, so a logit loses about half a unit in the last place with every 16 of the hidden size, and log-probs whose
terms lose different amounts are off by the difference.

T = tokens, V = vocabulary, H = hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 16
EXTRA_BITS = 2
FLOAT32_BITS = 24


def truncated(value: Tensor, exponent: Tensor, num_bits: int) -> Tensor:
    """float64 `value` cut off towards 0 to `num_bits` bits below 2^exponent."""
    unit = torch.ldexp(torch.ones_like(value), exponent - num_bits)
    return torch.trunc(value / unit) * unit


def tensor_core_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[T, V] float64 that hold hidden [T, H] times weight [V, H] as the instructions above add it up."""
    total = torch.zeros(hidden.shape[0], weight.shape[0], dtype=torch.float64)
    for start in range(0, hidden.shape[1], STEP):
        part = slice(start, start + STEP)
        products = hidden[:, None, part].double() * weight[None, :, part].double()
        largest = torch.maximum(products.abs().amax(-1), total.abs())
        exponent = torch.frexp(largest).exponent
        products = truncated(products, exponent[..., None], FLOAT32_BITS + EXTRA_BITS)
        total = products.sum(-1) + truncated(total, exponent, FLOAT32_BITS + EXTRA_BITS)
        total = truncated(total, torch.frexp(total).exponent, FLOAT32_BITS)
    return total


def logprob_errors(
    num_rows: int, hidden_size: int, vocab_size: int, *, peak: float, rivals: int = 0, shared: float = 0.0
) -> tuple[dict[str, Tensor], float]:
    """Errors [T] in nats of log-probs, by where the logit of the target comes from; and the largest logit.

    "apart" is a dot product of its own with exact sums; "same" is the product that gives the other logits. The target
    and `rivals` other tokens have logits around `peak`, the rest around 0, and all are moved by `shared`.
    """
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=source) * hidden_size**-0.5
    leaders = torch.randint(0, vocab_size, (num_rows, 1 + rivals), generator=source)
    common = torch.randn(hidden_size, generator=source) * hidden_size**-0.5
    hidden = torch.randn(num_rows, hidden_size, generator=source) + peak * weight[leaders].sum(1) + shared * common
    hidden, weight = hidden.bfloat16(), (weight + common * (shared != 0)).bfloat16()
    exact = hidden.double() @ weight.double().T
    cut = tensor_core_logits(hidden, weight)
    at = leaders[:, :1]
    wanted = exact.log_softmax(-1).gather(1, at)[:, 0]
    others = cut.scatter(1, at, -torch.inf)
    errors = {}
    for name, target in (("apart", exact.gather(1, at)), ("same", cut.gather(1, at))):
        errors[name] = -torch.log1p((others - target).exp().sum(-1)) - wanted
    return errors, exact.abs().max().item()

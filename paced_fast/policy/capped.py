"""Log-probs of models that bound their logits, which the fused operation does not support.

T = tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_NUMBERS = 2**24
"""Logits held at once."""


def capped_logprobs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    token_ids: Tensor,  # i64[T]
    *,
    bias: Tensor | None,  # [V]
    cap: float,
    temperature: float,
) -> Tensor:
    """Log-probs f32[T] of cap * tanh(logits / cap) / temperature, differentiable; logits are made again, not kept."""

    def part(states: Tensor, matrix: Tensor, tokens: Tensor, offset: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(states, matrix, offset).float()
        logits = cap * torch.tanh(logits / cap) / temperature
        return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    rows = max(1, _NUMBERS // weight.shape[0])
    if not torch.is_grad_enabled():
        parts = [part(h, weight, t, bias) for h, t in zip(hidden.split(rows), token_ids.split(rows), strict=True)]
    else:
        parts = [
            checkpoint(part, h, weight, t, bias, use_reentrant=False)
            for h, t in zip(hidden.split(rows), token_ids.split(rows), strict=True)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

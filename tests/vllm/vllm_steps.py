"""One optimiser step on both sides."""

from __future__ import annotations

from typing import Any

import torch


def step(side: Any, seed: int = 0, lr: float = 3e-3) -> None:
    """A step on a loss that moves every parameter, and what the trainer calls around it."""
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(seed))
    side.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in side.model.parameters())
    side.generator.before_training()
    torch.optim.AdamW(side.model.parameters(), lr=lr).step()
    side.model.zero_grad()
    side.generator.after_update()

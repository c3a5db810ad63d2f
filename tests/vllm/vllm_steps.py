"""One optimiser step on both sides, and processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
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


def child_environment() -> dict[str, str]:
    """Variables of a process that imports what this one imports."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "kernels"), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "HF_HUB_OFFLINE": "1"}

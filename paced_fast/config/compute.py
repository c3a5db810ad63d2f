"""How the work is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Several processes, started by torchrun, one a GPU."""

    mode: Literal["auto", "replicated", "sharded"] = "auto"
    """`replicated` (every rank holds all parameters, and a part of the optimiser's state), `sharded` (FSDP2: parameters
    too are split), or `auto`: replicated where it fits, and the memory plan says why."""
    timeout_seconds: float = 600.0
    """Longest wait for another rank in an exchange; after it the run stops."""
    stall_seconds: float = 300.0
    """Time without progress after which every rank logs where it is and what it runs, once; nothing is stopped. Below
    `timeout_seconds`, so that the reason is on record when that ends the run."""

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

"""How the work is spread over processes, and which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters in place of all parameters; the warm start trains all of them all the same."""

    rank: int = 0
    """Rank of the matrices that are trained; 0 trains every parameter."""
    alpha: int = 32
    """What is learned is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get them, such as q_proj; all-linear is every one, experts included, but the
    output head."""


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

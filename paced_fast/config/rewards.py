"""Settings of the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How completions are judged; which reward judges a row is part of its source."""

    workers: int = 0
    """Processes that judge answers and run programs; 0 for one a core."""
    math_seconds: float = 3.0
    """Longest time for one answer of the `math` rewards, in seconds."""
    task_seconds: float = 5.0
    """Processor time after which one answer of a task of reasoning-gym that needs a sandbox is wrong, in seconds."""
    function_seconds: float = 600.0
    """Longest time for one call of a plain reward function of yours, in seconds; after it the run ends."""
    async_seconds: float = 120.0
    """Longest wait for an async reward function, in seconds; after it the completions are unscored."""
    max_unscored_share: float = 0.1
    """Share of the last 256 completions (of a step's, if it has more) without a verdict above which the run stops."""
    shaping: tuple[str, ...] = ()
    """What a completion earns beside its correctness, each `weight*name`: overlong, length, truncated, boxed or a
    function of your own; the policy's loss sees it, log Z does not."""
    overlong_share: float = 0.2
    """`overlong`: last share of the completion limit over which the penalty grows from 0 to 1."""
    sandbox: Literal["auto", "fork_server", "bubblewrap", "unsafe"] = "auto"
    """Isolation of programs: `fork_server`, `bubblewrap`, `auto` (one of them or an error), `unsafe` (limits only)."""
    code_seconds: float = 5.0
    """Longest time for one test case of `code`, in seconds of wall time."""
    code_memory_mib: int = 512
    """Address space of a program, in MiB."""
    code_output_kib: int = 1024
    """What a program may write to its output, errors and answers together, in KiB."""
    code_threads: int = 32
    """Threads of a program; it can have no child processes."""

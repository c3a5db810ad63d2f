"""Settings of the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How completions are judged; which reward judges a row is part of its source."""

    workers: Annotated[int, Bounds(0, 1024)] = 0
    """Processes that judge answers and run programs; 0 for one a core."""
    math_seconds: Annotated[float, Bounds(0.01, 3600.0)] = 3.0
    """Longest time for one answer of the `math` rewards, in seconds."""
    task_seconds: Annotated[float, Bounds(0.01, 3600.0)] = 5.0
    """Processor time after which one answer of a task of reasoning-gym that needs a sandbox is wrong, in seconds."""
    function_seconds: Annotated[float, Bounds(0.01, 86400.0)] = 600.0
    """Longest time for one call of a plain reward function of yours, in seconds; after it the run ends."""
    async_seconds: Annotated[float, Bounds(0.01, 86400.0)] = 120.0
    """Longest wait for an async reward function, in seconds; after it the completions are unscored."""
    max_unscored_share: Annotated[float, Bounds(0.0, 1.0)] = 0.1
    """Share of the last 256 completions (of a step's, if it has more) without a verdict above which the run stops."""
    shaping: tuple[str, ...] = ()
    """What a completion earns beside its correctness, each `weight*name`: overlong, length, truncated, boxed or a
    function of your own; the policy's loss sees it, log Z does not."""
    overlong_share: Annotated[float, Bounds(1e-6, 1.0)] = 0.2
    """`overlong`: last share of the completion limit over which the penalty grows from 0 to 1."""
    sandbox: Literal["auto", "fork_server", "bubblewrap", "unsafe"] = "auto"
    """Isolation of programs: `fork_server`, `bubblewrap`, `auto` (one of them or an error), `unsafe` (limits only)."""
    code_seconds: Annotated[float, Bounds(0.1, 3600.0)] = 5.0
    """Longest time for one test case of `code`, in seconds of wall time."""
    code_memory_mib: Annotated[int, Bounds(128, 1 << 20)] = 512
    """Address space of a program, in MiB."""
    code_output_kib: Annotated[int, Bounds(1, 1 << 20)] = 1024
    """What a program may write to its output, errors and answers together, in KiB."""
    code_threads: Annotated[int, Bounds(1, 1024)] = 32
    """Threads of a program; it can have no child processes."""

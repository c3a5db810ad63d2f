"""Settings of the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How completions are judged; the source of a row says which reward judges it."""

    name: str | None = None
    """Reward of the sources that name none by `reward=`: a built-in one (math, exact, number, ...), or your function as
    file.py:function; none: by the format of the rows, math for answers and code for tests."""
    workers: Annotated[int, Bounds(0, 1024)] = 0
    """Number of processes that judge answers and run programs; 0: one per core."""
    math_seconds: Annotated[float, Bounds(0.01, 3600.0)] = 3.0
    """Time limit per answer of the `math` rewards, in seconds; beyond it the completion is unscored."""
    task_seconds: Annotated[float, Bounds(0.01, 3600.0)] = 5.0
    """Processor time limit per answer of a reasoning-gym task that is judged in a sandbox, in seconds; beyond it the
    completion is wrong."""
    function_seconds: Annotated[float, Bounds(0.01, 86400.0)] = 600.0
    """Time limit per call of your own (not async) reward function, in seconds; beyond it the run stops."""
    async_seconds: Annotated[float, Bounds(0.01, 86400.0)] = 120.0
    """Time limit per call of your own async reward function, in seconds; beyond it the completions are unscored."""
    max_unscored_share: Annotated[float, Bounds(0.0, 1.0)] = 0.1
    """Largest share of unscored completions among the last 256 (or the step's, if it has more); above it the run
    stops."""
    shaping: tuple[str, ...] = ()
    """Terms added to a completion's correctness, each `weight*name`: overlong, length, truncated, boxed or your own
    function. They enter the policy's loss, but not log Z."""
    overlong_share: Annotated[float, Bounds(1e-6, 1.0)] = 0.2
    """`overlong`: the penalty rises from 0 to 1 over this last share of the completion limit."""
    sandbox: Literal["auto", "fork_server", "bubblewrap", "unsafe"] = "auto"
    """Isolation of programs: `fork_server`, `bubblewrap`, `unsafe` (resource limits only), or `auto`: the first of
    fork_server and bubblewrap that isolates fully on this machine, otherwise an error."""
    code_seconds: Annotated[float, Bounds(0.1, 3600.0)] = 5.0
    """Time limit per test case of `code`, in seconds of wall time."""
    code_memory_mib: Annotated[int, Bounds(128, 1 << 20)] = 512
    """Maximum address space of a program, in MiB."""
    code_output_kib: Annotated[int, Bounds(1, 1 << 20)] = 1024
    """Maximum size of a program's output, error output and answers together, in KiB."""
    code_threads: Annotated[int, Bounds(1, 1024)] = 32
    """Maximum number of threads of a program; it cannot start other processes."""

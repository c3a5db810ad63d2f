"""Limits of a sandboxed program, its outcome, and the interface of a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Ending = Literal["exit", "signal", "timeout", "output", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one program. The kernel enforces them, except `seconds`, which the parent's clock enforces."""

    seconds: float = 5.0
    """Wall time of a program that reads its input, or of one function call, in seconds."""
    cpu_seconds: int = 10
    """CPU time of all threads together, in whole seconds."""
    memory_mib: int = 512
    """Address space in MiB; without child processes, this is the program's total."""
    file_mib: int = 16
    """Size in MiB of the largest file, and of all files together if the scratch folder is a separate file system."""
    output_kib: int = 1024
    """Size in KiB of output, errors and answers together; a program that exceeds it is killed."""
    threads: int = 32
    """Simultaneous threads, including the main thread."""
    files: int = 64
    """Open files."""
    start_seconds: float = 20.0
    """Time limit in seconds to start a program's process; exceeding it is a failure of the sandbox, not the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a program that has ended."""

    ended: Ending
    """`exit`: ended by itself; `signal`: killed by a signal, for example for its CPU time; `timeout`, `output`: killed
    at that limit; `stopped`: killed because it was no longer needed."""
    status: int
    """Exit status, or minus the signal number."""
    stdout: bytes
    stderr: bytes
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float
    """Peak resident memory in MiB."""


class SandboxError(RuntimeError):
    """The sandbox failed, so nothing is known about the program: it is neither right nor wrong."""


class SandboxTimeout(SandboxError):
    """The sandbox was not ready in time; nothing need be missing, the machine may just be busy."""


class Session(Protocol):
    """A running program whose function is called repeatedly."""

    def ask(self, request: bytes | None) -> bytes | None:
        """Send one line of JSON (nothing if None) and return the program's next line; None if the program has ended."""
        ...

    def finish(self) -> Outcome:
        """End the program."""
        ...


class Sandbox(Protocol):
    """Run programs in isolation; usable from any thread."""

    strength: str
    """Name of the sandbox and of its active layers."""

    def run(self, program: str, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run a program to its end.

        Raises:
            SandboxError: the sandbox failed twice.
        """
        ...

    def session(
        self, program: str, function: str, limits: Limits | None = None, *, more: Mapping[str, Any] | None = None
    ) -> Session:
        """Start a program whose `function` will be called; the caller must call `finish` at the end.

        `more` is passed to the harness: `plain` if the calls come from `calls`, `test` for a test making such calls.

        Raises:
            SandboxError: the sandbox failed twice.
        """
        ...

    def close(self) -> None:
        """End all processes of the sandbox."""
        ...

    def keepers(self) -> Sequence[int]:
        """Return the process ids of the sandbox's servers."""
        ...

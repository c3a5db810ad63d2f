"""What a program may use, and what is known of it afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Ending = Literal["exit", "signal", "timeout", "output", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one program; the kernel holds it to them, the parent's clock to `seconds`."""

    seconds: float = 5.0
    """Wall time of a program that reads its input, or of one call of a function."""
    cpu_seconds: int = 10
    """CPU time of all threads, whole seconds."""
    memory_mib: int = 512
    """Address space; programs have no child processes, so this is all they have."""
    file_mib: int = 16
    """Largest file, and all files together where the scratch folder is a file system of its own."""
    output_kib: int = 1024
    """Output, errors and answers together; a program is killed beyond."""
    threads: int = 32
    """Threads at once, the first included."""
    files: int = 64
    """Open files."""
    start_seconds: float = 20.0
    """Time to get a program's process ready; longer is a failure of the sandbox, not of the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One program that has ended."""

    ended: Ending
    """`exit` by itself; `signal`: killed by one, as for its CPU time; `timeout` and `output`: killed beyond a limit;
    `stopped`: killed because nothing more was asked of it."""
    status: int
    """Exit status, or minus the number of the signal."""
    stdout: bytes
    stderr: bytes
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float
    """Resident memory at its largest."""


class SandboxError(RuntimeError):
    """The sandbox failed, so nothing is known of the program: it is neither right nor wrong."""


class SandboxTimeout(SandboxError):
    """The sandbox did not get ready in time: it may lack nothing and the machine be busy."""


class Session(Protocol):
    """A program whose function is called again and again."""

    def ask(self, request: bytes | None) -> bytes | None:
        """The answer to one line of JSON, or with none what it says by itself; None when it ended, or was ended."""
        ...

    def finish(self) -> Outcome:
        """End the program."""
        ...


class Sandbox(Protocol):
    """Runs programs in isolation; to be used from any thread."""

    strength: str
    """Its name and the layers that are on, in words."""

    def run(self, program: str, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run a program to its end.

        Raises:
            SandboxError: the sandbox failed twice.
        """
        ...

    def session(
        self, program: str, function: str, limits: Limits | None = None, *, more: Mapping[str, Any] | None = None
    ) -> Session:
        """Start a program whose `function` is to be called; `finish` must be called in the end.

        `more` goes to the harness with it: `plain` for calls as `calls` makes them, `test` for one that makes them.

        Raises:
            SandboxError: the sandbox failed twice.
        """
        ...

    def close(self) -> None:
        """End all its processes."""
        ...

    def keepers(self) -> Sequence[int]:
        """Process ids of its servers."""
        ...

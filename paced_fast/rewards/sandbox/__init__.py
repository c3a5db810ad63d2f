"""Isolated execution of programs that a model wrote.

    sandbox = open_sandbox("auto", Limits(seconds=5))
    outcome = sandbox.run("print(input()[::-1])", b"abc")

A program gets no expected output, no environment, no file system but Python's library and a scratch folder of its own,
no network, no sockets, no child processes; it may start threads. It can read installed packages only in a sandbox that
was opened with `modules`. A fault in the kernel is outside of what this holds.

Where there are no namespaces, a fork server asked for by name makes do with Landlock and seccomp: a program then has no
scratch folder, reads and changes nothing outside of Python's library, but can tell that a file exists and how large it
is, and shares its limit of threads with the trainer's user unless that is root.

    fork_server   a fork of a warm interpreter in namespaces of its own, another user, Landlock, seccomp, limits
    bubblewrap    a new interpreter in bwrap with the same filter, Landlock and limits
    unsafe        a plain process with limits; must be asked for by name
"""

from paced_fast.rewards.sandbox.calls import CALL, VERDICT
from paced_fast.rewards.sandbox.choice import open_sandbox
from paced_fast.rewards.sandbox.harness import known_names
from paced_fast.rewards.sandbox.limits import Limits, Outcome, Sandbox, SandboxError, Session

__all__ = [
    "CALL",
    "VERDICT",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxError",
    "Session",
    "known_names",
    "open_sandbox",
]

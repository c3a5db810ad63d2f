"""Isolated execution of programs written by a model.

    sandbox = open_sandbox("auto", Limits(seconds=5))
    outcome = sandbox.run("print(input()[::-1])", b"abc")

A program has no expected output, no environment, no network, no sockets, no child processes, and no files except
Python's library and its own scratch folder; it may start threads. It can read installed packages only in a sandbox
opened with `modules`. Bugs in the kernel are not covered.

Without namespaces, a fork server requested by name uses only Landlock and seccomp. A program then has no scratch folder
and can read or change nothing outside Python's library, but it can see that a file exists and how large it is, and it
shares its thread limit with the trainer's user unless that is root.

    fork_server   a fork of a warm interpreter in its own namespaces, as another user, with Landlock, seccomp, limits
    bubblewrap    a new interpreter in bwrap with the same filter, Landlock and limits
    unsafe        a plain process with limits; must be requested by name
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

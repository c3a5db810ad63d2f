"""Choose the sandbox of this machine, determine its layers, and test it with attacks before it is used."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import random
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paced_fast.errors import InputError
from paced_fast.rewards.sandbox.client import Box
from paced_fast.rewards.sandbox.harness import SCRATCH
from paced_fast.rewards.sandbox.limits import Limits, Sandbox, SandboxError, SandboxTimeout
from paced_fast.rewards.sandbox.linux import NOBODY, TRUNCATION

logger = logging.getLogger(__name__)

_KINDS = {"fork_server": "fork", "bubblewrap": "bwrap", "unsafe": "plain"}
_PATIENT = Limits(seconds=120.0, start_seconds=120.0, cpu_seconds=60)
"""Limits of the self-test; a user's limits are for the programs to be judged and may be far tighter."""
_NAMESPACES = "namespaces (pid, net, ipc, uts, mount)"
_ANYWAY = "--reward.sandbox unsafe runs programs without isolation, with all your permissions"

# Attempts forbidden actions and an `honest` one; prints the names of those that succeeded, which must be just that one.
_SELF_TEST = """
import os, socket, _socket, ctypes, json
got = []
def attempt(name, action):
    try:
        action()
    except (OSError, ImportError):
        return
    got.append(name)
def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)  # else its end may stop this process once it is traced
parent, readable, writable = json.loads(input())
attempt("honest", lambda: sum(range(1000)))
attempt("network", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
attempt("sockets", lambda: _socket.socketpair())
attempt("reading a file", lambda: open(readable).read())
attempt("writing a file", lambda: open(writable, "w").write("x"))
attempt("reading another process", lambda: open(f"/proc/{parent}/environ", "rb").read())
attempt("a signal to the trainer", lambda: os.kill(parent, 0))
attempt("a child process", fork)
libc = ctypes.CDLL(None)
if libc.unshare(0x10000000) == 0:
    got.append("a user namespace")
if libc.ptrace(0, 0, 0, 0) == 0:
    got.append("ptrace")
if os.environ:
    got.append("environment")
print(json.dumps(got), flush=True)
if "ptrace" not in got:  # a traced process stops where it would become another program, and nobody lets it go on
    attempt("a program", lambda: os.execv("/bin/sh", ["/bin/sh", "-c", "echo it ran"]))
"""


def open_sandbox(
    name: str = "auto", limits: Limits | None = None, workers: int = 0, modules: Sequence[str] = ()
) -> Sandbox:
    """Return the sandbox of that name for `workers` programs at a time (0: one per core), tested and logged.

    If `modules` names packages, programs may import installed packages; a fork server loads `modules` before it forks.

    `auto` is fork_server with all its layers, else bubblewrap with all its layers, never less: weaker isolation must be
    requested by name.

    Raises:
        InputError: this machine cannot isolate as requested (with the missing parts), or the test took too long.
    """
    limits = limits or Limits()
    workers = workers or os.cpu_count() or 1
    if name == "auto":
        reasons = []
        for choice in ("fork_server", "bubblewrap"):
            box, reason = _try(choice, limits, workers, modules)
            if box is not None and not reason:
                return box
            if box is not None:
                box.close()
            reasons.append(f"{choice} lacks {reason}")
        raise InputError(
            f"this machine cannot fully isolate programs: {'; '.join(reasons)}. Install bubblewrap or allow user "
            f"namespaces; --reward.sandbox fork_server isolates by Landlock and seccomp alone if both work; {_ANYWAY}"
        )
    if name not in _KINDS:
        raise InputError(f"--reward.sandbox {name} is unknown: use auto, {', '.join(_KINDS)}")
    box, reason = _try(name, limits, workers, modules)
    if box is None:
        raise InputError(f"--reward.sandbox {name} does not work on this machine: it lacks {reason}. {_ANYWAY}")
    if reason:
        logger.warning("the sandbox %s isolates only in part: it lacks %s", name, reason)
    return box


def _try(name: str, limits: Limits, workers: int, modules: Sequence[str]) -> tuple[Box | None, str]:
    """Return the sandbox (None if it cannot be trusted) and a description of what it lacks ("" for nothing)."""
    packages = _packages(modules)
    settings: dict[str, Any] = {"kind": _KINDS[name], "uids": _free_uids(), **_paths(name, packages)}
    settings |= {"modules": list(modules), "packages": list(packages)}
    if name == "bubblewrap":
        settings["bwrap"] = shutil.which("bwrap")
        if settings["bwrap"] is None:
            return None, "the program bwrap (package bubblewrap)"
    hidden = [path for path in settings["binds"] if path.startswith(f"{SCRATCH}/")]
    if name != "unsafe" and hidden:
        return None, f"an interpreter outside of {SCRATCH} ({hidden[0]})"
    box = Box(name, settings, os.path.realpath(sys.executable), limits, workers)
    try:
        layers, missing = box.layers()
        box.strength = _describe(name, layers)
        weak = _is_weak(name, layers)
        if not weak and name != "unsafe":
            broken = _self_test(box)
            weak = broken != ""
            missing += [broken] if weak else []
    except SandboxTimeout as error:
        box.close()
        raise InputError(
            f"--reward.sandbox {name}: {error}; this is a time limit and not a missing feature: try again when this "
            "machine is less busy"
        ) from error
    except SandboxError as error:
        weak, missing = True, [f"a working start ({error})"]
    reason = " and ".join(missing)
    if weak:
        box.close()
        return None, reason
    logger.info("sandbox for programs: %s", box.strength)
    return box, reason


def _is_weak(name: str, layers: dict[str, Any]) -> bool:
    """Return True for a fork server without seccomp or Landlock; without namespaces it needs Landlock 3 or newer."""
    enough = layers["seccomp"] and layers["landlock"] >= (1 if layers["namespaces"] else TRUNCATION)
    return name == "fork_server" and not enough


def _self_test(box: Box) -> str:
    """Return what the sandbox lacks; "" if it blocks a few test attacks and an honest program works.

    Raises:
        SandboxTimeout: the test program gave no result in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        secret, target = Path(folder, "secret"), Path(folder, "written")
        secret.write_text("secret")
        secret.chmod(0o644)
        given = json.dumps([os.getpid(), str(secret), str(target)])
        outcome = box.run(_SELF_TEST, given.encode(), _PATIENT)
        written = target.exists()
    try:
        first, *more = outcome.stdout.splitlines()
        got = {*json.loads(first), *(["a program"] if more else [])}
    except ValueError:
        if outcome.ended == "timeout":
            raise SandboxTimeout(f"a program that tries it says nothing within {_PATIENT.seconds:g} s") from None
        last = outcome.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"a working start (a program ended by {outcome.ended} {outcome.status}: {''.join(last)})"
    if written:
        got.add("writing a file")
    got.discard("honest")
    return f"protection against {', '.join(sorted(got))}" if got else ""


def _describe(name: str, layers: dict[str, Any]) -> str:
    if name == "unsafe":
        return "unsafe: resource limits only, no isolation"
    parts = [_NAMESPACES] if layers["namespaces"] else []
    if layers["uid"] is not None:
        parts.append(f"uid {layers['uid']}")
    if name == "bubblewrap" or (layers["namespaces"] and layers["uid"] is None):
        parts.append("a user namespace")
    if layers["landlock"]:
        parts.append(f"Landlock {layers['landlock']}")
    if layers["seccomp"]:
        parts.append("seccomp")
    return f"{name}: {', '.join([*parts, 'resource limits'])}"


def _free_uids() -> list[int]:
    """Return unused user ids: the thread limit counts per user, so each keeper gets its own id.

    Only root can change to them; a container may map few ids.
    """
    ranges = []
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        ranges.append((inside, inside + count))
    low, high = max(ranges, key=lambda ends: ends[1] - ends[0])
    first = 1 << 30 if high > 1 << 31 else max(low, high - 5000)
    known = range(first, min(high, (1 << 31) - 2))
    return [uid for uid in random.SystemRandom().sample(known, min(len(known), 1024)) if uid != NOBODY]


def _packages(modules: Sequence[str]) -> tuple[str, ...]:
    """Return the folders of installed packages, including those of `modules`; empty if `modules` is empty."""
    if not modules:
        return ()
    found = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise InputError(f"the module {module} is not installed: pip install {module.replace('_', '-')}")
        found.append(str(Path(spec.origin).parents[1 if spec.submodule_search_locations else 0]))
    return tuple(dict.fromkeys(os.path.realpath(path) for path in found if os.path.isdir(path)))


@functools.cache
def _paths(name: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the paths that a Python interpreter reads: `binds`, in a valid mount order, and `links` between them."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"]
    # Without `vars`, sysconfig gives the folder of a virtual environment, which has only packages.
    platform = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
    standard = [os.path.dirname(os.path.realpath(os.__file__)), platform]
    files = ["/etc/ld.so.cache"]
    if name == "bubblewrap":
        files += [os.path.realpath(sys.executable)]
    links = {path: os.readlink(path) for path in libraries if os.path.islink(path)}
    wanted = {os.path.realpath(path) for path in [*libraries, *standard, *packages] if os.path.isdir(path)}
    wanted |= {path for path in files if os.path.exists(path)}
    binds = [path for path in sorted(wanted) if not any(path.startswith(f"{other}/") for other in wanted - {path})]
    return {"binds": binds, "links": links}

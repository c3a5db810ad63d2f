"""Code that runs inside the sandbox: give up all rights, then run one program.

The program under test never receives tests or expected outputs.

Descriptors: 0 to 2 belong to the program; REQUESTS delivers one JSON object per line, ANSWERS returns one per line.
The first request holds the program. If it names a function, each further request holds the arguments of one call. If it
has `test`, the program is the helper code of that test, which calls a function in another process (see `calls`).
"""

from __future__ import annotations

import _sitebuiltins
import ast
import atexit
import builtins
import contextlib
import functools
import gc
import io
import json
import os
import resource
import socket
import sys
import threading
import traceback
import types
from typing import Any

from paced_fast.rewards.sandbox import calls, linux, seccomp

REQUESTS, ANSWERS = 3, 4
SCRATCH = "/tmp"
_MIB = 1 << 20
_STACK_MIB = 112
# Names that solutions for practice sites assume; a program's own definitions replace them.
_PRELUDE = """
from bisect import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
from math import *
from random import *
from re import *
from string import *
from typing import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
"""
_RECURSION_LIMIT = 50_000  # for functions: on practice sites they do not set it themselves; the stack is large enough


def lock(settings: dict[str, Any]) -> None:
    """Give up for good all rights that a program does not need. `settings` holds the limits and available layers."""
    limits = settings["limits"]
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    wanted = _STACK_MIB * _MIB
    resource.setrlimit(resource.RLIMIT_STACK, (wanted if stack < 0 else min(wanted, stack), stack))
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_mib"] * _MIB),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, limits["file_mib"] * _MIB),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, settings["others"] + limits["threads"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard < 0 else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if not settings["restricted"]:
        return
    linux.drop_capabilities()
    linux.hide_memory()
    linux.forbid_new_privileges()
    if settings["landlock"]:
        writable = [SCRATCH] if settings["scratch"] else []
        linux.restrict_files(settings["landlock"], settings["readable"], [*writable, "/dev/null"])
    if settings["seccomp"]:
        linux.apply_filter(seccomp.lowest_filter(os.getpid(), has_scratch=settings["scratch"]))


def add_packages(folders: list[str]) -> None:
    """Let programs import packages from these folders, with one thread each: a filter may forbid more."""
    sys.path += folders
    if folders:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))


def run() -> None:
    """Run the program received from REQUESTS and end the process with its status; any error in it gives status 1."""
    status, module = 1, None
    try:
        os.write(ANSWERS, b"ready\n")
        os.environ.clear()  # Python itself sets a locale
        requests = _stream(REQUESTS)
        first = json.loads(requests.readline())
        function = first["function"]
        module = _prepare("__main__" if function is None else "program")
        if function is None:
            os.close(REQUESTS)
            os.close(ANSWERS)
        else:
            sys.setrecursionlimit(_RECURSION_LIMIT)
        exec(compile(first["program"], "program.py", "exec", dont_inherit=True), module.__dict__)
        if "test" in first:
            calls.run_test(first, module.__dict__, requests.readline, _send)
        elif function is not None:
            _answer_calls(requests, function, module.__dict__, plain=first.get("plain", False))
        status = 0
    except SystemExit as stop:
        code = stop.code
        status = code & 255 if isinstance(code, int) else 0 if code is None else 1
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if module is not None:
            _finalize(module)
    except BaseException:
        status = status or 120
    os._exit(status)


@functools.cache
def known_names() -> frozenset[str]:
    """Return the names that a program may use without defining them."""
    names: dict[str, Any] = {}
    exec(_PRELUDE, names)
    return frozenset(names.keys() | vars(builtins).keys())


def _prepare(name: str) -> types.ModuleType:
    """Return the module in which a program runs, and make the interpreter look like a fresh one.

    If a function will be called, the module is not `__main__`, so that the program's main block does not run.
    """
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    sys.argv[:] = ["program.py"]
    sys.set_int_max_str_digits(0)
    sys.stdin, sys.stdout, sys.stderr = (_stream(number) for number in range(3))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    for word in ("exit", "quit"):  # normally defined by the module `site`
        setattr(builtins, word, _sitebuiltins.Quitter(word, "Ctrl-D (i.e. EOF)"))
    socket.socketpair = lambda *_: tuple(map(_PipeEnd, os.pipe()))  # type: ignore[assignment]
    exec(_PRELUDE, module.__dict__)
    for word in module.__dict__.keys() & vars(builtins).keys():
        if not word.startswith("__"):
            del module.__dict__[word]  # keep the built-in pow (not math's) and compile (not re's)
    return module


class _PipeEnd:
    """One-way replacement, without sockets, for half of the socket pair with which an asyncio loop wakes itself."""

    def __init__(self, descriptor: int) -> None:
        self._end = descriptor

    def fileno(self) -> int:
        return self._end

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._end, flag)

    def send(self, data: bytes) -> int:
        return os.write(self._end, data)

    def recv(self, size: int) -> bytes:
        return os.read(self._end, size)

    def close(self) -> None:
        os.close(self._end)


def _finalize(module: types.ModuleType) -> None:
    """Finalise as an interpreter does: delete the program's objects and flush its files."""
    _flush_files()  # objects in a cycle are deleted in any order, perhaps a file before its buffer
    names = module.__dict__
    for name in [*names]:
        if name != "__builtins__":
            names[name] = None
    gc.collect()
    _flush_files()


def _flush_files() -> None:
    files = [thing for thing in gc.get_objects() if isinstance(thing, io.TextIOWrapper | io.BufferedWriter)]
    for kind in (io.TextIOWrapper, io.BufferedWriter):
        for file in files:
            if isinstance(file, kind):
                with contextlib.suppress(Exception):  # closed, or opened for reading
                    file.flush()


def _stream(number: int) -> io.TextIOWrapper:
    errors = "backslashreplace" if number == 2 else "surrogateescape"
    return open(number, "r" if number in (0, REQUESTS) else "w", encoding="utf-8", errors=errors, closefd=False)


def _answer_calls(requests: io.TextIOWrapper, name: str, names: dict[str, Any], *, plain: bool) -> None:
    """Write one line of JSON per call: {"value": ...} or {"error": ...}; with `plain`, in the format of `calls`."""

    def find() -> Any:
        solution = names.get("Solution")
        is_method = name not in names and hasattr(solution, name)
        return getattr(solution(), name) if is_method and solution is not None else names[name]

    held: dict[int, Any] = {}
    for line in requests:
        if plain:
            _send(calls.answer(line, find, held))
            continue
        request = json.loads(line)
        arguments = ast.literal_eval(request["literal"]) if "literal" in request else request["arguments"]
        try:
            answer = json.dumps({"value": find()(*arguments)})
        except Exception as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"[:200]})
        _send(answer.encode() + b"\n")


def _send(data: bytes) -> None:
    while data:
        data = data[os.write(ANSWERS, data) :]

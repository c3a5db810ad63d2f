"""What runs inside the sandbox: give up every right, then run one program. No test and no expected output gets here.

Descriptors: 0 to 2 are the program's own, REQUESTS brings one JSON object per line, ANSWERS takes one back.
The first request holds the program. With a function's name in it, each further request holds the arguments of one call,
or with `test` the program is what a test needs, and the test calls a function elsewhere (see `calls`).
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
# What answers on practice sites take for granted; a program's own names replace these.
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
_RECURSION_LIMIT = 50_000  # of functions, which on practice sites do not set it; the stack is large enough


def lock(settings: dict[str, Any]) -> None:
    """Give up, for good, all that a program has no need of. `settings` says what this machine and backend have."""
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
    """Let programs import what is installed in these folders, in one thread: a filter may forbid to start more."""
    sys.path += folders
    if folders:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))


def run() -> None:
    """Run the program that REQUESTS brings and end the process; what the program does is its own affair."""
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
    """What a program may use without defining it."""
    names: dict[str, Any] = {}
    exec(_PRELUDE, names)
    return frozenset(names.keys() | vars(builtins).keys())


def _prepare(name: str) -> types.ModuleType:
    """The module in which a program runs, in an interpreter that looks as a fresh one does.

    A function's module is not the main one, so that a program's own use of the function does not run.
    """
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    sys.argv[:] = ["program.py"]
    sys.set_int_max_str_digits(0)
    sys.stdin, sys.stdout, sys.stderr = (_stream(number) for number in range(3))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    for word in ("exit", "quit"):  # which only the module site makes
        setattr(builtins, word, _sitebuiltins.Quitter(word, "Ctrl-D (i.e. EOF)"))
    socket.socketpair = lambda *_: tuple(map(_PipeEnd, os.pipe()))  # type: ignore[assignment]
    exec(_PRELUDE, module.__dict__)
    for word in module.__dict__.keys() & vars(builtins).keys():
        if not word.startswith("__"):
            del module.__dict__[word]  # pow of math, compile of re
    return module


class _PipeEnd:
    """Half of the pair by which an event loop of asyncio wakes itself, where there are no sockets: it goes one way."""

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
    """What the end of an interpreter does: objects of the program go, and what its files hold is written."""
    _flush_files()  # a cycle's parts go in any order, a file perhaps before what buffers it
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
                with contextlib.suppress(Exception):  # closed, or for reading
                    file.flush()


def _stream(number: int) -> io.TextIOWrapper:
    errors = "backslashreplace" if number == 2 else "surrogateescape"
    return open(number, "r" if number in (0, REQUESTS) else "w", encoding="utf-8", errors=errors, closefd=False)


def _answer_calls(requests: io.TextIOWrapper, name: str, names: dict[str, Any], *, plain: bool) -> None:
    """One line of JSON for each call: {"value": ...} or {"error": ...}, or with `plain` what `calls` reads."""

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

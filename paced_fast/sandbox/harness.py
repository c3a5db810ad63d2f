"""What runs inside the sandbox: give up every right, then run one program. No test and no expected output gets here.

Descriptors: 0 to 2 are the program's own, REQUESTS brings one JSON object a line, ANSWERS takes one back.
The first request holds the program. With a function's name in it, each further request holds the arguments of one call.
"""

from __future__ import annotations

import ast
import atexit
import io
import json
import os
import resource
import sys
import threading
import traceback
import types
from typing import Any

from paced_fast.sandbox import kernel, seccomp

REQUESTS, ANSWERS = 3, 4
SCRATCH = "/tmp"
_MIB = 1 << 20
_STACK_MIB = 64
# What answers on practice sites take for granted; a program's own names replace these.
_PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, combinations, permutations, product
from math import ceil, comb, floor, gcd, inf, sqrt
from typing import *
"""


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
    kernel.drop_capabilities()
    kernel.hide_memory()
    kernel.forbid_new_privileges()
    if settings["landlock"]:
        writable = [SCRATCH] if settings["scratch"] else []
        kernel.restrict_files(settings["landlock"], settings["readable"], [*writable, "/dev/null"])
    if settings["seccomp"]:
        kernel.apply_filter(seccomp.lowest_filter(os.getpid()))


def run() -> None:
    """Run the program that REQUESTS brings and end the process; what the program does is its own affair."""
    status = 1
    try:
        os.write(ANSWERS, b"ready\n")
        os.environ.clear()  # Python itself sets a locale
        requests = _stream(REQUESTS)
        first = json.loads(requests.readline())
        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = module
        sys.argv[:] = ["program.py"]
        sys.stdin, sys.stdout, sys.stderr = (_stream(number) for number in range(3))
        exec(_PRELUDE, module.__dict__)
        if first["function"] is None:
            os.close(REQUESTS)
            os.close(ANSWERS)
            exec(compile(first["program"], "program.py", "exec"), module.__dict__)
        else:
            exec(compile(first["program"], "program.py", "exec"), module.__dict__)
            _answer_calls(requests, first["function"], module.__dict__)
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
    except BaseException:
        status = status or 120
    os._exit(status)


def _stream(number: int) -> io.TextIOWrapper:
    errors = "backslashreplace" if number == 2 else "surrogateescape"
    return open(number, "r" if number in (0, REQUESTS) else "w", encoding="utf-8", errors=errors, closefd=False)


def _answer_calls(requests: io.TextIOWrapper, name: str, names: dict[str, Any]) -> None:
    """One line of JSON for each call: {"value": ...} or {"error": ...}."""
    for line in requests:
        request = json.loads(line)
        arguments = ast.literal_eval(request["literal"]) if "literal" in request else request["arguments"]
        try:
            solution = names.get("Solution")
            is_method = name not in names and hasattr(solution, name)
            function = getattr(solution(), name) if is_method and solution is not None else names[name]
            answer = json.dumps({"value": function(*arguments)})
        except Exception as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"[:200]})
        data = answer.encode() + b"\n"
        while data:
            data = data[os.write(ANSWERS, data) :]

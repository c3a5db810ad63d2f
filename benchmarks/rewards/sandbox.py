"""Isolation and cost of each sandbox: attacks, honest programs, and a trivial program against a bare interpreter.

The attacks are those of the tests; each backend is attacked from a separate process. They also run without isolation,
to show that they work. Timings of all backends are interleaved in one process, first with one program at a time, then
with one per core.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from paced_fast.errors import InputError
from paced_fast.rewards.sandbox import Limits, Sandbox, open_sandbox

TESTS = Path(__file__).resolve().parents[2] / "tests" / "support"
WAYS = ("fork_server", "bubblewrap", "unsafe")
_TRIVIAL = "print(input())"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure isolation and cost of the sandboxes."""

    runs: int = 100
    """Trivial programs per backend, one at a time."""
    attacks: bool = True
    """Also run the attacks, which takes a minute or two."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Return one row per backend."""
    if arguments.runs < 2:
        raise InputError(f"--runs is {arguments.runs}: give 2 or more")
    cores = os.cpu_count() or 1
    boxes: dict[str, Sandbox] = {}
    rows: dict[str, dict[str, Any]] = {"bare": {"strength": "python -I, no sandbox"}}
    for name in WAYS:
        try:
            boxes[name] = open_sandbox(name, Limits(seconds=10.0), workers=cores)
            rows[name] = {"strength": boxes[name].strength}
        except InputError as error:
            rows[name] = {"strength": None, "reason": str(error)}
    calls: dict[str, Callable[[], bytes]] = {"bare": _bare}
    calls |= {name: _trivial(box) for name, box in boxes.items()}
    try:
        _time(calls, rows, arguments.runs, cores)
        for name, box in boxes.items():
            rows[name] |= _honest(box)
    finally:
        for box in boxes.values():
            box.close()
    if arguments.attacks:
        for name in boxes:
            rows[name] |= _attack(name)
    for line in table(rows):
        print(line)
    return {"runs": arguments.runs, "rows": rows}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Format the rows as Markdown."""
    lines = [
        "| sandbox | attacks blocked | honest programs right | ms per program (10th to 90th percentile) | programs/s |"
    ]
    lines.append("|---|---|---|---|---|")
    for name, row in rows.items():
        if "median_ms" not in row:
            continue
        held = f"{row['held']} of {row['attacks']}" if "held" in row else ""
        honest = f"{row['honest_right']} of {row['honest']}" if "honest" in row else ""
        spread = f"{row['median_ms']:.1f} ({row['p10_ms']:.1f} to {row['p90_ms']:.1f})"
        lines.append(f"| {name} | {held} | {honest} | {spread} | {row['per_second']:.0f} |")
    return lines


def _bare() -> bytes:
    command = [sys.executable, "-I", "-c", _TRIVIAL]
    return subprocess.run(command, input=b"1", capture_output=True, env={}, check=True).stdout


def _trivial(box: Sandbox) -> Callable[[], bytes]:
    return lambda: box.run(_TRIVIAL, b"1").stdout


def _time(calls: dict[str, Callable[[], bytes]], rows: dict[str, dict[str, Any]], runs: int, cores: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            began = time.perf_counter()
            output = call()
            seconds[name].append(time.perf_counter() - began)
            assert output == b"1\n", (name, output)
    for name, call in calls.items():
        cuts = statistics.quantiles(seconds[name], n=10)
        began = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda _, call=call: call(), range(runs)))
        rows[name] |= {
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "p10_ms": 1e3 * cuts[0],
            "p90_ms": 1e3 * cuts[-1],
            "per_second": runs / (time.perf_counter() - began),
        }


def _honest(box: Sandbox) -> dict[str, int]:
    sys.path.insert(0, str(TESTS))
    try:
        from honest_programs import HONEST
    finally:
        sys.path.remove(str(TESTS))
    outcomes = [(box.run(program, given.encode()), expected) for program, given, expected in HONEST]
    right = sum(o.ended == "exit" and o.status == 0 and o.stdout.decode().strip() == e for o, e in outcomes)
    return {"honest": len(HONEST), "honest_right": right}


def _attack(name: str) -> dict[str, Any]:
    given = {**environment.child_environment(), "SCENE_TOKEN": secrets.token_hex(12)}
    words = [sys.executable, str(TESTS / "sandbox_attacks.py"), name]
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the attacks on {name} did not run: {done.stderr.strip().splitlines()[-1:]}")
    results = json.loads(done.stdout)
    results.pop("strength")
    through = {attack: found for attack, found in results.items() if found}
    return {"attacks": len(results), "held": len(results) - len(through), "through": through}

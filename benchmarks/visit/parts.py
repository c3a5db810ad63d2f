"""The parts of the two visits, in order, with their time.

A, at most six minutes: what the machine is, kernels compiled side by side, the smoke test, hardware counters, the sweep
of configurations. B, at most five: the tests that need a GPU, the tables of both operations, the tree, the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.loss.problems import Shape, toy_of
from benchmarks.visit.processes import Part

MINUTES = {"a": 6.0, "b": 5.0}
SWEPT = ("T8192-H1536-V151936", "T8192-H896-V151936", "T8192-H4096-V151936", "T8192-H2048-V151936")
TABLE = ("T8192-H1536-V151936", "T16384-H4096-V151936", "T8192-H2048-V151936", "T8192-H896-V151936")
SMOKE_HEADS = tuple(f"bfloat16 H64 V8192{options}" for options in ("", " weights", " weights stage 1", " stage 1"))
"""Heads of `precompile` whose kernels the smoke test and the sweep take."""
TEST_WORKERS = 8

VISITS: dict[str, tuple[Part, ...]] = {
    "a": (
        Part(name="machine", case="visit_machine", seconds=25.0),
        Part(name="precompile", case="precompile", seconds=60.0, options=("--only", *SMOKE_HEADS)),
        Part(name="smoke", case="visit_smoke", seconds=68.0, least=60.0),
        Part(name="counters", case="visit_counters", seconds=70.0, least=30.0),
        Part(name="sweep", case="gemm_sweep", seconds=200.0, least=90.0, options=("--repetitions", "15")),
    ),
    "b": (
        Part(name="precompile", case="precompile", seconds=45.0),
        Part(name="tests", case="tests", seconds=150.0, least=90.0),
        Part(
            name="trajectory_balance",
            case="trajectory_balance",
            seconds=80.0,
            least=40.0,
            options=("--inputs", "peaked", "--cell-seconds", "8"),
            exclude=("ours, backend reference",),
            resumable=True,
        ),
        Part(
            name="logprobs",
            case="logprobs",
            seconds=30.0,
            least=12.0,
            options=("--inputs", "peaked", "--cell-seconds", "4"),
            exclude=("ours, backend reference",),
            resumable=True,
        ),
        Part(
            name="priority_tree",
            case="priority_tree",
            seconds=40.0,
            least=12.0,
            options=("--cell-seconds", "4"),
            resumable=True,
        ),
        Part(
            name="trainer",
            case="trainer",
            seconds=60.0,
            least=40.0,
            options=("--prompts", "16", "--longest", "1024", "--repeats", "3"),
        ),
    ),
}
"""Parts of each visit. What a part does not use goes to those behind it, as far as their limits let them take it."""

UNHURRIED_S = 3600.0
"""Limit of a part, and of its silence, in a rehearsal, whose times say nothing."""

SHAPES = {"sweep": SWEPT, "trajectory_balance": TABLE, "logprobs": TABLE[:1]}
_FEW = ("--only", "ours", "naive", "ceiling", "--inputs", "peaked")
REHEARSED: dict[str, tuple[str, ...]] = {
    "machine": ("--load-seconds", "0"),
    "precompile": ("--heads", "1", "--workers", "0"),
    "smoke": (),
    "counters": (),
    "sweep": ("--repetitions", "1"),
    "trajectory_balance": ("--repetitions", "1", "--no-memory", *_FEW),
    "logprobs": ("--repetitions", "1", "--no-memory", *_FEW),
    "priority_tree": ("--cells", "N100-B8", "--draws", "64", "--updates", "1", "--repeats", "1", "--repetitions", "1"),
    "trainer": ("--model", "toy", "--threads", "1", "--repeats", "1", "--longest", "16", "--methods", "paced_fast"),
}
"""Options of a rehearsal: seconds instead of minutes, no other process, no other project."""


def parts_of(visit: str, *, rehearse: bool = False, only: Sequence[str] = ()) -> tuple[Part, ...]:
    """Return the parts of a visit with their options, at toy shapes for a rehearsal; `only` names methods."""
    found = []
    for part in VISITS[visit]:
        options = REHEARSED.get(part.name, ()) if rehearse else part.options
        if part.name in SHAPES:
            names = SHAPES[part.name][: 3 if rehearse and part.name == "sweep" else None]
            options += ("--shapes", *((toy_of(Shape.parse(name)).name for name in names) if rehearse else names))
        if rehearse and part.name == "priority_tree":
            options += ("--operations", "update random", "--only", "ours")
        elif only and part.resumable:
            options += ("--only", *only)
        if rehearse:  # on a machine that may be busy with something else
            part = replace(part, seconds=UNHURRIED_S, least=0.0)
        if rehearse and part.exclude:
            part = replace(part, exclude=(*part.exclude, "torch.compile of naive"))  # compiles for seconds
        found.append(replace(part, options=options))
    return tuple(found)


def limit_of(part: Part, later: Sequence[Part], left_s: float) -> float:
    """Seconds that a part may take of those that are left, so that each later one has its least."""
    return min(part.seconds, left_s - sum(other.least for other in later))


def test_workers() -> int:
    """Processes of pytest; on a small machine none but the first."""
    return TEST_WORKERS if (os.cpu_count() or 1) >= TEST_WORKERS else 0

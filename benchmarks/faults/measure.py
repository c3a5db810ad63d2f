"""Count failures under faults: kills, damaged and planted files, resumes, forgotten state, failing processes.

Exit status 1 if anything is lost, silently loaded, undetected, different or left behind.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import checkpoint as faults_checkpoint
from benchmarks.faults import processes as faults_processes
from benchmarks.faults.resume import CUTS


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Inject faults and count failures."""

    kills: int = 100
    """Number of processes killed while they save."""
    damages: int = 200
    """Number of damaged checkpoints."""
    parallel: int = 3
    """Concurrent runs with a failing process; those with a stopped rank mostly wait."""
    cuts: tuple[str, ...] = tuple(map(str, CUTS))
    """Steps after which a run is killed and resumed."""
    pieces: tuple[str, ...] = ()
    """Pieces of state to omit on resume, chosen by words in their names; none means all."""
    cells: tuple[str, ...] = ()
    """Process faults to try, as FAULT/PHASE; none means all."""


def measure(arguments: Arguments, path: Path | None = None) -> dict[str, Any]:
    """Return all counts; after counting, exit with the first failure if there is one."""
    started = time.monotonic()
    cuts = tuple(map(int, arguments.cuts))
    checkpoint = faults_checkpoint.measure(arguments.kills, arguments.damages, cuts, arguments.pieces)
    kill, damage, planted = checkpoint["kill"], checkpoint["damage"], checkpoint["planted_code"]
    cut, ablation = checkpoint["resume"]["cuts"], checkpoint["resume"]["ablation"]
    print(
        f"processes killed: {kill['kills']} ({kill['kills_inside_a_save']} during a save); acknowledged checkpoints: "
        f"{kill['acknowledged']}; wrong: {kill['wrong']}\n"
        f"checkpoints damaged: {damage['damages']}; wrong: {damage['wrong']}\n"
        f"planted code ran {planted['code_ran']} times\n"
        f"runs killed and resumed: {cut['cut_points']}; wrong: {cut['wrong']}\n"
        f"parts of the state left out: {ablation['pieces']}; not noticed: {ablation['wrong']}",
        flush=True,
    )
    processes = faults_processes.measure(faults_processes.Arguments(parallel=arguments.parallel, only=arguments.cells))
    wrong = [*kill["wrong"], *damage["wrong"], *cut["wrong"], *ablation["wrong"], *processes["shared_memory_left"]]
    wrong += [outcome for outcome in processes["outcomes"] if not outcome["passed"]]
    if wrong or planted["code_ran"]:
        sys.stderr.write(f"error: {len(wrong)} faults were not survived; the first: {(wrong or [planted])[0]}\n")
        raise SystemExit(1)
    return {"checkpoint": checkpoint, "processes": processes, "seconds": round(time.monotonic() - started, 1)}

"""Rollouts, tokens and seconds that each algorithm needs to learn, paired by seed, at several scales.

Every run is a file below the folder of `--json`, by suite, arm, learning rate and seed, written when the run ends and
never repeated: the command does what is missing. benchmarks/README.md says how it is measured and how to spread it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.efficiency import arms, curves, files, schedule, suites, summary, table, warm
from benchmarks.training.efficiency.schedule import Plan
from benchmarks.training.efficiency.suites import Suite
from paced_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare the algorithms on one suite; what has a file already is not run again."""

    suite: str = "tiny"
    """Suite: its preset, and how long and with how many seeds it is trained."""
    seeds: str = ""
    """Seeds of the comparison: N for 0 to N - 1, A:B for A to B - 1; without it, those of the suite."""
    arms: tuple[str, ...] = tuple(arms.ARMS)
    """Arms to run; `grpo` always runs."""
    sweep: bool | None = None
    """Only run the sweep of learning rates; --no-sweep compares at the preset's rate without one."""
    rate: float = 0.0
    """Learning rate of every arm instead of the one that its sweep chose; 0 for that one."""
    continue_: bool = False
    """Go on where files of other code are there, and use them; the table names their commits."""
    workers: int = 2
    """Concurrent runs, one thread each; 0 = one after another in this process."""
    cache: str = str(warm.CACHE)
    """Folder of the initial policies, one a seed."""
    quick: bool = False
    """Toy sizes, to check that everything works."""


def default_path(arguments: Arguments) -> Path:
    """Path of the summary, beside the folders of runs."""
    return Path(__file__).parents[1] / "results" / "sample_efficiency" / f"{arguments.suite}.json"


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Do the runs that are missing below the folder of `path`, and return the figures of all."""
    suite = suites.find(arguments.suite + (suites.QUICK if arguments.quick else ""))
    names, seeds = arms.chosen(arguments.arms), schedule.seeds_of(arguments.seeds, suite)
    root, cache = path.parent, Path(arguments.cache)
    check_code(root, suite, allowed=arguments.continue_)
    if arguments.sweep:
        schedule.run_all(Plan(jobs=tuple(schedule.sweep_jobs(suite, names)), root=root, cache=cache), arguments.workers)
        finals = tuple(schedule.final_jobs(suite, names, root))
        schedule.run_all(Plan(jobs=finals, root=root, cache=cache), arguments.workers)
    else:
        rates = rates_of(arguments, suite, names, root)
        jobs = schedule.comparison_jobs(suite, rates, seeds)
        base = tuple(job for job in jobs if job.arm == arms.BASE)
        schedule.run_all(Plan(jobs=tuple(jobs), root=root, cache=cache, base=base), arguments.workers)
    found = files.read_all(root, suite.name)
    shown = summary.rows(suite.name, found)
    print(table.full(suite.name, shown))
    if shown:
        curves.draw({row.arm: list(row.runs.values()) for row in shown}, root / f"{suite.name}.png")
    return {"suite": suite.name, "rows": [_figures(row) for row in shown]}


def _figures(row: summary.Row) -> dict[str, Any]:
    """A row without its runs, which have files."""
    return dataclasses.asdict(dataclasses.replace(row, runs={})) | {"seeds": list(row.runs)}


def rates_of(arguments: Arguments, suite: Suite, names: list[str], root: Path) -> dict[str, float]:
    """Learning rate of each arm. Raises InputError for arms without a finished sweep, unless the user says what to
    take instead."""
    if arguments.rate or arguments.sweep is False:
        return dict.fromkeys(names, float(f"{arguments.rate or arms.preset_rate(suite):.6g}"))
    tuned = schedule.tuned_rates(suite, names, root)
    missing = [name for name, rate in tuned.items() if rate is None]
    if missing:
        raise InputError(
            f"the sweep of learning rates is not finished for {', '.join(missing)}: run it by --sweep with the same "
            "options, or give --rate, or --no-sweep for the preset's rate"
        )
    return {name: rate for name, rate in tuned.items() if rate is not None}


def check_code(root: Path, suite: Suite, *, allowed: bool) -> None:
    """Raises InputError when files of the suite were made by other code than this, unless that is allowed."""
    others = {
        run["environment"]["commit"] for run in files.read_all(root, suite.name) if run["code"] != files.code_digest()
    }
    if others and not allowed:
        raise InputError(
            f"{root / suite.name} has runs of other code (commit {', '.join(sorted(map(str, others)))}): --continue "
            "uses them beside new ones, and the table names the commits; or give --json in another folder"
        )

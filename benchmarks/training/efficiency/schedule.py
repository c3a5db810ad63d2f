"""Who runs what, and when: jobs in order, claimed one by one by any number of processes.

Jobs are ordered by seed, so that the arms of a seed run next to each other and under the same conditions. The other
arms of a seed wait for `BASE`, whose training time is their time budget.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.training.efficiency import arms, files, runs
from benchmarks.training.efficiency.files import SWEEP_SEEDS, Job
from benchmarks.training.efficiency.suites import Suite
from paced_fast.errors import InputError

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Learning rates of the sweep, as multiples of the preset's."""
_PAUSE = 2.0
"""Seconds between two looks for work while other processes hold every claim."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs that are wanted, and where their files and initial policies are."""

    jobs: tuple[Job, ...]
    root: Path
    cache: Path
    base: tuple[Job, ...] = ()
    """Runs of `BASE` that give the time budgets, one a seed; jobs of other seeds have no time budget."""

    def base_of(self, job: Job) -> Job | None:
        """The run whose training time is the time budget of `job`."""
        return next((one for one in self.base if one.seed == job.seed and one != job), None)

    def missing(self) -> list[Job]:
        """Jobs without a file."""
        return [job for job in self.jobs if not job.path(self.root).is_file()]


def sweep_jobs(suite: Suite, names: Sequence[str]) -> list[Job]:
    """The runs of the sweep: every arm with the same rates and seeds."""
    rates = [swept_rate(suite, factor) for factor in FACTORS]
    return [
        Job(suite=suite.name, arm=name, rate=rate, seed=seed)
        for seed in SWEEP_SEEDS
        for name in names
        for rate in rates
    ]


def swept_rate(suite: Suite, factor: float) -> float:
    """A learning rate of the sweep, with the six digits that files keep."""
    return float(f"{factor * arms.preset_rate(suite):.6g}")


def comparison_jobs(suite: Suite, rates: dict[str, float], seeds: Sequence[int]) -> list[Job]:
    """The runs of the comparison, seed by seed, `BASE` first."""
    return [Job(suite=suite.name, arm=arm, rate=rate, seed=seed) for seed in seeds for arm, rate in rates.items()]


def tuned_rates(suite: Suite, names: Sequence[str], root: Path) -> dict[str, float | None]:
    """Return for each arm the rate of the highest mean final accuracy in the sweep; None while runs are missing.

    A failed run counts as an accuracy of 0. Of equals the one nearer to the preset's is taken.
    """
    return {name: tuned_rate(suite, [job.read(root) for job in sweep_jobs(suite, [name])]) for name in names}


def tuned_rate(suite: Suite, sweep: Sequence[dict[str, Any]]) -> float | None:
    """Return the best rate of one arm's sweep; None if a run of it is missing."""
    if not all(sweep):
        return None
    by_rate: dict[float, list[float]] = {}
    for run in sweep:
        by_rate.setdefault(run["rate"], []).append(final_accuracy(run))
    nearness = {swept_rate(suite, factor): -abs(factor - 1.0) for factor in FACTORS}
    return max(by_rate, key=lambda rate: (sum(by_rate[rate]) / len(by_rate[rate]), nearness.get(rate, -1.0)))


def final_accuracy(run: dict[str, Any]) -> float:
    """Accuracy at the rollout budget; 0 for a run that failed before it."""
    return (run["at_budget"] or {}).get("accuracy") or 0.0


def seeds_of(text: str, suite: Suite) -> list[int]:
    """Seeds by `N` (0 to N - 1), `A:B` (A to B - 1), or the suite's number of them. Raises InputError for others."""
    first, colon, last = text.partition(":")
    if not (text == "" or (first.isdecimal() and (last.isdecimal() if colon else True))):
        raise InputError(f"--seeds {text} must be a number, or a range such as 3:6")
    low, high = (int(first), int(last)) if colon else (0, int(first or suite.seeds))
    if low >= high or high > SWEEP_SEEDS[0]:
        raise InputError(f"--seeds {text} names no seed from 0 to {SWEEP_SEEDS[0] - 1}; those from there on are swept")
    return list(range(low, high))


def run_job(job: Job, plan: Plan) -> bool:
    """Run `job` and write its file, unless it has one or another process holds its claim; returns whether it ran."""
    with files.claimed(job, plan.root) as is_mine:
        if not is_mine or job.path(plan.root).is_file():
            return False
        base = plan.base_of(job)
        _run(job, plan, None if base is None else base.read(plan.root))
        return True


def _run(job: Job, plan: Plan, base: dict[str, Any] | None) -> None:
    started = environment.describe()
    budget = None if base is None else time_budget(base, started)
    result = runs.train(job, cache=plan.cache, seconds=budget["seconds"] if budget else 0.0)
    head = {"suite": job.suite, "arm": job.arm, "rate": job.rate, "seed": job.seed, "code": files.code_digest()}
    head |= {"environment": started, "time_budget": budget}
    files.write(job, plan.root, head | result)
    found = result["at_budget"] or {}
    ended = f"failed: {result['failed']}" if "failed" in result else f"accuracy {found['accuracy']:.3f}"
    print(f"{job}: {ended} in {result['curve'][-1]['train_seconds']:.1f} s of training", flush=True)
    for warning in result["warnings"]:
        print(f"  warning: {warning}", flush=True)


def time_budget(base: dict[str, Any], here: dict[str, Any]) -> dict[str, Any] | None:
    """Training time of the `BASE` run of the same seed, and whether it was measured on this processor; None if that
    run failed."""
    if base["at_budget"] is None:
        return None
    same = all(base["environment"][name] == here[name] for name in ("cpu", "cores", "gpu"))
    return {"seconds": base["at_budget"]["train_seconds"], "on_this_processor": same}


def run_all(plan: Plan, workers: int) -> None:
    """Run the missing jobs in `workers` processes, a new one for each job; with 0 in this process.

    Returns when every job has a file, those of other processes included. An error of a job ends all, after the jobs
    that are running.
    """
    queue = _Queue(plan)
    if not workers:
        queue.work(run_job)
        return
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool,
        ThreadPoolExecutor(workers) as threads,
    ):
        working = [
            threads.submit(queue.work, lambda job, plan: pool.submit(run_job, job, plan).result())
            for _ in range(workers)
        ]
        try:
            for one in working:
                one.result()
        except BaseException:  # an interrupt too ends the threads after their runs
            queue.has_failed = True
            raise


class _Queue:
    """Hands out the jobs of a plan, in order, to threads that each wait for one run at a time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lock = threading.Lock()
        self.running: set[Job] = set()
        self.has_failed = False

    def work(self, run: Callable[[Job, Plan], bool]) -> None:
        """Run jobs until all have a file."""
        while not self.has_failed and self.plan.missing():
            job = self._take()
            if job is None:
                time.sleep(_PAUSE)
                continue
            try:
                run(job, self.plan)
            except BaseException:
                self.has_failed = True
                raise
            finally:
                self.running.discard(job)

    def _take(self) -> Job | None:
        """The first job that can run now: nobody runs it, and its time budget is known."""
        with self.lock:
            for job in self.plan.missing():
                base = self.plan.base_of(job)
                if job in self.running or not (base is None or base.path(self.plan.root).is_file()):
                    continue
                with files.claimed(job, self.plan.root) as is_free:
                    if is_free:
                        self.running.add(job)
                        return job
        return None

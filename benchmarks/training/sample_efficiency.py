"""Rollouts and seconds that each algorithm needs, on the `tiny` preset; the arms of a seed start from equal weights.

A seed determines the warm start and the training noise; prompts, held-out problems and settings are the same for all.
Arms are compared at equal rollouts, including dropped groups of dynamic sampling, and at equal training time: that of
`grpo` for its rollouts, without evaluation. Each run uses one thread; `--workers` runs are concurrent.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quick import quick
from benchmarks.training import curves
from paced_fast.config import Config
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError
from paced_fast.run import evaluate_policy
from paced_fast.run.start.build import PreparedRun, build

# name -> description, and changes to the preset's settings. `grpo` comes first, because it sets the time budget.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPO", {"algorithm": "grpo"}),
    "dynamic": ("GRPO + dynamic sampling", {"algorithm": "grpo", "scheduler.rule": "dynamic"}),
    "history": ("GRPO + group-variance history", {"algorithm": "grpo", "scheduler.rule": "history"}),
    "flowrl": ("FlowRL", {"algorithm": "flowrl"}),
    "tb_group": ("TB, group mean", {"algorithm": "tb_group"}),
    "tb": ("TB, learned log Z", {"algorithm": "tb", "loss.intercept": "value", "log_z.loss": "tb"}),
    "replay": (
        "replay alone",
        {"algorithm": "paced", "scheduler.rule": "uniform", "loss.intercept": "value", "log_z.loss": "tb"},
    ),
    "selection": (
        "selection alone",
        {"algorithm": "paced", "replay.mode": "off", "loss.intercept": "value", "log_z.loss": "tb"},
    ),
    "paced": ("PACED (paper's pair)", {"algorithm": "paced", "loss.intercept": "value", "log_z.loss": "tb"}),
    "paced_greedy": (
        "PACED, greedy rule",
        {"algorithm": "paced", "scheduler.rule": "greedy", "loss.intercept": "value", "log_z.loss": "tb"},
    ),
    "paced_bce": ("PACED, bce head", {"algorithm": "paced", "loss.intercept": "value", "log_z.loss": "bce"}),
    "selection_group": (
        "selection alone, group mean",
        {"algorithm": "paced", "replay.mode": "off", "loss.intercept": "group_mean", "log_z.loss": "bce"},
    ),
    "paced_group": (
        "PACED, group mean, bce head",
        {"algorithm": "paced", "loss.intercept": "group_mean", "log_z.loss": "bce"},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare the algorithms on the tiny preset."""

    seeds: int = 3
    """Seeds 0 to SEEDS - 1."""
    steps: int = 150
    """Rollout budget, in steps of 128 rollouts."""
    eval_every: int = 25
    """Budget between two points of a curve, in the same unit."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to run; `grpo` always runs."""
    workers: int = 2
    """Concurrent runs, one thread each; 0 = one after another in this process."""
    quick: bool = False
    """Toy sizes, to check that everything works."""


def arm_config(name: str, seed: int, steps: int, *, toy: bool = False) -> Config:
    """Return the settings of one run."""
    config = quick(preset("tiny")) if toy else preset("tiny")
    for key, value in ARMS[name][1].items():
        config = _replace(config, key, value)
    config = dataclasses.replace(
        config,
        seed=seed,
        steps=steps,
        warm_start=dataclasses.replace(config.warm_start, seed=seed),
        run=dataclasses.replace(config.run, threads=1, report=False, rollouts_per_step=0),
    )
    return resolve(config)


def _replace(config: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    inner = _replace(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})


def run_arm(job: tuple[str, int], *, steps: int, eval_every: int, seconds: float, toy: bool) -> dict[str, Any]:
    """Train one arm until the rollout budget and `seconds` of training are used up; return curve and final scores."""
    name, seed = job
    config = arm_config(name, seed, steps, toy=toy)
    budget, interval = steps * config.rollouts_per_step, eval_every * config.rollouts_per_step
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, run_dir=folder)
        run = build(config, console)
        first = evaluate_policy.evaluate_now(run, config.evaluation.final_samples)
        assert first is not None
        points = [_point(run, first, 0, 0.0)]
        shares: list[float] = []
        at_budget = None
        counters = run.stepper.counters
        while counters.rollouts < budget or counters.train_seconds < seconds:
            record = run.stepper.step().record
            shares.append(record.mixed_group_share)
            done = at_budget is None and counters.rollouts >= budget
            if done or counters.rollouts >= points[-1]["rollouts"] + interval:
                samples = config.evaluation.final_samples if done else config.evaluation.samples
                evaluation = evaluate_policy.evaluate_now(run, samples)
                assert evaluation is not None
                points.append(_point(run, evaluation, counters.rollouts, counters.train_seconds))
                at_budget = points[-1] if done else at_budget
        if points[-1]["train_seconds"] < counters.train_seconds:
            evaluation = evaluate_policy.evaluate_now(run, config.evaluation.samples)
            assert evaluation is not None
            points.append(_point(run, evaluation, counters.rollouts, counters.train_seconds))
    return {
        "arm": name,
        "seed": seed,
        "curve": points,
        "start": points[0],
        "at_budget": at_budget,
        "mixed_group_share": statistics.fmean(shares[config.scheduler.warmup_steps :] or shares),
        "steps": counters.step,
        "skipped_steps": counters.skipped_steps,
    }


def _point(run: PreparedRun, evaluation: Any, rollouts: int, seconds: float) -> dict[str, Any]:
    point = {
        "rollouts": rollouts,
        "train_seconds": seconds,
        "accuracy": evaluation.overall.accuracy,
        "pass_at_8": evaluation.overall.pass_at_8,
        "distinct_correct": evaluation.overall.distinct_correct,
        "trivial": evaluation.slices["trivial"].accuracy,
    }
    value = evaluate_policy.value_on_held_out(run, evaluation)
    if value is not None:
        point |= {f"value_{name}": value[name] for name in ("brier", "ece", "rank_correlation")}
    return point


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Run every arm and seed, print the table, plot the curves next to `path`, and return everything."""
    unknown = [name for name in arguments.arms if name not in ARMS]
    if unknown:
        raise InputError(f"unknown arm {unknown[0]!r}: the arms are {', '.join(ARMS)}")
    names = ["grpo", *(name for name in arguments.arms if name != "grpo")]
    seeds = range(arguments.seeds)
    common = {"steps": arguments.steps, "eval_every": arguments.eval_every, "toy": arguments.quick}
    with _pool(arguments.workers) as pool:
        baseline = _map(pool, functools.partial(run_arm, seconds=0.0, **common), [("grpo", seed) for seed in seeds])
        seconds = statistics.median(run["at_budget"]["train_seconds"] for run in baseline)
        jobs = [(name, seed) for name in names[1:] for seed in seeds]
        others = _map(pool, functools.partial(run_arm, seconds=seconds, **common), jobs)
    runs = {name: [run for run in (*baseline, *others) if run["arm"] == name] for name in names}
    budget = arguments.steps * arm_config("grpo", 0, arguments.steps, toy=arguments.quick).rollouts_per_step
    rows = [curves.summarise(name, runs, budget, seconds) for name in names]
    Console(width=170).print(_table(rows))
    titles = {name: ARMS[name][0] for name in names}
    curves.draw(runs, titles, path.with_suffix(".png"))
    return {
        "settings": dataclasses.asdict(arguments),
        "rollout_budget": budget,
        "seconds_budget": seconds,
        "titles": titles,
        "rows": rows,
        "runs": runs,
    }


def _pool(workers: int) -> AbstractContextManager[Any]:
    """Return a pool whose processes do one job each, or None to run all jobs in this process."""
    if not workers:
        return nullcontext()
    return multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1)


def _map(pool: Any, function: Any, jobs: list[tuple[str, int]]) -> list[dict[str, Any]]:
    results = []
    found = map(function, jobs) if pool is None else pool.imap_unordered(function, jobs)
    for done, result in enumerate(found, start=1):
        final = result["at_budget"]
        line = f"{done}/{len(jobs)} {result['arm']} seed {result['seed']}: accuracy {result['start']['accuracy']:.3f}"
        print(f"{line} -> {final['accuracy']:.3f} in {final['train_seconds']:.1f} s", flush=True)
        results.append(result)
    return sorted(results, key=lambda result: result["seed"])


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(*curves.COLUMNS, title="held-out accuracy of the medium problems", title_justify="left")
    for row in rows:
        table.add_row(ARMS[row["arm"]][0], *curves.cells(row))
    return table

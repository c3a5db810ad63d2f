"""Figures of a suite from its run files: one row for each arm, paired by seed with `BASE`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.training.efficiency import schedule, statistics
from benchmarks.training.efficiency.arms import ARMS, BASE
from benchmarks.training.efficiency.files import SWEEP_SEEDS
from benchmarks.training.efficiency.statistics import Interval
from benchmarks.training.efficiency.suites import SUITES, Suite, find

Run = dict[str, Any]

_GRID = 25
"""Points at which curves are compared, from 0 to the rollout budget."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An arm at one learning rate: means over the seeds of the sweep, and of the comparison if it was run there."""

    rate: float
    sweep_accuracy: float | None
    """At the rollout budget; a run that failed counts as 0."""
    sweep_pass_at_8: float | None
    seeds: int
    """Seeds of the comparison."""
    accuracy: float | None
    gain: Interval
    """Accuracy above `BASE` at the rate chosen for it, at equal rollouts."""
    pass_gain: Interval
    distinct_gain: Interval


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm of a suite."""

    arm: str
    rate: float
    tuning: str
    """How the rate was found: tuned, tuned (at the edge), or untuned."""
    runs: dict[int, Run]
    """Runs of the comparison at that rate, by seed."""
    paired: tuple[int, ...]
    """Seeds that `BASE` has too."""
    accuracy: float
    gain: Interval
    """Accuracy above `BASE` at equal rollouts."""
    wins: int
    """Seeds with a gain above 0."""
    share: Interval
    """Rollouts to the final accuracy of `BASE`, as a share of the budget."""
    gain_at_seconds: Interval
    """Accuracy above `BASE` at its training time, of pairs that ran on one kind of processor."""
    gain_at_tokens: Interval
    """Accuracy above `BASE` at the tokens that it sampled."""
    pass_at_8: float | None
    pass_gain: Interval
    distinct: float | None
    distinct_gain: Interval
    easiest: float | None
    """Accuracy of the easiest slice at the rollout budget."""
    easiest_change: Interval
    """That less its accuracy before training."""
    mixed: float | None
    """Share of groups that are neither all right nor all wrong."""
    seconds: float
    """Training time of the rollout budget."""
    value: dict[str, float | None]
    """Mean errors of the estimate at the rollout budget, by names such as `table band rank`."""
    tried: tuple[Tried, ...]
    """Every rate at which the arm was run, in order."""
    files: tuple[Run, ...]
    """Every run of the arm, those of the sweep included."""


def rows(suite_name: str, runs: Sequence[Run]) -> list[Row]:
    """Return the rows of a suite in the order of `ARMS`; none before `BASE` has a run of the comparison."""
    if suite_name.partition("-")[0] not in SUITES:
        return []
    suite = find(suite_name)
    chosen = {arm: found for arm in ARMS if (found := _of_arm(suite, arm, runs)) is not None}
    if BASE not in chosen:
        return []
    base = chosen[BASE][2]
    slice_name = easiest_slice(suite, base.values())
    files = {arm: tuple(run for run in runs if run["arm"] == arm) for arm in chosen}
    return [
        _row(arm, rate, tuning, mine, base, suite=suite, slice_name=slice_name, files=files[arm])
        for arm, (rate, tuning, mine) in chosen.items()
        if set(mine) & set(base)
    ]


def final(run: Run) -> dict[str, Any]:
    """Figures at the rollout budget; of a run that failed before it, those of its last point."""
    return run["at_budget"] or run["curve"][-1]


def gain(mine: Mapping[int, Run], others: Mapping[int, Run]) -> Interval:
    """Accuracy of `mine` above `others` at equal rollouts, paired by seed."""
    return statistics.paired([final(mine[s])["accuracy"] - final(others[s])["accuracy"] for s in _pairs(mine, others)])


def easiest_slice(suite: Suite, runs: Iterable[Run]) -> str:
    """Slice that shows forgetting: the suite's, or that of the highest mean accuracy before training."""
    starts = [run["curve"][0]["slices"] for run in runs]
    if suite.easiest:
        return suite.easiest
    return max(sorted(starts[0]), key=lambda name: sum(start[name] or 0.0 for start in starts))


def _of_arm(suite: Suite, arm: str, runs: Sequence[Run]) -> tuple[float, str, dict[int, Run]] | None:
    """Rate of an arm, how it was found, and the runs of the comparison at it by seed; None without any.

    Without a sweep it is the rate with most seeds.
    """
    mine = [run for run in runs if run["arm"] == arm]
    comparison = [run for run in mine if run["seed"] < SWEEP_SEEDS[0]]
    sweep = [run for run in mine if run["seed"] >= SWEEP_SEEDS[0]]
    rate, tuning = schedule.tuned_rate(suite, sweep), "tuned"
    if rate is not None and rate in (min(run["rate"] for run in sweep), max(run["rate"] for run in sweep)):
        tuning = "tuned (at the edge)"
    if rate is None or all(run["rate"] != rate for run in comparison):
        rates = sorted(run["rate"] for run in comparison)
        rate, tuning = (max(rates, key=rates.count), "untuned") if rates else (None, "")
    found = {run["seed"]: run for run in comparison if run["rate"] == rate}
    return (rate, tuning, dict(sorted(found.items()))) if rate is not None else None


def _row(
    arm: str,
    rate: float,
    tuning: str,
    mine: dict[int, Run],
    base: dict[int, Run],
    *,
    suite: Suite,
    slice_name: str,
    files: tuple[Run, ...],
) -> Row:
    pairs = _pairs(mine, base)
    gains = [final(mine[seed])["accuracy"] - final(base[seed])["accuracy"] for seed in pairs]
    grid = np.linspace(0, suite.rollouts, _GRID)
    curves, base_curves = (np.stack([statistics.at(runs[s], "rollouts", grid) for s in pairs]) for runs in (mine, base))

    def easiest(point: Run) -> float | None:
        return point["slices"].get(slice_name)

    changes = [(easiest(final(run)), easiest(run["curve"][0])) for run in mine.values()]
    return Row(
        arm=arm,
        rate=rate,
        tuning=tuning,
        runs=mine,
        paired=tuple(pairs),
        accuracy=float(np.mean([final(run)["accuracy"] for run in mine.values()])),
        gain=statistics.paired(gains),
        wins=sum(one > 0 for one in gains),
        share=statistics.share_interval(grid, curves, base_curves),
        gain_at_seconds=statistics.paired(
            [found for s in pairs if (found := _at_seconds(mine[s], base[s])) is not None]
        ),
        gain_at_tokens=statistics.paired([_at_tokens(mine[seed], base[seed]) for seed in pairs]),
        pass_at_8=_mean(final(run)["pass_at_8"] for run in mine.values()),
        pass_gain=_against(mine, base, "pass_at_8"),
        distinct=_mean(final(run)["distinct_correct"] for run in mine.values()),
        distinct_gain=_against(mine, base, "distinct_correct"),
        easiest=_mean(easiest(final(run)) for run in mine.values()),
        easiest_change=statistics.paired([a - b for a, b in changes if a is not None and b is not None]),
        mixed=_mean(run["mixed_group_share"] for run in mine.values()),
        seconds=float(np.mean([final(run)["train_seconds"] for run in mine.values()])),
        value=_value(mine.values()),
        tried=_tried(files, base),
        files=files,
    )


def _tried(mine: Sequence[Run], base: dict[int, Run]) -> tuple[Tried, ...]:
    """All runs of an arm by their rate."""
    found = []
    for rate in sorted({run["rate"] for run in mine}):
        sweep = [run for run in mine if run["rate"] == rate and run["seed"] >= SWEEP_SEEDS[0]]
        compared = {run["seed"]: run for run in mine if run["rate"] == rate and run["seed"] in base}
        found.append(
            Tried(
                rate=rate,
                sweep_accuracy=_mean(schedule.final_accuracy(run) for run in sweep),
                sweep_pass_at_8=_mean(final(run)["pass_at_8"] for run in sweep),
                seeds=len(compared),
                accuracy=_mean(final(run)["accuracy"] for run in compared.values()),
                gain=gain(compared, base),
                pass_gain=_against(compared, base, "pass_at_8"),
                distinct_gain=_against(compared, base, "distinct_correct"),
            )
        )
    return tuple(found)


def _against(mine: Mapping[int, Run], base: Mapping[int, Run], figure: str) -> Interval:
    """A figure at the rollout budget less that of `base`, of the pairs that have both."""
    both = [(final(mine[seed])[figure], final(base[seed])[figure]) for seed in _pairs(mine, base)]
    return statistics.paired([a - b for a, b in both if a is not None and b is not None])


def _pairs(mine: Mapping[int, Run], others: Mapping[int, Run]) -> list[int]:
    return sorted(set(mine) & set(others))


def _at_seconds(run: Run, base: Run) -> float | None:
    """Gain at the training time of `BASE`; None for a pair from different processors, or when that run of `BASE` gave
    another time budget."""
    if run["arm"] == BASE:
        return 0.0
    budget = run["time_budget"]
    if budget is None or not budget["on_this_processor"] or run["at_seconds"] is None:
        return None
    if budget["seconds"] != final(base)["train_seconds"]:
        return None
    return run["at_seconds"]["accuracy"] - final(base)["accuracy"]


def _at_tokens(run: Run, base: Run) -> float:
    where = np.array([final(base)["tokens"]])
    return float(statistics.at(run, "tokens", where)[0]) - final(base)["accuracy"]


def _value(runs: Iterable[Run]) -> dict[str, float | None]:
    ends = [{place: found.get("end") for place, found in run["value"].items()} for run in runs]
    return {
        f"{place} {part} {figure}": _mean(end[place][part][figure] for end in ends if end[place])
        for place in ("held_out", "table")
        for part in ("whole", "band")
        for figure in ("ece", "brier", "rank")
    }


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None

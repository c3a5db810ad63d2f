"""What the method promises, and whether it was met: each goal with its figure, from the run files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.training.efficiency import summary
from benchmarks.training.efficiency.statistics import Interval
from benchmarks.training.efficiency.suites import find
from benchmarks.training.efficiency.summary import Row

METHOD = "groups_of_4"
"""Arm that the goals are about: the presets' default."""
Verdict = tuple[str, bool | None]
"""The figure as text, and whether it meets the goal; None for not measured."""


@dataclass(frozen=True)
class Goal:
    """One promise."""

    words: str
    wanted: str
    judge: Callable[[Row, Mapping[str, Row]], Verdict]
    other: str = summary.BASE
    """Arm that the method is compared with."""


def _at_most(interval: Interval, limit: float) -> Verdict:
    if interval.mean is None:
        return "not reached", False
    return shown(interval, ".2f"), interval.mean <= limit


def _at_least(interval: Interval, limit: float) -> Verdict:
    return (shown(interval, "+.3f"), interval.mean >= limit) if interval.mean is not None else ("", None)


def _above_0(interval: Interval) -> Verdict:
    return (shown(interval, "+.3f"), interval.claim == "ahead") if interval.low is not None else ("", None)


def _not_below(interval: Interval) -> Verdict:
    return (shown(interval, "+.3f"), interval.claim != "behind") if interval.low is not None else ("", None)


def _figure(row: Row, key: str, meets: Callable[[float], bool]) -> Verdict:
    value = row.value[key]
    return (f"{value:.3f}", meets(value)) if value is not None else ("", None)


def _against(other: str, rows: Mapping[str, Row], row: Row) -> Verdict:
    return _above_0(summary.gain(row.runs, rows[other].runs)) if other in rows else ("", None)


def _kept(row: Row, least: float) -> Verdict:
    return (f"{row.easiest:.3f}", row.easiest >= least) if row.easiest is not None else ("", None)


_COMMON = (
    Goal("pass@8 against GRPO", "not below", lambda row, _: _not_below(row.pass_gain)),
    Goal("distinct correct answers against GRPO", "not below", lambda row, _: _not_below(row.distinct_gain)),
    Goal("ECE on held-out prompts", "<= .05", lambda row, _: _figure(row, "held_out whole ece", lambda x: x <= 0.05)),
    Goal("rank on held-out prompts", ">= .75", lambda row, _: _figure(row, "held_out whole rank", lambda x: x >= 0.75)),
    Goal("rank on the training table", ">= .85", lambda row, _: _figure(row, "table whole rank", lambda x: x >= 0.85)),
    Goal("the same inside the band", ">= .70", lambda row, _: _figure(row, "table band rank", lambda x: x >= 0.7)),
    Goal("ahead of MoPPS, equal rollouts", "interval above 0", lambda row, rows: _against("mopps", rows, row), "mopps"),
    Goal("ahead of PCL, equal rollouts", "interval above 0", lambda row, rows: _against("pcl", rows, row), "pcl"),
)
_LARGER = (
    Goal("rollouts to GRPO's final accuracy", "<= .50", lambda row, _: _at_most(row.share, 0.5)),
    Goal("accuracy above GRPO, equal rollouts", "interval above 0", lambda row, _: _above_0(row.gain)),
    Goal("the same at equal training time", "interval above 0", lambda row, _: _above_0(row.gain_at_seconds)),
    Goal("easiest slice against its start", ">= -.02", lambda row, _: _at_least(row.easiest_change, -0.02)),
    *_COMMON,
)
GOALS: dict[str, tuple[Goal, ...]] = {
    "tiny": (
        Goal("rollouts to GRPO's final accuracy", "<= .33", lambda row, _: _at_most(row.share, 0.33)),
        Goal("accuracy above GRPO, equal rollouts", ">= +.15", lambda row, _: _at_least(row.gain, 0.15)),
        Goal("the same at equal training time", ">= +.08", lambda row, _: _at_least(row.gain_at_seconds, 0.08)),
        Goal("trivial slice at the end", ">= .96", lambda row, _: _kept(row, 0.96)),
        *_COMMON,
    ),
    "small": _LARGER,
    "smollm2": _LARGER,
}
"""Goals by suite."""


def verdicts(suite_name: str, rows: list[Row]) -> list[tuple[Goal, str, str]]:
    """Each goal of a suite with its figure, and met, missed or not measured and why.

    A goal counts as measured when the method and the arm it is compared with have a tuned learning rate and all seeds.
    """
    by_arm = {row.arm: row for row in rows}
    row = by_arm.get(METHOD)
    found = []
    for goal in GOALS[suite_name]:
        figure, met = goal.judge(row, by_arm) if row is not None else ("", None)
        if row is None or met is None:
            word = "not measured"
        elif (lacking := _lacking(suite_name, by_arm, goal.other)) is not None:
            word = f"not measured ({lacking})"
        else:
            word = "met" if met else "missed"
        found.append((goal, figure, word))
    return found


def claim(suite_name: str, rows: list[Row]) -> str:
    """One sentence on what the runs of a suite show of the method; empty without a run of it."""
    row = next((row for row in rows if row.arm == METHOD), None)
    if row is None:
        return ""
    words = {"ahead": "ahead of GRPO", "behind": "behind GRPO", "not told apart": "not told apart from GRPO"}
    found = [words.get(one.claim) for one in (row.gain, row.gain_at_seconds)]
    if found[0] is None:
        return f"On `{suite_name}` one seed was run, which shows nothing."
    at_seconds = f"{found[1]} at equal training time" if found[1] else "not measured at equal training time"
    return f"On `{suite_name}` PACED-RL is {found[0]} at equal rollouts and {at_seconds} ({len(row.paired)} seeds)."


def _lacking(suite_name: str, rows: Mapping[str, Row], other: str) -> str | None:
    """What a comparison still lacks before it can be judged."""
    wanted = find(suite_name).seeds
    untuned = [name for name in (other, METHOD) if rows[name].tuning == "untuned"]
    seeds = len(set(rows[METHOD].runs) & set(rows[other].runs))
    if seeds < wanted:
        return f"{seeds} of {wanted} seeds"
    return f"{' and '.join(untuned)} untuned" if untuned else None


def shown(interval: Interval, spec: str) -> str:
    """Format a mean with its interval."""
    if interval.mean is None:
        return "-"
    if interval.low is None and interval.high is None:
        return f"{interval.mean:{spec}}"
    low, high = (format(end, spec) if end is not None else "never" for end in (interval.low, interval.high))
    return f"{interval.mean:{spec}} [{low}, {high}]"

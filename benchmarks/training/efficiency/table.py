"""Tables of the comparison as Markdown, from the run files alone: the same files give the same text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.pages.words import wrapped
from benchmarks.training.efficiency import goals, summary
from benchmarks.training.efficiency.arms import ARMS, BASE
from benchmarks.training.efficiency.goals import shown
from benchmarks.training.efficiency.suites import Suite
from benchmarks.training.efficiency.summary import Row

COLUMNS = (
    "arm",
    "accuracy",
    "above GRPO",
    "",
    "wins",
    "rollouts to GRPO's final",
    "above GRPO, equal time",
    "above GRPO, equal tokens",
    "pass@8",
    "distinct",
    "easiest slice",
    "mixed groups",
    "seconds",
    "learning rate",
)
SHORT = ("grpo", goals.METHOD, "paced_paper", "mopps", "pcl", "flowrl")
"""Arms of the short table."""
_SHORT_COLUMNS = (
    "suite",
    "arm",
    "accuracy",
    "above GRPO",
    "rollouts to GRPO's final",
    "above GRPO, equal time",
    "seeds",
)
_VALUE_COLUMNS = (
    "arm",
    "held out: ECE",
    "Brier",
    "rank",
    "rank in the band",
    "training table: ECE",
    "Brier",
    "rank",
    "rank in the band",
)
_TRIED_COLUMNS = (
    "arm",
    "learning rate",
    "sweep: accuracy",
    "pass@8",
    "seeds",
    "accuracy",
    "above GRPO",
    "pass@8 above GRPO",
    "distinct above GRPO",
)
_VALUE_KEYS = tuple(
    f"{place} {figure}"
    for place in ("held_out", "table")
    for figure in ("whole ece", "whole brier", "whole rank", "band rank")
)


def full(suite_name: str, rows: list[Row], picture: str = "") -> str:
    """Everything about one suite: the arms, the estimates, the goals, and where it was measured."""
    if not rows:
        return f"No runs of the suite `{suite_name}` yet.\n\n{_goals(suite_name, rows)}".rstrip()
    parts = [
        goals.claim(suite_name, rows),
        _markdown(COLUMNS, [_cells(row) for row in rows]),
        wrapped(_note(suite_name, rows)),
        "\n".join(wrapped(f"* {ARMS[row.arm].title}: {ARMS[row.arm].words}.", "  ") for row in rows),
        _markdown(_VALUE_COLUMNS, [cells for row in rows if (cells := _value_cells(row))]),
        _goals(suite_name, rows),
        *_tried(rows),
    ]
    warnings = _warnings(rows)
    parts += ["\n".join(f"* {line}" for line in warnings)] if warnings else []
    parts += [f"![learning curves]({picture})"] if picture else []
    return "\n\n".join(part for part in parts if part)


def short(suites: dict[str, list[Row]]) -> str:
    """The arms that matter most, of every suite in one table."""
    found, missing, notes, claims = [], [], [], []
    for suite_name, rows in suites.items():
        if not rows:
            missing.append(f"`{suite_name}`")
            continue
        for row in (row for row in rows if row.arm in SHORT):
            gains = ("", "1", "") if row.arm == BASE else _against_base(row)
            count = f"{len(row.runs)}" + ("" if row.tuning != "untuned" else ", untuned")
            title = ARMS[row.arm].title
            found.append((suite_name, title, f"{row.accuracy:.3f}", gains[0], gains[1], gains[2], count))
        claims.append(goals.claim(suite_name, rows))
        notes.append(f"`{suite_name}`: {provenance([run for row in rows for run in row.files])}.")
    parts = [wrapped(" ".join(claims)), _markdown(_SHORT_COLUMNS, found)] if found else []
    if missing:
        parts.append(f"No runs yet: {', '.join(missing)}.")
    if found:
        notes.insert(0, "Means over seeds, differences paired by seed, 90 % bootstrap intervals over seeds.")
        parts.append(wrapped(" ".join(notes)))
    return "\n\n".join(part for part in parts if part)


def provenance(runs: Sequence[dict[str, Any]]) -> str:
    """Commits, processors and versions of runs, each with its number of runs where there are several."""
    found = [run["environment"] for run in runs]
    commits = [f"{one['commit']}{' with changes' if one['uncommitted_changes'] else ''}" for one in found]
    processors = [f"{one['gpu'] or one['cpu']}, {one['cores']} cores" for one in found]
    torch = [f"torch {one['versions']['torch']}" for one in found]
    dates = sorted(one["date"] for one in found)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return "; ".join([days, f"commit {_counted(commits)}", _counted(processors), _counted(torch)])


def _against_base(row: Row) -> tuple[str, str, str]:
    share = shown(row.share, ".2f") if row.share.mean is not None else "not reached"
    return shown(row.gain, "+.3f"), share, shown(row.gain_at_seconds, "+.3f")


def _cells(row: Row) -> list[str]:
    is_base = row.arm == BASE
    gain, share, at_seconds = ("", "1", "") if is_base else _against_base(row)
    marked = "" if row.tuning == "tuned" else f" {row.tuning.removeprefix('tuned ')}"
    return [
        ARMS[row.arm].title,
        f"{row.accuracy:.3f}",
        gain,
        "" if is_base else row.gain.claim,
        "" if is_base else f"{row.wins}/{len(row.paired)}",
        share,
        at_seconds,
        "" if is_base else shown(row.gain_at_tokens, "+.3f"),
        _optional(row.pass_at_8, ".3f") + ("" if is_base else f" ({_optional(row.pass_gain.mean, '+.3f')})"),
        _optional(row.distinct, ".2f") + ("" if is_base else f" ({_optional(row.distinct_gain.mean, '+.2f')})"),
        f"{_optional(row.easiest, '.3f')} ({_optional(row.easiest_change.mean, '+.3f')})",
        _optional(row.mixed, ".2f"),
        f"{row.seconds:.1f}",
        f"{row.rate:g}{marked}",
    ]


def _value_cells(row: Row) -> list[str]:
    figures = [row.value[key] for key in _VALUE_KEYS]
    if all(figure is None for figure in figures):
        return []
    return [ARMS[row.arm].title, *(_optional(figure, ".3f") for figure in figures)]


def _tried(rows: list[Row]) -> list[str]:
    """Every rate of every arm, if any was run at a second one."""
    if all(len(row.tried) < 2 for row in rows):
        return []
    cells = [
        (
            ARMS[row.arm].title,
            f"{one.rate:g}{' (chosen)' * (one.rate == row.rate)}",
            _optional(one.sweep_accuracy, ".3f"),
            _optional(one.sweep_pass_at_8, ".3f"),
            f"{one.seeds or '-'}",
            _optional(one.accuracy, ".3f"),
            *(
                "" if (row.arm, one.rate) == (BASE, row.rate) else shown(each, "+.3f")
                for each in (one.gain, one.pass_gain, one.distinct_gain)
            ),
        )
        for row in rows
        for one in row.tried
    ]
    words = """Every learning rate that was tried. The sweep, on seeds of its own, chooses by accuracy alone; `seeds`
        and what follows are runs of the comparison, against GRPO at its chosen rate."""
    return [wrapped(words), _markdown(_TRIED_COLUMNS, cells)]


def _goals(suite_name: str, rows: list[Row]) -> str:
    if suite_name not in goals.GOALS:
        return ""
    found = goals.verdicts(suite_name, rows)
    cells = [(goal.words, goal.wanted, figure, word) for goal, figure, word in found]
    return _markdown(("goal", "wanted", "measured", ""), cells)


def _note(suite_name: str, rows: list[Row]) -> str:
    base = next(row for row in rows if row.arm == BASE)
    first = next(iter(base.runs.values()))
    suite = summary.find(suite_name)
    slice_name = summary.easiest_slice(suite, base.runs.values())
    start = sum(run["curve"][0]["accuracy"] for run in base.runs.values()) / len(base.runs)
    samples = first["curve"][0]["samples"]
    return f"""
        Held-out accuracy ({start:.3f} before training, {samples} completions for each prompt) after
        {suite.rollouts:,} rollouts, dropped ones included; {len(base.runs)} seeds, each with a warm start of its own
        that all arms share. `above GRPO`: mean paired difference with its 90 % bootstrap interval over seeds, and what
        the interval says. `rollouts to GRPO's final`: share of all rollouts after which the arm's mean curve is as high
        as GRPO's at its end; both curves are first made non-decreasing. `equal time`: after the training time of GRPO
        with the same seed{_clock(first)}.
        In brackets: pass@8 and distinct correct answers against GRPO, the slice `{slice_name}` against its start.
        {_uncounted(suite, rows)}The band are prompts with a measured accuracy of .06 to .94. {_scope(rows)}
        {provenance([run for row in rows for run in row.files])}."""


def _clock(run: dict[str, Any]) -> str:
    return ", in seconds of the processor" if run.get("clock") == "processor" else ""


def _uncounted(suite: Suite, rows: list[Row]) -> str:
    title = next((ARMS[row.arm].title for row in rows if ARMS[row.arm].by_oracle), None)
    if title is None:
        return ""
    return f"""`{title}` is no competitor: {suite.oracle_samples} completions of every training prompt, every
        {suite.oracle_every} steps, are not counted. """


def _scope(rows: list[Row]) -> str:
    untuned = [ARMS[row.arm].title for row in rows if row.tuning == "untuned"]
    if untuned:
        return f"Learning rates were not tuned for {', '.join(untuned)}."
    return "Learning rates were tuned for every arm with the same trials on seeds that are not used here."


def _warnings(rows: list[Row]) -> list[str]:
    """Warnings of runs, each once with its number, and runs that failed."""
    found = Counter(
        f"{ARMS[row.arm].title}: {text}"
        for row in rows
        for run in row.runs.values()
        for text in (*run["warnings"], *([f"failed, {run['failed']}"] if "failed" in run else []))
    )
    return [f"{text} ({count} runs)" if count > 1 else text for text, count in sorted(found.items())]


def _counted(names: Sequence[str]) -> str:
    counts = Counter(names)
    if len(counts) == 1:
        return names[0]
    return ", ".join(f"{name} ({counts[name]} run{'s' * (counts[name] > 1)})" for name in sorted(counts))


def _optional(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])

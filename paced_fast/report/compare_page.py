"""Comparison of several runs on one page: overlaid curves, figures side by side, and the settings that differ.

Runs that differ only in the seed form a group, whose curve is their mean over the range that all of them cover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from paced_fast.config.resuming import NOT_OF_TRAINING
from paced_fast.errors import InputError
from paced_fast.report.charts.chart import COLORS, PERCENT, Axis, Chart, Line, running_mean
from paced_fast.report.charts.held_out import (
    ROLLOUTS,
    SECONDS,
    chart_over_k,
    evaluation_line,
    largest_k,
    learning_lead,
    line_over_k,
)
from paced_fast.report.charts.renderer import draw
from paced_fast.report.figures_table import figures_table
from paced_fast.report.html import document, part, shown, write_page
from paced_fast.report.read_run import Run, read_run, series
from paced_fast.report.seeds import FEWEST, SeedGroup, grouped, mean_line


def compare(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page that compares run folders; return its path: `out`, or compare.html beside the first run.

    Raises InputError if a folder is not a run folder or is named twice.
    """
    paths = [Path(folder) for folder in folders]
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise InputError(f"{path} is named twice: give different run folders")
    runs = [read_run(path) for path in paths]
    target = Path(out) if out is not None else paths[0].resolve().parent / "compare.html"
    if target.is_dir():
        raise InputError(f"--out {target} is a folder: give the name of a file")
    write_page(target, page_of(runs))
    return target


def page_of(runs: Sequence[Run]) -> str:
    """Return the comparison as HTML."""
    groups = grouped(runs)
    learning, training = _learning(groups), _training(groups)
    drawn, _ = draw([*learning, *training])
    bodies = {
        "learning": part("figures", learning, drawn),
        "training": part("figures", training, drawn),
        "figures": figures_table(groups),
        "settings": _settings(groups),
        "runs": _runs(groups),
    }
    state = part("keys", [(_titled(group), i % COLORS) for i, group in enumerate(groups)])
    title = f"{len(runs)} runs compared"
    return document("compare.html", bodies, title=title, state=state, top="", lead=_lead(runs), fewest=FEWEST)


def _lead(runs: Sequence[Run]) -> str:
    """Introductory sentence: the one of the runs if they agree, else one that is true of any run."""
    leads = {learning_lead(run) for run in runs}
    return leads.pop() if len(leads) == 1 else "Measured on the held-out prompts."


def _titled(group: SeedGroup) -> str:
    return f"{group.name} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.name


def _lines(groups: Sequence[SeedGroup], line_of: Callable[[Run], Line | None]) -> tuple[list[Line], str]:
    """Return one curve per group (with the runs' curves if they are too few for a band), and a caption on bands."""
    lines, few, seeds, prompts = [], False, False, False
    for i, group in enumerate(groups):
        members = [line for run in group.runs if (line := line_of(run)) is not None]
        line = mean_line(members, name=group.name, color=i % COLORS)
        if line is None:
            continue
        lines.append(line)
        if 1 < len(members) < FEWEST:
            few = True
            runs = (run.name for run in group.runs if line_of(run) is not None)
            lines += [
                Line(name=name, x=one.x, y=one.y, color=i % COLORS, style="thin")
                for name, one in zip(runs, members, strict=True)
            ]
        seeds = seeds or len(members) >= FEWEST
        prompts = prompts or (len(members) == 1 and line.low is not None)
    words = ["Band of a single run: 95% interval over held-out prompts."] if prompts else []
    words += ["Band of a group: 95% t interval of the mean over its seeds."] if seeds else []
    words += ["Thin: single seeds; thick: their mean; no band, because there are too few seeds."] if few else []
    return lines, " ".join(words)


def _overlay(
    groups: Sequence[SeedGroup], name: str, title: str, axes: tuple[Axis, Axis], line_of: Callable[[Run], Line | None]
) -> list[Chart]:
    lines, caption = _lines(groups, line_of)
    if not lines:
        return []
    thick = [line for line in lines if line.style != "thin"]
    return [
        Chart(
            name=name,
            title=title,
            caption=caption,
            x=axes[0],
            y=axes[1],
            words=f"{title}: " + ", ".join(f"{line.name} ends at {axes[1].write(float(line.y[-1]))}" for line in thick),
            lines=lines,
            legend=[(line.name, line.color) for line in thick],
        )
    ]


def _learning(groups: Sequence[SeedGroup]) -> list[Chart]:
    def course(name: str, title: str, axis: Axis, key: str, *, clock: bool = False) -> list[Chart]:
        def line_of(run: Run) -> Line | None:
            return evaluation_line(run.evaluations, key, clock=clock, name="", color=0)

        return _overlay(groups, name, title, (axis, Axis(label=title.split()[1], unit=PERCENT)), line_of)

    charts = course("accuracy_rollouts", "Held-out accuracy against rollouts", ROLLOUTS, "accuracy")
    charts += course("accuracy_time", "Held-out accuracy against training time", SECONDS, "accuracy", clock=True)
    for key in ("pass_at_k", "maj_at_k"):
        lines, caption = _lines(groups, lambda run, key=key: _at_end(run, key))
        charts += chart_over_k(lines, key, f"At the end of each run. {caption}".rstrip())
    charts += course("pass_at_8", "Held-out pass@8 against rollouts", ROLLOUTS, "pass_at_8")
    k = largest_k([e.figures for group in groups for run in group.runs for e in run.evaluations], "maj_at_k")
    return charts + (course("maj", f"Held-out maj@{k} against rollouts", ROLLOUTS, f"maj_at_k/{k}") if k else [])


def _at_end(run: Run, key: str) -> Line | None:
    return line_over_k(run.evaluations[-1].figures, key, name="", color=0) if run.evaluations else None


def _training(groups: Sequence[SeedGroup]) -> list[Chart]:
    charts = []
    for key, title, axis in (
        ("reward_mean", "Mean reward of fresh rollouts", Axis()),
        ("mixed_group_share", "Mixed groups", Axis(low=0.0, high=1.0, unit=PERCENT)),
        ("value_brier", "Brier score of the value", Axis(low=0.0)),
        ("value_ece", "Expected calibration error of the value", Axis(low=0.0)),
        ("entropy", "Entropy (nats per token)", Axis(low=0.0)),
        ("tokens_per_second", "Tokens sampled per second", Axis(low=0.0)),
    ):
        charts += _overlay(groups, key, title, (ROLLOUTS, axis), lambda run, key=key: _smooth(run, key))
    return charts


def _smooth(run: Run, key: str) -> Line | None:
    """Running mean over 1/15 of the run, against rollouts."""
    x, y = series(run.records, key, x="rollouts")
    return Line(name=key, x=x, y=running_mean(y)) if x.size else None


# Settings


def _settings(groups: Sequence[SeedGroup]) -> Markup:
    configs = [group.runs[0].config for group in groups]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    missing = [group.name for group, config in zip(groups, configs, strict=True) if not config]
    rows = [
        [key, *(shown(config[key]) if key in config else "not set" for config in configs)]
        for key in keys
        if key != "seed"
        and not key.startswith(NOT_OF_TRAINING)
        and len({repr(config.get(key)) for config in configs}) > 1
    ]
    said = part("absent", f"no config.json: {', '.join(missing)}") if missing else Markup()
    if rows:
        return said + part("card", part("table", ["setting", *(group.name for group in groups)], rows))
    return said or part("absent", "none: the runs differ only in their seeds and folders")


def _runs(groups: Sequence[SeedGroup]) -> Markup:
    rows = [
        [
            group.name,
            str(run.folder),
            shown(run.config.get("seed")),
            f"{run.last_step:,}{'' if run.summary else ' (not finished)'}",
        ]
        for group in groups
        for run in group.runs
    ]
    return part("card", part("table", ["", "folder", "seed", "steps"], rows))

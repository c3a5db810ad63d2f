"""Report of one run: `report.html` and, for slides and papers, `plots/*.png`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from paced_fast.config.given import in_words
from paced_fast.config.presets import PRESETS
from paced_fast.config.presets.changed import changed_settings
from paced_fast.errors import InputError, counted
from paced_fast.evaluation.forgetting import change_interval, fallen_slices
from paced_fast.report.charts.chart import Axis, Chart, Line, merged, percent, seconds
from paced_fast.report.charts.held_out import (
    after_step,
    interval,
    largest_k,
    learning_charts,
    learning_lead,
    measured,
    scored_prompts,
    unscored_notes,
)
from paced_fast.report.charts.renderer import draw
from paced_fast.report.charts.training import generator_charts, health_charts, reward_charts, time_charts
from paced_fast.report.charts.value import replay_charts, schedule_charts, value_charts
from paced_fast.report.html import Tile, document, pairs_table, part, shown, write_page
from paced_fast.report.read_run import Record, Run, number, read_run, series
from paced_fast.report.sample_rollouts import groups_section, rollouts_section
from paced_fast.report.warning_tiles import LONGER, MAX_TOKEN_RATIO, MAX_TRUNCATED, recent_mean, warning_tiles

ARROW = "\u2192"
REFRESH_SECONDS = 15
"""Seconds after which the page of a run that goes on loads itself again."""

logger = logging.getLogger(__name__)


def try_report(run_dir: str | Path) -> None:
    """Write the report of a finished run; a failure is only logged, because the run is complete without it."""
    try:
        make_report(run_dir)
    except Exception as error:
        logger.warning("the report was not written (%r): try again by python -m paced_fast report %s", error, run_dir)


def make_report(run_dir: str | Path, *, pictures: bool = True) -> Path:
    """Draw every chart the run has data for, write `report.html`, and return its path.

    Without `pictures` only the page is written, and that of a run without a summary loads itself again: this is how a
    run writes it while it goes on.

    Raises InputError if the folder or its `metrics.jsonl` is missing, empty, or broken before its last line.
    """
    run = read_run(run_dir)
    path, folder = run.folder / "report.html", run.folder / "plots"
    page, drawn = report_of(run, pictures=pictures, refresh=0 if pictures or run.summary else REFRESH_SECONDS)
    write_page(path, page)
    if not pictures:
        return path
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} is not a folder, so no pictures were written: move it away") from error
    for name in PICTURES:
        picture = folder / f"{name}.png"
        if name in drawn:
            picture.write_bytes(drawn[name])
        else:  # a picture of an earlier report would contradict the page
            picture.unlink(missing_ok=True)
    return path


PICTURES = {
    "learning_curve": ("learning_rollouts", "pass_at_8"),
    "calibration": ("calibration_first", "calibration_last", "calibration_all"),
    "value_histogram": ("value_histogram",),
    "mixed_groups": ("mixed_groups",),
    "train_reward": ("train_reward",),
    "value_quality": ("value_brier", "value_ece", "value_rank_correlation"),
    "replay_priorities": ("replay_priorities",),
    "seconds_by_phase": ("seconds_by_phase",),
    "health": (
        *("loss", "grad_norm", "entropy", "mean_length", "truncated_share", "log_ratio_mean", "kl"),
        *("generator_mismatch_max", "tokens_per_second"),
    ),
}
"""Picture files (names without extension) and the charts in each, for a slide or a paper."""


def report_of(run: Run, *, pictures: bool = True, refresh: int = 0) -> tuple[str, dict[str, bytes]]:
    """Return the page as HTML, with every chart the run has data for, and pictures by the names in `PICTURES`.

    With `refresh` the page loads itself again after so many seconds.
    """
    charts = {
        "learning": learning_charts(run),
        "value": value_charts(run),
        "schedule": schedule_charts(run),
        "replay": replay_charts(run),
        "reward": reward_charts(run),
        "health": health_charts(run),
        "generator": generator_charts(run),
        "cost": time_charts(run),
    }
    named = {chart.name: chart for found in charts.values() for chart in found}
    wanted = {name: [named[key] for key in keys if key in named] for name, keys in PICTURES.items() if pictures}
    tiles = [*_tiles(run), *warning_tiles(run)]
    courses = [tile.course for tile in tiles if tile.course is not None]
    drawn, files = draw([*named.values(), *courses], {name: found for name, found in wanted.items() if found})
    bodies = {name: part("figures", found, drawn) for name, found in charts.items()}
    bodies["groups"] = groups_section(run.groups)
    bodies["rollouts"] = rollouts_section(run.rollouts)
    bodies["configuration"] = _configuration(run)
    bodies["summary"] = _summary(run)
    bodies["origin"] = _origin(run)
    top = part("tiles", tiles, drawn) + part("notes", _notes(run))
    about = {"title": run.name, "state": _state(run, goes_on=refresh > 0), "top": top, "lead": learning_lead(run)}
    page = document("run.html", bodies, refresh=refresh, **about)
    return page, files


def _summary(run: Run) -> Markup:
    """Figures before and after training side by side, and the others below them."""
    rows: list[list[str]] = []
    rest = dict(run.summary)
    for key in run.summary:
        ends = [f"{key.removesuffix('_before')}_{end}" for end in ("before", "after")]
        found = [run.summary.get(end) for end in ends]
        if key == ends[0] and not any(isinstance(value, list | Mapping) for value in found):
            rows.append([key.removesuffix("_before").replace("_", " "), *map(shown, found)])
            rest = {name: value for name, value in rest.items() if name not in ends}
    table = part("table", ["figure", "before", "after"], rows) if rows else Markup("")
    return part("card", table + pairs_table(rest), True)


def _origin(run: Run) -> Markup:
    """Versions, machine and command of the newest start, and when the others were."""
    if not run.starts:
        return Markup("")
    *earlier, newest = run.starts
    before = [f"{start.get('started', '-')} on {start.get('host', '-')}" for start in earlier]
    rows = {key: value for key, value in newest.items() if value is not None}
    return part("card", pairs_table(rows | ({"earlier starts": before} if before else {})), True)


def _state(run: Run, *, goes_on: bool) -> Markup:
    steps = number(run.config.get("steps"))
    if run.summary:
        badge, text = "finished", f"after {counted(run.last_step, 'step')}"
    else:
        badge, text = (
            "running" if goes_on else "not finished",
            f"step {run.last_step:,}" + (f" of {steps:,.0f}" if steps else ""),
        )
    facts = [f"{name} {in_words(run.config[key])}" for key, name in _FACTS.items() if run.config.get(key) is not None]
    return part("state", badge, text, facts)


_FACTS = {
    "preset": "preset",
    "algorithm": "algorithm",
    "model.name": "model",
    "scheduler.rule": "schedule",
    "seed": "seed",
    "model.device": "on",
}


def _tiles(run: Run) -> list[Tile]:
    evaluated = [e.figures for e in run.evaluations]
    k = largest_k([evaluated[0], evaluated[-1]] if evaluated else [], "maj_at_k")
    items = [
        *_change(run, "accuracy", "held-out accuracy"),
        *_change(run, "pass_at_8", "held-out pass@8"),
        *(_change(run, f"maj_at_k/{k}", f"held-out maj@{k}") if k else ()),
    ]
    last = run.records[-1]

    def latest(key: str) -> float | None:
        found = number(run.summary.get(key))
        return found if found is not None else next((y for y in reversed(series(run.records, key)[1].tolist())), None)

    mixed = latest("mixed_group_share")
    if mixed is not None:
        course = _spark(run, "mixed_group_share")
        items.append(Tile(name="mixed groups", text=percent(mixed), sub="right and wrong completions", course=course))
    rank = latest("value_rank_correlation")
    if rank is not None:
        scores = {"Brier": latest("value_brier"), "ECE": latest("value_ece")}
        sub = ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if score is not None)
        sub += " on held-out prompts" if sub and number(run.summary.get("value_ece")) is not None else ""
        course = _spark(run, "value_rank_correlation")
        items.append(Tile(name="value rank correlation", text=f"{rank:.2f}", sub=sub, course=course))
    rollouts, spent = number(last.get("rollouts")), number(last.get("train_seconds"))
    if rollouts:
        items.append(Tile(name="rollouts", text=f"{rollouts:,.0f}", sub=f"in {counted(run.last_step, 'step')}"))
    if spent:
        rate = latest("tokens_per_second")
        sub = f"{rate:,.0f} tokens per second" if rate is not None else ""
        items.append(Tile(name="training time", text=seconds(spent), sub=sub))
    return items


def _spark(run: Run, key: str) -> Chart | None:
    """Small curve of a figure, for its tile."""
    x, y = series(run.records, key)
    if x.size < 3:
        return None
    x, columns = merged(x, y[:, None], 40)
    line = Line(name=key, x=x, y=columns[:, 0])
    return Chart(
        name=f"spark_{key}", title="", x=Axis(), y=Axis(), words="", lines=[line], bare=True, width=100, height=26
    )


def _change(run: Run, key: str, name: str) -> list[Tile]:
    evaluations = [e.figures for e in run.evaluations]
    found = [number(run.summary.get(f"{key}_{end}")) for end in ("before", "after")]
    for i, evaluated in enumerate((evaluations[0], evaluations[-1]) if evaluations else ()):
        found[i] = measured(evaluated, key) if found[i] is None else found[i]
    before, after = found
    if after is None:
        return []
    text = percent(after) if before is None or len(evaluations) == 1 else f"{percent(before)} {ARROW} {percent(after)}"
    ends = [f"{100 * end:.1f}" for end in (interval(evaluations[-1], key) if evaluations else ())]
    subs: list[str] = []
    both = before is not None and len(evaluations) != 1
    if before is not None and both:
        points = round(100 * (after - before), 1) + 0.0  # so that no change is not "-0.0"
        direction = _direction(evaluations, key)
        moved = f"{points:+.1f} points" if direction != "" else f"{points:+.1f} points, within the noise"
        subs.append(Markup('<span class="{}">{}</span>').format(direction, moved) if direction else moved)
    if "nan" not in ends and ends:
        subs.append(f"95% interval: {ends[0]} to {ends[1]}%{f' {after_step(run.evaluations[-1])}' if both else ''}")
    if both and evaluations and scored_prompts(evaluations[0]) != scored_prompts(evaluations[-1]):
        subs.append("on different scored prompts")
    return [Tile(name=name, text=text, sub=Markup("; ").join(subs))]


def _direction(evaluations: Sequence[Record], key: str) -> str | None:
    """Whether a figure went "up" or "down" by more than its noise; "" if it did not, None if its noise is unknown.

    Accuracy is compared prompt by prompt; of other figures the intervals of both evaluations must be apart.
    """
    if not evaluations:
        return None
    first, last = evaluations[0], evaluations[-1]
    change = change_interval(first, last) if key == "accuracy" else None
    if change is None:
        before, after = interval(first, key), interval(last, key)
        change = (after[0] - before[1], after[1] - before[0])
    if not math.isfinite(sum(change)):
        return None
    return "up" if change[0] > 0 else "down" if change[1] < 0 else ""


def _notes(run: Run) -> list[str]:
    """Notes on problems of a run; empty if there are none."""
    records, lines = run.records, unscored_notes(run)

    steps = sum(1 for r in records if number(r.get("step")))
    last = "the first step" if steps == 1 else f"the last {min(10, steps)} steps"

    def last_mean(key: str) -> float:
        return recent_mean(run, key) or 0.0

    skipped = max((number(r.get("skipped_steps")) or 0.0 for r in records), default=0.0)
    if skipped:
        were = "was" if skipped == 1 else "were"
        lines.append(f"{counted(int(skipped), 'step')} {were} skipped because loss or gradient was not finite.")
    if (share := last_mean("truncated_share")) > MAX_TRUNCATED:
        lines.append(f"{percent(share)} of the completions of {last} were cut at the length limit: {LONGER}.")
    if (ratio := last_mean("generator_mismatch_token_ratio")) > MAX_TOKEN_RATIO:
        lines.append(f"Generator and trainer disagree: token ratio {ratio:.3f} over {last}, above 1.05.")
    if len(run.evaluations) > 1:
        falls = fallen_slices(run.evaluations[0].figures, run.evaluations[-1].figures)
        lines += [f"S{str(fall)[1:]} since the start of training." for fall in falls]
    if (share := last_mean("unscored_share")) > 0.01:
        lines.append(f"{percent(share)} of the completions of {last} are unscored.")
    size = min(number(run.config.get("generation.group_size")) or 8, 8)  # smaller groups are mixed less often
    mixed = last_mean("mixed_group_share")
    if len(records) > 10 and series(records, "mixed_group_share")[0].size and mixed < 0.1 * size / 8:
        lines.append(f"{percent(1 - mixed)} of the groups of {last} were all right or all wrong and taught little.")
    return lines


def _configuration(run: Run) -> Markup:
    if not run.config:
        return part("absent", "not written yet")
    changed, decided = (
        [[name, shown(default) or "none", shown(value) or "none"] for name, (default, value) in found.items()]
        for found in changed_settings(run.config)
    )
    known = str(run.config.get("preset")) in PRESETS
    every = {name: in_words(value) for name, value in run.config.items()}
    return part("configuration", known, changed, decided, pairs_table(every))

"""One picture of a run, for a notebook or a slide."""

from __future__ import annotations

from pathlib import Path

from paced_fast.errors import InputError, nearest
from paced_fast.report.charts.held_out import learning_charts
from paced_fast.report.charts.renderer import draw
from paced_fast.report.charts.training import generator_charts, health_charts, reward_charts, time_charts
from paced_fast.report.charts.value import replay_charts, schedule_charts, value_charts
from paced_fast.report.read_run import read_run
from paced_fast.report.run_page import PICTURES

_MAKERS = (
    *(learning_charts, value_charts, schedule_charts, replay_charts),
    *(reward_charts, health_charts, generator_charts, time_charts),
)


def picture(folder: str | Path, name: str) -> bytes:
    """Return the picture of that name in `PICTURES`, as PNG.

    Raises InputError for another name, for a folder that is no run folder, and for a run without figures for it.
    """
    if name not in PICTURES:
        raise InputError(f"no picture {name!r}{nearest(name, list(PICTURES))}: the pictures are {', '.join(PICTURES)}")
    run = read_run(folder)
    named = {chart.name: chart for make in _MAKERS for chart in make(run)}
    charts = [named[key] for key in PICTURES[name] if key in named]
    drawn = draw([], {name: charts})[1] if charts else {}
    if name not in drawn:
        raise InputError(f"{run.folder} has no figures for {name} yet: wait for more steps, or draw another picture")
    return drawn[name]

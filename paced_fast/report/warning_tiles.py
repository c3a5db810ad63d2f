"""Tiles that warn: forgetting, calibration, cut completions, and the mismatch of generator and trainer."""

from __future__ import annotations

import numpy as np

from paced_fast.errors import counted
from paced_fast.evaluation.calibration import expected_calibration_error
from paced_fast.evaluation.forgetting import can_compare, fallen_slices
from paced_fast.report.charts.chart import percent
from paced_fast.report.charts.value import forecasts
from paced_fast.report.html import Tile
from paced_fast.report.read_run import Run, series

MAX_ECE = 0.15
"""Calibration error of the value above which its tile warns; the noise of 100 groups alone makes about 0.05."""
MAX_TRUNCATED = 0.2
"""Share of cut completions above which a tile and a note warn."""
MAX_TOKEN_RATIO = 1.05
"""Mismatch of generator and trainer above which a tile and a note warn: the bound of the guard's default."""
LONGER = "raise --generation.max-completion-tokens, or ask for short answers"
"""Remedy for completions that are cut."""
_STEPS = 10


def warning_tiles(run: Run) -> list[Tile]:
    """Tiles of the figures that say that something goes wrong; each is there if the run measures it."""
    return [*_forgetting(run), *_calibration(run), *_truncated(run), *_mismatch(run)]


def recent_mean(run: Run, key: str) -> float | None:
    """Mean of a figure over the last ten steps; None if the run lacks it."""
    y = series(run.records, key)[1][-_STEPS:]
    return float(y.mean()) if y.size else None


def _forgetting(run: Run) -> list[Tile]:
    evaluations = run.evaluations
    if len(evaluations) < 2 or not can_compare(evaluations[0].figures, evaluations[-1].figures):
        return []
    falls = fallen_slices(evaluations[0].figures, evaluations[-1].figures)
    if not falls:
        return [Tile(name="forgetting", text="none", sub="no slice fell by more than its noise")]
    worst = falls[0]
    others = f"; {len(falls) - 1} more fell" if len(falls) > 1 else ""
    sub = (
        f"slice {worst.slice}: {100 * worst.change:+.1f} points{others}; a lower --optimizer.learning-rate forgets less"
    )
    return [Tile(name="forgetting", text=f"{percent(worst.before)} \u2192 {percent(worst.after)}", sub=sub, warns=True)]


def _calibration(run: Run) -> list[Tile]:
    steps = forecasts(run.records)[-_STEPS:]
    if not steps:
        return []
    value, accuracy = (np.concatenate(column) for column in zip(*steps, strict=True))
    ece = expected_calibration_error(value, accuracy)
    warns = ece > MAX_ECE and len(steps) == _STEPS  # the head has not learned anything in the first ones
    sub = f"ECE of the value over {counted(value.size, 'group')} of the last {counted(len(steps), 'step')}"
    remedy = "; lower --log-z.learning-rate" if warns else ""
    return [Tile(name="calibration error", text=f"{ece:.3f}", sub=sub + remedy, warns=warns)]


def _truncated(run: Run) -> list[Tile]:
    share = recent_mean(run, "truncated_share")
    if share is None:
        return []
    warns = share > MAX_TRUNCATED
    sub = f"at the length limit{f': {LONGER}' if warns else ''}"
    return [Tile(name="cut completions", text=percent(share), sub=sub, warns=warns)]


def _mismatch(run: Run) -> list[Tile]:
    ratio = recent_mean(run, "generator_mismatch_token_ratio")
    if ratio is None:
        return []
    warns = ratio > MAX_TOKEN_RATIO
    sub = f"probability of a token, generator against trainer{'; correct by --mismatch.mode' if warns else ''}"
    return [Tile(name="mismatch", text=f"{percent(ratio - 1)}", sub=sub, warns=warns)]

"""Group runs that differ only in the seed: name of the group, mean of its curves, and interval of that mean."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paced_fast.config.resuming import NOT_OF_TRAINING
from paced_fast.report.charts.chart import Line
from paced_fast.report.read_run import Floats, Run

FEWEST = 3
"""Fewest seeds for an interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedGroup:
    """Runs that differ only in the seed, under a unique name."""

    name: str
    runs: Sequence[Run]


def grouped(runs: Sequence[Run]) -> list[SeedGroup]:
    """Group runs that differ only in the seed, in order of each group's first run."""
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        same = {
            key: value for key, value in run.config.items() if key != "seed" and not key.startswith(NOT_OF_TRAINING)
        }
        groups.setdefault(repr(sorted(same.items(), key=str)) if same else f"unknown {i}", []).append(run)
    names: list[str] = []
    for members in groups.values():
        name = members[0].name if len(members) == 1 else _common(members)
        names.append(name if name not in names else f"{name} ({members[0].folder})")
    return [SeedGroup(name=name, runs=members) for name, members in zip(names, groups.values(), strict=True)]


def _common(runs: Sequence[Run]) -> str:
    """Name of a group: the common prefix of its runs' names, else preset and algorithm."""
    first, *others = (run.name for run in runs)
    if all(name == first for name in others):
        return first
    length = next((i for i, char in enumerate(first) if any(o[i : i + 1] != char for o in others)), len(first))
    # Drop trailing digits (the 1 of seed1 and seed12 is not common), then the uninformative word "seed".
    shared = re.sub(r"(^|[-_. ])(seed|s)$", "", first[:length].rstrip("0123456789-_. ")).rstrip("-_. ")
    if len(shared) > 1:
        return shared
    about = [str(value) for key in ("preset", "algorithm") if (value := runs[0].config.get(key)) is not None]
    return " ".join(about) or f"like {first}"


def t_error(values: Floats) -> Floats:
    """Half-width of the 95 % interval of the mean over the first axis (Student's t); nan with fewer than two values."""
    n = values.shape[0]
    if n < 2:
        return np.full(values.shape[1:], np.nan)
    return t_quantile(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t to three decimals."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, n = 1.959964, float(freedom)  # first terms of its expansion around the normal quantile
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def mean_line(lines: Sequence[Line], *, name: str, color: int) -> Line | None:
    """Mean of linearly interpolated curves, over the range that all of them cover.

    With at least `FEWEST` curves it has the 95 % interval of the mean; a single curve keeps its own interval.
    """
    lines = [line for line in lines if line.x.size]
    if not lines:
        return None
    if len(lines) == 1:
        (one,) = lines
        dots = one.x.size < 40
        return Line(name=name, x=one.x, y=one.y, low=one.low, high=one.high, color=color, style="thick", dots=dots)
    start, end = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    x = np.unique(np.concatenate([line.x for line in lines]))
    x = x[(x >= start) & (x <= end)]
    if not x.size:
        return None
    found = np.stack([np.interp(x, line.x, line.y) for line in lines])
    mean, dots = found.mean(axis=0), x.size < 40
    error = t_error(found) if len(lines) >= FEWEST else None
    low, high = (None, None) if error is None else (mean - error, mean + error)
    return Line(name=name, x=x, y=mean, low=low, high=high, color=color, style="thick", dots=dots)

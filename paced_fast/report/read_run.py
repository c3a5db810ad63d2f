"""Read a run folder without trusting its contents: any number may be missing, null or of another type.

Needs no tensor library. A file of a run still in progress may end in an incomplete line, which is ignored.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paced_fast.data.step_record import KEYS
from paced_fast.errors import InputError

Record = Mapping[str, object]
Floats = NDArray[np.float64]

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
"""Invisible or misleading characters: control characters, changes of text direction, lone surrogates."""
_NEWEST_ROLLOUTS = 2000
"""Number of lines read from the end of rollouts.jsonl."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out evaluation, and when it was made."""

    step: float
    rollouts: float
    seconds: float
    figures: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Contents of a run folder."""

    folder: Path
    records: list[Record]
    """Lines of metrics.jsonl in order, at least one; unknown keys are left out."""
    summary: Record = field(default_factory=dict)
    """Contents of summary.json; empty until the run has ended."""
    config: Record = field(default_factory=dict)
    """Contents of config.json by dotted names; empty if the file is missing."""
    rollouts: list[Record] = field(default_factory=list)
    """Newest lines of rollouts.jsonl, in order."""
    groups: list[Record] = field(default_factory=list)
    """Contents of groups.json: whole groups that are worth reading; empty if there are none."""
    starts: list[Record] = field(default_factory=list)
    """Contents of origin.json: versions, machine and command of each start, in order."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def evaluations(self) -> list[Evaluated]:
        """All evaluations in order of step."""
        return [
            Evaluated(
                step=number(r.get("step")) or 0.0,
                rollouts=number(r.get("rollouts")) or 0.0,
                seconds=number(r.get("train_seconds")) or 0.0,
                figures=figures,
            )
            for r in self.records
            if (figures := mapping(r.get("eval")))
        ]

    @property
    def last_step(self) -> int:
        """Step of the newest record."""
        return int(number(self.records[-1].get("step")) or 0)


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises InputError if it or its `metrics.jsonl` is missing, empty or corrupt."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder {folder}: give a run folder")
    return Run(
        folder=folder,
        records=_metrics(folder / "metrics.jsonl"),
        summary=_json(folder / "summary.json"),
        config=flatten(_json(folder / "config.json")),
        rollouts=list(_rollouts(folder / "rollouts.jsonl")),
        groups=_rows(folder / "groups.json"),
        starts=_rows(folder / "origin.json"),
    )


def _metrics(path: Path) -> list[Record]:
    if not path.exists():
        raise InputError(f"no {path.name} in {path.parent}: give a run folder, or wait for the run's first record")
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    records: list[Record] = []
    for index, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if index == len(lines):  # a running or killed writer leaves an incomplete last line
                break
            raise InputError(f"{path}:{index} is not JSON: {error}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise InputError(f"{path}:{index} is not a metrics record: it has no step")
        records.append({key: value for key, value in record.items() if key in KEYS})
    if not records:
        raise InputError(f"{path} has no record yet: wait for the first step")
    return records


def _json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return obj if isinstance(obj, dict) else {path.stem: obj}


def _rows(path: Path) -> list[Record]:
    """A list of objects; empty if the file is missing or is no such list, because a page can do without."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _rollouts(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            tail = deque(file, maxlen=_NEWEST_ROLLOUTS)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    for line in tail:
        try:
            row = json.loads(line)
        except ValueError:  # only the last line can be incomplete, and this is only a sample
            continue
        if isinstance(row, dict):
            yield row


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested mappings into one with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def mapping(x: object) -> Record:
    """Return `x` if it is a mapping, else an empty one."""
    return x if isinstance(x, Mapping) else {}


def number(x: object) -> float | None:
    """Return `x` as a float; None if it is not a number, not finite, or too large to draw."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < 1e30:
        return None
    return float(x)


def numbers(x: object) -> Floats:
    """Convert a list to floats. Null becomes nan, so that two lists over the same groups stay aligned."""
    found = [number(y) for y in x] if isinstance(x, list) else []
    return np.array([np.nan if y is None else y for y in found], np.float64)


def series(records: Sequence[Record], *keys: str, x: str = "step") -> tuple[Floats, Floats]:
    """Return x and y of the step records that have both; several keys form a path into nested mappings."""
    points = []
    for record in records:
        inner: object = record
        for key in keys:
            inner = mapping(inner).get(key)
        at, y = number(record.get(x)), number(inner)
        if at is not None and y is not None and number(record.get("step")):
            points.append((at, y))
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])

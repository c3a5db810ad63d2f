"""The metrics and rollouts files of a run, and the loggers that mirror them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from paced_fast.errors import InputError
from paced_fast.run.record.files import plain, replace
from paced_fast.run.record.journal import Journal
from paced_fast.run.record.loggers import Logger

_KEPT_BYTES = 1 << 26


def drop_steps(path: str | Path, first_step: int) -> int:
    """Remove the JSON lines with `step` >= `first_step`, and a torn last line, atomically; returns how many were
    removed.

    A resumed run calls this, because steps after the checkpoint are repeated. A missing file is an empty one. Raises
    InputError when a line other than the last is no JSON object with a step.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] < first_step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):  # a kill tears the last line only
                raise InputError(f"{path}:{number} is not a metrics record: {error}") from error
    if len(kept) < len(lines):
        replace(path, "".join(kept))
    return len(lines) - len(kept)


class MetricsWriter:
    """Appends to `metrics.jsonl` and `rollouts.jsonl` of a run folder, and mirrors scalars to optional sinks.

    `sinks` names any of "wandb" and "tensorboard"; they are imported here and only when named.
    Raises InputError for an unknown sink, or naming the extra to install when a sink's package is missing.
    """

    def __init__(
        self, run_dir: str | Path, *, sinks: Sequence[str] = (), config: Mapping[str, object] | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self._sinks = [Logger(name, self.run_dir, plain(config or {})) for name in sinks]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: Journal(self.run_dir / f"{name}.jsonl", keep_bytes=_KEPT_BYTES) for name in ("metrics", "rollouts")
        }
        for sink in self._sinks:
            sink.open()

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record; keys keep their order, non-finite floats become null.

        Neither a full disk nor a failing sink ends the run: both are logged and retried.
        """
        line = {str(key): plain(value) for key, value in record.items()}
        step = line.get("step")
        if not isinstance(step, int):
            raise ValueError(f"a metrics record needs an integer step, got {step!r}")
        self._append("metrics", [line])
        scalars = dict(_scalars(line))
        for sink in self._sinks:
            sink.log(scalars, step)

    def write_rollouts(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append sample rollouts: step, prompt, completion, reward, value, slice, replayed."""
        self._append("rollouts", [plain(row) for row in rows])

    def drop_from(self, step: int) -> None:
        """Remove every record of `step` and later, for a run that resumes there; each file changes atomically."""
        for file in self._files.values():
            drop_steps(file.path, step)

    def close(self) -> None:
        """Close the files and the sinks; a second call does nothing."""
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _append(self, name: str, records: Sequence[object]) -> None:
        self._files[name].append([json.dumps(record, allow_nan=False) for record in records])


def _scalars(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, float(value)


# Time

"""The metrics and rollouts files of a run, and the loggers that mirror them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from paced_fast.errors import InputError
from paced_fast.run.record import logged
from paced_fast.run.record.files import plain, replace
from paced_fast.run.record.journal import Journal
from paced_fast.run.record.loggers import Logger
from paced_fast.run.record.sinks import RunInfo

_KEPT_BYTES = 1 << 26
_TABLE_EVERY = 25
"""Steps between tables of completions at the loggers."""
_TABLE_ROWS = 32
"""Most completions in one of them: the newest."""
_TABLE_COLUMNS = ("step", "slice", "prompt", "completion", "reward", "value", "replayed")


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
    """Appends to `metrics.jsonl` and `rollouts.jsonl` of a run folder, and mirrors them to optional loggers.

    `sinks` names any of `sinks.KINDS`; they are imported here and only when named. `project`, `group` and `tags` say
    where the run stands there.

    Raises InputError for an unknown sink, or naming the extra to install when a sink's package is missing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        sinks: Sequence[str] = (),
        config: Mapping[str, object] | None = None,
        project: str = "paced_fast",
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        self.run_dir = Path(run_dir)
        info = RunInfo(folder=self.run_dir, config=plain(config or {}), project=project, group=group, tags=tags)
        self._sinks = [Logger(name, info) for name in sinks]
        self._rows: deque[dict[str, object]] = deque(maxlen=_TABLE_ROWS)
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
        if self._sinks:
            shown, counts = logged.figures(line), logged.histograms(line)
            for sink in self._sinks:
                sink.log(shown, step, counts)

    def write_rollouts(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append sample rollouts: step, prompt, completion, reward, value, slice, replayed."""
        lines = [plain(row) for row in rows]
        self._append("rollouts", lines)
        if not self._sinks:
            return
        for line in lines:
            if isinstance(line, dict):
                self._rows.append({name: line.get(name) for name in _TABLE_COLUMNS})
        step = self._rows[-1]["step"] if lines and self._rows else None
        if isinstance(step, int) and step % _TABLE_EVERY == 0:
            for sink in self._sinks:
                sink.table("completions", list(self._rows), step)

    def artifact(self, path: Path, kind: str) -> None:
        """Give a file of the run, such as its report, to the loggers that keep files."""
        for sink in self._sinks:
            sink.artifact(path, kind)

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

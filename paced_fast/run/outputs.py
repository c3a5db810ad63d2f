"""Outputs of a run: the metrics file and its loggers, the terminal, the rollouts that are kept for replay."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console

from paced_fast.config import flatten
from paced_fast.data.records import Fresh
from paced_fast.data.step_record import StartRecord, StepRecord
from paced_fast.run.record.phases import Phases
from paced_fast.run.record.progress import Progress
from paced_fast.run.record.rollouts_file import Recorder
from paced_fast.run.record.summary import evaluated_accuracies
from paced_fast.run.record.writer import MetricsWriter
from paced_fast.run.start.build import PreparedRun


class Outputs:
    """Context manager of a run's files and terminal; does nothing on ranks other than rank 0."""

    def __init__(self, run: PreparedRun, console: Console) -> None:
        """Open the files for appending."""
        self._open = contextlib.ExitStack()
        self._writer = self._progress = self._recorder = None
        self._sample_every = run.config.run.show_sample_every
        if not run.world.is_rank0:
            return
        config, step = run.config, run.stepper.counters.step
        self._writer = self._open.enter_context(
            MetricsWriter(run.folder, sinks=config.run.loggers, config=flatten(config))
        )
        accuracies = evaluated_accuracies(run.folder, step) if run.resumed else ()
        self._progress = self._open.enter_context(
            Progress(config.steps, start_step=step, accuracies=accuracies, console=console)
        )
        if config.run.save_rollouts:
            self._recorder = self._open.enter_context(contextlib.closing(Recorder(run.folder, run.collector.table)))

    def drop_from(self, step: int) -> None:
        """Forget every record of `step` and later."""
        if self._writer is not None:
            self._writer.drop_from(step)
        if self._recorder is not None:
            self._recorder.drop_from(step)

    def say(self, status: str) -> None:
        """Show a status before the first step."""
        if self._progress is not None:
            self._progress.update({"step": 0, "status": status})

    def watch(self, phases: Phases) -> None:
        """Show the phase of each step as it begins, beside whoever listens already."""
        progress, before = self._progress, phases.listener
        if progress is None:
            return

        def heard(name: str) -> None:
            before(name)
            progress.phase(name)

        phases.listener = heard

    def keep(self, step: int, fresh: Fresh) -> None:
        """Save the step's rollouts, if the settings ask for it."""
        if self._recorder is not None:
            self._recorder.write(step, fresh.groups, fresh.dropped)

    def write(self, record: StartRecord | StepRecord, shown: Sequence[dict[str, Any]] = ()) -> None:
        """Write a record, and the rollouts to show with it."""
        if self._writer is not None and self._progress is not None:
            self._writer.write(record.line())
            self._writer.write_rollouts(shown)
            self._progress.update(record.line())
            if self._sample_every and record.step and record.step % self._sample_every == 0:
                self._show_sample(record.step, shown)

    def _show_sample(self, step: int, shown: Sequence[dict[str, Any]]) -> None:
        fresh = [row for row in shown if not row["replayed"]]
        if fresh and self._progress is not None:
            self._progress.sample(fresh[step // self._sample_every % len(fresh)])

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

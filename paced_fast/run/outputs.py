"""Outputs of a run: the metrics file and its loggers, the terminal, the rollouts that are kept for replay."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from paced_fast.config import flatten
from paced_fast.data.distributed import usable_cores
from paced_fast.data.records import Fresh, Group
from paced_fast.data.step_record import ABSENT, StartRecord, StepRecord
from paced_fast.run import checkpoint
from paced_fast.run.record.groups_file import GROUPS_FILE, GroupsFile
from paced_fast.run.record.live_report import LiveReport
from paced_fast.run.record.origin import note_start
from paced_fast.run.record.phases import Phases
from paced_fast.run.record.progress import Progress
from paced_fast.run.record.rollouts_file import Recorder
from paced_fast.run.record.summary import past_evaluations
from paced_fast.run.record.writer import MetricsWriter
from paced_fast.run.start.build import PreparedRun

logger = logging.getLogger(__name__)


class Outputs:
    """Context manager of a run's files and terminal; does nothing on ranks other than rank 0."""

    def __init__(self, run: PreparedRun, console: Console) -> None:
        """Open the files for appending."""
        self._open = contextlib.ExitStack()
        self._writer = self._progress = self._recorder = None
        self._sample_every = run.config.run.show_sample_every
        self._groups: GroupsFile | None = None
        self._fresh: Sequence[Group] = ()
        if not run.world.is_rank0:
            return
        config, step = run.config, run.stepper.counters.step
        self._writer = self._open.enter_context(
            MetricsWriter(
                run.folder,
                sinks=config.run.loggers,
                config=flatten(config),
                project=config.run.project,
                group=config.run.group,
                tags=config.run.tags,
            )
        )
        evaluations = past_evaluations(run.folder, step) if run.resumed else ()
        self._progress = self._open.enter_context(
            Progress(config.steps, start_step=step, evaluations=evaluations, console=console)
        )
        if config.run.report:
            self._groups = GroupsFile(run.folder, run.collector.table, run.collector.decode)
        every = config.run.report_every if config.run.report else 0
        self._live = self._open.enter_context(LiveReport(run.folder, every))
        note_start(run.folder, resumed_after=step if run.resumed else None, **_machine(run), **checkpoint.versions())
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
        self._fresh = fresh.groups
        if self._recorder is not None:
            self._recorder.write(step, fresh.groups, fresh.dropped)

    def write(self, record: StartRecord | StepRecord, shown: Sequence[dict[str, Any]] = ()) -> None:
        """Write a record, and the rollouts to show with it."""
        if self._writer is not None and self._progress is not None:
            self._writer.write(record.line())
            self._writer.write_rollouts(shown)
            self._progress.update(record.line())
            if isinstance(record, StepRecord):
                self._report(record)
            if self._sample_every and record.step and record.step % self._sample_every == 0:
                self._show_sample(record.step, shown)

    def write_report(self, write: Callable[[Path], object]) -> None:
        """Let `write` make the report of the finished run in its folder, and give it to the loggers."""
        if self._writer is None:
            return
        self._live.stop()
        self._write_groups()
        write(self._writer.run_dir)
        page = self._writer.run_dir / "report.html"
        if page.is_file():
            self._writer.artifact(page, "report")

    def _report(self, record: StepRecord) -> None:
        """Look for groups worth reading, and let the page be written when it is time."""
        if self._groups is not None:
            self._groups.see(record.step, self._fresh, None if record.value_fresh is ABSENT else record.value_fresh)
        if self._live.due(record.step):
            self._write_groups()
            self._live.write()

    def _write_groups(self) -> None:
        if self._groups is not None:
            try:
                self._groups.write()
            except OSError as error:
                logger.warning("%s was not written (%s): the run continues", GROUPS_FILE, error.strerror or error)

    def _show_sample(self, step: int, shown: Sequence[dict[str, Any]]) -> None:
        fresh = [row for row in shown if not row["replayed"]]
        if fresh and self._progress is not None:
            self._progress.sample(fresh[step // self._sample_every % len(fresh)])

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write_groups()
        self._open.__exit__(kind, error, traceback)


def _machine(run: PreparedRun) -> dict[str, object]:
    device = run.trainer.policy.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {usable_cores()} cores, threads: {torch.get_num_threads()}"
    )
    return {"device": name, "ranks": run.world.size, "generator": run.config.generator}

"""The loop of a run: prepare, step, record, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from paced_fast import report
from paced_fast.config import Config, flatten
from paced_fast.config.presets.changed import changed_settings
from paced_fast.config.resolve import placed, resolve
from paced_fast.data.distributed import World
from paced_fast.data.step_record import ABSENT, StartRecord
from paced_fast.errors import EVERYWHERE, InputError, StopRequested, TrainingError, UnscoredError, counted
from paced_fast.evaluation.held_out import prompt_columns
from paced_fast.rewards.loading import RewardFunction
from paced_fast.run import checkpoint
from paced_fast.run.evaluate_policy import evaluate_now, evaluation_due
from paced_fast.run.outputs import Outputs
from paced_fast.run.record import terminal
from paced_fast.run.record.rollouts_file import replayed_settings
from paced_fast.run.record.summary import write_summary
from paced_fast.run.saving import make_saver, save
from paced_fast.run.start import signals
from paced_fast.run.start.build import PreparedRun, build
from paced_fast.run.start.run_folder import RunLock
from paced_fast.run.start.session import ranks_of_run, watch, watchdog_of_rank
from paced_fast.run.start.signals import StopRequest
from paced_fast.run.start.tables import without_missing
from paced_fast.run.start.watchdog import Watchdog


def train(
    run: PreparedRun, console: Console, stop: StopRequest | None = None, watchdog: Watchdog | None = None
) -> dict[str, Any]:
    """Run the training loop; returns the summary, which is also written to the run folder. With several ranks, only
    rank 0 writes files.

    Raises StopRequested, after saving a checkpoint, at the end of the step in which any rank was asked to stop;
    TrainingError, after saving one of the last whole step, for a reward function that fails after the first step.
    """
    config, stepper = run.config, run.stepper
    began = stepper.counters.step
    if watchdog is not None:
        watch(run, watchdog)
    with contextlib.closing(make_saver(run)) as saver, Outputs(run, console) as outputs:
        _stop_if_asked(run, saver, stop, began)
        with _told_with_step(run, saver, began, "step {step}"):
            _begin(run, outputs)
        if stop is not None:
            stop.waits()
        outputs.watch(stepper.phases)
        while stepper.counters.step < config.steps:
            _stop_if_asked(run, saver, stop, began)
            with _told_with_step(run, saver, began, "step {next}"):
                record, shown, result = stepper.step()
            step = stepper.counters.step
            outputs.keep(step, result.fresh)
            with _told_with_step(run, saver, began, "evaluation after step {step}"):
                try:
                    record = dataclasses.replace(record, **evaluation_due(run, step))
                finally:  # an evaluation that fails costs its own figures, not those of the step
                    outputs.write(record, shown)
            stepper.guards.stop(step)
            if step == config.steps or (config.run.checkpoint_every and step % config.run.checkpoint_every == 0):
                save(run, saver, last=step == config.steps)
        summary = write_summary(run.folder, config) if run.world.is_rank0 else {}
        if config.run.report:
            outputs.write_report(report.try_report)
    return summary


def _begin(run: PreparedRun, outputs: Outputs) -> None:
    """Prepare the first step: check the engine, then evaluate a new run, or drop the records that a resumed run
    repeats."""
    parity = run.stepper.check_parity()  # a resumed run starts a new engine, so it is checked too
    if run.resumed:
        outputs.drop_from(run.stepper.counters.step + 1)
        return
    count, samples = len(run.eval_table), run.config.evaluation.final_samples
    if count:
        outputs.say(
            f"evaluating the policy before training: {counted(count, 'prompt')}, {counted(samples, 'completion')} each"
        )
    record = StartRecord(parity=parity or ABSENT)
    before = evaluate_now(run, run.config.evaluation.final_samples)
    if before is not None:
        evaluated = before.record() | prompt_columns(run.eval_table)
        overlap = {
            "repeated": sum(run.repeated.values()),
            "training_prompts": len(run.collector.table),
            "slices": dict(run.repeated),
        }
        record = dataclasses.replace(record, eval=evaluated, overlap=overlap)
    if before is not None or parity or not run.config.steps:  # a run of no step has a record too, to be summarised
        outputs.write(record)


@contextlib.contextmanager
def _told_with_step(run: PreparedRun, saver: checkpoint.Saver, began: int, place: str) -> Iterator[None]:
    """Context of a part of the loop: an error of the user's, such as in a reward function, says where it was and how to
    go on, after the steps that are done are saved. `place` may name the last whole `{step}` and the `{next}`."""
    try:
        yield
    except (InputError, UnscoredError) as error:
        step = run.stepper.counters.step
        where = place.format(step=step, next=step + 1)
        how = signals.how_to_resume(run.folder)
        if step == 0:
            if isinstance(error, InputError):  # the same object, because of its notes
                error.args = (f"{where}: {error}; then {how}",)
            raise
        kept = "which is saved" if step == began else _kept(run, saver, error)
        if step == run.config.steps:
            how = f"evaluate {run.folder}"
        told = TrainingError(f"{where}: {error}; stopped after step {step}, {kept}: mend this, then {how}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


def _kept(run: PreparedRun, saver: checkpoint.Saver, error: Exception) -> str:
    """Save the last whole step, if all ranks are here to do it, and say in words what became of it."""
    if run.world.size > 1 and EVERYWHERE not in getattr(error, "__notes__", ()):
        return "which is not saved, because other ranks go on"
    try:
        save(run, saver, last=True)
    except TrainingError as problem:
        return f"which is not saved ({problem})"
    return "which is saved"


def _stop_if_asked(run: PreparedRun, saver: checkpoint.Saver, stop: StopRequest | None, began: int) -> None:
    """Save a checkpoint and raise StopRequested if any rank was asked to stop; the step that the run `began` at needs
    none."""
    if stop is None or not stop.agreed(run.world):
        return
    step = run.stepper.counters.step
    if step != began:
        save(run, saver, last=True)
    when = f"after step {step}, which is saved" if step != began else f"before step {step + 1}"
    how = signals.how_to_resume(run.folder)
    raise StopRequested(f"{stop.name or 'a signal to another rank'}: stopped {when}: {how}")


def run(
    config: Config,
    console: Console | None = None,
    *,
    replay: Path | None = None,
    functions: Mapping[str, RewardFunction] | None = None,
    is_interactive: bool = False,
) -> dict[str, Any]:
    """Train with `config`, from start to summary; `main` calls this after reading the command line.

    With `replay` the rollouts are read from that file, and nothing is sampled. `functions` are rewards that Python
    handed over, by the names that sources have for them. `is_interactive`: the process is a notebook's or a script's,
    which a second interrupt must not end. The summary is empty on ranks other than 0.
    """
    config = placed(config)
    with (
        ranks_of_run(config, console or Console()) as (world, own),
        StopRequest(at_once=world.size == 1, ends_process=not is_interactive) as stop,
        watchdog_of_rank(config, world) as watchdog,
    ):
        return _run(config, own, world, stop, watchdog, replay, functions)


def _run(
    config: Config,
    console: Console,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    replay: Path | None,
    functions: Mapping[str, RewardFunction] | None,
) -> dict[str, Any]:
    if replay is not None:
        config = replayed_settings(config, replay)
    config = without_missing(resolve(config))
    console.print(terminal.settings_table(changed_settings(flatten(config))[0], preset=config.preset))
    with RunLock() as lock:
        prepared = build(config, console, world, replay, lock, functions)
        stop.remedy = signals.how_to_resume(prepared.folder)
        try:
            summary = train(prepared, console, stop, watchdog)
        finally:
            prepared.collector.scorer.close()
            prepared.collector.generator.close()
    return summary

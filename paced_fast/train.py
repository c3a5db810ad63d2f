"""Train a policy by PACED-RL.

    python -m paced_fast.train [PRESET] [--field.subfield value ...]

The run folder holds config.json, metrics.jsonl, rollouts.jsonl, checkpoints/, summary.json and report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from paced_fast import distributed, report
from paced_fast.config import Config, cli, flatten, modes, stream_seed
from paced_fast.config.resolve import resolve
from paced_fast.distributed import EVERYWHERE, World
from paced_fast.errors import InputError, StopRequested, TrainingError
from paced_fast.evaluation.held_out import Evaluation, Sampling, evaluate, prompt_columns
from paced_fast.generation import VLLMGenerator
from paced_fast.policy import PolicyFiles, plain_state, quiet
from paced_fast.run import checkpoint
from paced_fast.run.plan import bench, dry_run
from paced_fast.run.record import writer as metrics
from paced_fast.run.record.rollouts_file import Recorder, replayed_settings
from paced_fast.run.start import signals
from paced_fast.run.start.build import Run, build
from paced_fast.run.start.run_folder import RunLock
from paced_fast.run.start.signals import StopRequest
from paced_fast.run.start.tables import without_missing
from paced_fast.run.start.watchdog import Watchdog, open_board
from paced_fast.sharing import SharedGenerator, shared_judge, summed_counts

logger = logging.getLogger("paced_fast.train")  # __name__ is __main__ under python -m


def train(
    run: Run, console: Console, stop: StopRequest | None = None, watchdog: Watchdog | None = None
) -> dict[str, Any]:
    """The loop; returns the summary that is also written to the run folder. Of several ranks the lead writes.

    Raises StopRequested at the end of the step in which any rank's `stop` was asked for, with a checkpoint.
    """
    config, trainer, folder, world = run.config, run.trainer, run.folder, run.world
    began = trainer.counters.step
    if watchdog is not None:
        _watch(run, watchdog)
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(contextlib.closing(_saver(run)))
        writer = progress = None
        if world.is_lead:
            writer = stack.enter_context(
                metrics.MetricsWriter(folder, sinks=config.run.loggers, config=flatten(config))
            )
            progress = stack.enter_context(
                metrics.Progress(config.steps, start_step=trainer.counters.step, console=console)
            )

        def tell(record: dict[str, Any], shown: list[dict[str, Any]] | None = None) -> None:
            if writer is not None and progress is not None:
                writer.write(record)
                writer.write_rollouts(shown or [])
                progress.update(record)

        recording = config.run.save_rollouts and world.is_lead
        recorder = stack.enter_context(contextlib.closing(Recorder(folder, trainer.table))) if recording else None
        _stop_if_asked(run, saver, stop, began)
        # A resumed run loads the engine anew, so it is checked like a new one.
        parity = trainer.check_parity()
        if run.resumed:
            if writer is not None:
                writer.drop_from(trainer.counters.step + 1)
            if recorder is not None:
                recorder.drop_from(trainer.counters.step + 1)
        else:
            if progress is not None:
                progress.update({"step": 0, "status": "evaluating before training"})
            record: dict[str, Any] = {"step": 0, "rollouts": 0, "train_seconds": 0.0}
            if parity:
                record["parity"] = parity
            before = evaluate_now(run, config.evaluation.final_samples)
            if before is not None:
                record["eval"] = before.record() | prompt_columns(run.eval_table)
                record["overlap"] = {"repeated": run.repeated, "training_prompts": len(run.trainer.table)}
            if before is not None or parity:
                tell(record)
        while trainer.counters.step < config.steps:
            _stop_if_asked(run, saver, stop, began)
            record, shown = trainer.step()
            step = trainer.counters.step
            if recorder is not None:
                recorder.write(step, *trainer.sampled)
            last = step == config.steps
            if not last and config.evaluation.every and step % config.evaluation.every == 0:
                evaluation = evaluate_now(run, config.evaluation.samples)
                record["eval"] = None if evaluation is None else evaluation.record()
            if last:
                record |= _final_evaluation(run)
            tell(record, shown)
            trainer.guards.stop(step)
            if last or (config.run.checkpoint_every and step % config.run.checkpoint_every == 0):
                _save(run, saver, last=last)
    if not world.is_lead:
        return {}
    try:
        summary = summarise(folder, config)
        metrics.write_json_atomic(folder / "summary.json", summary)
        return summary
    except (OSError, ValueError, LookupError) as error:  # of a disk that took no metrics
        logger.warning("there is no summary.json (%r): the checkpoints are whole", error)
        return {}


def _stop_if_asked(run: Run, saver: checkpoint.Saver, stop: StopRequest | None, began: int) -> None:
    """Leave with a checkpoint of this step when any rank was asked to; the step that the run `began` at has one."""
    if stop is None or not stop.agreed(run.world):
        return
    step = run.trainer.counters.step
    if step != began:
        _save(run, saver, last=True)
    what = f"after step {step}: --resume auto continues" if step else "before the first step"
    raise StopRequested(f"{stop.name or 'a signal to another rank'}: stopped {what}")


def _watch(run: Run, watchdog: Watchdog) -> None:
    """Let the watchdog see every phase of the run, and every pass through the policy and the engine within one."""
    watchdog.count = lambda: run.trainer.counters.step
    run.trainer.phases.listener = watchdog.phase
    run.trainer.policy.body.register_forward_pre_hook(lambda *_: watchdog.progress())
    own = run.generator.own if isinstance(run.generator, SharedGenerator) else run.generator
    if isinstance(own, VLLMGenerator):
        own.progress = watchdog.progress


def evaluate_now(run: Run, samples: int) -> Evaluation | None:
    """Evaluate the policy as it is now on the held-out prompts; None without any, and where nothing is sampled."""
    config = run.config
    if not run.eval_table.rows or run.trainer.recorded is not None:
        return None
    sampling = Sampling(
        samples=samples,
        max_completion_tokens=config.evaluation.max_completion_tokens or config.generation.max_completion_tokens,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        seed=stream_seed(config.seed, run.trainer.counters.step, "evaluate"),
    )
    with run.trainer.phases.phase("evaluate"):
        return evaluate(
            run.generator,
            run.eval_table,
            score=shared_judge(run.world, run.scorer.score),
            take_counts=lambda: summed_counts(run.world, run.scorer.take_counts()),
            decode=run.trainer.decode,
            sampling=sampling,
            headline=config.data.headline,
            vocabulary=run.trainer.vocabulary,
        )


def _final_evaluation(run: Run) -> dict[str, Any]:
    """The evaluation after training, and how well the value foretells it on prompts the head never saw."""
    evaluation = evaluate_now(run, run.config.evaluation.final_samples)
    if evaluation is None:
        return {}
    value = value_on_held_out(run, evaluation)
    return {"eval": evaluation.record()} | ({} if value is None else {"eval_value": value})


def value_on_held_out(run: Run, evaluation: Evaluation) -> dict[str, Any] | None:
    """How well the value foretells the accuracies of `evaluation`; None where it is no accuracy or knows no prompts."""
    if run.trainer.log_z is None or not run.config.value_is_accuracy or run.eval_embeddings is None:
        return None
    predicted = zip(run.trainer.log_z.value_of(run.eval_embeddings).tolist(), evaluation.prompt_accuracy, strict=True)
    scored = [(value, accuracy) for value, accuracy in predicted if accuracy is not None]
    values, accuracy = [value for value, _ in scored], [accuracy for _, accuracy in scored]
    return {
        "brier": metrics.brier_score(values, accuracy),
        "ece": metrics.expected_calibration_error(values, accuracy),
        "rank_correlation": metrics.rank_correlation(values, accuracy),
        "values": values,
        "accuracies": accuracy,
    }


_COMPARED = (
    *("accuracy", "accuracy_interval", "pass_at_8", "pass_at_k", "pass_at_k_interval", "maj_at_k"),
    *("distinct_correct", "truncated_share", "tokens_mean", "unscored"),
)
"""Figures of the evaluations before and after training that the summary sets side by side."""


def summarise(folder: Path, config: Config) -> dict[str, Any]:
    """`summary.json` from the metrics of a finished run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"] > 0]
    evaluations = [record["eval"] for record in records if record.get("eval")]
    before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    last = records[-1]
    value = last.get("eval_value") or {}
    shares = [record["mixed_group_share"] for record in steps if record["step"] > config.scheduler.warmup_steps]
    return {
        "preset": config.preset,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "steps": last["step"],
        "rollouts": last.get("rollouts", 0),
        "train_seconds": last.get("train_seconds", 0.0),
        **{f"{name}_before": before.get(name) for name in _COMPARED},
        **{f"{name}_after": after.get(name) for name in _COMPARED},
        "value_brier": value.get("brier"),
        "value_ece": value.get("ece"),
        "value_rank_correlation": value.get("rank_correlation"),
        "mixed_group_share": sum(shares) / len(shares) if shares else None,
        "skipped_steps": last.get("skipped_steps", 0),
        "warnings": dict(Counter(name for record in steps for name in record.get("warnings", ()))),
        "curve": [
            {"rollouts": r["rollouts"], "train_seconds": r["train_seconds"], "accuracy": r["eval"]["accuracy"]}
            for r in records
            if r.get("eval")
        ],
        "run_dir": str(folder),
    }


def _saver(run: Run) -> checkpoint.Saver:
    """What writes the run's checkpoints; the tokenizer's files are those written before training."""
    initial = run.folder / "initial"
    generation = initial / "generation_config.json"
    files = PolicyFiles(run.trainer.policy.model, generation=generation.read_bytes() if generation.is_file() else None)

    def write_policy(folder: Path, state: dict[str, Tensor]) -> None:
        files.write(folder, state)
        for path in initial.iterdir():
            weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
            if not weights and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)

    settings = run.config.run
    return checkpoint.Saver(
        run.folder / "checkpoints",
        keep=settings.keep_checkpoints,
        write_policy=write_policy,
        background=settings.async_save,
        world=run.world,
    )


def _save(run: Run, saver: checkpoint.Saver, *, last: bool) -> None:
    trainer = run.trainer
    with trainer.phases.phase("checkpoint"):
        saver.save(
            trainer.counters.step,
            tensors=trainer.state_tensors(),
            model=plain_state(trainer.policy.model),
            state={
                "counters": dataclasses.asdict(trainer.counters),
                "identity": run.identity,
                "versions": checkpoint.versions(),
            },
            last=last,
        )


def run(config: Config, console: Console | None = None, *, replay: Path | None = None) -> dict[str, Any]:
    """Train by `config` from start to summary; what `main` does after reading the command line.

    With `replay` the rollouts come from that file, and nothing is sampled. The summary is empty on every rank but the
    lead.
    """
    with (
        _world(config, console or Console()) as (world, own),
        StopRequest() as stop,
        _watchdog(config, world) as watchdog,
    ):
        return _run(config, own, world, stop, watchdog, replay)


@contextlib.contextmanager
def _world(config: Config, console: Console) -> Iterator[tuple[World, Console]]:
    """The ranks of a run, together until the end, and a console that only the lead's words reach."""
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"preset {config.preset} runs on a GPU (--model.device cuda) and torch sees none: "
            "use the preset tiny or smollm2, or --model.device cpu"
        )
    world = distributed.start(config.model.device, config.distributed.timeout_seconds)
    if world.size > 1:
        signals.end_with_parent()
    try:
        if not world.is_lead:
            logging.getLogger("paced_fast").setLevel(logging.WARNING)
        yield world, console if world.is_lead else Console(quiet=True)
    finally:
        distributed.stop()


def _watchdog(config: Config, world: World) -> Watchdog:
    """The watchdog of this rank; torchrun says where the store of all ranks is, and which attempt this is."""
    address, port = "", 0
    if world.size > 1:  # or they may be anybody's: Kubernetes gives a service called master a MASTER_PORT of its own
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Watchdog(
        world,
        stall_seconds=config.distributed.stall_seconds,
        gone_seconds=config.distributed.timeout_seconds,
        board=open_board(world, address, port),
        name=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _run(
    config: Config, console: Console, world: World, stop: StopRequest, watchdog: Watchdog, replay: Path | None
) -> dict[str, Any]:
    if replay is not None:
        config = replayed_settings(config, replay)
    config = without_missing(resolve(config))
    console.print(metrics.config_table(flatten(config)))
    with RunLock() as lock:
        prepared = build(config, console, world, replay, lock)
        try:
            summary = train(prepared, console, stop, watchdog)
        finally:
            prepared.scorer.close()
            prepared.generator.close()
        if config.run.report and world.is_lead:
            report.try_report(prepared.folder)
    return summary


def _bench(config: Config, mode: modes.Launch, console: Console) -> None:
    if mode.json is not None and not mode.json.parent.is_dir():
        raise InputError(f"--bench-json {mode.json}: there is no folder {mode.json.parent}")
    config = resolve(config)
    with _world(config, console) as (world, console):
        result = bench.measure(config, steps=mode.bench or 1, lengths=mode.lengths, world=world)
        for table in bench.tables(result):
            console.print(table)
        if mode.json is not None and world.is_lead:
            metrics.write_json_atomic(mode.json, result)


def _ranks_here() -> int:
    """How many processes the environment says there are, for a plan that names no number."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise InputError(f"--dry-run: WORLD_SIZE is {text[:80]!r}, no number of processes: give --dry-run RANKS")
    return int(text)


def _tell(line: str, error: Exception) -> None:
    """One line to the user; of an error that every rank has, the lead's is enough."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or EVERYWHERE not in getattr(error, "__notes__", ()):
        sys.stderr.write(f"{line}\n" if rank == "0" else f"rank {rank}: {line}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. Exit status 0 when done, 2 for wrong input, 3 when the run stopped itself.

    A run that a signal asked to stop leaves with 75, or with 0 under torchrun, which would start it again otherwise.
    """
    console = metrics.configure_logging()
    quiet()
    try:
        mode, words = modes.take(sys.argv[1:] if arguments is None else arguments)
        config = cli.parse(words)
        if mode.dry_run is not None:
            ranks = mode.dry_run or _ranks_here()
            dry_run.show(dry_run.make_plan(config, ranks=ranks, nodes=mode.nodes, device=mode.device), console)
            return
        if mode.bench is not None:
            _bench(config, mode, console)
            return
        summary = run(config, console, replay=mode.replay)
    except InputError as error:
        _tell(f"error: {error}", error)
        raise SystemExit(2) from None
    except TrainingError as error:
        _tell(f"stopped: {error}", error)
        raise SystemExit(3) from None
    except StopRequested as error:
        _tell(str(error), error)
        raise SystemExit(signals.status(launched="TORCHELASTIC_RUN_ID" in os.environ)) from None
    if summary:
        console.print(metrics.final_table(summary, run_dir=summary["run_dir"]))


if __name__ == "__main__":
    main()

"""Train a policy by PACED-RL.

    python -m paced_fast.train [PRESET] [--field.subfield value ...]

The run folder holds config.json, metrics.jsonl, rollouts.jsonl, checkpoints/, summary.json and report.html.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paced_fast import checkpoint, cli, memory, metrics, prompts, report, tasks
from paced_fast.batch import PromptRow, PromptTable
from paced_fast.config import Config, flatten, resolve, stream_seed
from paced_fast.errors import InputError, TrainingError
from paced_fast.evaluate import Evaluation, check_headline, evaluate, load_config
from paced_fast.generate import TransformersGenerator
from paced_fast.policy import Policy, build_tiny, load_model, smollm2_folder
from paced_fast.rewards import Scorer
from paced_fast.trainer import Counters, Trainer
from paced_fast.warm_start import warm_start

logger = logging.getLogger("paced_fast.train")  # __name__ is __main__ under python -m


@dataclass(frozen=True, slots=True)
class Run:
    """A run ready to train: its parts, its folder, and the step it continues after."""

    config: Config
    folder: Path
    trainer: Trainer
    generator: TransformersGenerator
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    eval_table: PromptTable
    eval_embeddings: Tensor | None
    resumed: bool


def build(config: Config, console: Console) -> Run:
    """Load data and model, warm-start or resume, and only then create the run folder."""
    torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    torch.set_flush_denormal(True)  # squared gradients of unlikely tokens are denormal, and AdamW crawls on those
    folder = _run_folder(config)
    newest = _newest_checkpoint(config, folder) if config.resume == "auto" else None
    cache = Path(config.warm_start.cache_dir).expanduser()
    path = str(smollm2_folder(cache)) if config.model.name == "smollm2" else config.model.name
    tokenizer = _tokenizer(path)
    table, eval_table = (_table(sources, tokenizer, config) for sources in (config.data.train, config.data.eval))
    scorer = Scorer(row.reward for row in (*table.rows, *eval_table.rows))
    _try_rewards(scorer, (*table.rows, *eval_table.rows))
    check_headline(config.data.headline, eval_table)
    stop_ids = prompts.stop_token_ids(tokenizer)
    if newest is None:
        model = _initial_model(path, tokenizer, config, stop_ids[0])
        _claim(folder, config)
        checkpoint.seed_random_state(stream_seed(config.seed, 0, "ambient"))
        model.save_pretrained(folder / "initial")
        tokenizer.save_pretrained(folder / "initial")
    else:
        model = load_model(config.model, str(folder / "initial"))
    # Embeddings, and the reference of flowrl, belong to the policy as it was before training.
    policy = Policy(model, max_tokens=config.optimizer.micro_batch_tokens)
    embeddings = eval_embeddings = None
    if config.uses_head:
        embeddings = policy.embed([row.token_ids for row in table.rows])
        eval_embeddings = policy.embed([row.token_ids for row in eval_table.rows])
    initial = policy.frozen_copy() if config.algorithm == "flowrl" else None
    if newest is not None:
        model = load_model(config.model, str(newest / "policy"))
        policy = Policy(model, max_tokens=config.optimizer.micro_batch_tokens)
    generator = TransformersGenerator(
        model, stop_ids=stop_ids, max_batch_sequences=config.generation.max_batch_sequences
    )
    trainer = Trainer(
        config,
        policy=policy,
        initial=initial,
        generator=generator,
        scorer=scorer,
        tokenizer=tokenizer,
        table=table,
        embeddings=embeddings,
    )
    console.print(metrics.memory_plan_table(memory.plan(model, config, len(table)), available_bytes=memory.available()))
    if newest is not None:
        tensors, state = checkpoint.load(newest)
        trainer.load_state_tensors(tensors)
        trainer.counters = Counters(**state["counters"])
        checkpoint.restore_random_state(state["random"])
        metrics.write_json_atomic(folder / "config.json", dataclasses.asdict(config))
        logger.info("resumed after step %d from %s", trainer.counters.step, newest)
    return Run(config, folder, trainer, generator, scorer, tokenizer, eval_table, eval_embeddings, newest is not None)


def train(run: Run, console: Console) -> dict[str, Any]:
    """The loop; returns the summary that is also written to the run folder."""
    config, trainer, folder = run.config, run.trainer, run.folder
    with (
        metrics.MetricsWriter(folder, sinks=config.run.loggers, config=flatten(config)) as writer,
        metrics.Progress(config.steps, start_step=trainer.counters.step, console=console) as progress,
    ):
        if run.resumed:
            writer.drop_from(trainer.counters.step + 1)
        else:
            progress.update({"step": 0, "status": "evaluating before training"})
            before = evaluate_now(run, config.evaluation.final_samples)
            if before is not None:
                record = {"step": 0, "rollouts": 0, "train_seconds": 0.0, "eval": before.record()}
                writer.write(record)
                progress.update(record)
        while trainer.counters.step < config.steps:
            record, shown = trainer.step()
            step = trainer.counters.step
            last = step == config.steps
            if not last and config.evaluation.every and step % config.evaluation.every == 0:
                evaluation = evaluate_now(run, config.evaluation.samples)
                record["eval"] = None if evaluation is None else evaluation.record()
            if last:
                record |= _final_evaluation(run)
            writer.write(record)
            writer.write_rollouts(shown)
            progress.update(record)
            if last or (config.run.checkpoint_every and step % config.run.checkpoint_every == 0):
                _save(run)
    summary = summarise(folder, config)
    metrics.write_json_atomic(folder / "summary.json", summary)
    return summary


def evaluate_now(run: Run, samples: int) -> Evaluation | None:
    """Evaluate the policy as it is now on the held-out prompts; None when the run has none."""
    config = run.config
    if not run.eval_table.rows:
        return None
    return evaluate(
        run.generator,
        run.eval_table,
        score=run.scorer.score,
        decode=lambda ids: prompts.decode(run.tokenizer, ids),
        samples=samples,
        max_completion_tokens=config.generation.max_completion_tokens,
        temperature=config.evaluation.temperature,
        seed=stream_seed(config.seed, run.trainer.counters.step, "evaluate"),
        headline=config.data.headline,
    )


def _final_evaluation(run: Run) -> dict[str, Any]:
    """The evaluation after training, and how well the value foretells it on prompts the head never saw."""
    evaluation = evaluate_now(run, run.config.evaluation.final_samples)
    if evaluation is None:
        return {}
    record: dict[str, Any] = {"eval": evaluation.record()}
    if run.trainer.log_z is not None and run.config.value_is_accuracy and run.eval_embeddings is not None:
        values = run.trainer.log_z.value_of(run.eval_embeddings).tolist()
        accuracy = evaluation.prompt_accuracy
        record["eval_value"] = {
            "brier": metrics.brier_score(values, accuracy),
            "ece": metrics.expected_calibration_error(values, accuracy),
            "rank_correlation": metrics.rank_correlation(values, accuracy),
            "values": values,
            "accuracies": accuracy,
        }
    return record


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
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "pass_at_8_before": before.get("pass_at_8"),
        "pass_at_8_after": after.get("pass_at_8"),
        "distinct_correct_before": before.get("distinct_correct"),
        "distinct_correct_after": after.get("distinct_correct"),
        "value_brier": value.get("brier"),
        "value_ece": value.get("ece"),
        "value_rank_correlation": value.get("rank_correlation"),
        "mixed_group_share": sum(shares) / len(shares) if shares else None,
        "skipped_steps": last.get("skipped_steps", 0),
        "curve": [
            {"rollouts": r["rollouts"], "train_seconds": r["train_seconds"], "accuracy": r["eval"]["accuracy"]}
            for r in records
            if r.get("eval")
        ],
        "run_dir": str(folder),
    }


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    if path == "tiny":
        return prompts.character_tokenizer(
            tasks.SIGNED_SUMS_ALPHABET, pad=tasks.SIGNED_SUMS_PAD, stop=tasks.SIGNED_SUMS_STOP
        )
    return prompts.load_tokenizer(path)


def without_missing(config: Config) -> Config:
    """The settings without optional sources whose file is absent; one log line names the files."""
    data, warm = config.data, config.warm_start
    names, slices = set[str](), set[str]()

    def present(sources: tuple[str, ...]) -> tuple[str, ...]:
        kept, missing = prompts.drop_missing(sources, data.dir)
        names.update(source.name for source in missing)
        slices.update(source.slice_name for source in missing)
        return kept

    first, second = (dataclasses.replace(phase, sources=present(phase.sources)) for phase in (warm.first, warm.second))
    train_sources, eval_sources = present(data.train), present(data.eval)
    if not names:
        return config
    headline = tuple(name for name in data.headline if name not in slices)
    logger.warning("going on without %s: --data.dir names the folder that holds them", ", ".join(sorted(names)))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, train=train_sources, eval=eval_sources, headline=headline),
        warm_start=dataclasses.replace(warm, first=first, second=second),
    )


def _table(sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, config: Config) -> PromptTable:
    if not sources:
        return PromptTable(rows=())
    return prompts.load_table(
        sources,
        tokenizer=tokenizer,
        template=config.data.template,
        max_prompt_tokens=config.data.max_prompt_tokens,
        data_dir=config.data.dir,
        too_long=config.data.too_long,
    )


def _initial_model(path: str, tokenizer: PreTrainedTokenizerBase, config: Config, stop_id: int) -> Any:
    if path == "tiny":
        pad_id = tokenizer.convert_tokens_to_ids(tasks.SIGNED_SUMS_PAD)
        assert isinstance(pad_id, int)
        seed = stream_seed(config.warm_start.seed, 0, "initial weights")
        model = build_tiny(config.model, len(tokenizer), stop_id=stop_id, pad_id=pad_id, seed=seed)
    else:
        model = load_model(config.model, path)
    started = time.perf_counter()
    result = warm_start(
        model,
        tokenizer,
        config,
        load=lambda sources: _table(sources, tokenizer, config),
        stop_id=stop_id,
        report=logger.info,
    )
    logger.info("warm start: done after %.0f s", time.perf_counter() - started)
    return result


# What a run folder holds; a folder with any of these is not ours to write into unless the user says so.
_OWN_NAMES = ("metrics.jsonl", "checkpoints", "config.json", "initial", "rollouts.jsonl", "summary.json", "report.html")


def _run_folder(config: Config) -> Path:
    """The folder of the run; an automatic name gets a number when it is taken and nothing is to be resumed."""
    if config.run_dir is not None:
        folder = Path(config.run_dir)
        found = [name for name in _OWN_NAMES if (folder / name).exists()]
        if config.resume == "never" and found and not config.run.overwrite:
            raise InputError(
                f"--run-dir {folder} already holds a run (it has {found[0]}): --resume auto continues it, "
                "--run.overwrite replaces it"
            )
        return folder
    base = Path("runs", f"{config.preset}-{config.algorithm}-{config.seed}")
    folder, number = base, 1
    while config.resume == "never" and folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _try_rewards(scorer: Scorer, rows: Sequence[PromptRow]) -> None:
    """Judge an empty completion of one row for each reward, so that one that cannot be used fails before any work."""
    first = {row.reward: row for row in reversed(rows)}
    scorer.score(list(first.values()), [""] * len(first))


def _claim(folder: Path, config: Config) -> None:
    """Make the run folder and write the settings; what an earlier run left in it is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run-dir {folder} cannot be made ({error.strerror}): give another") from error
    for path in (folder / name for name in _OWN_NAMES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    metrics.write_json_atomic(folder / "config.json", dataclasses.asdict(config))


# What may differ between a run and its continuation: how long it goes on, what it keeps and where things lie.
_FREE_ON_RESUME = ("steps", "resume", "run_dir", "run.", "warm_start.cache_dir")


def _newest_checkpoint(config: Config, folder: Path) -> Path | None:
    """What `--resume auto` continues from; None when nothing has been saved yet. Never starts over a damaged run."""
    if any((folder / name).exists() for name in _OWN_NAMES):
        _check_same_run(config, folder)
    root = folder / "checkpoints"
    newest = checkpoint.newest(root)
    if newest is None and any(root.glob("step_*")):
        raise InputError(
            f"--resume auto: every checkpoint in {root} is damaged: --resume never --run.overwrite restarts"
        )
    return newest


def _check_same_run(config: Config, folder: Path) -> None:
    old = flatten(load_config(folder))
    for name, value in flatten(config).items():
        if not name.startswith(_FREE_ON_RESUME) and old[name] != value:
            raise InputError(
                f"--resume auto: --{name.replace('_', '-')} was {old[name]} in {folder} and is {value} now: "
                "give the same settings, or another --run-dir"
            )


def _save(run: Run) -> None:
    def save_policy(folder: Path) -> None:
        run.trainer.policy.model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    state = {"counters": dataclasses.asdict(run.trainer.counters), "random": checkpoint.random_state()}
    checkpoint.save(
        run.folder / "checkpoints",
        run.trainer.counters.step,
        save_policy=save_policy,
        tensors=run.trainer.state_tensors(),
        state=state,
        keep=run.config.run.keep_checkpoints,
    )


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Train by `config` from start to summary; what `main` does after reading the command line."""
    console = console or Console()
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"preset {config.preset} runs on a GPU (--model.device cuda) and torch sees none: "
            "use the preset tiny or smollm2, or --model.device cpu"
        )
    config = without_missing(resolve(config))
    console.print(metrics.config_table(flatten(config)))
    prepared = build(config, console)
    summary = train(prepared, console)
    if config.run.report:
        report.make_report(prepared.folder)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. Exit status 0 when done, 2 for wrong input, 3 when the run stopped itself."""
    console = metrics.configure_logging()
    try:
        config = cli.parse(sys.argv[1:] if arguments is None else arguments)
        summary = run(config, console)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except TrainingError as error:
        sys.stderr.write(f"stopped: {error}\n")
        raise SystemExit(3) from None
    console.print(metrics.final_table(summary, run_dir=summary["run_dir"]))


if __name__ == "__main__":
    main()

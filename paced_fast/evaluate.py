"""Held-out evaluation: mean@k, unbiased pass@k and the number of distinct correct answers, by slice.

python -m paced_fast.evaluate RUN_DIR [--samples 16] [--step 100] [--sources SOURCE ...]
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.table import Table

from paced_fast import checkpoint, cli, metrics, prompts
from paced_fast.batch import PromptTable
from paced_fast.config import Config, DataConfig, ModelConfig, stream_seed
from paced_fast.errors import InputError
from paced_fast.generate import Generator, TransformersGenerator
from paced_fast.policy import load_model
from paced_fast.rewards import Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of one policy on a table of held-out prompts."""

    accuracy: float
    """mean@k over the prompts of the headline slices."""
    pass_at_8: float | None
    """Unbiased pass@8 over the same prompts; None with fewer than 8 samples."""
    distinct_correct: float
    """Distinct correct completions among the samples of a prompt, mean over the same prompts."""
    samples: int
    """Completions of each prompt."""
    slices: dict[str, dict[str, float | None]]
    """accuracy, pass_at_8 and prompts of each slice."""
    prompt_accuracy: list[float]
    """Share of correct samples of every prompt of the table."""

    def record(self) -> dict[str, Any]:
        """What goes into metrics.jsonl: everything but the figures of single prompts."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "prompt_accuracy"}


def evaluate(
    generator: Generator,
    table: PromptTable,
    *,
    score: Callable[[Sequence[Any], Sequence[str]], list[float | None]],
    decode: Callable[[list[int]], str],
    samples: int,
    max_completion_tokens: int,
    temperature: float,
    seed: int,
    headline: Sequence[str],
) -> Evaluation:
    """Sample every prompt of `table` `samples` times and score the completions.

    A completion counts as correct when its reward is above one half.
    """
    check_headline(headline, table)
    completions = generator.generate(
        [row.token_ids for row in table.rows],
        group_size=samples,
        max_completion_tokens=max_completion_tokens,
        temperature=temperature,
        seed=seed,
    )
    texts = [decode(completion.token_ids) for completion in completions]
    rows = [row for row in table.rows for _ in range(samples)]
    correct = [reward is not None and reward > 0.5 for reward in score(rows, texts)]
    counts = [sum(correct[i * samples : (i + 1) * samples]) for i in range(len(table))]
    distinct = [len({texts[j] for j in range(i * samples, (i + 1) * samples) if correct[j]}) for i in range(len(table))]
    names = [row.slice for row in table.rows]

    def scores(members: list[int]) -> tuple[float, float | None]:
        chosen = [counts[i] for i in members]
        passed = float(metrics.pass_at_k(samples, chosen, 8).mean()) if samples >= 8 else None
        return metrics.mean_at_k(samples, chosen), passed

    main = [i for i, name in enumerate(names) if not headline or name in headline]
    slices: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(names):
        members = [i for i, other in enumerate(names) if other == name]
        accuracy, passed = scores(members)
        slices[name] = {"accuracy": accuracy, "pass_at_8": passed, "prompts": float(len(members))}
    accuracy, passed = scores(main)
    return Evaluation(
        accuracy=accuracy,
        pass_at_8=passed,
        distinct_correct=sum(distinct[i] for i in main) / len(main),
        samples=samples,
        slices=slices,
        prompt_accuracy=[count / samples for count in counts],
    )


def check_headline(headline: Sequence[str], table: PromptTable) -> None:
    """Raises InputError when `headline` names a slice that the held-out prompts do not have."""
    names = {row.slice for row in table.rows}
    missing = set(headline) - names
    if missing and names:
        raise InputError(f"--data.headline names {min(missing)!r}, but the held-out slices are {sorted(names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArguments:
    """Evaluate a checkpoint of a run."""

    run_dir: tyro.conf.Positional[str]
    """Run folder, as written by `python -m paced_fast.train`."""
    step: int | None = None
    """Step of the checkpoint; without one, the newest."""
    samples: int = 16
    """Completions for each prompt."""
    sources: tuple[str, ...] = ()
    """Sources of prompts; without any, the held-out prompts of the run."""
    seed: int = 0
    """Seed of the samples."""


def load_config(run_dir: Path) -> Config:
    """The resolved settings of a run. Raises InputError when the folder holds none."""
    path = run_dir / "config.json"
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{run_dir} is not a run folder: {path} cannot be read") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return config_from_dict(Config, raw)


def config_from_dict(kind: Any, raw: dict[str, Any]) -> Any:
    """Rebuild a settings dataclass from `dataclasses.asdict` gone through JSON."""
    values: dict[str, Any] = {}
    defaults = kind()
    for item in dataclasses.fields(kind):
        if item.name not in raw:
            continue
        default, value = getattr(defaults, item.name), raw[item.name]
        if dataclasses.is_dataclass(default):
            value = config_from_dict(type(default), value)
        elif isinstance(default, tuple):
            value = tuple(value)
        values[item.name] = value
    return kind(**values)


def evaluate_run(arguments: EvaluateArguments) -> Evaluation:
    """Load the run's checkpoint and evaluate it. Raises InputError for a folder without one."""
    run_dir = Path(arguments.run_dir)
    if arguments.samples < 1:
        raise InputError(f"--samples is {arguments.samples}: give 1 or more")
    config = load_config(run_dir)
    root = run_dir / "checkpoints"
    folder = checkpoint.newest(root) if arguments.step is None else root / f"step_{arguments.step:06d}"
    if folder is None or not folder.is_dir():
        wanted = "a checkpoint" if arguments.step is None else f"a checkpoint of step {arguments.step}"
        raise InputError(f"{run_dir} holds no such thing as {wanted}: look in {root}")
    problem = checkpoint.verify(folder)
    if problem is not None:
        raise InputError(f"checkpoint {folder} is damaged: {problem}")
    path = str(folder / "policy")
    tokenizer = prompts.load_tokenizer(path)
    model_config: ModelConfig = config.model
    if model_config.device == "cuda" and not torch.cuda.is_available():
        logger.warning("the run used a GPU and torch sees none here: evaluating on the CPU")
        model_config = dataclasses.replace(model_config, device="cpu")
    model = load_model(model_config, path)
    data: DataConfig = config.data
    scorer = Scorer(settings=config.reward)
    table = prompts.load_table(
        arguments.sources or data.eval,
        tokenizer=tokenizer,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
        data_dir=data.dir,
        too_long=data.too_long,
        bad_rows=data.bad_rows,
        max_bad_share=data.max_bad_share,
        check=scorer.problem,
    )
    generator = TransformersGenerator(
        model,
        stop_ids=prompts.stop_token_ids(tokenizer),
        max_batch_sequences=config.generation.max_batch_sequences,
    )
    return evaluate(
        generator,
        table,
        score=scorer.score,
        decode=lambda ids: prompts.decode(tokenizer, ids),
        samples=arguments.samples,
        max_completion_tokens=config.generation.max_completion_tokens,
        temperature=config.evaluation.temperature,
        seed=stream_seed(arguments.seed, 0, "evaluate run"),
        headline=() if arguments.sources else data.headline,
    )


def _result_table(result: Evaluation) -> Table:
    table = Table(
        "slice", "prompts", f"mean@{result.samples}", "pass@8", title="held-out accuracy", title_justify="left"
    )
    rows = {"headline": {"accuracy": result.accuracy, "pass_at_8": result.pass_at_8}, **result.slices}
    for name, scores in rows.items():
        shown = [scores.get("prompts"), scores["accuracy"], scores["pass_at_8"]]
        texts = [
            "" if value is None else format(value, spec)
            for value, spec in zip(shown, (".0f", ".3f", ".3f"), strict=True)
        ]
        table.add_row(name, *texts)
    return table


def main() -> None:
    """Entry point: a table for people, and one line of JSON as the last line for programs."""
    console = metrics.configure_logging()
    words = sys.argv[1:]
    try:
        prog = "python -m paced_fast.evaluate"
        arguments = cli.read(words, lambda: tyro.cli(EvaluateArguments, args=words, prog=prog))
        result = evaluate_run(arguments)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    console.print(_result_table(result))
    sys.stdout.write(json.dumps(result.record()) + "\n")


if __name__ == "__main__":
    main()

"""The evaluation of a run's checkpoint, or of any model: what is loaded, and with which settings."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import logging
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paced_fast.config import Config, DataConfig, EvaluationConfig, ModelConfig, stream_seed
from paced_fast.config.resolve import check_chats, check_prompt_files, named
from paced_fast.config.saved import parse_config, read_settings
from paced_fast.data import prompts
from paced_fast.data.records import PromptTable
from paced_fast.data.sources import parse_day, template_arguments
from paced_fast.data.sources.benchmarks import BENCHMARKS, benchmark_sources
from paced_fast.errors import InputError, counted
from paced_fast.evaluate.arguments import EvaluateArguments, check
from paced_fast.evaluate.example import held_out_like
from paced_fast.evaluation.held_out import Sample, evaluate
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.policy import load_model, smollm2_folder
from paced_fast.policy.families import check_finite, examine
from paced_fast.policy.shape import positions, text_settings
from paced_fast.rewards import Scorer
from paced_fast.rewards.loading import RewardFunction
from paced_fast.run import checkpoint
from paced_fast.run.plan.devices import require_float32_products

logger = logging.getLogger("paced_fast.evaluate")


@dataclass(frozen=True, slots=True)
class _Target:
    """Target of an evaluation: a model's folder or id, and the settings it was trained with, or defaults."""

    path: str
    config: Config
    is_run: bool


def evaluate_target(
    arguments: EvaluateArguments,
    keep: Callable[[Sequence[Sample]], None] | None = None,
    *,
    functions: Mapping[str, RewardFunction] | None = None,
) -> dict[str, Any]:
    """Load the run's checkpoint or the model and evaluate it; returns `Evaluation.record` with the model and the
    sources.

    `keep` receives every sample; no file is written. `functions` are rewards that Python handed over, by name. Raises
    InputError for what cannot be loaded, found, combined or, later, written, before anything is sampled.
    """
    check(arguments)
    target = _target(arguments)
    config = target.config
    data_dir = arguments.data_dir or config.data.dir
    names = [name for word in arguments.benchmarks for name in word.split(",") if name]
    reward = arguments.reward or config.reward.name
    given = (*benchmark_sources(names, data_dir), *arguments.data)
    if not given and not config.data.eval:
        raise _without_prompts(arguments.run_or_model, target)
    data = dataclasses.replace(config.data, dir=data_dir)
    check_prompt_files(given or data.eval, data, reward=reward, functions=functions or ())
    if (config.model.device, config.model.dtype) == ("cpu", "float32"):
        require_float32_products()
    tokenizer = prompts.load_tokenizer(target.path, target.path)
    stops = prompts.find_stops(tokenizer, config.generation.stop_tokens, prompts.declared_stop_ids(target.path))
    decode = prompts.Decoder(tokenizer, stops.ids, config.data.keep_special_tokens)
    model = load_model(config.model, target.path)
    check_finite(model)
    examine(model)
    sampling = _sampling(arguments, config)
    template = arguments.template or (config.data.template if target.is_run else _own_template(tokenizer))
    check_chats(given or config.data.eval, template, arguments.system_prompt, arguments.template_args, prefix="--")
    own = not given and arguments.max_prompt_tokens is None
    room = _room(model, sampling)
    scorer = Scorer(settings=config.reward, functions=functions)
    table = prompts.load_table(
        given or config.data.eval,
        tokenizer=tokenizer,
        template=template,
        chat=prompts.ChatSettings.parsed(
            system_prompt=config.data.system_prompt,
            template_args=config.data.template_args,
            date=config.data.date,
        ),
        max_prompt_tokens=config.data.max_prompt_tokens if own else (arguments.max_prompt_tokens or 1 << 20),
        data_dir=data_dir,
        too_long=config.data.too_long if own else "error",
        bad_rows=config.data.bad_rows,
        max_bad_share=config.data.max_bad_share,
        check=scorer.problem,
        reward=reward,
        limit_option="--max-prompt-tokens",
    )
    if arguments.limit is not None:
        table = _limited(table, arguments.limit, arguments.seed)
    sequences = [(row.where, row.token_ids) for row in table.rows]
    prompts.check_embedded(sequences, tokenizer, prompts.num_embedded(model))
    longest = max(table.rows, key=lambda row: len(row.token_ids), default=None)
    if longest is not None and len(longest.token_ids) > room:
        raise InputError(
            f"--max-completion-tokens is {sampling.max_completion_tokens}, which with the {len(longest.token_ids)} "
            f"tokens of {longest.where} is above the model's {room + sampling.max_completion_tokens} positions: give "
            "fewer, or leave long prompts out"
        )
    generator = TransformersGenerator(
        model,
        stop_ids=stops.ids,
        max_batch_sequences=arguments.max_batch_sequences or config.generation.batch_sequences(),
    )
    logger.info(
        "%s: %s, %s per prompt, temperature %g, top-p %g, up to %d tokens, stop tokens %s",
        *(target.path, counted(len(table), "prompt"), counted(sampling.samples, "completion")),
        *(sampling.temperature, sampling.top_p),
        *(sampling.max_completion_tokens, stops),
    )
    try:
        evaluation = evaluate(
            generator,
            table,
            score=scorer.score,
            take_counts=scorer.take_counts,
            decode=decode,
            vocabulary=prompts.num_ids(tokenizer),
            sampling=sampling,
            headline=() if given else config.data.headline,
            keep=keep,
        )
    finally:
        scorer.close()
    about = {"model": target.path, "sources": list(given or config.data.eval), "reward": reward, "template": template}
    return about | evaluation.record()


def _target(arguments: EvaluateArguments) -> _Target:
    """Resolve the argument: a folder with a model's configuration is a model, any other folder a run, and anything else
    a hub id."""
    name = arguments.run_or_model
    folder = Path(name).expanduser()
    if folder.is_dir():
        raw = read_settings(folder)
        if not raw.keys() & {"model_type", "architectures"}:
            config = parse_config(folder, raw)
            config = _with_text(arguments, _placed(arguments, config))
            return _Target(str(checkpoint.policy_folder(folder, arguments.step)), config, True)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        here = [str(path) for path in folder.parent.iterdir()] if folder.parent.is_dir() and not folder.exists() else []
        near = difflib.get_close_matches(str(folder), here, n=1)
        hint = f"did you mean {near[0]}?" if near else "give a run folder or a model"
        raise InputError(f"no such run or model folder {name}: {hint}")
    if arguments.step is not None:
        raise InputError(f"--step {arguments.step}: {name} is a model, and only runs have steps: leave --step out")
    cuda = (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    settings = ModelConfig(device="cuda" if cuda else "cpu", dtype="bfloat16" if cuda else "float32")
    config = Config(model=settings, data=DataConfig(), evaluation=EvaluationConfig())
    path = str(folder) if folder.is_dir() else name
    if name == "smollm2" and not folder.is_dir():
        path = str(smollm2_folder(Path(config.warm_start.cache_dir).expanduser()))
    return _Target(path, _with_text(arguments, _placed(arguments, config)), False)


def _placed(arguments: EvaluateArguments, config: Config) -> Config:
    """Settings with the requested device and data type; falls back to the CPU if a run's GPU is absent."""
    settings = config.model
    if arguments.device is not None:
        settings = dataclasses.replace(settings, device=arguments.device)
    if arguments.dtype is not None:
        settings = dataclasses.replace(settings, dtype=arguments.dtype)
    if settings.device == "cuda" and not torch.cuda.is_available():
        if arguments.device == "cuda":
            raise InputError("--device cuda: torch finds no GPU on this machine: give --device cpu")
        logger.warning("the run used a GPU, but torch finds none on this machine: evaluating on the CPU")
        settings = dataclasses.replace(settings, device="cpu")
    return dataclasses.replace(config, model=settings)


def _with_text(arguments: EvaluateArguments, config: Config) -> Config:
    """Settings with the requested chat arguments, stop tokens and text options. Raises InputError for an invalid
    one."""
    named("--template-args", lambda: template_arguments(arguments.template_args))
    date = arguments.date or config.data.date or datetime.date.today().isoformat()
    named("--date", lambda: parse_day(date))
    given = {name: getattr(arguments, name) for name in ("system_prompt", "template_args", "keep_special_tokens")}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    stop_tokens = arguments.stop_tokens or config.generation.stop_tokens
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, date=date, **given),
        generation=dataclasses.replace(config.generation, stop_tokens=stop_tokens),
    )


def _sampling(arguments: EvaluateArguments, config: Config) -> Sampling:
    own = config.evaluation
    cut = own.max_completion_tokens or config.generation.max_completion_tokens
    return Sampling(
        samples=arguments.samples,
        max_completion_tokens=arguments.max_completion_tokens or cut,
        temperature=own.temperature if arguments.temperature is None else arguments.temperature,
        top_p=own.top_p if arguments.top_p is None else arguments.top_p,
        seed=stream_seed(arguments.seed, 0, "evaluate run"),
    )


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    return "chat" if tokenizer.chat_template else "{prompt}"


def _room(model: PreTrainedModel, sampling: Sampling) -> int:
    """Longest prompt that leaves room for a completion."""
    limit = positions(text_settings(model.config))
    room = (limit.longest or 1 << 20) - sampling.max_completion_tokens
    if room < 1:
        raise InputError(
            f"--max-completion-tokens is {sampling.max_completion_tokens}, and this is {limit.why}: give fewer, so "
            "that a prompt fits too"
        )
    return room


def _without_prompts(name: str, target: _Target) -> InputError:
    """Error for a run or model `name` without prompts to evaluate on, with sources that work."""
    remedy = (
        f"give --benchmarks {','.join(BENCHMARKS)}, or prompts of yours, as in --data "
        f"{shlex.quote(held_out_like(next(iter(target.config.data.train), '')))}"
    )
    if not target.is_run and not Path(target.path).is_dir():
        return InputError(f"no such run or model folder {name}; if you mean a model of the Hugging Face hub, {remedy}")
    kind = "this run has no held-out prompts" if target.is_run else "a model has no held-out prompts of its own"
    return InputError(f"no prompts to evaluate {name} on, because {kind}: {remedy}")


def _limited(table: PromptTable, limit: int, seed: int) -> PromptTable:
    """Up to `limit` rows of each slice, in their original order."""
    kept: list[int] = []
    for name in dict.fromkeys(row.slice for row in table.rows):
        members = [i for i, row in enumerate(table.rows) if row.slice == name]
        source = random.Random(stream_seed(seed, 0, f"limit {name}"))
        kept += source.sample(members, min(limit, len(members)))
    return PromptTable(rows=tuple(table.select(sorted(kept))))

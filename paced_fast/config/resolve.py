"""From the settings a user gave to the settings of a run: no `auto` left, every number in range, no contradiction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import util
from pathlib import Path
from typing import Any, Literal

from paced_fast.config import Config, flatten
from paced_fast.config.bounds import settings
from paced_fast.config.data import DataConfig
from paced_fast.config.paced import ALGORITHMS, RULES, LogZConfig
from paced_fast.config.reward_names import check_file, missing_column
from paced_fast.config.run import OWN
from paced_fast.data.sources import (
    check_first_row,
    is_template,
    parse_day,
    parse_source,
    require_file,
    template_arguments,
)
from paced_fast.errors import InputError, pip_install


def resolve(config: Config) -> Config:
    """Replace every `auto` by what the algorithm's name says, and check the settings against each other.

    `weight_sync.mode`, `reward.sandbox`, `distributed.mode`, `model.attention` and `model.liger` stay `auto`: the
    engine's layout, the machine and the model decide, not known yet.

    Raises InputError naming the first field that is out of range or in conflict with another.
    """
    config = placed(config)
    traits = config.traits
    intercept = traits.intercepts[0] if config.loss.intercept == "auto" else config.loss.intercept
    rule = traits.rule if config.scheduler.rule == "auto" else config.scheduler.rule
    replay = traits.replay if config.replay.mode == "auto" else config.replay.mode
    # On a CPU the engine takes longer to start than a small run to train, so it is there on demand only.
    vllm = util.find_spec("vllm")
    wants_vllm = config.model.device == "cuda" and vllm is not None and vllm.origin is not None
    auto_generator = "vllm" if wants_vllm else "transformers"
    engine_dtype = config.model.dtype if config.weight_sync.dtype == "auto" else config.weight_sync.dtype
    resolved = dataclasses.replace(
        config,
        weight_sync=dataclasses.replace(config.weight_sync, dtype=engine_dtype),
        generator=auto_generator if config.generator == "auto" else config.generator,
        loss=dataclasses.replace(config.loss, intercept=intercept),
        scheduler=dataclasses.replace(config.scheduler, rule=rule),
        replay=dataclasses.replace(config.replay, mode=replay),
    )
    remembers = traits.remembers and resolved.uses_head
    resolved = dataclasses.replace(resolved, log_z=resolve_log_z(config.log_z, remembers=remembers))
    _check(resolved)
    return resolved


def placed(config: Config) -> Config:
    """Settings with the device, the data type and the precision of products that `auto` means on this machine."""
    model = config.model.placed()
    return config if model == config.model else dataclasses.replace(config, model=model)


def check(config: Config) -> None:
    """Raises InputError for settings that `resolve` would refuse on any device, without a look at this machine's."""
    if config.model.device != "auto":
        resolve(config)
        return
    try:
        resolve(_on(config, "cuda"))
    except InputError:
        resolve(_on(config, "cpu"))


def check_files(config: Config) -> None:
    """Raises InputError when the model's folder or a file of data or reward is absent, when the reward's file has no
    such function, and when the first row of a file of prompts lacks what its source or its reward asks for."""
    name = config.model.name
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise InputError(f"--model {name}: no such folder: give the folder of a model or its hub id")
    for spec in _all_sources(config):
        require_file(parse_source(spec), config.data.dir)
    check_prompt_files((*config.data.train, *config.data.eval), config.data, reward=config.reward.name)


def check_prompt_files(
    sources: Sequence[str], data: DataConfig, *, reward: str | None, functions: Collection[str] = ()
) -> None:
    """Raises InputError for what can be told of sources of prompts at once: a reward that no function can have, and
    files whose first row lacks something. `reward` judges the rows of sources that name none; `functions` are the names
    of those that Python handed over."""
    for spec in sources:
        judge = parse_source(spec).reward or reward
        if judge is not None and judge not in functions:
            check_file(judge)
        if data.bad_rows == "error":
            check_first_row(spec, data.dir, check=missing_column, reward=judge)


def _on(config: Config, device: Literal["cpu", "cuda"]) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, device=device))


def resolve_log_z(config: LogZConfig, *, remembers: bool) -> LogZConfig:
    """Settings of log Z without `auto`; `remembers` is what it means for the memory."""
    is_on = remembers if config.memory == "auto" else config.memory == "on"
    wide = "mean_and_last" if is_on else "mean"
    return dataclasses.replace(
        config,
        memory="on" if is_on else "off",
        loss=("bce" if is_on else "tb") if config.loss == "auto" else config.loss,
        updates_per_step=config.updates_per_step or (4 if is_on else 1),
        embedding=wide if config.embedding == "auto" else config.embedding,
    )


def check_value(name: str, value: Any) -> None:
    """Raises InputError when the value of the setting `name` is out of range, or an empty text."""
    settings(Config)[name].check(_option(name), value)


def check_engine_ranks(config: Config, ranks: int) -> None:
    """Raises InputError when resolved settings split engines over ranks, and so many do not make whole engines."""
    wanted = config.weight_sync.tensor_parallel
    if ranks % wanted or (config.generator != "vllm" and wanted > 1):
        raise InputError(
            f"--weight-sync.tensor-parallel {wanted} needs --generator vllm and a multiple of {wanted} ranks; this run "
            f"has --generator {config.generator} and {ranks} ranks: start it with torchrun, or give tensor-parallel 1"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _either(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check(config: Config) -> None:
    if config.preset == OWN and not config.model.name:
        raise InputError("--model names no model: give a folder or a hub id, as in --model Qwen/Qwen2.5-0.5B-Instruct")
    for name, value in flatten(config).items():
        check_value(name, value)
    for name in ("data.train", "data.eval", "warm_start.first.sources", "warm_start.second.sources"):
        for spec in flatten(config)[name]:
            named(_option(name), functools.partial(parse_source, spec))
    if config.data.template != "auto" and not is_template(config.data.template):
        raise InputError(f"--data.template {config.data.template!r} must be chat, plain or text with {{prompt}} in it")
    _check_text(config)
    if config.model.name == "tiny" and config.model.hidden_size % config.model.num_heads:
        raise InputError(
            f"--model.hidden-size {config.model.hidden_size} is not a multiple of --model.num-heads "
            f"{config.model.num_heads}: give a multiple, because all heads have the same width"
        )
    for name, phase in (("first", config.warm_start.first), ("second", config.warm_start.second)):
        if phase.steps > 0 and not phase.sources:
            raise InputError(
                f"--warm-start.{name}.steps is {phase.steps}, but --warm-start.{name}.sources names no source: give "
                "one, or 0 steps"
            )
    if not config.data.train:
        raise InputError(
            "--data names no source of training prompts: give at least one, such as --data train.jsonl or --data "
            "'rg:chain_sum?size=500'"
        )
    _check_algorithm(config)
    if config.weight_sync.sleep_level > 0 and config.weight_sync.mode != "push":
        raise InputError(
            f"--weight-sync.sleep-level {config.weight_sync.sleep_level} frees the engine's weights, which works only "
            "if they are copied: give --weight-sync.mode push, or level 0"
        )
    hottest = max(config.generation.temperature, config.evaluation.temperature)
    coldest = min(config.generation.temperature, config.evaluation.temperature or 1.0)  # 0 is no sampling
    if config.model.device == "cpu" and config.model.matmul_precision != "highest":
        raise InputError(
            f"--model.matmul-precision {config.model.matmul_precision} rounds float32 products on some CPUs and not on "
            "others: give highest, which computes the same numbers on all"
        )
    if config.model.device == "cpu" and config.model.liger == "on":
        raise InputError("--model.liger on needs a GPU, and --model.device is cpu: give auto or off")
    if config.model.device == "cpu" and config.model.attention not in ("auto", "shared", "padded", "packed-sdpa"):
        raise InputError(
            f"--model.attention {config.model.attention} needs a GPU, and --model.device is cpu: give auto, shared, "
            "padded or packed-sdpa"
        )
    if config.lora.rank > 0 and util.find_spec("peft") is None:
        raise InputError(f"--lora.rank {config.lora.rank} needs PEFT: {pip_install('lora')}, or give --lora.rank 0")
    if config.lora.rank > 0 and not config.lora.targets:
        raise InputError("--lora.targets names no layer: give names of linear layers, or all-linear")
    if config.lora.rank > 0 and config.weight_sync.mode == "shared" and config.generator == "vllm":
        raise InputError(
            "--weight-sync.mode shared does not work with --lora.rank, because the engine needs the adapters merged "
            "into the weights: give push"
        )
    if config.distributed.mode == "sharded" and config.distributed.gradients == "whole":
        raise InputError(
            "--distributed.gradients whole keeps all gradients on every rank, and --distributed.mode sharded splits "
            "them with the parameters: leave one of the two at auto"
        )
    if config.generator == "vllm" and hottest > 2.0:
        raise InputError(f"--generator vllm samples at temperatures up to 2, not {hottest:g}: lower the temperature")
    if config.generator == "vllm" and coldest < 0.01:
        raise InputError(f"--generator vllm samples at temperatures from 0.01, not {coldest:g}: raise the temperature")
    if config.generation.prompts_per_step < config.optimizer.minibatches:
        raise InputError(
            f"--optimizer.minibatches is {config.optimizer.minibatches}, but a step draws only "
            f"{config.generation.prompts_per_step} prompts: lower it, or raise --generation.prompts-per-step"
        )


def _check_algorithm(config: Config) -> None:
    """Settings that the algorithm cannot have."""
    traits = config.traits
    if config.replay.mode == "on" and not traits.may_replay:
        others = _either(name for name, other in ALGORITHMS.items() if other.may_replay)
        raise InputError(f"--replay.mode on needs --algorithm {others}, not {config.algorithm}")
    if config.generation.group_size < 2 and traits.compares_groups:
        raise InputError(
            f"--generation.group-size is {config.generation.group_size}: give 2 or more for --algorithm "
            f"{config.algorithm}, which compares the completions of a group"
        )
    if config.log_z.memory == "on" and not traits.value_is_accuracy:
        raise InputError(
            f"--log-z.memory on needs a value that predicts accuracy, and log Z of --algorithm {config.algorithm} does "
            "not: give off"
        )
    if RULES[config.scheduler.rule].reads_value and not traits.value_is_accuracy:
        others = _either(name for name, rule in RULES.items() if not rule.reads_value)
        raise InputError(
            f"--scheduler.rule {config.scheduler.rule} needs a value that predicts accuracy, and log Z of --algorithm "
            f"{config.algorithm} does not: give the rule {others}"
        )
    if config.loss.intercept not in traits.intercepts:
        others = _either(name for name, other in ALGORITHMS.items() if len(other.intercepts) > 1)
        raise InputError(
            f"--loss.intercept {config.loss.intercept} does not work with --algorithm {config.algorithm}: leave it "
            f"out, or give --algorithm {others}"
        )
    if config.loss.intercept == "group_mean" and config.generation.group_size < 2:
        raise InputError(
            f"--generation.group-size is {config.generation.group_size}: give 2 or more for --loss.intercept group_mean"
        )


def _check_text(config: Config) -> None:
    """Settings of the text around prompts and completions, as far as they can be told without a tokenizer."""
    data = config.data
    named("--data.template-args", lambda: template_arguments(data.template_args))
    if (date := data.date) is not None:
        named("--data.date", lambda: parse_day(date))
    if not data.keep_special_tokens:
        raise InputError("--data.keep-special-tokens is empty: give tags, all, none, or tokens by their text")
    if not config.generation.stop_tokens:
        raise InputError("--generation.stop-tokens is empty, so that no completion could end: give auto, or tokens")
    check_chats(_all_sources(config), data.template, data.system_prompt, data.template_args, prefix="--data.")


def writes_chats(config: Config) -> bool:
    """Whether the chat template writes some of the prompts."""
    return _has_chats(_all_sources(config), config.data.template)


def _all_sources(config: Config) -> tuple[str, ...]:
    data, warm = config.data, config.warm_start
    return (*data.train, *data.eval, *warm.first.sources, *warm.second.sources)


def _has_chats(sources: Iterable[str], template: str) -> bool:
    return any((parse_source(spec).template or template) in ("chat", "auto") for spec in sources)


def check_chats(
    sources: Iterable[str], template: str, system_prompt: str | None, template_args: Sequence[str], *, prefix: str
) -> None:
    """Raises InputError for what belongs to chats, where no source is written by the chat template.

    `prefix` is that of the options of the command line.
    """
    if _has_chats(sources, template):
        return
    for name, value in (("system-prompt", system_prompt), ("template-args", template_args or None)):
        if value is not None:
            raise InputError(f"{prefix}{name} works only with {prefix}template chat: give that, or leave it out")


def named(option: str, read: Callable[[], object]) -> None:
    """Call `read`; what it refuses is refused in the name of `option`."""
    try:
        read()
    except InputError as error:
        raise InputError(f"{option}: {error}") from None

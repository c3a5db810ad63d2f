"""Dry run: settings, memory per rank and time per step, without weights, data or an engine."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
from rich.console import Console

from paced_fast.config import Config, flatten
from paced_fast.config.resolve import check_engine_ranks, placed, resolve
from paced_fast.data.distributed import threads_of
from paced_fast.data.prompts import ALPHABETS
from paced_fast.data.sources import parse_source
from paced_fast.errors import InputError
from paced_fast.policy import adapt
from paced_fast.policy.families import planned
from paced_fast.policy.gradient_checkpointing import can_recompute
from paced_fast.policy.loading import model_settings, skeleton
from paced_fast.policy.shape import ModelShape, Positions, positions, shape_of, text_settings
from paced_fast.run.plan import fit, idle, memory, roofline
from paced_fast.run.plan.devices import DEVICES, Device, device_here, device_named
from paced_fast.run.record import terminal

logger = logging.getLogger(__name__)

_ASSUMED_DEVICE = "h100"
_ASSUMED_PROMPTS = 50_000
_RANKS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Result of a dry run; `notes` lists its assumptions."""

    config: Config
    shape: ModelShape
    layout: memory.Layout
    device: Device
    why: str
    """Reason of the layout."""
    recompute: str
    """Whether gradient checkpointing is on, with the reason."""
    parts: dict[str, int]
    """Bytes that one rank holds, by purpose."""
    seconds: dict[str, float]
    """Seconds per step by phase."""
    embedding_seconds: float
    """Seconds before the first step for the embeddings of all prompts."""
    notes: list[str]


def make_plan(config: Config, *, ranks: int, nodes: int | None = None, device: str | None = None) -> Plan:
    """Plan `ranks` processes on `nodes` machines with one `device` each; the device that is here without a name.

    Raises InputError for settings that contradict each other, ranks that do not fill the machines, an unknown device.
    """
    nodes = nodes or -(-ranks // _RANKS_PER_NODE)
    if ranks % nodes:
        raise InputError(
            f"--dry-run {ranks}: {ranks} processes cannot be divided evenly among {nodes} machines: give a multiple of "
            f"{nodes}, or another --dry-run-nodes"
        )
    notes: list[str] = []
    config = _assume_generator(config, device, notes)
    check_engine_ranks(config, ranks)
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    torch.set_num_threads(threads_of(config.run.threads))
    chip = _device(config, device, notes)
    settings = model_settings(config.model, len(ALPHABETS[config.model.alphabet].characters))
    config = planned(config, settings)
    _check_positions(config, positions(text_settings(settings)), notes)
    model = skeleton(settings)
    if config.lora.rank > 0:
        adapt(model, config.lora, seed=0)
    shape = shape_of(model)
    num_prompts = _num_prompts(config, notes)
    layout = memory.Layout(ranks=ranks, nodes=nodes, device_bytes=chip.memory_bytes, capability=chip.capability)
    chosen = fit.choose(config, shape, num_prompts, layout, can_recompute=can_recompute(model))
    config, layout = chosen.config, chosen.layout
    if chip.name == "cpu":
        notes.append("every rank has a CPU of its own (ranks that share one are slower)")
    if config.model.attention == "auto" and config.model.device == "cuda":
        notes.append("a kernel for packed rows is installed (--model.attention shared plans without one)")
    notes += [
        "prompts and completions have their maximum lengths, nothing is replayed, and rewards take no time",
        f"matrix products reach {roofline.MATMUL_SHARE:.0%} of the peak rate, memory and links "
        f"{roofline.BANDWIDTH_SHARE:.0%} of their bandwidth",
        "kernel launches take no time, so the estimate is too low for small models",
    ]
    return Plan(
        config=config,
        shape=shape,
        layout=layout,
        device=chip,
        why=chosen.mode,
        recompute=chosen.recompute,
        parts=memory.plan(shape, config, num_prompts, layout),
        seconds=roofline.estimate(shape, config, layout, chip),
        embedding_seconds=roofline.embedding_seconds(shape, config, layout, chip, num_prompts),
        notes=notes,
    )


def _generation(plan: Plan) -> str:
    """How many sequences a rank has to sample in a step and how many of them it decodes at once."""
    config, layout = plan.config, plan.layout
    own = -(-config.rollouts_per_step // layout.ranks)
    at_once = roofline.decoded_at_once(plan.shape, config, layout)
    limit = memory.batch_sequences(config, layout)
    text = f"{own} sequences per rank, {at_once} at once (up to {limit} by {config.generator}'s limit)"
    generators = layout.ranks // config.weight_sync.tensor_parallel
    if generators == 1:
        return text
    found = idle.shares(config, generators, at_once)
    return (
        f"{text}; if lengths vary from prompt to prompt, ranks idle for {found['queue']:.1%} of it with prompts from a "
        f"shared queue, {found['parts']:.1%} with equal parts"
    )


def _check_positions(config: Config, limit: Positions, notes: list[str]) -> None:
    """Raises InputError when completions alone are longer than the model can place; shorter prompts are a note."""
    cut = max(config.generation.max_completion_tokens, config.evaluation.max_completion_tokens)
    owner = "generation" if cut == config.generation.max_completion_tokens else "evaluation"
    if limit.longest is None or config.data.max_prompt_tokens + cut <= limit.longest:
        return
    if cut >= limit.longest:
        raise InputError(
            f"--{owner}.max-completion-tokens: completions of up to {cut} tokens leave no room for a prompt in "
            f"{limit.why}: lower it, or use a model with more positions"
        )
    notes.append(f"prompts have up to {limit.longest - cut} tokens, so that they fit with a completion in {limit.why}")


def show(plan: Plan, console: Console) -> None:
    """Print a plan as tables."""
    layout, device, shape = plan.layout, plan.device, plan.shape
    console.print(terminal.config_table(flatten(plan.config)))
    ranks = f"{layout.ranks} on {layout.nodes} machine{'s' * (layout.nodes > 1)}, {plan.why}"
    peak = device.flops(plan.config.model.dtype)
    found = {
        "model": f"{plan.config.model.name}, {shape.parameters:,} parameters, {shape.trainable:,} trained",
        "device": f"{device.name}, {_scaled(peak)}FLOP/s in {plan.config.model.dtype}, "
        f"{_scaled(device.memory_bandwidth)}B/s",
        "ranks": ranks,
    }
    found["gradient checkpointing"] = plan.recompute
    found["generation"] = _generation(plan)
    console.print(terminal.config_table(found, title="model and hardware"))
    console.print(terminal.memory_plan_table(plan.parts, available_bytes=device.memory_bytes))
    total = sum(plan.seconds.values())
    rows = {name: f"{seconds:,.3g} s" for name, seconds in plan.seconds.items()}
    tokens = plan.config.rollouts_per_step * plan.config.generation.max_completion_tokens
    rows["step"] = f"{total:,.3g} s, {tokens / total:,.0f} completion tokens/s"
    rows[f"{plan.config.steps} steps"] = f"{plan.config.steps * total / 3600:,.2f} h, without evaluation and start-up"
    if plan.embedding_seconds:
        rows["before the first step"] = f"{plan.embedding_seconds:,.3g} s for the prompts' embeddings"
    console.print(terminal.config_table(rows, title="estimated time per step"))
    for note in plan.notes:
        console.print(f"assumed: {note}", highlight=False, soft_wrap=True)
    wanted = sum(memory.at_a_time(plan.parts).values())
    console.print(
        f"peak memory per rank: {wanted / 2**30:.1f} GiB (the key-value cache is freed while the policy trains)",
        highlight=False,
        soft_wrap=True,
    )
    if wanted > device.memory_bytes:
        console.print(
            f"this does not fit in {device.memory_bytes / 2**30:.1f} GiB: lower --optimizer.micro-batch-tokens, or "
            "use more ranks with --distributed.mode sharded",
            highlight=False,
            soft_wrap=True,
        )


def _assume_generator(config: Config, device: str | None, notes: list[str]) -> Config:
    """Resolve the settings; for a GPU of another machine vLLM is assumed to be installed there."""
    if config.model.device == "auto" and device is not None:
        on = "cpu" if device == "cpu" else "cuda"
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, device=on))
    config = placed(config)
    elsewhere = config.model.device == "cuda" and (device is not None or not torch.cuda.is_available())
    if config.generator == "auto" and elsewhere:
        notes.append("vllm is installed on the machine of the run (--generator transformers plans without it)")
        config = dataclasses.replace(config, generator="vllm")
    return resolve(config)


def _device(config: Config, name: str | None, notes: list[str]) -> Device:
    if name is not None:
        if (name == "cpu") != (config.model.device == "cpu"):
            right = "cpu" if name == "cpu" else "cuda"
            raise InputError(
                f"--dry-run-device {name} does not match --model.device {config.model.device}: give --model.device "
                f"{right}"
            )
        return device_named(name, config.model.dtype)
    found = device_here(config.model.device, config.model.dtype)
    if found is not None:
        return found
    if torch.cuda.is_available():
        raise InputError(
            f"the peak rates of {torch.cuda.get_device_name()} are not known: give --dry-run-device, one of "
            f"{', '.join(DEVICES)}"
        )
    notes.append(f"the device is an {_ASSUMED_DEVICE} (--dry-run-device names another)")
    return DEVICES[_ASSUMED_DEVICE]


def _num_prompts(config: Config, notes: list[str]) -> int:
    sizes = [parse_source(spec).size for spec in config.data.train]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return sum(known)
    notes.append(f"there are {_ASSUMED_PROMPTS:,} training prompts, whose embeddings are kept in memory")
    return _ASSUMED_PROMPTS


def _scaled(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.3g} {letter}"
    return f"{number:,.3g} "

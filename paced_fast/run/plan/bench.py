"""Time training steps on random rollouts: the trainer's own step, without sampling and scoring.

A model of the configured sizes with random weights is trained on random tokens, so that neither weights nor data are
needed. The figures are those of a step without generation and rewards.

P = prompts per step, G = completions per prompt, N = prompts in the table.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from paced_fast.config import Config, stream_seed
from paced_fast.data import prompts
from paced_fast.data.distributed import ALONE, EVERYWHERE, World, threads_of
from paced_fast.data.records import Completion, Group, PromptRow, PromptTable
from paced_fast.data.step_record import StepRecord
from paced_fast.errors import InputError
from paced_fast.generation import TransformersGenerator
from paced_fast.paced.collect import Collector
from paced_fast.paced.trainer import Trainer
from paced_fast.policy import make_policy, prepare
from paced_fast.policy.gradient_checkpointing import can_recompute
from paced_fast.policy.loading import model_settings, random_model
from paced_fast.policy.shape import ModelShape, shape_of
from paced_fast.rewards import Scorer, Shaper
from paced_fast.run.plan import fit, memory, roofline
from paced_fast.run.plan.devices import Device, device_here
from paced_fast.run.record import terminal
from paced_fast.run.record.phases import Phases, clock_of, probe
from paced_fast.run.step import Stepper

_TABLE_FACTOR = 4
"""Size of the table, in multiples of the prompts per step."""


class RandomRollouts:
    """Source of groups of random tokens with rewards of 0 or 1, which depend on seed and step only."""

    def __init__(self, config: Config, table: PromptTable, vocab_size: int, *, lengths: str) -> None:
        """`lengths` is `full`, every completion at the limit, or `even`, drawn evenly from 1 to the limit."""
        self._config, self._table, self._vocab_size, self._lengths = config, table, vocab_size, lengths

    def groups(self, step: int, round_: int = 0) -> list[Group]:
        """Make P groups of G completions, different ones per step and round."""
        settings = self._config.generation
        source = torch.Generator().manual_seed(stream_seed(self._config.seed, step, f"bench/{round_}"))
        drawn = torch.randperm(len(self._table), generator=source)[: settings.prompts_per_step].tolist()
        return [Group(index, *self._group(source)) for index in drawn]

    def _group(self, source: torch.Generator) -> tuple[list[Completion], list[float | None], list[float]]:
        settings = self._config.generation
        limit = settings.max_completion_tokens
        completions, rewards = [], torch.randint(0, 2, (settings.group_size,), generator=source).tolist()
        for _ in range(settings.group_size):
            length = limit if self._lengths == "full" else int(torch.randint(1, limit + 1, (), generator=source))
            ids = torch.randint(0, self._vocab_size, (length,), generator=source).tolist()
            logprobs = torch.rand(length, generator=source).neg().tolist()
            completions.append(Completion(token_ids=ids, logprobs=logprobs, stopped=length < limit))
        return completions, [float(reward) for reward in rewards], []


@dataclass(frozen=True, slots=True)
class _Totals:
    """Work of a step's rollouts, without padding and repeated prompts."""

    row_tokens: int
    completion_tokens: int
    pairs: int  # of a token with one that it looks at


def measure(config: Config, *, steps: int, lengths: str, world: World = ALONE) -> dict[str, Any]:
    """Time `steps` steps; with more than one the first, which warms caches up, is left out of every figure.

    Raises InputError for sharded parameters over several ranks: what is timed replicates them.
    """
    if world.size > 1 and config.distributed.mode == "sharded":
        error = InputError(
            f"--bench with {world.size} processes supports replicated parameters only: leave out --distributed.mode "
            "sharded"
        )
        error.add_note(EVERYWHERE)
        raise error
    config = dataclasses.replace(
        config, generator="transformers", run=dataclasses.replace(config.run, rollouts_per_step=0)
    )
    torch.set_num_threads(threads_of(config.run.threads, world.local_size))
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    torch.set_flush_denormal(True)
    device = device_here(config.model.device, config.model.dtype)
    stepper, rollouts = _stepper(config, lengths, world)
    trainer = stepper.trainer
    config = trainer.config  # with the gradient checkpointing that was chosen
    shape = shape_of(trainer.policy.model)
    records, work = [], []
    for step in range(1, steps + 1):
        records.append(stepper.step().record)
        work.append(_totals(trainer.collector.table, rollouts.groups(step)))
    trainer.collector.scorer.close()
    kept = slice(1 if steps > 1 else 0, None)
    return _figures(config, shape, device, records[kept], work[kept], lengths, world)


def _stepper(config: Config, lengths: str, world: World) -> tuple[Stepper, RandomRollouts]:
    source = torch.Generator().manual_seed(stream_seed(config.seed, 0, "bench"))
    tokenizer = prompts.alphabet_tokenizer(config.model.alphabet)
    settings = model_settings(config.model, len(tokenizer))
    model = random_model(config.model, settings, seed=stream_seed(config.seed, 0, "initial weights"))
    config, layout = _fitted(config, model, world)
    policy = make_policy(model, config)
    initial = policy.frozen_copy() if config.traits.keeps_initial_policy else None
    prepare(policy, config)
    size = (_TABLE_FACTOR * config.generation.prompts_per_step, config.data.max_prompt_tokens)
    ids = torch.randint(0, settings.vocab_size, size, generator=source).tolist()
    rows = (PromptRow(prompt="", token_ids=tuple(prompt), reward="none", slice="bench", columns={}) for prompt in ids)
    table = PromptTable(rows=tuple(rows))
    embeddings = None
    if config.uses_head:
        width = settings.hidden_size * (2 if config.log_z.embedding == "mean_and_last" else 1)
        embeddings = torch.randn(len(table), width, generator=source).to(policy.device)
    rollouts = RandomRollouts(config, table, settings.vocab_size, lengths=lengths)
    phases = Phases(*clock_of(policy.device), probe(policy.device))
    collector = Collector(
        config,
        generator=TransformersGenerator(model, stop_ids=[0], max_batch_sequences=1),
        scorer=Scorer(settings=config.reward),
        shaper=Shaper(config.reward),
        decode=prompts.Decoder(tokenizer, prompts.stop_token_ids(tokenizer)),
        table=table,
        vocabulary=settings.vocab_size,
        device=policy.device,
        world=world,
        recorded=rollouts,
        phase=phases.phase,
    )
    trainer = Trainer(
        config,
        policy=policy,
        initial=initial,
        collector=collector,
        embeddings=embeddings,
        world=world,
        split_gradients=layout.gradients == "split",
    )
    return Stepper(trainer, phases), rollouts


def _fitted(config: Config, model: PreTrainedModel, world: World) -> tuple[Config, memory.Layout]:
    """The settings with the gradient checkpointing of a run, and the ranks with its gradients; parameters are
    replicated."""
    device = torch.device(config.model.device)
    own = memory.available(device) // (1 if device.type == "cuda" else world.local_size)
    layout = memory.Layout(ranks=world.size, nodes=world.nodes, device_bytes=own)
    replicated = dataclasses.replace(config, distributed=dataclasses.replace(config.distributed, mode="replicated"))
    num_prompts = _TABLE_FACTOR * config.generation.prompts_per_step
    chosen = fit.choose(replicated, shape_of(model), num_prompts, layout, can_recompute=can_recompute(model))
    recompute = chosen.config.model.gradient_checkpointing
    model_config = dataclasses.replace(config.model, gradient_checkpointing=recompute)
    return dataclasses.replace(config, model=model_config), chosen.layout


def _totals(table: PromptTable, groups: list[Group]) -> _Totals:
    rows = completions = pairs = 0
    for group in groups:
        prompt = len(table.rows[group.prompt_index].token_ids)
        lengths = [len(completion.token_ids) for completion in group.completions]
        rows += prompt + sum(lengths)
        completions += sum(lengths)
        pairs += prompt * prompt // 2 + sum(length * prompt + length * length // 2 for length in lengths)
    return _Totals(rows, completions, pairs)


def _model_flops(shape: ModelShape, config: Config, work: _Totals) -> float:
    """Operations of one forward pass for the old log-probs of all optimiser steps but the first and, per epoch, one
    forward and backward pass, without recomputation."""
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_size * work.pairs
    matmul = 2 * (shape.body_parameters * work.row_tokens + shape.head_parameters * work.completion_tokens)
    references = (2 if config.traits.keeps_initial_policy else 1) - 1 / config.optimizer.minibatches
    return (matmul + attention) * (references + config.optimizer.epochs * (2 + shape.trainable / shape.parameters))


def _figures(
    config: Config,
    shape: ModelShape,
    device: Device | None,
    records: list[StepRecord],
    work: list[_Totals],
    lengths: str,
    world: World,
) -> dict[str, Any]:
    totals = [sum(record.seconds.values()) for record in records]
    names = sorted({name for record in records for name in record.seconds})
    seconds = {name: statistics.median(record.seconds.get(name, 0.0) for record in records) for name in names}
    peaks: dict[str, int] = {}
    for record in records:
        for name, size in record.memory.items():
            peaks[name] = max(size, peaks.get(name, 0))
    rate = [_model_flops(shape, config, each) / total / world.size for each, total in zip(work, totals, strict=True)]
    peak = None if device is None else device.flops(config.model.dtype)
    estimated = {}
    if device is not None and lengths == "full":
        layout = memory.Layout(ranks=world.size, nodes=world.nodes, capability=device.capability)
        estimated = roofline.estimate(shape, config, layout, device)
    return {
        "preset": config.preset,
        "algorithm": config.algorithm,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "parameters": shape.parameters,
        "device": _device_name(config),
        "ranks": world.size,
        "mode": "replicated",
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "steps": len(records),
        "lengths": lengths,
        "prompts_per_step": config.generation.prompts_per_step,
        "group_size": config.generation.group_size,
        "prompt_tokens": config.data.max_prompt_tokens,
        "completion_tokens": config.generation.max_completion_tokens,
        "micro_batch_tokens": config.optimizer.micro_batch_tokens,
        "step_seconds": statistics.median(totals),
        "step_seconds_least": min(totals),
        "step_seconds_most": max(totals),
        "seconds": seconds,
        "tokens_per_second": statistics.median(
            each.completion_tokens / total for each, total in zip(work, totals, strict=True)
        ),
        "row_tokens_per_second": statistics.median(
            each.row_tokens / total for each, total in zip(work, totals, strict=True)
        ),
        "model_flops_per_second": statistics.median(rate),
        "peak_flops_per_second": peak,
        "mfu": None if peak is None else statistics.median(rate) / peak,
        "peak_bytes": peaks,
        "estimated_seconds": {name: estimated[name] for name in ("old_logprobs", "update") if name in estimated},
        "loss": [record.loss for record in records],
        "torch": torch.__version__,
    }


def _device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if config.model.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def tables(result: dict[str, Any]) -> list[Any]:
    """Tables of the result: figures of the step, and seconds and memory by phase."""
    estimated, peaks = result["estimated_seconds"], result["peak_bytes"]
    rows = {}
    for name, seconds in sorted(result["seconds"].items(), key=lambda item: -item[1]):
        parts = [f"{seconds:.4g} s"]
        if name in peaks:
            parts.append(f"peak {peaks[name] / 2**30:.2f} GiB")
        if estimated.get(name):  # nothing is expected of a phase that has no pass
            parts.append(f"{seconds / estimated[name]:.2f} times the estimate of {estimated[name]:.3g} s")
        rows[name] = ", ".join(parts)
    peak = result["peak_flops_per_second"]
    mfu = "peak rate of this GPU not known"
    if peak is not None:
        mfu = f"{result['mfu']:.1%} of {peak / 1e12:.3g} TFLOP/s per rank"
    figures = {
        "model": f"{result['model']}, {result['parameters']:,} parameters in {result['dtype']}, random weights",
        "device": f"{result['device']}, {result['ranks']} rank{'s' * (result['ranks'] > 1)}, {result['mode']}",
        "rollouts": f"{result['prompts_per_step']} prompts of {result['prompt_tokens']} tokens, {result['group_size']} "
        f"completions each {'of' if result['lengths'] == 'full' else 'of 1 to'} {result['completion_tokens']} tokens",
        "step": f"{result['step_seconds']:.4g} s ({result['step_seconds_least']:.4g} to "
        f"{result['step_seconds_most']:.4g}, {result['steps']} steps)",
        "tokens": f"{result['tokens_per_second']:,.0f} completion tokens/s, "
        f"{result['row_tokens_per_second']:,.0f} tokens/s with prompts",
        "model FLOPs": mfu,
    }
    return [
        terminal.config_table(figures, title="training steps on random rollouts, no generation"),
        terminal.config_table(rows, title="medians by phase"),
    ]

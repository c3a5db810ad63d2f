"""The model that a run trains: made or read, laid out over ranks, with its reference."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.config import Config, ModelConfig, stream_seed
from paced_fast.data import prompts
from paced_fast.data.distributed import World, joined
from paced_fast.data.records import PromptTable
from paced_fast.errors import InputError, counted
from paced_fast.generation.vllm_engine import require_head_size, require_pushable_experts
from paced_fast.policy import Policy, adapt, build_tiny, has_experts, load_model, make_policy, prepare
from paced_fast.policy.families import admit, planned
from paced_fast.policy.gradient_checkpointing import can_recompute
from paced_fast.policy.loading import skeleton
from paced_fast.policy.saving import generation_settings, save_model
from paced_fast.policy.shape import ModelShape, shape_of
from paced_fast.policy.sharding import shards_mesh
from paced_fast.policy.warm_start import warm_start
from paced_fast.run import checkpoint
from paced_fast.run.plan import fit, memory
from paced_fast.run.record import terminal
from paced_fast.run.record.progress import Waiting
from paced_fast.run.start.run_folder import RunLock, claim
from paced_fast.run.start.tables import Data, read_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedPolicy:
    """The policy to train, with the reference policy and the embeddings from before training."""

    policy: Policy
    initial: Policy | None
    embeddings: Tensor | None  # f32[N, H] of the training prompts
    eval_embeddings: Tensor | None  # of the held-out prompts
    layout: memory.Layout


def make_trained_policy(
    data: Data, folder: Path, newest: Path | None, lock: RunLock, world: World, console: Console
) -> TrainedPolicy:
    """Make or read the policy, spread over the ranks; the run folder is made with the first one.

    With `newest`, a checkpoint's folder, its parameters are those. Prints the memory plan to the console.
    """
    config, home = data.config, _home(data.config, world)
    model = _first_model(data, folder, newest is None, home, lock, world, console)
    checkpoint.seed_random_state(stream_seed(config.seed, 0, "ambient"))
    shape, as_planned = _trained_shape(config, model), planned(config, model.config)
    chosen = _fit(as_planned, shape, len(data.table), world, can_recompute=can_recompute(model))
    layout, as_planned = chosen.layout, chosen.config
    recompute = as_planned.model.gradient_checkpointing
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=recompute))
    is_sharded = layout.mode == "sharded"
    plan = memory.plan(shape, as_planned, len(data.table), layout)
    console.print(terminal.memory_plan_table(plan, available_bytes=layout.device_bytes or 0))
    # Embeddings, and the reference that an algorithm keeps, belong to the policy as it was before training.
    with world.agreement():
        policy, initial = _policies(config, model, world, is_sharded)
    embeddings = eval_embeddings = None
    if config.uses_head:
        logger.info("embedding %s for log Z", counted(len(data.table) + len(data.eval_table), "prompt"))
        with policy.whole():
            tables, with_last = (data.table, data.eval_table), config.log_z.embedding == "mean_and_last"
            embeddings, eval_embeddings = (
                _embeddings(policy, [row.token_ids for row in table.rows], world, with_last=with_last)
                for table in tables
            )
    if newest is not None and config.lora.rank == 0:  # adapters lie beside the weights from before training
        del model  # otherwise a second copy would be held while an engine starts
        with world.agreement():
            latest = load_model(home, str(newest / "policy"))
        with world.agreement():
            policy, _ = _policies(config, latest, world, is_sharded, with_initial=False)
        del latest
    with world.agreement():
        if not is_sharded:
            prepare(policy, config)
    return TrainedPolicy(
        policy=policy, initial=initial, embeddings=embeddings, eval_embeddings=eval_embeddings, layout=layout
    )


def _embeddings(policy: Policy, prompts: Sequence[tuple[int, ...]], world: World, *, with_last: bool) -> Tensor:
    """`Policy.embed` of all prompts, on every rank the same to the bit; each rank computes every R-th."""
    own = policy.embed(prompts[world.rank :: world.size], with_last=with_last)
    result = own.new_zeros(len(prompts), own.shape[1])
    result[world.rank :: world.size] = own
    world.sum_(result)  # zeros from the other ranks
    return result


def _first_model(
    data: Data, folder: Path, is_new: bool, home: ModelConfig, lock: RunLock, world: World, console: Console
) -> PreTrainedModel:
    """Model before training: rank 0 makes it for a new run, and the other ranks read it from the run folder."""
    model = None
    with world.agreement(patient=True):
        if is_new and world.is_rank0:
            model = _begin(data, folder, home, lock, console)
    with world.agreement(patient=True):
        if model is None:
            model = load_model(home, str(folder / "initial"))
    # On the same device as on the other ranks: it may not fit on one device.
    cast(torch.nn.Module, model).to(home.device)
    return model


def _begin(data: Data, folder: Path, home: ModelConfig, lock: RunLock, console: Console) -> PreTrainedModel:
    """Make the first model and then the run folder, with its weights in `initial`."""
    config, tables = data.config, (data.table, data.eval_table)
    warm = config.warm_start.first.steps or config.warm_start.second.steps
    placed = config if warm else dataclasses.replace(config, model=home)
    model = _initial_model(data, placed, tables, console)
    if config.generator == "vllm":
        memory.engine_tokens(shape_of(model), config)
        require_head_size(shape_of(model).head_size, config.model.device)
        require_pushable_experts(has_experts(model), config.model.device)
    claim(folder, config, lock)
    generation = None if data.path == "tiny" else generation_settings(data.path)
    save_model(model, folder / "initial", generation=generation)
    data.tokenizer.save_pretrained(folder / "initial")
    return model


def _home(config: Config, world: World) -> ModelConfig:
    """Model settings with the device to read weights to: the host while it is not known whether one device can hold
    them."""
    is_open = world.size > 1 and config.distributed.mode != "replicated"
    return dataclasses.replace(config.model, device="cpu") if is_open else config.model


def _device_bytes(config: Config, world: World) -> int:
    """Bytes available to each rank (its GPU, or its share of host memory); the minimum over ranks."""
    device = torch.device(config.model.device)
    own = memory.available(device) // (1 if device.type == "cuda" else world.local_size)
    return min(joined(world.gather(torch.tensor([own], dtype=torch.int64))))


def _trained_shape(config: Config, model: PreTrainedModel) -> ModelShape:
    """Sizes of the model as it will be trained, including adapters that it does not have yet."""
    if config.lora.rank == 0:
        return shape_of(model)
    adapted = skeleton(model.config)
    adapt(adapted, config.lora, seed=0)
    return shape_of(adapted)


def _fit(config: Config, shape: ModelShape, num_prompts: int, world: World, *, can_recompute: bool = True) -> fit.Fit:
    """Choose whether parameters and gradients are split over the ranks and layers computed again, and log the
    reasons."""
    layout = memory.Layout(ranks=world.size, nodes=world.nodes, device_bytes=_device_bytes(config, world))
    chosen = fit.choose(config, shape, num_prompts, layout, can_recompute=can_recompute)
    if world.size > 1:
        logger.info("%s", chosen.mode)
    if config.model.device == "cuda":
        logger.info("gradient checkpointing %s", chosen.recompute)
    return chosen


def _policies(
    config: Config, model: PreTrainedModel, world: World, is_sharded: bool, *, with_initial: bool = True
) -> tuple[Policy, Policy | None]:
    """The policy on the device, all of it or this rank's shards, and the policy before training if it is the reference.

    Adapters and fused layers are added first, because a sharded model cannot be changed.
    """
    device = torch.device(config.model.device)
    if not is_sharded:
        cast(torch.nn.Module, model).to(device)
    policy = make_policy(model, config)
    initial = policy.frozen_copy() if config.traits.keeps_initial_policy and with_initial else None
    if is_sharded:
        prepare(policy, config)
        for one in (policy, initial):
            if one is not None:
                one.shard(shards_mesh(world, device), getattr(torch, config.model.dtype))
    return policy, initial


def _initial_model(data: Data, config: Config, tables: Sequence[PromptTable], console: Console) -> Any:
    """Make the model before training, including its warm start; first checks that it has an embedding for every prompt
    token."""
    path, tokenizer, stops = data.path, data.tokenizer, data.stops
    logger.info("loading the model %s", config.model.name)
    if path == "tiny":
        pad_id = tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        seed = stream_seed(config.warm_start.seed, 0, "initial weights")
        model = build_tiny(config.model, len(tokenizer), stop_id=stops.text_end, pad_id=pad_id, seed=seed)
    else:
        model = load_model(config.model, path)
    embedded = prompts.num_embedded(model)
    rows = [(row.where, row.token_ids) for table in tables for row in table.rows]
    prompts.check_embedded(rows, tokenizer, embedded)
    if min(stops.ids) >= embedded:
        raise InputError(
            f"the model has embeddings for {embedded} tokens, and the stop tokens {stops} are not among them: name "
            "others with --generation.stop-tokens"
        )
    admit(config, model, tables)
    _trained_shape(config, model)  # check that adapters are possible before the warm start
    with Waiting(console) as waiting:
        return warm_start(
            model,
            tokenizer,
            config,
            load=lambda sources: read_table(sources, tokenizer, config),
            stops=stops,
            report=waiting.update,
        )

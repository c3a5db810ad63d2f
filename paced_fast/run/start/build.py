"""Everything a run needs, put together: data, model, warm start, run folder, and what a resumed run continues with."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paced_fast.config import Config, ModelConfig, flatten, stream_seed
from paced_fast.config.resolve import check_engine_ranks, resolve, writes_chats
from paced_fast.data import prompts, tasks
from paced_fast.data.records import PromptTable
from paced_fast.distributed import ALONE, World, joined, usable_cores
from paced_fast.errors import InputError
from paced_fast.evaluate import load_config
from paced_fast.generation import Generator, TransformersGenerator, VLLMGenerator, weight_sync
from paced_fast.generation.parity import ParityGuard, long_sequences
from paced_fast.generation.vllm_engine import EngineSettings, require_head_size, require_pushable_experts, require_vllm
from paced_fast.paced.trainer import Counters, Trainer
from paced_fast.policy import Policy, adapt, build_tiny, has_experts, load_model, make_policy, prepare, smollm2_folder
from paced_fast.policy.families import admit, planned
from paced_fast.policy.saving import generation_settings, save_model
from paced_fast.policy.shape import ModelShape, shape_of
from paced_fast.policy.sharding import choose_mode, shards_mesh
from paced_fast.policy.warm_start import warm_start
from paced_fast.rewards import Scorer, Shaper
from paced_fast.run import checkpoint
from paced_fast.run.plan import memory
from paced_fast.run.plan.devices import require_float32_products
from paced_fast.run.record import writer
from paced_fast.run.record.rollouts_file import RecordedRollouts
from paced_fast.run.start.run_folder import OWN_NAMES, RunLock, claim, run_folder
from paced_fast.run.start.tables import read_ends, read_table, read_tables, read_tokenizer
from paced_fast.sharing import SharedGenerator, together
from paced_fast.skeleton import skeleton

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """A run ready to train: its parts, its folder, and the step it continues after."""

    config: Config
    folder: Path
    trainer: Trainer
    generator: Generator
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    eval_table: PromptTable
    eval_embeddings: Tensor | None
    repeated: int
    """Training prompts that are held-out prompts."""
    resumed: bool
    identity: dict[str, str]
    """Hashes of data and tokenizer, and the stop tokens; a continuation must have the same."""
    world: World = ALONE


def build(
    config: Config,
    console: Console,
    world: World = ALONE,
    replay: Path | None = None,
    lock: RunLock | None = None,
) -> Run:
    """Load data and model, warm-start or resume, and only then create the run folder.

    Of several ranks the lead makes the folder and the first weights, which the others read from it. With `replay` the
    rollouts of a run that was recorded take the place of sampling. The lead takes the `lock`; the caller ends it.
    """
    torch.set_num_threads(config.run.threads or max(1, usable_cores() // world.local_size))
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    if (config.model.device, config.model.dtype) == ("cpu", "float32"):
        require_float32_products()
    torch.set_flush_denormal(True)  # squared gradients of unlikely tokens are denormal, and AdamW crawls on those
    writer.require_sinks(config.run.loggers)
    check_engine_ranks(config, world.size)
    if config.generator == "vllm":
        require_vllm(config.model.device)
        if config.model.name == "tiny":  # known before the warm start
            require_head_size(config.model.hidden_size // config.model.num_heads, config.model.device)
    lock = lock or RunLock()
    folder = _of_lead(world, lambda: run_folder(config, lock))
    assert folder is not None
    newest = _newest_checkpoint(config, folder, lock, world) if config.resume == "auto" else None
    path = config.model.name
    if path == "smollm2":
        path = str(_of_lead(world, lambda: smollm2_folder(Path(config.warm_start.cache_dir).expanduser())))
    tokenizer = together(world, lambda: read_tokenizer(path))
    config = _dated(config, folder, tokenizer, world)
    config, stops, decode = together(world, lambda: read_ends(config, path, tokenizer))
    scorer, shaper = Scorer(settings=config.reward), Shaper(config.reward)
    table, eval_table, repeated = together(world, lambda: read_tables(config, tokenizer, scorer, shaper))
    recorded = None
    if replay is not None:
        recorded = together(world, lambda: RecordedRollouts(replay, config, table, prompts.num_ids(tokenizer)))
    identity = checkpoint.identity(table, eval_table, tokenizer) | {"stop tokens": str(stops)}
    model, home = None, _home(config, world)
    if newest is None:
        begin = functools.partial(_begin, config, folder, lock, path, tokenizer, stops, home, (table, eval_table))
        model = together(world, begin if world.is_lead else lambda: None, patient=True)
    if model is None:
        model = together(world, lambda: load_model(home, str(folder / "initial")), patient=True)
    else:  # where the others have it, too: it may be more than one device can hold
        cast(torch.nn.Module, together(world, lambda: model, patient=True)).to(home.device)
    checkpoint.seed_random_state(stream_seed(config.seed, 0, "ambient"))
    shape, as_planned = _shape(config, model), planned(config, model.config)
    layout = _layout(as_planned, shape, len(table), world)
    is_sharded = layout.mode == "sharded"
    plan = memory.plan(shape, as_planned, len(table), layout)
    console.print(writer.memory_plan_table(plan, available_bytes=layout.device_bytes or 0))
    # Embeddings, and the reference of flowrl, belong to the policy as it was before training.
    first = model
    policy, initial = together(world, lambda: _policies(config, first, world, is_sharded))
    embeddings = eval_embeddings = None
    if config.uses_head:
        with policy.whole():
            embeddings = policy.embed([row.token_ids for row in table.rows])
            eval_embeddings = policy.embed([row.token_ids for row in eval_table.rows])
    if newest is not None and config.lora.rank == 0:  # adapters lie beside the weights from before training
        latest = together(world, lambda: load_model(home, str(newest / "policy")))
        policy, _ = together(world, lambda: _policies(config, latest, world, is_sharded, with_initial=False))
        del model, first, latest  # or a second copy would be held while an engine starts
    if not is_sharded:
        together(world, lambda: prepare(policy, config))
    # Before the trainer makes the optimiser: sharing gives the parameters other memory.
    weights = folder / "initial" if newest is None else newest / "policy"
    generator, guard = together(world, lambda: _generator(config, policy, weights, stops.ids, table, world, layout))
    if world.size > 1:
        engine_ranks = config.weight_sync.tensor_parallel
        generator = SharedGenerator(
            generator, world, engine_ranks=engine_ranks, whole=_sampling_context(config, policy)
        )
    trainer = Trainer(
        config,
        policy=policy,
        initial=initial,
        generator=generator,
        scorer=scorer,
        shaper=shaper,
        decode=decode,
        table=table,
        embeddings=embeddings,
        guard=guard,
        world=world,
    )
    trainer.recorded = recorded
    if recorded is not None:  # a model may have fewer ids than its tokenizer
        recorded.vocabulary = trainer.vocabulary
    if newest is not None:
        _continue(trainer, config, folder, newest, identity)
    held_out = (eval_table, eval_embeddings, repeated)
    return Run(config, folder, trainer, generator, scorer, tokenizer, *held_out, newest is not None, identity, world)


def _of_lead(world: World, function: Callable[[], Path | None]) -> Path | None:
    """The path that `function` finds on the lead, told to every rank; the others do not call it."""
    found = together(world, lambda: function() if world.is_lead else None, patient=True)
    told = world.gather_text("" if found is None else str(found))[0]
    return Path(told) if told else None


def _begin(
    config: Config,
    folder: Path,
    lock: RunLock,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: prompts.Stops,
    home: ModelConfig,
    tables: Sequence[PromptTable],
) -> Any:
    """Make the first model and then the run folder, with its weights in `initial`."""
    warm = config.warm_start.first.steps or config.warm_start.second.steps
    model = _initial_model(path, tokenizer, config if warm else dataclasses.replace(config, model=home), stops, tables)
    if config.generator == "vllm":
        memory.engine_tokens(shape_of(model), config)
        require_head_size(shape_of(model).head_size, config.model.device)
        require_pushable_experts(has_experts(model), config.model.device)
    claim(folder, config, lock)
    generation = None if path == "tiny" else generation_settings(path)
    save_model(model, folder / "initial", generation=generation)
    tokenizer.save_pretrained(folder / "initial")
    return model


def _continue(trainer: Trainer, config: Config, folder: Path, newest: Path, identity: dict[str, str]) -> None:
    """Give the trainer the state of a checkpoint, and keep the settings it goes on with."""
    world = trainer.world
    tensors, state, generators = checkpoint.load(newest, trainer.spread_tensors(), world)
    together(world, lambda: checkpoint.check_identity(state, identity, newest))
    trainer.load_state_tensors(tensors)
    trainer.counters = Counters(**state["counters"])
    if generators is None:  # there are more ranks now than wrote it
        checkpoint.seed_random_state(stream_seed(config.seed, trainer.counters.step, f"ambient/{world.rank}"))
    else:
        checkpoint.restore_random_state(generators)
    if world.is_lead:
        writer.write_json_atomic(folder / "config.json", dataclasses.asdict(config))
    logger.info("resumed after step %d from %s", trainer.counters.step, newest)


def _home(config: Config, world: World) -> ModelConfig:
    """Where weights are read to: the host while it is not known whether one device can hold them."""
    is_open = world.size > 1 and config.distributed.mode != "replicated"
    return dataclasses.replace(config.model, device="cpu") if is_open else config.model


def _device_bytes(config: Config, world: World) -> int:
    """Memory that every rank may think of as its own: a GPU, or its part of the machine; the least if they differ."""
    device = torch.device(config.model.device)
    own = memory.available(device) // (1 if device.type == "cuda" else world.local_size)
    return min(joined(world.gather(torch.tensor([own], dtype=torch.int64))))


def _shape(config: Config, model: PreTrainedModel) -> ModelShape:
    """The sizes of what will be trained: with adapters, which the model does not have yet, those of the adapters."""
    if config.lora.rank == 0:
        return shape_of(model)
    adapted = skeleton(model.config)
    adapt(adapted, config.lora, seed=0)
    return shape_of(adapted)


def _layout(config: Config, shape: ModelShape, num_prompts: int, world: World) -> memory.Layout:
    """How the run is spread over its ranks: parameters replicated or sharded, which the log says with the reason."""
    device_bytes = _device_bytes(config, world)
    layout = memory.Layout(ranks=world.size, nodes=world.nodes, device_bytes=device_bytes)
    parts = memory.at_a_time(memory.plan(shape, config, num_prompts, layout))
    choice = choose_mode(config.distributed.mode, ranks=world.size, plan=parts, device_bytes=device_bytes)
    if world.size > 1:
        logger.info("%s", choice.reason)
    return dataclasses.replace(layout, mode="sharded" if choice.is_sharded else "replicated")


def _policies(
    config: Config, model: PreTrainedModel, world: World, is_sharded: bool, *, with_initial: bool = True
) -> tuple[Policy, Policy | None]:
    """The policy on the device, all of it or this rank's shards, and the reference that flowrl keeps beside it.

    What is split cannot be given adapters or other layers any more, so it gets them before.
    """
    device = torch.device(config.model.device)
    if not is_sharded:
        cast(torch.nn.Module, model).to(device)
    policy = make_policy(model, config)
    initial = policy.frozen_copy() if config.algorithm == "flowrl" and with_initial else None
    if is_sharded:
        prepare(policy, config)
        for one in (policy, initial):
            if one is not None:
                one.shard(shards_mesh(world, device), getattr(torch, config.model.dtype))
    return policy, initial


def _sampling_context(config: Config, policy: Policy) -> Callable[[], AbstractContextManager[None]]:
    """What is around a sampling: an engine has weights of its own, the trainer's model must be gathered."""
    return policy.whole if config.generator == "transformers" else contextlib.nullcontext


def _generator(
    config: Config,
    policy: Policy,
    weights: Path,
    stop_ids: Sequence[int],
    table: PromptTable,
    world: World,
    layout: memory.Layout,
) -> tuple[Generator, ParityGuard | None]:
    """Who samples and, for vLLM, who checks it; `weights` is a folder with the policy's present parameters."""
    settings, model = config.generation, policy.model
    shape = shape_of(model)
    if config.generator == "transformers":
        plain = TransformersGenerator(model, stop_ids=stop_ids, max_batch_sequences=settings.max_batch_sequences)
        return plain, None
    random_state = checkpoint.random_state()
    generator = VLLMGenerator(
        EngineSettings(
            path=str(weights),
            dtype=config.weight_sync.dtype,
            device=config.model.device,
            max_tokens=memory.engine_tokens(shape, config),
            max_sequences=settings.max_batch_sequences,
            kv_cache_bytes=memory.kv_cache_bytes(shape, config, layout),
            sleep_level=config.weight_sync.sleep_level,
            ranks=world.size,
            tensor_parallel_size=config.weight_sync.tensor_parallel,
        ),
        stop_ids=stop_ids,
    )
    checkpoint.restore_random_state(random_state)  # an engine that starts seeds every global generator
    generator.attach(weight_sync.connect(generator, model, config.weight_sync))
    if config.model.device == "cuda":
        torch.cuda.empty_cache()  # the trainer's own copy, where the weights are shared now
    length = min(memory.CHECK_TOKENS, memory.engine_tokens(shape, config)) - 1  # scoring samples one token more
    own = [row.token_ids for row in table.rows]
    sequences = long_sequences(own, count=config.weight_sync.check_prompts, length=length)
    return generator, ParityGuard(generator, policy, config, sequences=sequences)


def _initial_model(
    path: str, tokenizer: PreTrainedTokenizerBase, config: Config, stops: prompts.Stops, tables: Sequence[PromptTable]
) -> Any:
    """The model before training, after its warm start; refused before that when it has no embedding for a prompt."""
    if path == "tiny":
        pad_id = tokenizer.convert_tokens_to_ids(tasks.SIGNED_SUMS_PAD)
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
            f"completions end at {stops}, and the model has {embedded} tokens only: name others by "
            "--generation.stop-tokens"
        )
    admit(config, model, tables)
    _shape(config, model)  # what cannot be adapted is refused before anything is made of it
    started = time.perf_counter()
    result = warm_start(
        model,
        tokenizer,
        config,
        load=lambda sources: read_table(sources, tokenizer, config),
        stops=stops,
        report=logger.info,
    )
    logger.info("warm start: done after %.0f s", time.perf_counter() - started)
    return result


def _dated(config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase, world: World) -> Config:
    """The settings with the day of the run, where prompts hang on it: that of one that is continued, else today."""
    if config.data.date is not None or not (writes_chats(config) and prompts.reads_date(tokenizer)):
        return config
    today = ""
    if world.is_lead:
        today = datetime.date.today().isoformat()
        if config.resume == "auto" and (folder / "config.json").is_file():
            today = load_config(folder).data.date or today
    date = world.gather_text(today)[0]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


# What may differ between a run and its continuation: how long it goes on, what it keeps and where things lie.
# What an error message advises to change must be free too.
_FREE_ON_RESUME = (
    *(f"model.{name}" for name in ("attention", "gradient_checkpointing", "liger")),
    *("steps", "resume", "run_dir", "run.", "distributed.", "guard."),
    *("warm_start.cache_dir", "generation.max_batch_sequences"),
    "generation.stop_tokens",  # compared by what they come to, which the checkpoint says
    *(f"weight_sync.{name}" for name in ("mode", "kv_cache_gib", "sleep_level", "bucket_mib", "tensor_parallel")),
    *(f"weight_sync.{name}" for name in ("check_every", "check_prompts", "max_mean_difference")),
)


def _newest_checkpoint(config: Config, folder: Path, lock: RunLock, world: World) -> Path | None:
    """What `--resume auto` continues from; None when nothing has been saved yet. Never starts over a damaged run."""
    began = world.is_lead and any((folder / name).exists() for name in OWN_NAMES)
    together(world, lambda: _check_same_run(config, folder) if began else None)
    together(world, lambda: lock.take(folder) if world.is_lead and folder.is_dir() else None)
    root = folder / "checkpoints"
    newest, error = checkpoint.newest(root, world), None
    if newest is None and (found := checkpoint.folders(root)):
        error = InputError(
            f"--resume auto: every checkpoint in {root} is damaged ({found[-1].name}: "
            f"{checkpoint.verify(found[-1])}): --resume never --run.overwrite restarts"
        )
    world.agree(error)
    return newest


def _check_same_run(config: Config, folder: Path) -> None:
    try:
        old = flatten(resolve(load_config(folder)))  # a folder older than a setting has its default, maybe `auto`
    except InputError as error:
        raise InputError(f"--resume auto: {folder} was trained with settings refused today: {error}") from None
    for name, value in flatten(config).items():
        if name == "data.date" and value is None:  # the run's own is taken
            continue
        if not name.startswith(_FREE_ON_RESUME) and old[name] != value:
            raise InputError(
                f"--resume auto: --{name.replace('_', '-')} was {old[name]} in {folder} and is {value} now: "
                "give the same settings, or another --run-dir"
            )

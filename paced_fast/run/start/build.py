"""Assembly of a run: data, model, warm start, run folder, and the state of a resumed run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paced_fast.config import Config
from paced_fast.config.resolve import check_engine_ranks
from paced_fast.data import prompts
from paced_fast.data.distributed import ALONE, World, threads_of
from paced_fast.data.records import PromptTable
from paced_fast.generation import Generator
from paced_fast.generation.vllm_engine import require_head_size, require_vllm
from paced_fast.paced.collect import Collector, Phase
from paced_fast.paced.trainer import Trainer
from paced_fast.paced.update import rate_note
from paced_fast.policy import Policy
from paced_fast.rewards.loading import RewardFunction
from paced_fast.run.plan.devices import require_float32_products
from paced_fast.run.record import loggers
from paced_fast.run.record.phases import Phases, clock_of, probe
from paced_fast.run.start.first_rows import show_first_row
from paced_fast.run.start.generator import make_generator
from paced_fast.run.start.model import make_trained_policy
from paced_fast.run.start.resume import continue_from, newest_checkpoint
from paced_fast.run.start.run_folder import RunLock, run_folder
from paced_fast.run.start.tables import Data, path_from_rank0, read_data
from paced_fast.run.step import Stepper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run ready to train: its parts, its folder, and the step it continues after."""

    config: Config
    folder: Path
    stepper: Stepper
    tokenizer: PreTrainedTokenizerBase
    eval_table: PromptTable
    eval_embeddings: Tensor | None
    repeated: Mapping[str, int]
    """Training prompts that are held-out prompts, by the slice of those."""
    resumed: bool
    identity: dict[str, str]
    """Hashes of data and tokenizer, and the stop tokens; a resumed run must match them."""

    @property
    def trainer(self) -> Trainer:
        """Components and step of the method."""
        return self.stepper.trainer

    @property
    def collector(self) -> Collector:
        """Sampling and scoring of groups."""
        return self.stepper.trainer.collector

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.stepper.world


def build(
    config: Config,
    console: Console,
    world: World = ALONE,
    replay: Path | None = None,
    lock: RunLock | None = None,
    functions: Mapping[str, RewardFunction] | None = None,
) -> PreparedRun:
    """Load data and model, warm-start or resume, and only then create the run folder.

    With several ranks, rank 0 makes the folder and the first weights, which the others read from it. With `replay`,
    recorded rollouts take the place of sampling. Rank 0 takes the `lock`; the caller ends it. `functions` are rewards
    that Python handed over, by name.
    """
    _prepare_process(config, world)
    lock = lock or RunLock()
    folder = path_from_rank0(world, lambda: run_folder(config, lock))
    assert folder is not None
    newest = newest_checkpoint(config, folder, lock, world) if config.resume == "auto" else None
    data = read_data(config, folder, world, replay, functions)
    with world.agreement():
        if world.is_rank0:
            show_first_row(data, console)
    made = make_trained_policy(data, folder, newest, lock, world, console)
    # Must precede the trainer's optimiser, because sharing moves the parameters to other memory.
    generator, guard = make_generator(data, made, folder / "initial" if newest is None else newest / "policy", world)
    made.policy.warm_up(skipped_share=config.loss.skipped_share)
    phases = Phases(*clock_of(made.policy.device), probe(made.policy.device))
    trainer = Trainer(
        data.config,
        policy=made.policy,
        initial=made.initial,
        collector=_collector(data, made.policy, generator, world, phases.phase),
        embeddings=made.embeddings,
        world=world,
        split_gradients=made.layout.gradients == "split",
    )
    stepper = Stepper(trainer, phases, guard)
    if newest is not None:
        continue_from(stepper, folder, newest, data.identity)
    if world.is_rank0 and (note := rate_note(data.config, stepper.counters.step)):
        logger.info("%s", note)
    return PreparedRun(
        config=data.config,
        folder=folder,
        stepper=stepper,
        tokenizer=data.tokenizer,
        eval_table=data.eval_table,
        eval_embeddings=made.eval_embeddings,
        repeated=data.repeated,
        resumed=newest is not None,
        identity=data.identity,
    )


def _prepare_process(config: Config, world: World) -> None:
    """Apply process-wide settings, and check the machine before anything is read."""
    torch.set_num_threads(threads_of(config.run.threads, world.local_size))
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    if (config.model.device, config.model.dtype) == ("cpu", "float32"):
        require_float32_products()
    torch.set_flush_denormal(True)  # squared gradients of unlikely tokens are denormal, which makes AdamW slow
    loggers.require_sinks(config.run.loggers)
    check_engine_ranks(config, world.size)
    if config.generator == "vllm":
        require_vllm(config.model.device)
        if config.model.name == "tiny":  # known before the warm start
            require_head_size(config.model.hidden_size // config.model.num_heads, config.model.device)


def _collector(data: Data, policy: Policy, generator: Generator, world: World, phase: Phase) -> Collector:
    vocabulary = min(prompts.num_ids(data.tokenizer), policy.head[0].shape[0])  # a model may have fewer ids
    if data.recorded is not None:
        data.recorded.vocabulary = vocabulary
    return Collector(
        data.config,
        generator=generator,
        scorer=data.scorer,
        shaper=data.shaper,
        decode=data.decode,
        table=data.table,
        vocabulary=vocabulary,
        device=policy.device,
        world=world,
        recorded=data.recorded,
        phase=phase,
    )

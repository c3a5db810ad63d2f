"""The generator of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from paced_fast.data.distributed import World
from paced_fast.generation import Generator, TransformersGenerator, VLLMGenerator, weight_sync
from paced_fast.generation.over_ranks import SharedGenerator
from paced_fast.generation.parity import ParityGuard, long_sequences
from paced_fast.generation.vllm_engine import EngineSettings
from paced_fast.policy.shape import shape_of
from paced_fast.run import checkpoint
from paced_fast.run.plan import memory
from paced_fast.run.start.model import TrainedPolicy
from paced_fast.run.start.tables import Data

logger = logging.getLogger(__name__)


def make_generator(
    data: Data, made: TrainedPolicy, weights: Path, world: World
) -> tuple[Generator, ParityGuard | None]:
    """Make the generator and, for vLLM, its parity guard; `weights` is a folder with the policy's current
    parameters."""
    config = data.config
    with world.agreement():
        generator, guard = GENERATORS[config.generator](data, made, weights, world)
    if world.size == 1:
        return generator, guard
    # An engine has its own weights; to sample from the trainer's model, its shards must be gathered.
    whole = made.policy.whole if config.generator == "transformers" else contextlib.nullcontext
    shared = SharedGenerator(
        generator,
        world,
        engine_ranks=config.weight_sync.tensor_parallel,
        whole=whole,
        deal=config.distributed.prompts,
    )
    return shared, guard


def transformers_generator(
    data: Data, made: TrainedPolicy, weights: Path, world: World
) -> tuple[Generator, ParityGuard | None]:
    """The trainer's own model."""
    del weights, world
    size = data.config.generation.batch_sequences()
    return TransformersGenerator(made.policy.model, stop_ids=data.stops.ids, max_batch_sequences=size), None


def vllm_generator(
    data: Data, made: TrainedPolicy, weights: Path, world: World
) -> tuple[Generator, ParityGuard | None]:
    """A vLLM engine with the weights shared or pushed, and the guard that checks its log-probs."""
    config, policy, model = data.config, made.policy, made.policy.model
    shape = shape_of(model)
    random_state = checkpoint.random_state()
    logger.info("starting the vLLM engine")
    generator = VLLMGenerator(
        EngineSettings(
            path=str(weights),
            dtype=config.weight_sync.dtype,
            device=config.model.device,
            max_tokens=memory.engine_tokens(shape, config),
            max_sequences=memory.batch_sequences(config, made.layout),
            kv_cache_bytes=memory.kv_cache_bytes(shape, config, made.layout),
            sleep_level=config.weight_sync.sleep_level,
            ranks=world.size,
            tensor_parallel_size=config.weight_sync.tensor_parallel,
        ),
        stop_ids=data.stops.ids,
    )
    checkpoint.restore_random_state(random_state)  # starting an engine seeds every global generator
    generator.attach(weight_sync.connect(generator, model, config.weight_sync))
    if config.model.device == "cuda":
        torch.cuda.empty_cache()  # the trainer's own copy, if the weights are now shared
    length = min(memory.CHECK_TOKENS, memory.engine_tokens(shape, config)) - 1  # scoring samples one token more
    own = [row.token_ids for row in data.table.rows]
    sequences = long_sequences(own, count=config.weight_sync.check_prompts, length=length)
    return generator, ParityGuard(generator, policy, config, sequences=sequences)


GENERATORS: dict[str, Callable[[Data, TrainedPolicy, Path, World], tuple[Generator, ParityGuard | None]]] = {
    "transformers": transformers_generator,
    "vllm": vllm_generator,
}
"""Makers of this rank's generator, by `config.generator`; only an engine with weights of its own has a guard."""

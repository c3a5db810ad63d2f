"""Roofline estimate of the time per step: operations and bytes of each phase against a chip's peaks.

N = parameters that every token is multiplied with, V = vocabulary, H = hidden size. A forward pass takes 2 N operations
per token, 2 V H where the output layer is used, and 4 H_q of attention per layer for each position that a token attends
to (H_q = heads * head size); a backward pass takes twice that, plus a forward pass where activations are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from paced_fast.config import Config
from paced_fast.policy.shape import ModelShape
from paced_fast.run.plan.devices import Device
from paced_fast.run.plan.memory import Layout, batch_sequences, kv_cache_bytes, row_tokens, shares_prompts

MATMUL_SHARE = 0.5
"""Share of the peak that matrix products of whole micro-batches reach."""
BANDWIDTH_SHARE = 0.7
"""Share of the memory bandwidth that decoding and the optimiser reach, and of a link's that collectives reach."""
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Tokens that a step's passes see, over all ranks."""

    row_tokens: int
    """Tokens of prompts, once per row, and of completions, without padding."""
    completion_tokens: int
    seen: float
    """Positions that a token attends to, averaged over the row tokens."""


def step_work(config: Config) -> Work:
    """The work of a step whose prompts and completions are as long as they may be; replayed ones are left out.

    Rows that share a prompt are cut where a micro-batch ends, and their attention is computed whole, masked where
    nothing is seen. Packed rows read a prompt for each completion, and a token looks at what comes before it.
    """
    generation, prompt = config.generation, config.data.max_prompt_tokens
    if not shares_prompts(config):
        length = prompt + generation.max_completion_tokens
        return Work(
            row_tokens=config.rollouts_per_step * length,
            completion_tokens=config.rollouts_per_step * generation.max_completion_tokens,
            seen=length / 2,
        )
    room = max(1, (config.optimizer.micro_batch_tokens - prompt) // generation.max_completion_tokens)
    rows = -(-generation.group_size // min(room, generation.group_size))
    completions = config.rollouts_per_step * generation.max_completion_tokens
    tokens = generation.prompts_per_step * rows * prompt + completions
    seen = min(row_tokens(config), prompt + min(room, generation.group_size) * generation.max_completion_tokens)
    return Work(row_tokens=tokens, completion_tokens=completions, seen=float(seen))


def forward_flops(shape: ModelShape, work: Work) -> float:
    """Operations of one forward pass over a step's rows, the output layer at completion tokens only."""
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_size * work.seen
    return (
        work.row_tokens * (2 * shape.body_parameters + attention) + 2 * shape.head_parameters * work.completion_tokens
    )


def estimate(shape: ModelShape, config: Config, layout: Layout, device: Device) -> dict[str, float]:
    """Seconds of each phase of a step, without rewards (CPUs do them) and the head (small)."""
    work = step_work(config)
    forward = forward_flops(shape, work) / layout.ranks
    rate = MATMUL_SHARE * device.flops(config.model.dtype)
    backward = 2.0 if shape.trainable == shape.parameters else 1.0 + shape.trainable / shape.parameters
    again = 1.0 if config.model.gradient_checkpointing == "on" else 0.0
    passes = (1.0 + backward + again) * config.optimizer.epochs
    references = 2.0 if config.traits.keeps_initial_policy else 1.0
    # The first optimiser step has the old log-probs of its sequences from its own states: it projects those once more.
    first = 1 / config.optimizer.minibatches
    projection = 2 * shape.head_parameters * work.completion_tokens / layout.ranks
    seconds = {
        "generate": generation_seconds(shape, config, layout, device),
        "old_logprobs": (references - first) * forward / rate,
        "update": (passes * forward + first * projection) / rate + _optimizer_seconds(shape, config, layout, device),
    }
    exchange = _exchange_seconds(shape, config, layout, device)
    if exchange:
        seconds["exchange between ranks"] = exchange
    if config.generator == "vllm" and (config.weight_sync.mode == "push" or layout.shards > 1 or config.lora.rank > 0):
        copied = 2 * shape.parameters * _ITEMSIZE[config.weight_sync.dtype]
        seconds["sync"] = copied / (BANDWIDTH_SHARE * device.memory_bandwidth)
    return seconds


def generation_seconds(shape: ModelShape, config: Config, layout: Layout, device: Device) -> float:
    """Seconds to read each prompt once per group, then one pass per token for the sequences that are decoded at once.

    A pass reads all weights, and the keys and values of every sequence up to half its length on average; it takes as
    long as the slower of bytes and operations. What does not fit the key-value cache waits.
    """
    generation, prompt = config.generation, config.data.max_prompt_tokens
    dtype = config.weight_sync.dtype if config.generator == "vllm" else config.model.dtype
    element, rate = _ITEMSIZE[dtype], MATMUL_SHARE * device.flops(dtype)
    matmul = 2 * (shape.body_parameters + shape.head_parameters)
    prompts = generation.prompts_per_step * prompt * matmul / layout.ranks / rate
    context = prompt + generation.max_completion_tokens / 2
    at_once = decoded_at_once(shape, config, layout)
    waves = -(-config.rollouts_per_step // layout.ranks) / at_once
    weights = (shape.body_parameters + shape.head_parameters) * element
    bytes_read = weights + at_once * context * shape.kv_numbers * element
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_size * context
    pass_seconds = max(bytes_read / (BANDWIDTH_SHARE * device.memory_bandwidth), at_once * (matmul + attention) / rate)
    return prompts + waves * generation.max_completion_tokens * pass_seconds


def decoded_at_once(shape: ModelShape, config: Config, layout: Layout) -> int:
    """Sequences that a rank decodes at once: those of its part of a step that the batch and the key-value cache, at
    half of the completions' length, have room for."""
    context = config.data.max_prompt_tokens + config.generation.max_completion_tokens / 2
    dtype = config.weight_sync.dtype if config.generator == "vllm" else config.model.dtype
    room = kv_cache_bytes(shape, config, layout) // int(context * shape.kv_numbers * _ITEMSIZE[dtype])
    own = -(-config.rollouts_per_step // layout.ranks)
    return max(1, min(own, batch_sequences(config, layout), room))


def embedding_seconds(shape: ModelShape, config: Config, layout: Layout, device: Device, num_prompts: int) -> float:
    """Seconds to embed every prompt for log Z before the first step, each rank its part; 0 where nothing learns it."""
    if not config.uses_head:
        return 0.0
    tokens = num_prompts * config.data.max_prompt_tokens / layout.ranks
    return tokens * 2 * shape.body_parameters / (MATMUL_SHARE * device.flops(config.model.dtype))


def _optimizer_seconds(shape: ModelShape, config: Config, layout: Layout, device: Device) -> float:
    """Seconds to read weights, gradient, masters and two moments, and to write all but the gradient."""
    parts = layout.ranks if layout.mode == "replicated" else layout.shards
    moved = 7 * 4 * shape.trainable / parts
    steps = config.optimizer.minibatches * config.optimizer.epochs
    return steps * moved / (BANDWIDTH_SHARE * device.memory_bandwidth)


def _exchange_seconds(shape: ModelShape, config: Config, layout: Layout, device: Device) -> float:
    """Seconds to reduce gradients and gather parameters once per optimiser step; sharded, also to gather in every
    pass. Split gradients are reduced, in float32, after every micro-batch."""
    if layout.ranks == 1:
        return 0.0
    link = device.network_bandwidth if layout.nodes > 1 else device.link_bandwidth
    steps = config.optimizer.minibatches * config.optimizer.epochs
    element = _ITEMSIZE[config.model.dtype]
    tokens = step_work(config).row_tokens / layout.ranks
    micro_batches = max(steps, -(-tokens // config.optimizer.micro_batch_tokens))
    moved = 2 * steps * shape.trainable * element
    if layout.mode == "replicated" and layout.gradients == "split":
        moved = (micro_batches * config.optimizer.epochs * 4 + steps * element) * shape.trainable
    seconds = moved * (layout.ranks - 1) / layout.ranks / (BANDWIDTH_SHARE * link)
    if layout.shards > 1:
        # A forward pass gathers every layer; a backward pass gathers them again and scatters their gradients.
        gathers = micro_batches * (1 + 3 * config.optimizer.epochs)
        seconds += gathers * shape.parameters * element / (BANDWIDTH_SHARE * device.link_bandwidth)
    return seconds

"""Memory plan of a run, computed from sizes before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from paced_fast.config import Config
from paced_fast.errors import InputError
from paced_fast.policy.attention import MASKED_ROW
from paced_fast.policy.shape import ModelShape
from paced_kernels import default_workspace_bytes

ENGINE_BLOCK = 32
"""Tokens in a block of the engine's key-value cache, at most."""
CHECK_TOKENS = 256
"""Tokens of the sequences in a parity check: several blocks, because a shorter one would miss a stale cache."""
_SHARE_OF_GPU = 0.85
"""Share of memory for weights, moments and the key-value cache while an engine samples; the rest is for its activations
and graphs."""
_LARGE_GPU_BYTES = 70 * 2**30
_A100 = (8, 0)
"""Compute capability of the large GPU for which vLLM keeps its smaller defaults."""
_ITEMSIZE = {"float32": 4, "bfloat16": 2}
_GRADIENTS = "gradients"
_GATHERED = "gathered layers"
_ACTIVATIONS = "activations of a micro-batch"
_MASK = "attention mask of a micro-batch"
_HEAD = "vocabulary head (workspace, float32 gradient)"
_KEYS_AND_VALUES = "key-value cache"
_ENGINE = "the engine's own weights"
_IF_NOT_SHARED = f"{_ENGINE}, if not shared"
_ENGINE_ASLEEP = f"{_ENGINE}, asleep while the policy trains"
_TAKE_TURNS = ((_GRADIENTS, _GATHERED, _ACTIVATIONS, _MASK, _HEAD), (_KEYS_AND_VALUES, _ENGINE_ASLEEP))

Mode = Literal["replicated", "sharded"]
Gradients = Literal["whole", "split"]
_LAYER_VECTORS = (8, 9, 4)
"""Vectors of the hidden size, of all heads together and of the MLP's size that a layer keeps per token for its backward
pass, in the type of the computation: counted for Qwen3 without fused layers; Qwen2 and Llama keep 5 of the heads'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Ranks that a run is spread over, and the memory of one of them."""

    ranks: int = 1
    nodes: int = 1
    mode: Mode = "replicated"
    gradients: Gradients = "whole"
    """Of replicated parameters: whole on every rank, or each rank's part only."""
    device_bytes: int | None = None
    """Memory of a rank's device; None where it is not known."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability of a GPU that is planned for; None asks the one that is there."""

    @property
    def shards(self) -> int:
        """Ranks that parameters are split over: those of one node."""
        return self.ranks // self.nodes if self.mode == "sharded" else 1


def plan(shape: ModelShape, config: Config, num_prompts: int, layout: Layout | None = None) -> dict[str, int]:
    """Bytes that one rank holds, by purpose. Activations and key-value cache are upper bounds at the configured limits.

    Vocabulary head: chunks of logits or exponentials, and the gradient of its weight before it is rounded.
    Activations: per token and layer of one micro-batch, up to 8 vectors of the hidden size, 9 of the heads' and 4 of
    the MLP's; where layers are computed again one vector, and those of one layer. Attention mask: rows that share their
    prompt have a number for every pair of positions.
    """
    layout = layout or Layout()
    element = _ITEMSIZE[config.model.dtype]
    tokens = min(config.optimizer.micro_batch_tokens, step_tokens(config))
    masked = min(row_tokens(config), tokens) if needs_mask(config) else 0
    if config.model.device == "cpu" and shares_prompts(config):
        masked = min(masked, MASKED_ROW)
    workspace = default_workspace_bytes(
        tokens,
        shape.vocab_size,
        getattr(torch, config.model.dtype),
        torch.device(config.model.device),
        capability=layout.capability,
    )
    widths = (shape.hidden_size, shape.num_heads * shape.head_size, shape.intermediate_size)
    per_layer = sum(count * width for count, width in zip(_LAYER_VECTORS, widths, strict=True))
    kept = shape.num_layers * per_layer
    if config.model.gradient_checkpointing == "on":
        kept = shape.num_layers * shape.hidden_size + per_layer
    result = {
        **training_bytes(shape, config, layout),
        _ACTIVATIONS: tokens * kept * element,
        _MASK: tokens * masked * (element + 2),
        _HEAD: workspace + 4 * shape.head_parameters,
        _KEYS_AND_VALUES: kv_cache_bytes(shape, config, layout),
        **_engine_weights(shape, config, layout),
    }
    if config.traits.keeps_initial_policy:
        result["reference policy"] = result["weights"]
    if config.uses_head:
        width = shape.hidden_size * (2 if config.log_z.embedding == "mean_and_last" else 1)
        result["prompt embeddings"] = num_prompts * width * _ITEMSIZE[config.log_z.cache_dtype]
    if config.replay.mode == "on":
        result["replay"] = (config.replay.capacity + 1) * config.generation.max_completion_tokens * 12
    return result


def state_bytes(
    parameters: int, trainable: int, itemsize: int, *, split: int, is_sharded: bool, in_flight: int | None = None
) -> dict[str, int]:
    """Bytes of parameters, gradients and the optimiser's state on one rank, by purpose.

    `split`: ranks that share the optimiser's state, and sharded the parameters too. Parameters below float32 have
    float32 masters; gradients are float32, and a replica holds all of them and the sum of those it steps. With
    `in_flight` it holds the sum of those it steps, and while they are summed so many numbers of whole gradients.
    """
    own = -(-trainable // split)
    if is_sharded:
        shards = 4 * -(-parameters // split)
        return {"weights": shards, _GRADIENTS: 4 * own, "optimizer (AdamW, two moments)": 8 * own}
    state = {
        "weights": itemsize * parameters,
        _GRADIENTS: 4 * (trainable if in_flight is None else in_flight) + (4 * own if split > 1 else 0),
        "optimizer (AdamW, two moments)": 8 * own,
    }
    if itemsize < 4:
        state["float32 masters"] = 4 * own
    return state


def training_bytes(shape: ModelShape, config: Config, layout: Layout) -> dict[str, int]:
    """`state_bytes` of one rank and, where parameters are sharded, what is gathered from the shards.

    Gathered layers: embeddings and head, and two layers on their way, with their gradients.
    """
    element, is_sharded = _ITEMSIZE[config.model.dtype], layout.shards > 1
    split = layout.shards if is_sharded else layout.ranks
    # The largest matrix, and those of a layer that are computed meanwhile; each with a rank's rows of the sum.
    in_flight = min(shape.trainable, shape.head_parameters + shape.largest_layer) * (1 + split) // split
    result = state_bytes(
        shape.parameters,
        shape.trainable,
        element,
        split=split,
        is_sharded=is_sharded,
        in_flight=in_flight if layout.gradients == "split" and split > 1 else None,
    )
    if is_sharded:
        outer = shape.head_parameters * (1 if shape.tied else 2)
        result[_GATHERED] = (element + 4) * (outer + 2 * shape.largest_layer)
    return result


def _engine_weights(shape: ModelShape, config: Config, layout: Layout) -> dict[str, int]:
    if config.generator != "vllm" or (config.weight_sync.mode == "shared" and layout.shards == 1):
        return {}
    engine_ranks = config.weight_sync.tensor_parallel
    is_pushed = config.weight_sync.mode == "push" or config.lora.rank > 0
    name = _ENGINE if is_pushed or layout.shards > 1 or engine_ranks > 1 else _IF_NOT_SHARED
    if config.weight_sync.sleep_level > 0:
        name = _ENGINE_ASLEEP
    return {name: shape.parameters * _ITEMSIZE[config.weight_sync.dtype] // engine_ranks}


def at_a_time(parts: dict[str, int]) -> dict[str, int]:
    """Parts of a plan that are held together at the peak.

    The key-value cache is freed while the policy trains, and so are an engine's weights if it sleeps; activations of
    the policy exist only then. A copy of the weights that sharing may save is left out.
    """
    training, sampling = ({name: parts[name] for name in part if name in parts} for part in _TAKE_TURNS)
    smaller = min(training, sampling, key=lambda part: sum(part.values()))
    return {name: size for name, size in parts.items() if name not in smaller and name != _IF_NOT_SHARED}


def shares_prompts(config: Config) -> bool:
    """Whether a forward row holds a prompt and its group; else each completion comes with a prompt of its own."""
    return config.model.attention == "shared" or (config.model.attention == "auto" and config.model.device == "cpu")


def needs_mask(config: Config) -> bool:
    """Whether attention uses a mask of all pairs of positions; the kernels for packed rows do not."""
    return shares_prompts(config) or config.model.attention == "packed-sdpa"


def row_tokens(config: Config) -> int:
    """Longest stretch of tokens that may see each other: a prompt and its group, or a prompt and one completion."""
    group = config.generation.group_size if shares_prompts(config) else 1
    return config.data.max_prompt_tokens + group * config.generation.max_completion_tokens


def step_tokens(config: Config) -> int:
    """Most tokens in one step's forward rows, without what is replayed."""
    rows = config.generation.prompts_per_step if shares_prompts(config) else config.rollouts_per_step
    return rows * row_tokens(config)


def kv_cache_bytes(shape: ModelShape, config: Config, layout: Layout | None = None) -> int:
    """Keys and values of one step's sequences at their longest; `--weight-sync.kv-cache-gib` overrides it for vLLM.

    For vLLM a sequence is rounded up to whole blocks, and the longest sequence that a check scores must fit as well.
    That is the most a step can use; vLLM does with less by letting sequences wait, so on a GPU no more is taken than
    training leaves, and never less than the longest sequence needs.
    """
    layout = layout or Layout()
    if config.generator == "vllm" and config.weight_sync.kv_cache_gib > 0:
        return int(config.weight_sync.kv_cache_gib * 2**30)
    batch = min(batch_sequences(config, layout), -(-config.rollouts_per_step // layout.ranks))
    tokens = batch * (config.data.max_prompt_tokens + config.generation.max_completion_tokens)
    element = _ITEMSIZE[config.model.dtype]
    if config.generator == "vllm":
        blocks = -(-(config.data.max_prompt_tokens + config.generation.max_completion_tokens) // ENGINE_BLOCK)
        tokens = ENGINE_BLOCK * (batch * blocks + -(-engine_tokens(shape, config) // ENGINE_BLOCK) + 1)
        element = _ITEMSIZE[config.weight_sync.dtype]
    token_bytes = shape.kv_numbers * element
    if config.generator == "vllm" and config.model.device == "cuda" and layout.device_bytes is not None:
        # Weights on both sides while the engine starts; moments and masters from the first step on. Gradients are gone
        # when it samples, as its keys and values are while the policy trains. Sharing may turn out to be impossible.
        state = training_bytes(shape, config, layout)
        kept = sum(size for name, size in state.items() if name not in (_GRADIENTS, _GATHERED))
        engine = sum(_engine_weights(shape, config, layout).values())
        held = max(kept + engine, 2 * shape.parameters * element)
        left = int(_SHARE_OF_GPU * layout.device_bytes) - held
        least = ENGINE_BLOCK * (-(-engine_tokens(shape, config) // ENGINE_BLOCK) + 1)
        return max(min(tokens * token_bytes, left), least * token_bytes)
    return tokens * token_bytes


def batch_sequences(config: Config, layout: Layout) -> int:
    """Sequences that a rank decodes at once.

    vLLM's own default depends on the GPU: it is four times as large from 70 GiB of memory on, except on an A100.
    """
    on_gpu = config.generator == "vllm" and config.model.device == "cuda"
    is_large = on_gpu and (layout.device_bytes or 0) >= _LARGE_GPU_BYTES and _capability(layout) != _A100
    return config.generation.batch_sequences(large_engine=is_large)


def _capability(layout: Layout) -> tuple[int, int] | None:
    if layout.capability is not None or not torch.cuda.is_available():
        return layout.capability
    return torch.cuda.get_device_capability()


def engine_tokens(shape: ModelShape, config: Config) -> int:
    """Longest sequence the vLLM engine must take: a prompt with its completion, or a sequence that a check scores.

    Raises InputError when that is more than the model has positions for.
    """
    cut, owner = config.generation.max_completion_tokens, "generation"
    if config.evaluation.max_completion_tokens > cut:
        cut, owner = config.evaluation.max_completion_tokens, "evaluation"
    longest = config.data.max_prompt_tokens + cut
    positions = shape.positions or longest
    if longest > positions:
        raise InputError(
            f"--generator vllm: prompt and completion have up to {longest} tokens together, but the model has "
            f"{positions} positions: lower --data.max-prompt-tokens or --{owner}.max-completion-tokens"
        )
    return max(longest, min(CHECK_TOKENS, positions))


def available(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""What a run will hold in memory, reckoned before the first step, and what it holds while it trains."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from paced_fast.config import Config
from paced_fast.errors import InputError
from paced_kernels import default_workspace_bytes

ENGINE_BLOCK = 32
"""Tokens in a block of the engine's key-value cache, at most."""
_SHARE_OF_GPU = 0.6
"""What weights, gradients, moments and keys and values may take together; the rest is for activations and graphs."""
CHECK_TOKENS = 256
"""A check of both sides scores sequences of up to so many tokens: several blocks, or it would miss a stale cache."""


def state_bytes(parameters: int, trainable: int, itemsize: int, *, split: int, is_sharded: bool) -> dict[str, int]:
    """Bytes of parameters, gradients and the optimiser's state on one rank, by purpose.

    `split`: ranks that share the optimiser's state, and sharded the parameters too. Parameters below float32 have
    float32 masters; gradients are float32, and a replica holds all of them and the sum of those it steps.
    """
    own = -(-trainable // split)
    if is_sharded:
        shards = 4 * -(-parameters // split)
        return {"weights": shards, "gradients": 4 * own, "optimizer (AdamW, two moments)": 8 * own}
    state = {
        "weights": itemsize * parameters,
        "gradients": 4 * trainable + (4 * own if split > 1 else 0),
        "optimizer (AdamW, two moments)": 8 * own,
    }
    if itemsize < 4:
        state["float32 masters"] = 4 * own
    return state


def plan(
    model: PreTrainedModel, config: Config, num_prompts: int, *, split: int = 1, is_sharded: bool = False
) -> dict[str, int]:
    """Bytes by purpose on one rank. Activations and the key-value cache are upper bounds at the configured limits.

    `model` is not split yet; `split` and `is_sharded` say how it will be, as for `state_bytes`.
    Gathered layers: embeddings and head, and two layers on their way, with their gradients.
    Vocabulary head: chunks of logits or exponentials, and the gradient of its weight before it is rounded.
    Activations: per token and layer of one micro-batch, about 12 vectors of the hidden size and 3 of the MLP's.
    Attention mask: rows hold a prompt and its completions, and every pair of positions of a row has a number.
    """
    settings = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    element = model.dtype.itemsize
    # Rows hold a prompt and its group, so one step never has more tokens than this.
    step_tokens = config.generation.prompts_per_step * (
        config.data.max_prompt_tokens + config.generation.group_size * config.generation.max_completion_tokens
    )
    tokens = min(config.optimizer.micro_batch_tokens, step_tokens)
    vocab_size, hidden_size = settings.vocab_size, settings.hidden_size
    device = torch.device(config.model.device)
    workspace = default_workspace_bytes(tokens, vocab_size, model.dtype, device)
    per_layer = 12 * settings.hidden_size + 3 * settings.intermediate_size
    row = config.data.max_prompt_tokens + config.generation.group_size * config.generation.max_completion_tokens
    result = {
        **state_bytes(parameters, trainable, element, split=split, is_sharded=is_sharded),
        "activations of a micro-batch": tokens * settings.num_hidden_layers * per_layer * element,
        "attention mask of a micro-batch": tokens * min(row, tokens) * (element + 2),
        "vocabulary head (workspace, float32 gradient)": workspace + 4 * vocab_size * hidden_size,
        "key-value cache": kv_cache_bytes(model, config, split=split, is_sharded=is_sharded),
    }
    if is_sharded:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        outer = sum(
            {id(p): p.numel() for end in ends if end is not None for p in end.parameters()}.values()
        )  # tied ones once
        inner = (parameters - outer) // settings.num_hidden_layers
        result["gathered layers"] = (element + 4) * (outer + 2 * inner)
    if config.algorithm == "flowrl":
        result["reference policy"] = result["weights"]
    if config.uses_head:
        result["prompt embeddings"] = (
            num_prompts * settings.hidden_size * getattr(torch, config.log_z.cache_dtype).itemsize
        )
    if config.replay.mode == "on":
        result["replay"] = (config.replay.capacity + 1) * config.generation.max_completion_tokens * 12
    return result


def kv_cache_bytes(model: PreTrainedModel, config: Config, *, split: int = 1, is_sharded: bool = False) -> int:
    """Keys and values of one step's sequences at their longest; `--weight-sync.kv-cache-gib` overrides it for vLLM.

    For vLLM a sequence is rounded up to whole blocks, and the longest sequence that a check scores must fit as well.
    That is the most a step can use; vLLM does with less by letting sequences wait, so on a GPU no more is taken than
    training leaves, and never less than the longest sequence needs.
    """
    if config.generator == "vllm" and config.weight_sync.kv_cache_gib > 0:
        return int(config.weight_sync.kv_cache_gib * 2**30)
    settings = model.config
    batch = min(config.generation.max_batch_sequences, config.rollouts_per_step)
    tokens = batch * (config.data.max_prompt_tokens + config.generation.max_completion_tokens)
    element = model.dtype.itemsize
    if config.generator == "vllm":
        blocks = -(-(config.data.max_prompt_tokens + config.generation.max_completion_tokens) // ENGINE_BLOCK)
        tokens = ENGINE_BLOCK * (batch * blocks + -(-engine_tokens(model, config) // ENGINE_BLOCK) + 1)
        element = {"float32": 4, "bfloat16": 2}[config.weight_sync.dtype]
    token_bytes = 2 * settings.num_hidden_layers * settings.num_key_value_heads * head_size(settings) * element
    device = torch.device(config.model.device)
    if config.generator == "vllm" and device.type == "cuda":
        # Weights on both sides while the engine starts, moments and gradients from the first step on.
        count = sum(parameter.numel() for parameter in model.parameters())
        weights = element * count
        state = sum(state_bytes(count, count, element, split=split, is_sharded=is_sharded).values())
        held = state + weights if is_sharded else max(state, 2 * weights)  # sharded, the engine's are its own
        left = int(_SHARE_OF_GPU * available(device)) - held
        least = ENGINE_BLOCK * (-(-engine_tokens(model, config) // ENGINE_BLOCK) + 1)
        return max(min(tokens * token_bytes, left), least * token_bytes)
    return tokens * token_bytes


def head_size(settings: Any) -> int:
    """Size of an attention head of a model with this configuration."""
    return getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads


def engine_tokens(model: PreTrainedModel, config: Config) -> int:
    """Longest sequence the vLLM engine must take: a prompt with its completion, or a sequence that a check scores.

    Raises InputError when that is more than the model has positions for.
    """
    cut, owner = config.generation.max_completion_tokens, "generation"
    if config.evaluation.max_completion_tokens > cut:
        cut, owner = config.evaluation.max_completion_tokens, "evaluation"
    longest = config.data.max_prompt_tokens + cut
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    if longest > positions:
        raise InputError(
            f"--generator vllm: prompt and completion may be {longest} tokens together and the model has {positions} "
            f"positions: lower --data.max-prompt-tokens or --{owner}.max-completion-tokens"
        )
    return max(longest, min(CHECK_TOKENS, positions))


def available(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_STATM = Path("/proc/self/statm")


def probe(device: torch.device) -> Callable[[], int] | None:
    """A function that gives the most bytes held since its last call; None where nothing tells.

    On a GPU what torch has allocated there, as the host's books have it: nobody waits for the device. On a CPU the
    resident memory of the process at the time of the call.
    """
    if device.type == "cuda":

        def peak() -> int:
            found = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return found

        return peak
    if not _STATM.exists():
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return lambda: int(_STATM.read_bytes().split()[1]) * page

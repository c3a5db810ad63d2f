"""What a run will hold in memory, reckoned before the first step."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from paced_fast.config import Config
from paced_kernels import default_workspace_bytes


def plan(model: PreTrainedModel, config: Config, num_prompts: int) -> dict[str, int]:
    """Bytes by purpose. Activations and the key-value cache are upper bounds at the configured limits.

    Vocabulary head: chunks of logits or exponentials, and the gradient of its weight before it is rounded.
    Activations: per token and layer of one micro-batch, about 12 vectors of the hidden size and 3 of the MLP's.
    """
    settings = model.config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    element = model.dtype.itemsize
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    key_values = 2 * settings.num_hidden_layers * settings.num_key_value_heads * head_size * element
    sequence = config.data.max_prompt_tokens + config.generation.max_completion_tokens
    # Rows hold a prompt and its group, so one step never has more tokens than this.
    step_tokens = config.generation.prompts_per_step * (
        config.data.max_prompt_tokens + config.generation.group_size * config.generation.max_completion_tokens
    )
    tokens = min(config.optimizer.micro_batch_tokens, step_tokens)
    vocab_size, hidden_size = settings.vocab_size, settings.hidden_size
    workspace = default_workspace_bytes(tokens, vocab_size, model.dtype, model.device)
    per_layer = 12 * settings.hidden_size + 3 * settings.intermediate_size
    batch = min(config.generation.max_batch_sequences, config.rollouts_per_step)
    result = {
        "weights": weights,
        "gradients": trainable,
        "optimizer (AdamW, two moments)": 2 * trainable,
        "activations of a micro-batch": tokens * settings.num_hidden_layers * per_layer * element,
        "vocabulary head (workspace, float32 gradient)": workspace + 4 * vocab_size * hidden_size,
        "key-value cache": batch * sequence * key_values,
    }
    if config.algorithm == "flowrl":
        result["reference policy"] = weights
    if config.uses_head:
        result["prompt embeddings"] = (
            num_prompts * settings.hidden_size * getattr(torch, config.log_z.cache_dtype).itemsize
        )
    return result


def available(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

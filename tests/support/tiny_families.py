"""Small models of several families: grouped keys, biases, norms of queries, windows, tied heads."""

from __future__ import annotations

from typing import Any

import tiny_policy
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral-window", "qwen3-window", "gemma3-window")
WINDOW = 3


def model(family: str, **changes: Any) -> PreTrainedModel:
    """Two layers of width 16, far from a uniform distribution; `-window` lets all layers or one of two see three tokens
    back."""
    sizes: dict[str, Any] = {
        "vocab_size": tiny_policy.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": tiny_policy.STOP,
        **changes,
    }
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes)),
        "mistral-window": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=WINDOW)),
        "qwen3-window": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, **kinds, use_sliding_window=True)),
        "gemma3-window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **kinds)),
    }[family]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
            elif name.endswith("bias"):
                parameter.normal_()
    return made.eval()

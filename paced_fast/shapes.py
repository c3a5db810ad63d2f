"""What a plan needs to know of a model: its sizes, read from any instance of it, one on the meta device included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a causal language model; parameters count once where they are tied."""

    parameters: int
    trainable: int
    """Parameters that learn: all, or those of the adapters."""
    trainable_tensors: int
    largest_layer: int
    """Parameters of the largest layer, the unit in which sharded parameters are gathered."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    """Whether the output layer is the embedding's matrix."""
    positions: int | None
    """Longest sequence; None where the model sets no limit."""

    @property
    def head_parameters(self) -> int:
        """Of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def body_parameters(self) -> int:
        """All but embedding and output layer: those that every token is multiplied with."""
        return self.parameters - self.head_parameters * (1 if self.tied else 2)

    @property
    def kv_numbers(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The sizes of a model, wherever its parameters are."""
    settings = model.config
    layers = getattr(model.base_model, "layers", None)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers] if layers is not None else []
    learning = [p for p in model.parameters() if p.requires_grad]
    heads = settings.num_attention_heads
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in learning),
        trainable_tensors=len(learning),
        largest_layer=max(sizes, default=0),
        num_layers=settings.num_hidden_layers,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(settings, "num_key_value_heads", None) or heads,
        head_size=head_size(settings),
        vocab_size=settings.vocab_size,
        tied=bool(settings.tie_word_embeddings),
        positions=getattr(settings, "max_position_embeddings", None),
    )


def head_size(settings: Any) -> int:
    """Size of an attention head of a model with this configuration."""
    return getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads


_QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 28, "max_position_embeddings": 4096}

KNOWN: Mapping[str, Mapping[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "Qwen/Qwen2.5-Math-1.5B": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-Math-7B": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
}
"""Configurations of the presets' models, for plans made where there is no network: what decides sizes, no more."""

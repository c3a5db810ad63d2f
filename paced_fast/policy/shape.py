"""Sizes of a model for plans, read from any instance of it, also one on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from paced_fast.errors import InputError


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
        """Parameters of the output layer."""
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
    """The sizes of a model, wherever its parameters are. Raises InputError for one whose text part is ambiguous."""
    settings = text_settings(model.config)
    layers = layer_list(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers] if layers is not None else []
    learning = [p for p in model.parameters() if p.requires_grad]
    hidden = int(_first(settings, _HIDDEN, 0))
    heads = int(_first(settings, _HEADS, 1))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in learning),
        trainable_tensors=len(learning),
        largest_layer=max(sizes, default=0),
        num_layers=int(_first(settings, _LAYERS, len(sizes))),
        hidden_size=hidden,
        intermediate_size=int(_first(settings, _INNER, 4 * hidden)),
        num_heads=heads,
        num_kv_heads=1 if setting(settings, "multi_query", False) else int(_first(settings, _KEY_HEADS, heads)),
        head_size=head_size(settings),
        vocab_size=int(_first(settings, ("vocab_size", "n_words"), 0)),
        tied=tied,
        positions=positions(settings).longest,
    )


_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "decoder_layers", "num_layers", "n_layers")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "inner_dim", "d_ff")
_HEADS = ("num_attention_heads", "n_head", "decoder_attention_heads", "n_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "context_length")


def setting(settings: Any, name: str, default: Any = None) -> Any:
    """A setting of a model by name, or `default`; where its layers differ in it, the largest number among them."""
    try:
        return getattr(settings, name, default)
    except RuntimeError:  # transformers refuses to tell one value for all layers
        values = [getattr(layer, name, None) for layer in settings.per_layer_config]
        return max((value for value in values if isinstance(value, int | float)), default=default)


def differs(settings: Any, name: str) -> bool:
    """Whether the layers of a model differ in a setting."""
    try:
        getattr(settings, name, None)
    except RuntimeError:
        return True
    return False


def _first(settings: Any, names: tuple[str, ...], default: int) -> int | float:
    """The first of these settings that is a number, or the largest of a list of numbers, one per layer."""
    for name in names:
        value = setting(settings, name)
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, int | float) for one in value):
            return max(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return default


def text_settings(settings: Any) -> Any:
    """The part of a configuration that is about text: all of it, or one of several parts.

    Raises InputError where more than one part could be meant.
    """
    if not hasattr(settings, "get_text_config"):
        return settings
    try:
        return settings.get_text_config(decoder=True)
    except ValueError as error:
        raise InputError(
            f"--model.name: models of type {settings.model_type} have several parts that generate text, so that none "
            "can be chosen as the policy: give a causal language model"
        ) from error


def layer_list(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The list of a language model's layers, whatever it is called: the longest list of modules in its text part."""
    settings = text_settings(getattr(model, "config", None))
    number = int(_first(settings, _LAYERS, 0))
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == number]
    return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=None)


def head_size(settings: Any) -> int:
    """Size of an attention head of a model with this configuration."""
    size = setting(settings, "head_dim")
    if isinstance(size, int):
        return size
    return int(_first(settings, _HIDDEN, 0)) // int(_first(settings, _HEADS, 1))


@dataclass(frozen=True, slots=True)
class Positions:
    """Longest sequence (None for no limit), and the reason of the limit."""

    longest: int | None
    why: str


def positions(settings: Any) -> Positions:
    """Limit on the length of sequences from a text configuration.

    Rotary frequencies that depend on the longest sequence of a batch (`dynamic`, `longrope`) are the same for all up
    to the length before scaling; beyond it log-probs would depend on neighbours, and keys in a cache be turned by other
    frequencies than those of a whole pass. The other kinds are static. What `yarn` and `linear` were scaled to
    counts where the configuration gives the length before and is still written for it. Biases by distance set no limit.
    """
    stated = int(_first(settings, _POSITIONS, 0))
    stated = stated if stated > 0 else None
    model_type = setting(settings, "model_type", "")
    bias = setting(settings, "alibi", False) or setting(settings, "position_embedding_type", "") == "alibi"
    if bias and model_type != "mpt":  # mpt makes the table of its bias once, of that size
        return Positions(None, "biases by distance set no limit")
    if model_type in _OFFSET and stated is not None:
        stated -= int(setting(settings, "pad_token_id", None) or 0) + 1
    limit, why = stated, f"a {model_type} model with {stated} positions"
    for rope in _ropes(settings):
        kind = rope.get("rope_type", rope.get("type", "default"))
        before = rope.get("original_max_position_embeddings") or getattr(
            settings, "original_max_position_embeddings", None
        )
        if kind in ("dynamic", "longrope", "su"):
            own = before or stated
            if own is not None and (limit is None or own <= limit):
                limit = own
                why = (
                    f"a {model_type} model whose rotary frequencies ({kind}) change with the longest sequence of a "
                    f"batch beyond {own} positions"
                )
        elif kind in ("yarn", "linear") and before and limit is not None and rope.get("factor"):
            scaled = int(before * rope["factor"])
            if scaled > limit:
                limit, why = scaled, f"a {model_type} model with {scaled} positions after scaling ({kind})"
    return Positions(limit, why)


_OFFSET = (
    *("roberta", "roberta-prelayernorm", "camembert", "xlm-roberta", "xlm-roberta-xl", "data2vec-text", "xmod"),
    "longformer",
)
"""Types that count positions from one after the padding token."""


def _ropes(settings: Any) -> list[Mapping[str, Any]]:
    """The parameters of rotary embeddings: one set, or one for each kind of layer."""
    given = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None)
    if not isinstance(given, Mapping):
        return []
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or [given]


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

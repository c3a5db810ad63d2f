"""Small models of every causal language model type of transformers, with random weights.

Sizes are set through configuration names that the types share; a type that needs more has an entry in `CHANGES`.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 48
MOST_PARAMETERS = 20_000_000
WINDOW = 4


class TooLarge(Exception):
    """Raised if the sizes known here do not make the model small."""


TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Types that `AutoModelForCausalLM` of the installed transformers knows."""

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_config_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "sliding_window": WINDOW,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "is_decoder": True,
    "use_cache": True,
}

_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_LATENT = {**_MLA, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
_INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
_DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), _LATENT),
    "deepseek_v32": {**_LATENT, **_INDEX},
    "glm_moe_dsa": {**_LATENT, **_INDEX},
    "minicpm3": {**_MLA, "v_head_dim": 8},
    "longcat_flash": {**_MLA, "v_head_dim": 8, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "chunk_size": 8, "n_groups": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _DELTA),
    "kimi_linear": {**_DELTA, **_MLA, "v_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 2},
    "qwen4_exp_text": {
        **_DELTA,
        "layer_types": ["linear_attention", "indexed_attention"],
        "num_hidden_layers": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    **dict.fromkeys(("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "gemma4_text"), _WINDOWS),
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        **_MAMBA,
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": WINDOW},
    "mpt": {"d_model": 32, "n_heads": 4},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "feed_forward_size": 48},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
}
"""Additional settings by type."""

_VISION = {
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "projection_dim", "d_model"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    "image_size": 16,
    "patch_size": 8,
}
"""Sizes of the non-text parts of a multimodal model."""


def _named(kind: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that this kind of configuration has."""
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    known |= set(getattr(kind, "__dataclass_fields__", {}))
    return {name: value for name, value in sizes.items() if name in known}


def tiny_settings(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a small configuration of this type; `changes` take precedence."""
    kind: Any = CONFIG_MAPPING[model_type]
    parts: dict[str, Any] = {}
    for name, part in getattr(kind, "sub_configs", {}).items():
        if name == "text_config" and part is not AutoConfig:
            parts[name] = tiny_settings(part.model_type).to_dict()
        elif part is not AutoConfig:
            parts[name] = _named(part, _VISION)
        elif hasattr(own := getattr(kind(), name, None), "model_type"):  # only its default shows the kind
            parts[name] = {"model_type": own.model_type, **_named(type(own), _VISION)}
    named = _named(kind, {**SIZES, **CHANGES.get(model_type, {})})
    return kind(**{**named, **parts, **changes})


def sharpen(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Draw matrices so that every layer affects the output: a nearly uniform distribution would hide mistakes."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
                continue
            if "A_log" in name or "slope" in name:
                continue
            scale = 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=source) * scale)
    return model.eval()


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a small model of this type in float32."""
    made = tiny_settings(model_type, **changes)
    with tempfile.TemporaryDirectory() as folder:  # reload it from a folder, which may change it
        made.save_pretrained(folder)
        settings = type(made).from_pretrained(folder)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(settings).parameters())
    if size > MOST_PARAMETERS:
        raise TooLarge(f"{size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
    return sharpen(model.float())

"""Stored models of many kinds, small, with mixtures of experts among them, and runs saved from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_policy
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from paced_fast.data.prompts import character_tokenizer
from paced_fast.policy import PolicyFiles, plain_state, save_model
from paced_fast.run import checkpoint

ALPHABET = "ab~#cdefghi"

_MLA = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe-tied": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "mixtral": {"num_local_experts": 4},
    "gemma": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {},
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
}
_RARE: dict[str, dict[str, Any]] = {
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {**_MLA, "num_layers": 1, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "phimoe": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24},
}
"""Kinds of models by name, `-tied` being another of the same, with what their settings need beyond the sizes."""
MIXTURES = [name for name in KINDS if name.startswith(("qwen3_moe", "qwen2_moe", "mix", "gpt_oss", "olmoe", "deep"))]


def model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Two layers of width 16 whose weights are far from those of a fresh model."""
    kind = name.partition("-")[0]
    sizes: dict[str, Any] = {
        "vocab_size": tiny_policy.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": tiny_policy.STOP,
    }
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | (KINDS | _RARE)[name] | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
            parameter.data = parameter.data.to(dtype)
    return made.eval()


def logits(made: PreTrainedModel) -> Tensor:
    """Of a few tokens, f32[1, T, V]."""
    with torch.no_grad():
        return made(input_ids=torch.tensor([[2, 3, 4, 5, 6, 7]]), use_cache=False).logits.float()


def stored(made: PreTrainedModel, folder: Path) -> Path:
    """The model as transformers leaves it, with a tokenizer."""
    made.save_pretrained(folder)
    character_tokenizer(ALPHABET, pad="~", stop="#").save_pretrained(folder)
    return folder


def learn(made: PreTrainedModel) -> None:
    """Move what is trained, far enough to show in the logits."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def run_of(made: PreTrainedModel, folder: Path, *, learn: Any = None) -> Path:
    """A run folder: `initial` by the model as it is, and a checkpoint after `learn`, as training writes them."""
    save_model(made, folder / "initial")
    if learn is not None:
        learn(made)
    files = PolicyFiles(made)
    saver = checkpoint.Saver(folder / "checkpoints", keep=1, write_policy=files.write, background=False)
    saver.save(4, tensors={"optimizer.0.step": torch.tensor(1.0)}, model=plain_state(made), state={})
    (folder / "config.json").write_text("{}")
    return folder / "checkpoints" / "step_000004" / "policy"

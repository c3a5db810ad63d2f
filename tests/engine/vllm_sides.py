"""Small models with an engine each, one optimiser step on both sides, and processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from paced_fast.config import WeightSyncConfig
from paced_fast.generation import VLLMGenerator
from paced_fast.generation.vllm_engine import EngineSettings
from paced_fast.generation.weight_sync import connect
from paced_fast.policy import Policy

STOP = 1


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Grouped heads, an untied head, and 300 tokens, which the engine pads to 320."""
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return sharpened(LlamaForCausalLM(settings).to(dtype))


def tiny_qwen2(seed: int = 0) -> PreTrainedModel:
    """Biases of q, k and v, tied embeddings, three query heads to one of keys."""
    torch.manual_seed(seed)
    settings = Qwen2Config(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )
    made = Qwen2ForCausalLM(settings)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):  # zeros as made, and so no test of anything
                parameter.normal_(std=0.3)
    return sharpened(made)


def sharpened(made: PreTrainedModel) -> PreTrainedModel:
    """Larger matrices: far from a uniform distribution, and every position matters."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return made.eval()


class Side:
    """A model of the trainer's and an engine started from its folder."""

    def __init__(self, model: PreTrainedModel, folder: Path, *, mode: Any = "shared", **options: Any) -> None:
        model.save_pretrained(folder)
        settings = {
            "path": str(folder),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": "cpu",
            "max_tokens": 320,
            "max_sequences": 64,
            "kv_cache_bytes": 64 << 20,
        } | options
        self.model, self.folder = model, folder
        self.policy = Policy(model, max_tokens=4096)
        self.initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.generator = VLLMGenerator(EngineSettings(**settings), stop_ids=[STOP])
        self.sync = connect(self.generator, model, WeightSyncConfig(mode=mode))
        self.generator.attach(self.sync)

    def restore(self) -> None:
        """The weights as they were at first, on both sides."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.initial[name])
        self.generator.after_update()


def step(side: Any, seed: int = 0, lr: float = 3e-3) -> None:
    """A step on a loss that moves every parameter, and what the trainer calls around it."""
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(seed))
    side.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in side.model.parameters())
    side.generator.before_training()
    torch.optim.AdamW(side.model.parameters(), lr=lr).step()
    side.model.zero_grad()
    side.generator.after_update()


def child_environment() -> dict[str, str]:
    """Variables of a process that imports what this one imports.

    Nothing is compiled there: a toy model takes longer to compile than to sample from. The engines in the process of
    the tests themselves compile what a user's do.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "kernels"), *(path for path in sys.path if path)]
    own = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    return {**os.environ, **own}

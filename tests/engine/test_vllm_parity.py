"""The guard: quiet on a healthy engine, and each fault seeded here stops the run with a line that names its cause."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_policy
import torch
from vllm_sides import step

from paced_fast.errors import TrainingError
from paced_fast.generation.parity import ParityGuard, long_sequences

OWN = [tuple(torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(k)).tolist()) for k in range(7)]
SEQUENCES = long_sequences(OWN, count=2, length=230)


def guard_of(side: Any, **changes: Any) -> ParityGuard:
    config = tiny_policy.settings(**changes)
    return ParityGuard(side.generator, side.policy, config, sequences=SEQUENCES)


def test_sequences_are_long_and_differ() -> None:
    assert [len(sequence) for sequence in SEQUENCES] == [230, 230]
    assert SEQUENCES[0] != SEQUENCES[1]
    assert SEQUENCES[0][:60] == OWN[0]
    assert SEQUENCES[0][60:120] == OWN[1]


@pytest.mark.parametrize("fixture", ["llama", "qwen", "pushed"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_healthy_engine_passes_after_updates(
    fixture: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    side = request.getfixturevalue(fixture)
    guard = guard_of(side, generation__temperature=temperature)
    figures = [guard.check(0)]
    for k in range(2):
        guard.prime()
        step(side, seed=k)
        figures.append(guard.check(k + 1))
    for found in figures:
        assert 0 < found["scored_mean"] < 2e-5
        assert 0 < found["sampled_mean"] < 2e-5
        assert found["scored_max"] < 1e-3
        assert found["sampled_max"] < 1e-3


def test_a_stale_prefix_cache_stops_the_run(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guard_of(llama)
    guard.prime()
    monkeypatch.setattr(llama.generator, "reset_prefix_cache", lambda: None)
    step(llama)
    with pytest.raises(TrainingError, match="prefix cache") as raised:
        guard.check(5)
    assert "after step 5" in str(raised.value)
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    llama.generator.after_update()
    guard.check(5)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_parameter_left_out_of_the_push_stops_the_run(
    pushed: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = pushed.sync.trainer
    assert name in dict(every())
    monkeypatch.setattr(pushed.sync, "trainer", lambda: [pair for pair in every() if pair[0] != name])
    step(pushed)
    with pytest.raises(TrainingError, match="a parameter that did not reach the engine"):
        guard_of(pushed).check(1)
    monkeypatch.undo()
    pushed.generator.after_update()
    guard_of(pushed).check(1)


def test_a_parameter_rebound_after_sharing_is_named(qwen: Any) -> None:
    name = "model.layers.0.self_attn.v_proj.bias"
    parameter = dict(qwen.model.named_parameters())[name]
    shared = parameter.data
    parameter.data = shared.clone()
    try:
        with pytest.raises(TrainingError, match=f"{name} no longer shares memory with the engine's .*qkv_proj.bias"):
            qwen.generator.after_update()
        with torch.no_grad():
            parameter.add_(1.0)
        with pytest.raises(TrainingError, match="a parameter that did not reach the engine"):
            guard_of(qwen).check(1)
    finally:
        parameter.data = shared


@pytest.mark.parametrize(("option", "value"), [("top_p", 0.8), ("top_k", 5), ("min_p", 0.2)])
def test_a_sampling_filter_stops_the_run(llama: Any, option: str, value: float, monkeypatch: Any) -> None:
    plain = llama.generator._options

    def filtered(*arguments: Any) -> Any:
        made = plain(*arguments)
        setattr(made, option, value)
        return made

    monkeypatch.setattr(llama.generator, "_options", filtered)
    with pytest.raises(TrainingError, match="a sampling filter"):
        guard_of(llama).check(0)


def test_a_nan_is_above_every_bound(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.generator, "score", lambda sequences: [[math.nan] * (len(s) - 1) for s in sequences])
    with pytest.raises(TrainingError, match="differ by nan"):
        guard_of(llama, weight_sync__max_mean_difference=1e6).check(0)


def test_checks_come_due_every_k_steps(llama: Any) -> None:
    guard = guard_of(llama, weight_sync__check_every=3)
    assert [s for s in range(1, 10) if guard.due(s)] == [3, 6, 9]
    assert not any(guard_of(llama, weight_sync__check_every=0).due(s) for s in range(1, 10))

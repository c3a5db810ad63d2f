"""Mapping and aliasing on tensors laid out as vLLM lays them out; a real engine is in tests/engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from paced_fast.config import WeightSyncConfig
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation.weight_sync import (
    MAPPED_MODELS,
    LayoutError,
    PushedWeights,
    SharedWeights,
    connect,
    map_parameters,
    share,
    verify,
)

Tensors = dict[str, torch.nn.Parameter]


def model(kind: str, **changes: Any) -> PreTrainedModel:
    """Two layers, 4 query heads to 2 of keys, 19 tokens; `changes` to the configuration."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "pad_token_id": 0,
        "tie_word_embeddings": kind.startswith("gemma"),
    }
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def engine_of(made: PreTrainedModel, *, multiple: int = 64) -> Tensors:
    """The same weights as vLLM keeps them: q, k, v and gate, up in one matrix, the vocabulary padded with zeros."""
    left = {name: p.detach().clone() for name, p in made.named_parameters()}
    result: dict[str, Tensor] = {}
    while left:
        name = next(iter(left))
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            matrix = left.pop(name)
            padding = -len(matrix) % multiple
            result[name] = torch.cat([matrix, matrix.new_zeros(padding, matrix.shape[1])])
        elif ".q_proj." in name:
            parts = [left.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            result[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".gate_proj." in name:
            parts = [left.pop(name.replace("gate_proj", part)) for part in ("gate_proj", "up_proj")]
            result[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
        else:
            result[name] = left.pop(name)
    return {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in result.items()}


class Engine:
    """An engine as far as synchronising knows one: parameters in a dictionary."""

    def __init__(self, parameters: Tensors, tensor_parallel_size: int = 1) -> None:
        self.held, self.tensor_parallel_size = parameters, tensor_parallel_size
        self.reloaded: dict[str, Tensor] = {}

    def parameters(self) -> Tensors:
        return self.held

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.reloaded = {name: tensor.clone() for name, tensor in weights}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in MAPPED_MODELS),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 8, "vocab_size": 64}),
    ("qwen2", {"tie_word_embeddings": True, "vocab_size": 65}),
    ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    ("mistral", {"num_attention_heads": 8, "head_dim": 2}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_every_parameter_becomes_its_slice_of_the_engine(kind: str, changes: dict[str, Any]) -> None:
    made = model(kind, **changes)
    engine, values = engine_of(made), {name: p.detach().clone() for name, p in made.named_parameters()}
    identity = [id(p) for p in made.parameters()]
    sync = share(Engine(engine), made.config.model_type, dict(made.named_parameters()))
    sync.check()
    assert [id(p) for p in made.parameters()] == identity
    owners = {p.untyped_storage().data_ptr() for p in engine.values()}
    assert {p.untyped_storage().data_ptr() for p in made.parameters()} == owners
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad
        assert parameter.is_contiguous()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.fill_(number + 1.0)  # a number for each parameter shows in the engine where it lies
    wanted = engine_of(made)
    assert all(torch.equal(engine[name], wanted[name]) for name in wanted)
    assert engine.keys() == wanted.keys()


def test_the_model_computes_and_learns_through_the_views() -> None:
    made = model("qwen2", tie_word_embeddings=True)
    apart = model("qwen2", tie_word_embeddings=True)
    apart.load_state_dict(made.state_dict())
    share(Engine(engine_of(made)), "qwen2", dict(made.named_parameters()))
    ids = torch.randint(0, 19, (2, 7))
    for each in (made, apart):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        for _ in range(3):
            each(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), apart.parameters(), strict=True))


def test_a_shared_model_is_saved_and_loaded_like_any_other(tmp_path: Any) -> None:
    made = model("llama")
    values = {name: p.detach().clone() for name, p in made.named_parameters()}
    share(Engine(engine_of(made)), "llama", dict(made.named_parameters()))
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, values[name]) for name, p in loaded.named_parameters())
    count = sum(p.numel() for p in made.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * count + 10_000, "views are saved as themselves"


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda engine: engine.__delitem__(name)


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def apply(engine: Tensors) -> None:
        engine[name] = torch.nn.Parameter(change(engine[name].detach()), requires_grad=False)

    return apply


QKV, NORM, DOWN = (
    "model.layers.1.self_attn.qkv_proj.weight",
    "model.norm.weight",
    "model.layers.0.mlp.down_proj.weight",
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_drop(NORM), "the engine has no parameter for model.norm.weight"),
        (_replace("extra.weight", lambda _: torch.ones(3)), "rows 0 to 3 of the engine's extra.weight"),
        (_replace(QKV, lambda t: torch.cat([t, t[:4]])), f"rows 32 to 36 of the engine's {QKV}"),
        (_replace(QKV, lambda t: t[:-1]), r"v_proj.weight \[8, 16\] does not fit"),
        (_replace(DOWN, lambda _: torch.empty(0)), f"the engine holds {DOWN} packed or quantised"),
        (_replace(DOWN, lambda t: t.bfloat16()), "down_proj.weight is float32 and the engine's is bfloat16"),
        (_replace(DOWN, lambda t: t.t().contiguous().t()), "differ in stride"),
        (_replace(DOWN, lambda t: t.flip(0)), f"{DOWN} and the engine's {DOWN} differ in value"),
        (_replace(QKV, lambda t: t.roll(8, 0)), "q_proj.weight and the engine's .* differ in value"),
    ],
)
def test_a_layout_that_cannot_be_shared_says_why_and_changes_nothing(
    change: Callable[[Tensors], None], reason: str
) -> None:
    made = model("llama")
    engine = engine_of(made)
    engine["extra.weight"] = torch.nn.Parameter(torch.ones(3))
    if "extra" not in reason:
        engine.pop("extra.weight")
    change(engine)
    addresses = [p.data_ptr() for p in made.parameters()]
    with pytest.raises(LayoutError, match=reason):
        share(Engine(engine), "llama", dict(made.named_parameters()))
    assert [p.data_ptr() for p in made.parameters()] == addresses


def test_tied_on_one_side_only_is_refused() -> None:
    tied, untied = model("llama", tie_word_embeddings=True), model("llama")
    with pytest.raises(LayoutError, match=r"engine's lm_head.weight belong to no parameter"):
        map_parameters("llama", dict(tied.named_parameters()), engine_of(untied))
    with pytest.raises(LayoutError, match=r"the engine has no parameter for lm_head.weight"):
        map_parameters("llama", dict(untied.named_parameters()), engine_of(tied))


def test_an_unknown_model_type_is_named() -> None:
    made = model("llama")
    with pytest.raises(LayoutError, match="model type 'mamba' has no mapping"):
        map_parameters("mamba", dict(made.named_parameters()), engine_of(made))


def test_split_weights_are_refused() -> None:
    made = model("llama")
    with pytest.raises(LayoutError, match="splits its weights over 2 ranks"):
        share(Engine(engine_of(made), tensor_parallel_size=2), "llama", dict(made.named_parameters()))


def test_weights_made_in_inference_mode_are_refused() -> None:
    made = model("llama")
    trainer = dict(made.named_parameters())
    with torch.inference_mode():
        engine = {name: p.clone() for name, p in engine_of(made).items()}
    with pytest.raises(LayoutError, match="is an inference tensor"):
        verify(trainer, engine, map_parameters("llama", trainer, engine))


def test_a_rebound_parameter_is_found() -> None:
    made = model("llama")
    sync = share(Engine(engine_of(made)), "llama", dict(made.named_parameters()))
    assert sync.after_update()["bytes"] == 0
    parameter = made.get_parameter("model.layers.0.mlp.up_proj.weight")
    parameter.data = parameter.data + 0.0
    with pytest.raises(TrainingError, match=r"up_proj.weight no longer shares memory with the engine's .*gate_up_proj"):
        sync.after_update()


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 1 << 30])
def test_push_hands_over_every_weight_and_counts_its_bytes(bucket_bytes: int) -> None:
    made = model("qwen2")
    engine = Engine(engine_of(made))
    sync = PushedWeights(made.named_parameters, engine, bucket_bytes=bucket_bytes)
    with torch.no_grad():
        made.get_parameter(NORM).fill_(7.0)
    figures = sync.after_update()
    assert figures["bytes"] == 4 * sum(p.numel() for p in made.parameters())
    assert engine.reloaded.keys() == dict(made.named_parameters()).keys()
    assert all(torch.equal(engine.reloaded[name], p) for name, p in made.named_parameters())


def test_modes_share_push_and_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    made = model("llama")
    broken = engine_of(made)
    _drop(NORM)(broken)
    with pytest.raises(InputError, match=r"--weight-sync.mode shared: the engine has no parameter for model.norm"):
        connect(Engine(broken), made, WeightSyncConfig(mode="shared"))
    with caplog.at_level(logging.WARNING):
        assert isinstance(connect(Engine(broken), made, WeightSyncConfig(mode="auto")), PushedWeights)
    assert "not shared: the engine has no parameter for model.norm.weight" in caplog.text
    assert isinstance(connect(Engine(engine_of(made)), made, WeightSyncConfig(mode="push")), PushedWeights)
    assert isinstance(connect(Engine(engine_of(made)), made, WeightSyncConfig(mode="auto")), SharedWeights)

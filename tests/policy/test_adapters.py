"""Low-rank adapters: what is trained, what is merged, what is saved, and what sampling and engines see."""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_policy
import tiny_run
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from paced_fast import train
from paced_fast.config import LoraConfig, ModelConfig, WeightSyncConfig, resolve
from paced_fast.data.records import Targets
from paced_fast.errors import InputError
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.generation.weight_sync import PushedWeights, connect
from paced_fast.paced.losses import POLICY_LOSSES
from paced_fast.paced.update import make_optimizer
from paced_fast.policy import (
    Policy,
    adapt,
    adapter_state,
    is_adapted,
    load_adapter_state,
    load_model,
    plain_parameters,
    plain_state,
)

LORA = LoraConfig(rank=2, alpha=4)


def adapted(family: str = "qwen3", *, learned: bool = True, config: LoraConfig = LORA) -> PreTrainedModel:
    """A model with adapters; `learned` ones change what it says."""
    made = tiny_families.model(family)
    adapt(made, config, seed=3)
    if learned:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.5)
    return made


def plain_copy(made: PreTrainedModel, family: str = "qwen3") -> PreTrainedModel:
    copy = tiny_families.model(family)
    copy.load_state_dict(plain_state(made))
    return copy


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3-window"])
def test_adapted_and_merged_models_say_the_same(family: str) -> None:
    rollouts, made = tiny_policy.rollouts([4, 1, 6, 2], group_size=2), adapted(family)
    found = Policy(made, max_tokens=4096).logprobs(rollouts, 1.0)
    merged = Policy(plain_copy(made, family), max_tokens=4096).logprobs(rollouts, 1.0)
    before = Policy(tiny_families.model(family), max_tokens=4096)
    before.model.load_state_dict({name.replace(".base_layer.", "."): t for name, t in made.state_dict().items()}, False)
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4)
    assert float((found - before.logprobs(rollouts, 1.0)).abs().max()) > 0.1, "the adapters change something"


def test_fresh_adapters_change_nothing_and_depend_on_the_seed_only() -> None:
    rollouts = tiny_policy.rollouts([4, 1, 6, 2], group_size=2)
    torch.manual_seed(5)
    plain = tiny_families.model("llama")
    before = Policy(plain, max_tokens=4096).logprobs(rollouts, 1.0)
    ambient = torch.get_rng_state()
    adapt(plain, LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), ambient)
    assert torch.equal(Policy(plain, max_tokens=4096).logprobs(rollouts, 1.0), before)
    other, again = tiny_families.model("llama"), tiny_families.model("llama")
    adapt(again, LORA, seed=3)
    adapt(other, LORA, seed=4)
    same, different = (adapter_state(model) for model in (again, other))
    own = adapter_state(plain)
    assert all(torch.equal(own[name], same[name]) for name in own)
    assert any(not torch.equal(own[name], different[name]) for name in own)


def test_the_optimiser_has_the_adapters_and_nothing_else() -> None:
    made = adapted(learned=False)
    policy, config = Policy(made, max_tokens=4096), tiny_policy.settings()
    optimizer = make_optimizer(policy, config.optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in made.named_parameters() if ".lora_" in name}
    # q, k, v, o, gate, up, down in two layers, two matrices each; the head has none.
    assert len(held) == 7 * 2 * 2
    sizes = {name: p.numel() for name, p in made.named_parameters() if ".lora_" in name}
    q_and_o, k_and_v, mlp = 2 * (16 + 32), 2 * (16 + 16), 3 * (16 + 24)
    assert sum(sizes.values()) == 2 * 2 * (q_and_o + k_and_v + mlp)  # rank 2, two layers


def test_targets_are_the_named_layers() -> None:
    made = adapted(config=dataclasses.replace(LORA, targets=("q_proj", "down_proj")))
    assert {name.split(".")[-4] for name in adapter_state(made)} == {"q_proj", "down_proj"}


def products_of_a_loss(made: PreTrainedModel, algorithm: str) -> int:
    """Matrix products of a loss and its backward pass on given states: those with the head."""
    policy, config = Policy(made, max_tokens=4096), tiny_policy.settings(algorithm)
    rollouts = tiny_policy.rollouts([4, 1, 6, 2], group_size=2, rewards=[1, 0, 1, 0])
    zeros = torch.zeros(rollouts.num_tokens)
    ones = torch.ones(4)
    targets = Targets(signal=rollouts.rewards, intercept=ones / 2, old_logprobs=zeros, ref_logprobs=zeros, weights=ones)
    hidden = torch.randn(rollouts.num_tokens, 16, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        POLICY_LOSSES[algorithm](hidden, policy, rollouts, targets, config, 4).loss.backward()
    assert hidden.grad is not None
    return sum(event.name in ("aten::mm", "aten::addmm_", "aten::addmm") for event in profiler.events())


@pytest.mark.parametrize("algorithm", ["paced", "flowrl", "grpo"])
def test_a_frozen_head_has_no_gradient_and_none_is_computed(algorithm: str) -> None:
    frozen, free = adapted("llama"), tiny_families.model("llama")
    assert products_of_a_loss(free, algorithm) - products_of_a_loss(frozen, algorithm) == 1
    assert free.lm_head.weight.grad is not None
    assert frozen.lm_head.weight.grad is None


def test_sampling_is_from_the_adapted_model() -> None:
    made = adapted()

    def sample(model: PreTrainedModel) -> list[list[int]]:
        generator = TransformersGenerator(model, stop_ids=[tiny_policy.STOP], max_batch_sequences=64)
        completions = generator.generate(
            [(3, 4, 5), (6, 7)], Sampling(samples=8, max_completion_tokens=6, temperature=1.0, seed=1)
        )
        return [completion.token_ids for completion in completions]

    merged = plain_copy(made)
    assert sample(made) == sample(merged)
    with torch.no_grad():
        for tensor in adapter_state(made).values():
            tensor.zero_()
    assert sample(made) != sample(merged)


def test_plain_parameters_have_the_names_from_before_and_exist_one_at_a_time() -> None:
    for family in ("llama", "gemma3-window"):  # the second has its head tied
        made, wanted = adapted(family), tiny_families.model(family)
        merged = plain_state(made)
        names, alive = [], list[weakref.ref[Tensor]]()
        own = {id(parameter) for parameter in made.parameters()}
        for name, tensor in plain_parameters(made):
            names.append(name)
            assert torch.equal(tensor, merged[name])
            if id(tensor) not in own:
                alive.append(weakref.ref(tensor))
                assert sum(reference() is not None for reference in alive) == 1
        assert names == [name for name, _ in wanted.named_parameters()]
        assert len(alive) == 14
        assert merged.keys() == wanted.state_dict().keys()


def test_a_saved_policy_is_a_plain_folder(tmp_path: Path) -> None:
    rollouts = tiny_policy.rollouts([4, 1, 6, 2], group_size=2)
    for family in ("llama", "gemma3-window"):
        policy = Policy(adapted(family), max_tokens=4096)
        policy.model.save_pretrained(tmp_path / family, state_dict=plain_state(policy.model))
        assert not list((tmp_path / family).glob("adapter*"))
        loaded = load_model(ModelConfig(), str(tmp_path / family))
        assert not is_adapted(loaded)
        wanted, found = (each.logprobs(rollouts, 1.0) for each in (policy, Policy(loaded, max_tokens=4096)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_adapter_state_comes_back_or_is_refused() -> None:
    made = adapted()
    state = {name: tensor.clone() for name, tensor in adapter_state(made).items()}
    fresh = adapted(learned=False)
    load_adapter_state(fresh, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state(fresh).items())
    wider = adapted(config=dataclasses.replace(LORA, rank=3))
    for other in (wider, tiny_families.model("qwen3")):
        with pytest.raises(InputError, match="belong to other --lora settings"):
            load_adapter_state(other, state)
    load_adapter_state(tiny_families.model("qwen3"), {})


class Engine:
    """What pushing asks of an engine."""

    tensor_parallel_size = 1

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.loaded = {name: tensor.clone() for name, tensor in weights}


def test_an_engine_gets_merged_weights_and_cannot_share_them(caplog: pytest.LogCaptureFixture) -> None:
    made, engine = adapted(), Engine()
    with pytest.raises(InputError, match=r"^--weight-sync.mode shared: the engine needs merged weights, .* give push$"):
        connect(engine, made, WeightSyncConfig(mode="shared"))
    with caplog.at_level(logging.INFO):
        sync = connect(engine, made, WeightSyncConfig(mode="auto"))
    assert isinstance(sync, PushedWeights)
    assert "merged and pushed" in caplog.text
    with torch.no_grad():
        for tensor in adapter_state(made).values():
            tensor.add_(0.1)
    figures = sync.after_update()
    plain = dict(plain_copy(made).named_parameters())
    assert engine.loaded.keys() == plain.keys()
    assert all(torch.equal(engine.loaded[name], tensor) for name, tensor in plain.items())
    assert figures["bytes"] == 4 * sum(tensor.numel() for tensor in plain.values())


def test_what_cannot_be_adapted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("lm_head", "embed_tokens", "nothing"):
        with pytest.raises(
            InputError,
            match=rf"^--lora.targets {target} is none of the layers that can have adapters: name some of down_proj, ",
        ):
            adapt(tiny_families.model("llama"), dataclasses.replace(LORA, targets=(target,)), seed=0)
    with pytest.raises(InputError, match=r"^--lora.targets names no layer"):
        tiny_policy.settings(lora__rank=2, lora__targets=())
    with pytest.raises(InputError, match=r"^--weight-sync.mode shared does not work .* give push$"):
        tiny_policy.settings(lora__rank=2, weight_sync__mode="shared", generator="vllm")
    monkeypatch.setattr(resolve.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--lora.rank 2 needs PEFT: pip install 'peft>=0.21'"):
        tiny_policy.settings(lora__rank=2)


def test_a_run_with_adapters_continues_to_the_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between checkpoints, or not: the same losses, the same merged weights at the end."""
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        steps=6,
        lora__rank=2,
        lora__alpha=8,
        evaluation__every=0,
        optimizer__decay="none",  # one that falls depends on the number of steps
    )

    def go(name: str, **changes: Any) -> list[dict[str, Any]]:
        changed = tiny_policy.replaced(settings, run_dir=str(tmp_path / name), **changes)
        with caplog.at_level(logging.INFO):
            train.run(changed, tiny_run.quiet())
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    whole = go("whole")
    go("halves", steps=4)
    halves = go("halves", resume="auto")
    assert [r["loss"] for r in whole if r["step"]] == [r["loss"] for r in halves if r["step"]]
    one, two = (
        load_model(ModelConfig(), str(tmp_path / name / "checkpoints" / "step_000006" / "policy")).state_dict()
        for name in ("whole", "halves")
    )
    first = load_model(ModelConfig(), str(tmp_path / "whole" / "initial")).state_dict()
    assert one.keys() == first.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], first[name])}
    assert changed == {name for name in one if name.endswith("_proj.weight")}
    assert (
        "attention shared (each prompt is computed once per group); liger off (its kernels need a GPU)" in caplog.text
    )

"""Layers that are computed again: the same gradient, less kept, dropout off, sampling as before."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families
import tiny_policy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.config import LoraConfig
from paced_fast.errors import InputError
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.policy import SHARED, Policy, adapt, choose_attention

ROLLOUTS = tiny_policy.rollouts([4, 1, 0, 6, 2, 5], group_size=3)


def backward(policy: Policy) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, how often the first layer's MLP was computed, and the numbers kept for the backward pass."""
    calls, kept = [], [0]
    hook = policy.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def count(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        states = policy.hidden(ROLLOUTS)
    (states * torch.linspace(-1.0, 1.0, states.numel()).view_as(states)).sum().backward()
    hook.remove()
    return tiny_policy.gradients(policy.model), len(calls), kept[0]


def pair(made: PreTrainedModel, **options: Any) -> tuple[Policy, Policy]:
    plain, again = Policy(made, max_tokens=4096, **options).frozen_copy(), None
    plain.model.load_state_dict(made.state_dict())
    for copied, own in zip(plain.model.parameters(), made.parameters(), strict=True):
        copied.requires_grad_(own.requires_grad)
    again = Policy(made, max_tokens=4096, checkpoint=True, **options)
    return plain, again


@pytest.mark.parametrize("layout", ["shared", "packed-sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3-window"])
def test_layers_are_computed_twice_for_the_same_gradient(family: str, layout: str) -> None:
    made = tiny_families.model(family)
    plain, again = pair(made, attention=choose_attention(layout, made))
    wanted, once, much = backward(plain)
    found, twice, little = backward(again)
    assert (once, twice) == (1, 2)
    assert little < much / 2
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert wanted["model.layers.0.mlp.up_proj.weight"].abs().max() > 1e-3


def test_frozen_layers_with_adapters_are_computed_again_too() -> None:
    made = tiny_families.model("llama")
    adapt(made, LoraConfig(rank=2), seed=0)
    plain, again = pair(made)
    wanted, _, _ = backward(plain)
    found, twice, _ = backward(again)
    assert twice == 2
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(value.abs().max() > 1e-4 for name, value in found.items() if ".lora_B." in name)


def test_dropout_stays_off_and_no_part_is_left_in_train_mode() -> None:
    made = tiny_families.model("llama", attention_dropout=0.5)
    policy = Policy(made, max_tokens=4096, checkpoint=True)
    first, second = policy.hidden(ROLLOUTS), policy.hidden(ROLLOUTS)
    assert torch.equal(first, second)
    assert not any(module.training for module in made.modules())
    made.train()
    torch.manual_seed(0)
    assert not torch.equal(made(torch.tensor([[3, 4, 5]])).logits, made(torch.tensor([[3, 4, 5]])).logits)


def test_log_probs_and_sampling_keep_nothing_and_compute_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_families.model("llama")
    plain, again = pair(made, attention=SHARED)
    assert torch.equal(plain.logprobs(ROLLOUTS, 1.0), again.logprobs(ROLLOUTS, 1.0))
    again.hidden(ROLLOUTS).sum().backward()

    def sample(policy: Policy) -> list[list[int]]:
        generator = TransformersGenerator(policy.model, stop_ids=[tiny_policy.STOP], max_batch_sequences=64)
        sampling = Sampling(samples=4, max_completion_tokens=6, temperature=1.0, seed=1)
        found = generator.generate([(3, 4, 5), (6, 7)], sampling)
        return [completion.token_ids for completion in found]

    assert sample(plain) == sample(again)


def test_a_model_without_such_layers_is_refused() -> None:
    made = tiny_families.model("llama")
    monkey = type(made)
    made.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match=f"^--model.gradient-checkpointing: {monkey.__name__} has no layers"):
        Policy(made, max_tokens=10, checkpoint=True)


def test_layers_that_no_forward_pass_reaches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_families.model("llama")
    policy = Policy(made, max_tokens=4096, checkpoint=True)
    for layer in made.model.layers:
        monkeypatch.delattr(layer, "forward")  # as if the model called them by another way
    policy.hidden(ROLLOUTS)
    with pytest.raises(InputError, match=r"^--model.gradient-checkpointing: the layers of LlamaForCausalLM are not"):
        policy.hidden(ROLLOUTS)

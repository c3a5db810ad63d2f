"""torch.compile of parts of a model: the same numbers, and as many compilations whatever the lengths are."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import tiny_families
import tiny_policy
import torch
import torch._dynamo
import torch._inductor.config
from transformers import PreTrainedModel

from paced_fast.config import LoraConfig
from paced_fast.errors import InputError
from paced_fast.policy import Policy, adapt
from paced_fast.policy.compiled import compile_parts

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled, which run as they were traced: what a compiler makes of them is its own affair."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: whole(module, backend=backend, **options))
    torch._dynamo.reset()
    return found


def gradients(policy: Policy, lengths: list[int]) -> torch.Tensor:
    rollouts = tiny_policy.rollouts(lengths)
    states = policy.hidden(rollouts)
    states.float().square().sum().backward()
    found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.model.zero_grad()
    return torch.cat([states.detach().flatten(), found])


@pytest.mark.parametrize(("family", "parts"), [("llama", 7), ("qwen3", 11), ("gemma3-window", 15)])
def test_states_and_gradients_are_the_same_and_lengths_cost_nothing(family: str, parts: int, graphs: list[Any]) -> None:
    made = tiny_families.model(family)
    plain = Policy(copy.deepcopy(made), max_tokens=4096)
    assert compile_parts("on", made, CPU) == f"{parts} norms and MLPs"
    policy = Policy(made, max_tokens=4096)
    assert policy.model.state_dict().keys() == plain.model.state_dict().keys()
    for lengths in ([4, 1, 6, 2], [3, 3], [9, 2, 1, 1, 5, 7]):
        torch.testing.assert_close(gradients(policy, lengths), gradients(plain, lengths), rtol=1e-4, atol=1e-4)
    known = len(graphs)
    assert known > 0
    for k in range(1, 20):
        gradients(policy, [k, 1, 20 - k, 2])
    assert len(graphs) == known, "a new length was compiled anew"


def test_what_is_compiled_is_whole(graphs: list[Any]) -> None:
    """No break of a graph: of a Llama the norm and the MLP are one graph each."""
    made = tiny_families.model("llama")
    compile_parts("on", made, CPU)
    gradients(Policy(made, max_tokens=4096), [4, 1, 6, 2])
    assert len(graphs) == 2


def test_parts_of_others_stay_theirs_and_adapters_are_compiled_with_theirs(graphs: list[Any]) -> None:
    made = tiny_families.model("llama")
    norm = made.get_decoder().norm
    norm.forward = types.MethodType(type(norm).forward, norm)  # as liger-kernel's are put there
    adapt(made, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    wanted = gradients(Policy(made, max_tokens=4096), [4, 1, 6, 2])
    assert compile_parts("on", made, CPU) == "6 norms and MLPs"
    assert norm._compiled_call_impl is None
    torch.testing.assert_close(gradients(Policy(made, max_tokens=4096), [4, 1, 6, 2]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_compiler_makes_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    made = tiny_families.model("llama")
    plain = Policy(copy.deepcopy(made), max_tokens=4096)
    compile_parts("on", made, CPU)
    policy = Policy(made, max_tokens=4096)
    torch.testing.assert_close(gradients(policy, [4, 1, 6]), gradients(plain, [4, 1, 6]), rtol=1e-4, atol=1e-4)
    twin = policy.frozen_copy()
    rollouts = tiny_policy.rollouts([4, 1, 6])
    torch.testing.assert_close(twin.logprobs(rollouts, 1.0), plain.logprobs(rollouts, 1.0), rtol=1e-4, atol=1e-4)


def test_off_changes_nothing_and_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_families.model("llama")
    assert compile_parts("off", made) == "off"
    assert not any(_is_compiled(module) for module in made.modules())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"^--model.compile on needs a C\+\+ compiler on a CPU: install g\+\+ or"):
        compile_parts("on", made)
    bare = torch.nn.Sequential(torch.nn.Linear(2, 2))
    bare.config = types.SimpleNamespace(model_type="bare")  # type: ignore[assignment]
    with pytest.raises(InputError, match="bare has no norm or MLP that is left to compile: give off"):
        compile_parts("on", bare, torch.device("cuda"))  # type: ignore[arg-type]


def _is_compiled(module: PreTrainedModel | torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None

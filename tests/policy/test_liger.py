"""liger-kernel's functions in the layers of one model: where they are put, and when they are refused."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import tiny_families
import tiny_policy
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from paced_fast.config import LoraConfig
from paced_fast.errors import InputError
from paced_fast.policy import Policy, adapt, liger, use_liger

ROLLOUTS = tiny_policy.rollouts([4, 1, 6, 2], group_size=2)


def functions(calls: list[str]) -> Any:
    """The three functions by their formulas, with the signatures of liger_kernel.transformers.functional."""

    def liger_rms_norm(
        X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
    ) -> Tensor:
        calls.append("norm")
        return W * torch.nn.functional.rms_norm(X, X.shape[-1:], eps=eps)

    def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
        calls.append("swiglu")
        return torch.nn.functional.silu(a) * b

    def liger_rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
    ) -> Any:
        calls.append("rope")
        half = q.shape[-1] // 2

        def turned(x: Tensor) -> Tensor:
            return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

        return turned(q), turned(k)

    return types.SimpleNamespace(liger_rms_norm=liger_rms_norm, liger_swiglu=liger_swiglu, liger_rope=liger_rope)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(liger, "_lacks", lambda model, device: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functions(found))
    return found


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen2", 5), ("qwen3", 9), ("mistral-window", 5)])
def test_a_model_computes_the_same_through_them(family: str, norms: int, calls: list[str]) -> None:
    made = tiny_families.model(family)
    policy = Policy(made, max_tokens=4096)
    wanted = policy.logprobs(ROLLOUTS, 1.0)
    assert use_liger("auto", made) == f"on ({norms} RMSNorm, 4 SwiGLU and rotary embeddings)"
    assert calls == []
    torch.testing.assert_close(policy.logprobs(ROLLOUTS, 1.0), wanted, rtol=1e-4, atol=1e-4)
    assert {name: calls.count(name) for name in set(calls)} == {"norm": norms, "swiglu": 2, "rope": 2}


def plain(self: Any, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
    return hidden_states, None


def test_attention_without_the_rotary_function_is_named(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", plain)
    said = use_liger("auto", tiny_families.model("llama"))
    assert said == "on (5 RMSNorm, 2 SwiGLU and rotary embeddings; 2 rotary embeddings are not replaced)"
    with pytest.raises(
        InputError, match=r"^--model.liger on: 2 attention layers of llama do not call apply_rotary_pos"
    ):
        use_liger("on", tiny_families.model("llama"))


def test_decorated_attention_is_followed(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = modeling_llama.LlamaAttention.forward

    def decorated(self: Any, *args: Any, **options: Any) -> Any:
        return inner(self, *args, **options)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", decorated)
    made = tiny_families.model("llama")
    use_liger("on", made)
    Policy(made, max_tokens=4096).logprobs(ROLLOUTS, 1.0)
    assert calls.count("rope") == 2


def test_no_other_model_is_changed(calls: list[str]) -> None:
    one, other = tiny_families.model("llama"), tiny_families.model("llama")
    rotary = modeling_llama.apply_rotary_pos_emb
    use_liger("on", one)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    Policy(other, max_tokens=4096).logprobs(ROLLOUTS, 1.0)
    assert calls == []
    assert one.forward.__func__ is other.forward.__func__, "the head and its loss are left alone"


def test_adapters_are_called_through_them(calls: list[str]) -> None:
    made = tiny_families.model("llama")
    adapt(made, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    wanted = Policy(made, max_tokens=4096).logprobs(ROLLOUTS, 1.0)
    use_liger("on", made)
    torch.testing.assert_close(Policy(made, max_tokens=4096).logprobs(ROLLOUTS, 1.0), wanted, rtol=1e-4, atol=1e-4)
    assert calls.count("swiglu") == 2


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_families.model("llama")
    with pytest.raises(InputError, match=r"^--model.liger on: its kernels need a GPU: give auto"):
        use_liger("on", made)
    assert use_liger("auto", made) == "off (its kernels need a GPU)"
    assert use_liger("off", made) == "off"
    gpu = types.SimpleNamespace(device=torch.device("cuda"), config=types.SimpleNamespace(model_type="gemma3_text"))
    monkeypatch.setattr(liger.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"liger-kernel is not installed \(pip install 'liger-kernel>=0.8'\)"):
        use_liger("on", gpu)  # type: ignore[arg-type]
    monkeypatch.setattr(liger.util, "find_spec", lambda name: object())
    with pytest.raises(
        InputError, match="models of type gemma3_text are not supported, only llama, mistral, qwen2, qwen3"
    ):
        use_liger("on", gpu)  # type: ignore[arg-type]

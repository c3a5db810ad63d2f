"""`PacedTrainer` scores every kind of model as the model itself does, and trains the routers as the model does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl
import transformers

from paced_fast.errors import InputError
from paced_fast.integrations.trl_head import FUSED, HOST, LOGITS

SIZES: dict[str, Any] = {
    "vocab_size": tiny_policy.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": tiny_policy.STOP,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}

# Class, settings, and the way to its log-probs. The factors and caps are far from 1, so that leaving one out shows.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "cohere": ("Cohere2", {"logit_scale": 0.25, "head_dim": 8}, FUSED),
    "granite": ("Granite", {"logits_scaling": 3.0}, FUSED),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, **EXPERTS}, FUSED),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 8, **EXPERTS}, FUSED),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **EXPERTS}, FUSED),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 1.5, "head_dim": 8}, HOST),
    "recurrent_gemma": ("RecurrentGemma", {"logits_soft_cap": 1.5, "lru_width": 16, "num_hidden_layers": 3}, LOGITS),
    "electra": ("Electra", {"is_decoder": True, "embedding_size": 16}, LOGITS),
    "phi": ("Phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, FUSED),  # a bias in the output layer
    "opt": ("OPT", {"word_embed_proj_dim": 8, "ffn_dim": 24, "dropout": 0.0}, FUSED),
}


def model(name: str) -> Any:
    family, changes, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    )
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8.0)
            elif key == "lm_head.bias":
                parameter.normal_()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


def micro_batch() -> dict[str, Tensor]:
    """Four sequences of two prompts, of different lengths, and rewards."""
    source = torch.Generator().manual_seed(3)
    prompt_mask = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]])
    completion_mask = (torch.arange(5) < torch.tensor([4, 1, 5, 3])[:, None]).long()
    return {
        "prompt_ids": torch.randint(2, 11, (4, 2), generator=source) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 11, (4, 5), generator=source) * completion_mask,
        "completion_mask": completion_mask,
        "rewards": torch.tensor([1.0, 0.0, 0.25, 0.5]),
        "log_z": torch.tensor([10.0, 10.0, 7.5, 7.5]),
        "weights": torch.ones(4),
        "num_trained": torch.tensor(4.0),
    }


def own_logprobs(made: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Any]:
    """[B, C] by the forward of the model as transformers wrote it, and all that it returned."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    shown = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    out = type(made.model).forward(made.model, input_ids=ids, attention_mask=shown, use_cache=False, **options)
    table = (out.logits[:, 1:-1].float() / made.temperature).log_softmax(-1)
    return table.gather(2, inputs["completion_ids"][..., None])[..., 0] * inputs["completion_mask"], out


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(tmp_path: Path, name: str, fused: bool) -> None:
    made = tiny_trl.trainer(tmp_path, model=model(name), fused=fused, temperature=0.7, gradient_accumulation_steps=2)
    way = MODELS[name][2]
    assert made.head.way == (HOST if way == FUSED and not fused else way)
    made.current_gradient_accumulation_steps = 2
    inputs = micro_batch()
    with torch.no_grad():  # another old policy: the model moved a little since
        inputs["old_per_token_logps"] = own_logprobs(made, inputs)[0] + 0.1
    loss = made._compute_loss(made.model.train(), inputs)
    loss.backward()
    found = tiny_policy.gradients(made.model)
    made.model.zero_grad()
    router = {"output_router_logits": True} if made.aux_loss_enabled else {}
    logprobs, out = own_logprobs(made, inputs, **router)
    log_ratio = ((logprobs - inputs["old_per_token_logps"]) * inputs["completion_mask"]).sum(1)
    residual = 0.05 * (inputs["log_z"] + log_ratio) - inputs["rewards"]
    weight = log_ratio.detach().exp().clamp(max=1.28)
    expected = (weight * residual.square() / (2 * 0.05)).sum() / 4
    if router:
        expected = expected + 0.5 * out.aux_loss / 2  # two micro-batches make the step
        assert made._metrics["train"]["aux_loss"] == [pytest.approx(float(out.aux_loss.detach()), rel=1e-5)]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    wanted = tiny_policy.gradients(made.model)
    scale = max(float(g.abs().max()) for g in wanted.values())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=0, atol=1e-4 * scale, msg=key)
    entropy = -(lambda p: (p.exp() * p).sum(-1))((out.logits[:, 1:-1].float() / 0.7).log_softmax(-1))
    mask = inputs["completion_mask"].bool()
    assert made._metrics["train"]["entropy"] == [pytest.approx(float(entropy[mask].mean().detach()), rel=1e-4)]


def test_routers_are_part_of_the_families_above(tmp_path: Path) -> None:
    for name in ("qwen3_moe", "gpt_oss", "mixtral"):
        assert tiny_trl.trainer(tmp_path, model=model(name)).aux_loss_enabled


def test_a_router_loss_of_no_routers_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DogeConfig(**SIZES, is_moe=False, router_aux_loss_coef=0.1)
    with pytest.raises(InputError, match=r"DogeForCausalLM returns no router logits, .*: set router_aux_loss_coef=0"):
        tiny_trl.trainer(tmp_path, model=transformers.DogeForCausalLM(config))
    made = tiny_trl.trainer(tmp_path, model=transformers.DogeForCausalLM(config), router_aux_loss_coef=0.0)
    assert made.head.way == FUSED


@pytest.mark.parametrize(
    ("name", "fused", "notice"),
    [
        ("gemma2", True, "Gemma2ForCausalLM caps its logits (final_logit_softcapping): its log-probs come from TRL's"),
        ("gemma2", False, None),
        (
            "electra",
            True,
            "ElectraForCausalLM applies more to its hidden states than the output layer: its log-probs come from",
        ),
        ("electra", False, "the model's own logits, which exist in full"),
        ("qwen3_moe", True, None),
    ],
)
def test_another_way_to_the_log_probs_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, fused: bool, notice: str | None
) -> None:
    with caplog.at_level(logging.WARNING, logger="paced_fast"):
        tiny_trl.trainer(tmp_path, model=model(name), fused=fused)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("paced_fast")]
    assert len(said) == (notice is not None)
    assert notice is None or notice in said[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"logits_soft_cap": 30.0}, "changes its logits (logits_soft_cap)"),
        ({"unpadded_vocab_size": 7}, "changes its logits (unpadded_vocab_size)"),
        ({"cls": torch.nn.Identity()}, "transforms its hidden states before the output layer"),
    ],
)
def test_a_model_that_does_more_than_its_output_layer_is_asked_for_its_logits(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    made_model = tiny_policy.model(sharpness=2.0)
    for name, value in change.items():
        setattr(made_model if isinstance(value, torch.nn.Module) else made_model.config, name, value)
    made = tiny_trl.trainer(tmp_path, model=made_model)
    assert made.head.way == LOGITS
    assert why in made.head.why


def test_a_forward_that_nobody_knows_is_found_by_its_numbers(tmp_path: Path) -> None:
    """As remote code may do: a factor that no setting names."""
    made_model = tiny_policy.model(sharpness=2.0)
    own = made_model.forward

    def forward(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        out.logits = out.logits * 1.5
        return out

    made_model.forward = forward
    made_model.train()
    made = tiny_trl.trainer(tmp_path, model=made_model)
    assert made.head.way == LOGITS
    assert "applies more to its hidden states than the output layer" in made.head.why
    assert made.model.training


def test_the_old_policys_entropies_are_not_computed_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paced_fast.integrations import trl

    asked: list[bool] = []
    score = trl.linear_logprobs

    def counted(*args: Any, return_entropy: bool, **options: Any) -> Any:
        asked.append(return_entropy)
        return score(*args, return_entropy=return_entropy, **options)

    monkeypatch.setattr(trl, "linear_logprobs", counted)
    options = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    made = tiny_trl.trainer(tmp_path, max_steps=2, **options)
    made.train()
    assert ["old_per_token_logps" in batch for batch in made._buffered_inputs] == [False, True]
    assert asked == [False]  # up to the first optimiser step the policy is the old one

"""Model types of transformers: scored and sampled exactly in every layout they get, or refused in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny_policy
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.models import model_types, tiny_types, type_checks
from paced_fast.data import packing
from paced_fast.data.records import Targets
from paced_fast.errors import InputError
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.generation.reading import reading_of
from paced_fast.paced.losses import trajectory_balance
from paced_fast.policy import SHARED, Policy, families
from paced_fast.policy.families import planned
from paced_fast.policy.shape import positions, shape_of, text_settings
from paced_fast.run.plan.memory import plan

ROPE = {"rope_theta": 10000.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 32.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

REPRESENTATIVE = (
    ("gpt2", {}, "shared", "padded"),  # learned positions, tied head
    ("opt", {"word_embed_proj_dim": 16}, "shared", "padded"),  # states of another width than the layers
    ("gemma3", {}, "shared", "padded"),  # text settings inside those of images, windows in some layers
    ("gemma2", {}, "padded", "padded"),  # capped scores and bounded logits
    ("granite", {"logits_scaling": 8.0}, "shared", "padded"),
    ("phi", {}, "shared", "padded"),  # a head with a bias, rotary embedding of a part
    ("gpt_oss", {}, "padded", "padded"),  # attention sinks
    ("falcon", {"alibi": True}, "padded", "padded"),
    ("llama4", {}, "padded", "even"),  # chunks
    ("lfm2", {}, "padded", "even"),  # convolutions
    ("mamba2", {}, "padded", "even"),  # states
    ("recurrent_gemma", {}, "padded", "whole"),  # a cache inside the model
    ("roberta", {}, "padded", "whole"),  # positions counted by tokens of padding
)


@pytest.mark.parametrize(("name", "changes", "layout", "sampling"), REPRESENTATIVE, ids=[c[0] for c in REPRESENTATIVE])
def test_a_type_says_what_the_model_says_of_each_sequence_alone(
    name: str, changes: dict[str, Any], layout: str, sampling: str
) -> None:
    found = model_types.check(name, changes)
    assert (found.outcome, found.why) == ("exact", ""), found
    assert found.layout.split(", ")[0] == layout
    assert found.sampling == sampling


VARIANTS = (
    ("qwen2_moe", {"sliding_window": None}),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}),
    ("phimoe", {"sliding_window": None}),
    ("falcon", {"new_decoder_architecture": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma3_text", {"final_logit_softcapping": 5.0}),
    ("gemma4_text", {"final_logit_softcapping": 5.0}),
    ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}),
    ("mpt", {"attn_config": {"alibi": False}}),
    ("stablelm", {"use_parallel_residual": True}),
    ("cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    *((name, {"sliding_window": None}) for name in ("mistral", "mixtral", "starcoder2", "phi3")),
    *(
        ("llama", {"rope_parameters": {**ROPE, "rope_type": kind, **more}})
        for kind, more in (
            ("linear", {"factor": 2.0}),
            ("dynamic", {"factor": 2.0}),
            ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16}),
            (
                "llama3",
                {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            ),
            (
                "longrope",
                {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 32},
            ),
        )
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)])
def test_a_setting_of_a_type_changes_nothing_about_that(name: str, changes: dict[str, Any]) -> None:
    found = model_types.check(name, changes)
    assert (found.outcome, found.why) == ("exact", ""), found


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_type_is_exact_refused_or_cannot_be_built() -> None:
    """A newer transformers has more types: they are looked at as well, and none may be wrong."""
    found = list(model_types.outcomes(tiny_types.TYPES))
    assert len(found) >= 150
    assert [row for row in found if row.outcome == "wrong"] == []
    for row in found:
        if row.outcome == "refused":
            assert row.why.startswith("--model.name: "), row
            assert row.type in row.why, row
    exact = {row.type for row in found if row.outcome == "exact"}
    assert len(exact) >= 150, sorted({row.type for row in found} - exact)


def gradients(model: PreTrainedModel, policy: Policy | None) -> dict[str, Tensor]:
    """Of a weighted sum of log-probs, ours or the model's own."""
    batch = type_checks.rollouts(model_types.ORDINARY)
    factor = torch.linspace(-1.0, 2.0, batch.num_tokens)
    if policy is None:
        (type_checks.own_logprobs(model, batch) * factor).sum().backward()
    else:
        for sequences in policy.micro_batches(batch, range(batch.num_sequences)):
            part = packing.part(batch, sequences)
            found = policy.token_logprobs(policy.hidden(part.rollouts), part.rollouts.token_ids, 1.0)
            (found * factor[part.tokens]).sum().backward()
    return tiny_policy.gradients(model)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "lfm2", "cohere", "opt", "gpt_oss"])
def test_gradients_are_those_of_separate_sequences(name: str) -> None:
    changes = {"word_embed_proj_dim": 16} if name == "opt" else {}
    policy = Policy(tiny_types.tiny_model(name, **changes), max_tokens=40)
    found = gradients(policy.model, policy)
    plain = tiny_types.tiny_model(name, **changes)
    if name == "gemma2":
        plain.set_attn_implementation("eager")  # the other one caps no scores
    for key, wanted in gradients(plain, None).items():
        torch.testing.assert_close(found[key], wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())), msg=key)


def test_the_loss_of_bounded_logits_is_that_of_their_log_probs() -> None:
    """weight * (value + b (s - s_old) - reward)^2 / (2 b), by hand from the model's own log-probs."""
    config = tiny_policy.settings()
    policy = Policy(tiny_types.tiny_model("gemma2"), max_tokens=400)
    batch = type_checks.rollouts(model_types.ORDINARY)
    own = type_checks.own_logprobs(policy.model, batch)
    old = own.detach() - 0.01
    size = batch.num_sequences
    targets = Targets(
        signal=torch.linspace(0, 1, size),
        intercept=torch.full((size,), 0.3),
        old_logprobs=old,
        ref_logprobs=old,
        weights=torch.ones(size),
    )
    out = trajectory_balance(policy.hidden(batch), policy, batch, targets, config, size)
    ratios = torch.stack([part.sum() for part in (own - old).split(batch.lengths)])
    beta, cap = config.loss.beta, config.loss.importance_cap
    residual = 0.3 + beta * ratios - targets.signal
    wanted = (ratios.detach().exp().clamp(max=cap) * residual**2 / (2 * beta)).sum() / size
    torch.testing.assert_close(out.loss, wanted, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(out.loss, policy.model.get_output_embeddings().weight)[0]
    expected = torch.autograd.grad(wanted, policy.model.get_output_embeddings().weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "given", "longest"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 64}, 64),
        ("opt", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("bloom", {}, None),
        ("falcon", {"alibi": True}, None),
        ("falcon", {"alibi": False, "max_position_embeddings": 64}, 64),
        ("mpt", {"max_seq_len": 64}, 64),
        ("mamba", {}, None),
        ("xlnet", {}, None),
        ("gemma3", {"text_config": {"max_position_embeddings": 64}}, 64),
        ("llama", {"max_position_embeddings": 64, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4}}, 64),
        # yarn: settings written for the length before, or for the length after
        ("llama", {"max_position_embeddings": 32, "rope_parameters": YARN}, 128),
        ("llama", {"max_position_embeddings": 128, "rope_parameters": YARN}, 128),
        (
            "llama",
            {"max_position_embeddings": 64, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4}},
            64,
        ),
        ("llama", {"max_position_embeddings": 512, "rope_parameters": LLAMA3}, 512),
        (
            "phi3",
            {
                "max_position_embeddings": 128,
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    **ROPE,
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                    "original_max_position_embeddings": 32,
                },
            },
            32,
        ),
    ],
)
def test_the_longest_sequence_is_read_from_the_settings(kind: str, given: dict[str, Any], longest: int | None) -> None:
    assert positions(text_settings(AutoConfig.for_model(kind, **given))).longest == longest


LONGROPE = {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [9.0] * 4, **ROPE}


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({**LONGROPE, "original_max_position_embeddings": 20}, 20),
        ({**ROPE, "rope_type": "dynamic", "factor": 8.0}, 64),
        (None, 64),
    ],
    ids=["longrope", "dynamic", "default"],
)
def test_sequences_beyond_what_the_model_can_place_are_refused(rope: dict[str, Any] | None, longest: int) -> None:
    model = tiny_types.tiny_model("llama", **({} if rope is None else {"rope_parameters": rope}))
    policy = Policy(model, max_tokens=400)
    generator = TransformersGenerator(model, stop_ids=[1], max_batch_sequences=8)
    short = tiny_policy.rollouts([4, longest - 5], prompt_lengths=(3,))  # prompts of five tokens
    wanted = type_checks.own_logprobs(model, short).detach()
    torch.testing.assert_close(policy.logprobs(short, 1.0), wanted, rtol=0, atol=1e-5)
    sampling = Sampling(samples=1, max_completion_tokens=longest - 3, temperature=1.0)
    sampled = generator.generate([(3, 4, 5)], sampling)
    assert sampled[0].token_ids
    message = (
        rf"prompt and completion have {longest + 1} tokens together and do not fit in a llama .* {longest} positions"
    )
    with pytest.raises(InputError, match=message):
        policy.logprobs(tiny_policy.rollouts([4, longest - 4], prompt_lengths=(3,)), 1.0)
    with pytest.raises(InputError, match=message):
        generator.generate([(3, 4, 5), (6,)], dataclasses.replace(sampling, max_completion_tokens=longest - 2))


def test_frequencies_that_follow_the_batch_would_change_log_probs() -> None:
    """What the limit keeps out: the same sequence, with and without a longer neighbour."""
    model = tiny_types.tiny_model("llama", rope_parameters={**LONGROPE, "original_max_position_embeddings": 20})
    ids = torch.randint(3, 40, (2, 30))
    with torch.no_grad():
        alone, together = model(input_ids=ids[:1, :15]).logits[0], model(input_ids=ids).logits[0, :15]
    assert float((alone - together).abs().max()) > 0.1


def test_models_that_cannot_be_policies_are_refused_in_one_line() -> None:
    for name, why in (
        ("bert", "let tokens attend to later tokens, .* unless is_decoder is set in their configuration"),
        ("xlm", "in this model of type xlm tokens attend to later tokens"),
        ("cpmant", "models of type cpmant let tokens attend to later tokens"),
    ):
        model = tiny_types.tiny_model(name, **({"is_decoder": False} if name == "bert" else {}))
        for use in (
            lambda model=model: Policy(model, max_tokens=10),
            lambda model=model: reading_of(model),
        ):
            with pytest.raises(InputError, match=rf"^--model\.name: [^\n]*{why}[^\n]*$"):
                use()


class Squared(LlamaForCausalLM):
    """Logits that no output layer makes."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits * output.logits.abs()
        return output


class Mixed(LlamaForCausalLM):
    """Rows of a batch that know of each other."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        own = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=own + own.mean(0) * (len(input_ids) > 1), **options)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Squared, "computes logits in a way that the loss does not support"), (Mixed, "depend on the rest of its batch")],
)
def test_a_model_that_nobody_knows_is_tried_out(kind: type[LlamaForCausalLM], why: str) -> None:
    settings = tiny_types.tiny_settings("llama")
    made = tiny_types.sharpen(kind(settings))
    made.config.model_type = "novel"
    with pytest.raises(InputError, match=why):
        Policy(made, max_tokens=10)
    plain = tiny_types.tiny_model("llama")
    plain.config.model_type = "novel"
    policy = Policy(plain, max_tokens=40)
    assert policy.attention.name == "padded"
    assert policy.attention.reason == "models of type novel are exact only with one sequence per row"
    with pytest.raises(InputError, match=r"^--model\.attention shared: models of type novel .*: use auto or padded$"):
        Policy(plain, max_tokens=40, attention=SHARED)


def test_a_listed_type_that_does_not_share_exactly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "SHAREABLE", frozenset({*families.SHAREABLE, "mbart"}))
    model = tiny_types.tiny_model("mbart")
    with pytest.raises(InputError, match=r"has other log-probs than with one: give --model\.attention padded"):
        Policy(model, max_tokens=40)


def test_plans_know_the_layout_that_a_type_gets() -> None:
    config = tiny_policy.settings()
    for name, wanted in (("llama", "auto"), ("mamba2", "padded"), ("gemma3", "auto"), ("gemma2", "padded")):
        assert planned(config, tiny_types.tiny_settings(name)).model.attention == wanted
    shared = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="shared"))
    with pytest.raises(InputError, match=r"^--model\.attention shared: .*mamba2"):
        planned(shared, tiny_types.tiny_settings("mamba2"))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.real_empty
def test_every_type_has_a_shape_and_a_plan() -> None:
    config = tiny_policy.settings()
    seen = 0
    for name in tiny_types.TYPES:
        model = model_types.built(name)
        if model is None:
            continue  # the sweep says why
        shape = shape_of(model)
        assert shape.hidden_size > 0, name
        assert shape.num_layers > 0, name
        assert shape.vocab_size > 0, name
        assert shape.parameters == sum(p.numel() for p in model.parameters()), name
        assert 0 < shape.body_parameters < shape.parameters, name
        assert min(plan(shape, config, 10).values()) >= 0, name
        seen += 1
    assert seen >= 150

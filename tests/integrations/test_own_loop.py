"""The loss for an own loop, from a padded batch: against full logits of every sequence alone.

B = sequences, L = padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_policy
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from paced_fast.errors import InputError
from paced_fast.integrations.own_loop import balance_loss, completion_logprobs

PAD, BETA, CAP = 0, 0.1, 1.28
SIZES: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
PROMPTS = [[5, 6, 7], [5, 6, 7], [8], [8], [9, 10, 11, 12, 13], [9, 10, 11, 12, 13]]
COMPLETIONS = [[3, 4, 1], [14], [15, 16, 17, 3, 1], [], [4, 1], [6, 6, 6]]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def gpt2() -> PreTrainedModel:
    """Learned positions: a row padded on the left must not be read from a later place."""
    settings = GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=1)
    return GPT2LMHeadModel(settings)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": lambda: tiny_policy.model(sharpness=3.0),
    "learned positions": gpt2,
    "bias in the head": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "scaled logits": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "capped logits": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
}


def made(name: str) -> PreTrainedModel:
    """A model with logits far from uniform; in it no token has dropout."""
    model = MODELS[name]()
    if name != "plain":
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.dim() == 2:
                    weight.mul_(6.0)
                elif key.endswith("lm_head.bias"):
                    weight.normal_()
    return model.eval()


def batch(side: str, vocabulary: int = 19) -> dict[str, Tensor]:
    """Rows padded on that side; `both` is what generation leaves: prompts on the left, completions on the right."""
    rows = [(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    longest, longest_prompt = max(len(p) + len(c) for p, c in rows), max(len(p) for p, _ in rows)
    width = longest_prompt + max(len(c) for _, c in rows) if side == "both" else longest
    start = {
        "left": lambda p, c: width - len(p) - len(c),
        "right": lambda p, c: 0,
        "both": lambda p, c: longest_prompt - len(p),
    }[side]
    ids = torch.full((len(rows), width), PAD)
    seen, chosen = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        first, end = start(prompt, completion), start(prompt, completion) + len(prompt) + len(completion)
        ids[i, first:end] = torch.tensor([*prompt, *completion]) % vocabulary
        seen[i, first:end] = 1
        chosen[i, first + len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": seen, "completion_mask": chosen}


def alone(model: PreTrainedModel, temperature: float = 1.0, vocabulary: int = 19) -> list[Tensor]:
    """Log-probs of every completion from full logits, without padding."""
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([[*prompt, *completion]]) % vocabulary
        table = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
        found.append(table[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0])
    return found


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if part is None else part for part in parts]


def plain_loss(sums: Tensor, old: Tensor, values: Tensor, rewards: Tensor) -> Tensor:
    """The loss as README writes it."""
    residual = values + BETA * (sums - old) - rewards
    weight = (sums - old).detach().exp().clamp(max=CAP)
    return (weight * residual.square()).mean() / (2 * BETA)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_full_logits(name: str, side: str) -> None:
    model, temperature = made(name), 0.7
    vocabulary = tiny_policy.VOCAB if name == "plain" else 19
    inputs = batch(side, vocabulary)
    logprobs = alone(model, temperature, vocabulary)
    sums = torch.stack([part.sum() for part in logprobs])
    found = completion_logprobs(model, **inputs, temperature=temperature)
    torch.testing.assert_close(
        found[inputs["completion_mask"].bool()], torch.cat(logprobs).detach(), rtol=1e-4, atol=1e-4
    )
    assert not found[~inputs["completion_mask"].bool()].any()

    drift = torch.linspace(-0.3, 0.2, found.shape[1]) * inputs["completion_mask"]
    old = found - drift
    values = torch.tensor([0.5, 0.5, 0.2, 0.2, 0.8, 0.8])
    wanted = plain_loss(sums, sums.detach() - drift.sum(1), values, torch.tensor(REWARDS))
    loss, metrics = balance_loss(
        model, **inputs, rewards=REWARDS, values=values, old_logprobs=old, beta=BETA, temperature=temperature
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    largest = max(float(part.abs().max()) for part in gradients_of_once(model, wanted))
    for one, other in zip(gradients(model, loss), gradients_of_once(model, wanted), strict=True):
        torch.testing.assert_close(one, other.expand_as(one), rtol=1e-3, atol=2e-5 * largest)
    torch.testing.assert_close(metrics["log_ratio"], drift.sum(1).mean(), rtol=1e-3, atol=1e-4)
    assert float(metrics["tokens"]) == pytest.approx(sum(map(len, COMPLETIONS)) / len(COMPLETIONS))


def gradients_of_once(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    """Gradients that leave the graph."""
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros(()) if part is None else part for part in parts]


def test_a_single_update_is_reinforce_with_the_mean_of_the_group() -> None:
    model = made("plain")
    inputs = batch("both", tiny_policy.VOCAB)
    sums = torch.stack([part.sum() for part in alone(model, 1.0, tiny_policy.VOCAB)])
    means = torch.tensor(REWARDS).view(3, 2).mean(1).repeat_interleave(2)
    wanted = gradients(model, -((torch.tensor(REWARDS) - means) * sums).mean())
    for given in ({"group_size": 2}, {"groups": ["a", "a", "b", "b", "c", "c"]}, {"groups": torch.arange(6) // 2}):
        loss, metrics = balance_loss(model, **inputs, rewards=REWARDS, beta=BETA, **given)
        for one, other in zip(gradients(model, loss), wanted, strict=True):
            torch.testing.assert_close(one, other.expand_as(one), rtol=1e-3, atol=1e-5)
        assert float(metrics["value"]) == pytest.approx(0.5)
        assert float(metrics["importance_weight"]) == 1.0


def test_old_log_probs_may_be_those_of_the_shifted_tokens() -> None:
    model, inputs = made("plain"), batch("right", tiny_policy.VOCAB)
    old = completion_logprobs(model, **inputs) - 0.1
    settings = {"rewards": REWARDS, "group_size": 2}
    whole, _ = balance_loss(model, **inputs, **settings, old_logprobs=old)
    shifted, _ = balance_loss(model, **inputs, **settings, old_logprobs=old[:, 1:])
    assert torch.equal(whole, shifted)


def test_what_has_no_reward_counts_nowhere() -> None:
    model, inputs = made("plain"), batch("left", tiny_policy.VOCAB)
    some = {name: value[[0, 1, 4, 5]] for name, value in inputs.items()}
    rewards = torch.tensor([1.0, 0.0, torch.nan, torch.nan, 0.0, 1.0])
    all_of_it, metrics = balance_loss(model, **inputs, rewards=rewards, group_size=2)
    part, metrics_of_part = balance_loss(model, **some, rewards=rewards[[0, 1, 4, 5]], group_size=2)
    torch.testing.assert_close(all_of_it, part)
    torch.testing.assert_close(metrics["reward"], metrics_of_part["reward"])
    for one, other in zip(gradients(model, all_of_it), gradients(model, part), strict=True):
        torch.testing.assert_close(one, other)
    _, metrics = balance_loss(model, **inputs, rewards=[1.0, torch.nan, 0.0, 1.0, 1.0, 1.0], group_size=3)
    assert float(metrics["value"]) == pytest.approx((2 * 0.5 + 3 * 1.0) / 5)


def test_the_value_can_be_learned_and_a_batch_split() -> None:
    model, inputs = made("plain"), batch("both", tiny_policy.VOCAB)
    values = torch.full((6,), 0.4, requires_grad=True)
    rewards = torch.tensor(REWARDS)
    old = completion_logprobs(model, **inputs)
    loss, _ = balance_loss(model, **inputs, rewards=rewards, values=values, old_logprobs=old, beta=BETA)
    found = torch.autograd.grad(loss, values)[0]
    torch.testing.assert_close(found, (0.4 - rewards) / BETA / 6)  # dL / dvalue = u / beta
    parts = []
    for rows in (slice(0, 4), slice(4, 6)):
        part = {name: value[rows] for name, value in inputs.items()}
        settings = {"rewards": rewards[rows], "values": values[rows].detach(), "old_logprobs": old[rows]}
        parts.append(balance_loss(model, **part, **settings, beta=BETA, denominator=6)[0])
    torch.testing.assert_close(sum(parts), loss.detach())


def test_bfloat16_is_as_good_as_full_logits_in_bfloat16() -> None:
    model = made("plain")
    inputs = batch("both", tiny_policy.VOCAB)
    exact = completion_logprobs(model, **inputs)
    half = made("plain").to(torch.bfloat16)
    naive = torch.cat([part.detach() for part in alone(half, 1.0, tiny_policy.VOCAB)])
    mask = inputs["completion_mask"].bool()
    error = float((naive - exact[mask]).abs().max())
    found = completion_logprobs(half, **inputs)
    assert found.dtype == torch.float32
    assert float((found - exact)[mask].abs().max()) <= 2 * error + 1e-3
    loss, _ = balance_loss(half, **inputs, rewards=REWARDS, group_size=2, old_logprobs=found)
    loss.backward()
    assert all(weight.grad is None or weight.grad.dtype == torch.bfloat16 for weight in half.parameters())


def test_full_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("plain"), batch("both", tiny_policy.VOCAB)
    head = model.get_output_embeddings()
    monkeypatch.setattr(type(head), "forward", lambda *_: pytest.fail("the output layer ran"))
    body = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    for module in body:
        module.forward = lambda x, own=module: torch.nn.functional.linear(x, own.weight, own.bias)
    loss, _ = balance_loss(model, **inputs, rewards=REWARDS, group_size=2)
    loss.backward()
    assert head.weight.grad is not None
    assert "forward" not in vars(head)


def wrong(**changes: Any) -> dict[str, Any]:
    return {**batch("both", tiny_policy.VOCAB), "rewards": REWARDS, "group_size": 2, **changes}


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "mask of the completion alone": (
        lambda: wrong(completion_mask=torch.ones(6, 5)),
        r"completion_mask has shape \(6, 5\) and input_ids \(6, 10\): .*pad\(completion_mask, \(5, 0\)\)",
    ),
    "padding": (lambda: wrong(completion_mask=torch.ones(6, 10)), "on padding in row 0: multiply it by attention_mask"),
    "first token": (
        lambda: wrong(completion_mask=batch("both")["attention_mask"]),
        "first token of row 0, which no state predicts: put the prompt",
    ),
    "rewards": (lambda: wrong(rewards=[1.0]), r"rewards has shape \(1,\), and input_ids has 6 rows: give one number"),
    "no value": (lambda: wrong(group_size=None), r"give one of values \(one per row\), groups .* and group_size"),
    "two values": (lambda: wrong(groups=[0] * 6), r"give one of values \(one per row\), groups"),
    "broken group": (lambda: wrong(group_size=4), "group_size is 4 for 6 rows: give whole groups"),
    "group of one": (lambda: wrong(group_size=1), "group_size is 1 for 6 rows: give whole groups of two"),
    "old log-probs": (lambda: wrong(old_logprobs=torch.zeros(17)), r"old_logprobs has shape \(17,\) and input_ids"),
    "flat ids": (lambda: wrong(input_ids=torch.zeros(9)), r"input_ids has shape \(9,\): give one padded row"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_with_its_remedy(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(InputError, match=message):
        balance_loss(made("plain"), **make())


def test_a_batch_without_any_completion_token_has_no_loss_and_no_gradient() -> None:
    model, values = made("plain"), torch.full((6,), 0.3, requires_grad=True)
    inputs = batch("both", tiny_policy.VOCAB)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    old = completion_logprobs(model, **inputs)
    assert not old.any()
    loss, metrics = balance_loss(model, **inputs, rewards=REWARDS, values=values, old_logprobs=old, beta=BETA)
    loss.backward()
    assert float(loss.detach()) == 0.0
    found = [values.grad, *(weight.grad for weight in model.parameters())]
    assert not any(bool(gradient.any()) for gradient in found if gradient is not None)
    assert float(metrics["tokens"]) == 0.0
    assert float(metrics["reward"]) == pytest.approx(0.5)
    assert all(bool(figure.isfinite()) for figure in metrics.values())


def test_other_modules_are_refused() -> None:
    with pytest.raises(InputError, match="model is a Linear: give a causal language model of transformers"):
        balance_loss(torch.nn.Linear(2, 2), **wrong())


def test_adapters_of_peft_are_trained_in_their_wrapper() -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[lora]'")
    inputs = batch("both", tiny_policy.VOCAB)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(made("plain"), settings).eval()
    sums = torch.stack([part.sum() for part in alone(model, 1.0, tiny_policy.VOCAB)])
    values = torch.full((6,), 0.3)
    wanted = plain_loss(sums, sums.detach(), values, torch.tensor(REWARDS))
    loss, _ = balance_loss(model, **inputs, rewards=REWARDS, values=values, beta=BETA)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    found, expected = torch.autograd.grad(loss, adapters), torch.autograd.grad(wanted, adapters)
    assert any(bool(part.any()) for part in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_wrapper_is_called_in_place_of_its_model() -> None:
    """As DDP, which gathers gradients in its own forward."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs: Any) -> Any:
            self.calls += 1
            return self.module(**inputs)

    wrapper, inputs = Wrapper(made("plain")), batch("both", tiny_policy.VOCAB)
    loss, _ = balance_loss(wrapper, **inputs, rewards=REWARDS, group_size=2)
    assert wrapper.calls == 1
    assert torch.equal(loss, balance_loss(wrapper.module, **inputs, rewards=REWARDS, group_size=2)[0])

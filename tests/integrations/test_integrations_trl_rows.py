"""`PacedTrainer` computes a prompt once for its completions, with the loss and gradients of one row a completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl

from paced_fast.integrations.trl_rows import regrouped, shared_rows

LENGTHS = torch.tensor([6, 1, 0, 5, 6, 2])


def groups(*, old: bool = False) -> dict[str, Tensor]:
    """Three completions of each of two prompts of 5 and 3 tokens, of 0 to 6 tokens, in turns."""
    source = torch.Generator().manual_seed(5)
    prompt_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).repeat(3, 1)
    prompts = torch.randint(2, 11, (2, 5), generator=source).repeat(3, 1) * prompt_mask
    completion_mask = (torch.arange(6) < LENGTHS[:, None]).long()
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 11, (6, 6), generator=source) * completion_mask,
        "completion_mask": completion_mask,
        "rewards": torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.25]),
        "log_z": torch.tensor([10.0, 5.0] * 3),
        "weights": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
        "num_trained": torch.tensor(5.0),
    }
    return {**inputs, "old_per_token_logps": -2.0 * completion_mask} if old else inputs


def handed_ids(made: Any) -> list[Tensor]:
    """The ids that each forward pass of the model reads from now on."""
    seen: list[Tensor] = []
    made.model.base_model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    return seen


def loss_and_gradients(made: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    made.model.zero_grad()
    made.current_gradient_accumulation_steps = 1
    loss = made._compute_loss(made.model.train(), inputs)
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in tiny_policy.gradients(made.model).items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("has_tools", [False, True])
def test_shared_prompts_change_no_gradient(tmp_path: Path, old: bool, has_tools: bool) -> None:
    made = tiny_trl.trainer(tmp_path, temperature=0.7)
    assert made.shares_prompts
    seen = handed_ids(made)
    inputs = groups(old=old)
    if has_tools:  # tokens that a tool wrote are read, and not trained on
        inputs["tool_mask"] = torch.ones(6, 6).long()
        inputs["tool_mask"][0, 1:3] = 0
    loss, found = loss_and_gradients(made, inputs)
    made.shares_prompts = False
    expected_loss, expected = loss_and_gradients(made, inputs)
    # Of n tokens n - 1 are read: one prompt of 5 in two rows, 5 + 5 + 0 and 5 + 5, the other in one, 3 + 0 + 4 + 1. Two
    # rows of 15 would have as many tokens and more pairs.
    assert [tuple(ids.shape) for ids in seen] == [(3, 10), (6, 11)]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * scale, msg=name)


def test_scores_come_back_to_their_rows(tmp_path: Path) -> None:
    made = tiny_trl.trainer(tmp_path)
    inputs = groups()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    shown = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        found = made._get_per_token_logps_and_entropies(made.model, ids, shown, 6, compute_entropy=True)
        made.shares_prompts = False
        expected = made._get_per_token_logps_and_entropies(made.model, ids, shown, 6, compute_entropy=True)
    assert bool((expected[0] < -0.1).sum() == LENGTHS.sum())
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rows_that_share_nothing_stay(tmp_path: Path) -> None:
    ids = torch.arange(2, 22).view(2, 10)
    shown = torch.ones(2, 10)
    assert shared_rows(ids, shown, 4, hidden_size=64, dtype=None) is not None  # the last token predicts nothing
    shown[1, 7] = 0  # a hole
    assert shared_rows(ids, shown, 4, hidden_size=64, dtype=None) is None
    alone = torch.ones(2, 2)  # prompts of one token, completions of one: a row of a token each, as many as before
    found = shared_rows(ids[:, :2], alone, 1, hidden_size=64, dtype=None)
    assert found is not None
    assert found.inputs["input_ids"].tolist() == [[2], [12]]


def test_groups_are_dealt_out_together_and_rows_stay_whole() -> None:
    shuffled = torch.tensor([5, 0, 3, 1, 4, 2])  # rows 0 to 2 are of one prompt
    prompts = torch.tensor([[7, 8]] * 3 + [[9, 9]] * 3)
    masks = torch.tensor([[1, 1]] * 3 + [[0, 1]] * 3)
    whole = {"prompt_ids": prompts[shuffled], "prompt_mask": masks[shuffled], "row": shuffled, "nothing": None}
    batches = [
        {name: None if value is None else value[start : start + 3] for name, value in whole.items()}
        | {"items": torch.tensor(12)}
        for start in (0, 3)
    ]
    first, second = regrouped(batches)
    assert first["row"].tolist() == [5, 3, 4]
    assert second["row"].tolist() == [0, 1, 2]
    assert first["prompt_ids"].tolist() == [[9, 9]] * 3
    assert first["items"] == 12
    assert first["nothing"] is None
    with_lists = [{**batch, "images": [1, 2, 3]} for batch in batches]
    assert regrouped(with_lists) is with_lists


@pytest.mark.parametrize("bf16", [False, True])
def test_a_later_step_has_the_old_policys_log_probs(tmp_path: Path, bf16: bool) -> None:
    options = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    made = tiny_trl.trainer(tmp_path, max_steps=1, learning_rate=1e-1, bf16=bf16, **options)
    made.train()
    assert ["old_per_token_logps" in batch for batch in made._buffered_inputs] == [False, False, True, True]
    before = tiny_trl.trainer(tmp_path, max_steps=1, bf16=bf16, **options)
    before.shares_prompts = False  # TRL's order: all are scored when they are sampled
    before.train()
    assert all("old_per_token_logps" in batch for batch in before._buffered_inputs)
    rows = {tuple(ids.tolist()): old for batch in before._buffered_inputs for ids, old in pairs(batch)}
    for batch in made._buffered_inputs[2:]:
        for ids, old in pairs(batch):
            width = len(old)
            torch.testing.assert_close(old, rows[tuple(ids.tolist())][:width], rtol=0, atol=2e-2 if bf16 else 1e-5)


def pairs(batch: dict[str, Tensor]) -> Any:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"] * batch["completion_mask"]], 1)
    return zip(ids, batch["old_per_token_logps"], strict=True)


@pytest.mark.parametrize("iterations", [1, 2])
def test_samples_used_twice_keep_the_log_probs_of_the_first_time(tmp_path: Path, iterations: int) -> None:
    made = tiny_trl.trainer(tmp_path, max_steps=1, num_iterations=iterations)
    made.train()
    assert ["old_per_token_logps" in batch for batch in made._buffered_inputs] == [iterations == 2]


def test_prompts_are_shared_where_attention_takes_the_mask(tmp_path: Path) -> None:
    model = tiny_policy.model()
    model.set_attn_implementation("eager")
    assert not tiny_trl.trainer(tmp_path, model=model).shares_prompts

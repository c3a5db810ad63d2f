"""Packing against one forward pass per sequence: states, gradients, budgets and round trips."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny_policy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paced_fast.data import packing
from paced_fast.data.records import Rollouts, Targets
from paced_fast.paced.losses import POLICY_LOSSES
from paced_fast.paced.targets import group_advantage
from paced_fast.policy.micro_batches import forward_rows, micro_batches

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=9)


def assert_same(first: Rollouts, second: Rollouts) -> None:
    assert first.lengths == second.lengths
    assert first.prompt_ids == second.prompt_ids
    for name in ("token_ids", "cu_seqlens", "prompt_index", "rewards", "generator_logprobs", "policy_version"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_packing_keeps_every_token_in_order() -> None:
    batch = tiny_policy.rollouts([3, 0, 1], rewards=[1.0, 0.0, 0.5])
    assert batch.lengths == (3, 0, 1)
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.num_sequences, batch.num_tokens) == (3, 4)
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5]
    assert batch.policy_version.tolist() == [3, 3, 3]


@pytest.mark.parametrize("max_row_tokens", [1, 9, 14, 4096])
def test_rows_give_the_states_and_gradients_of_separate_sequences(max_row_tokens: int) -> None:
    batch = tiny_policy.rollouts([4, 1, 0, 6, 2, 5, 1, 3], group_size=4)
    packed = tiny_policy.policy(max_tokens=max_row_tokens, dtype=torch.float64)
    separate = tiny_policy.model(dtype=torch.float64)
    factor = torch.randn(batch.num_tokens, 16, dtype=torch.float64)
    states, expected = packed.hidden(batch), tiny_policy.naive_hidden(separate, batch)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    (states * factor).sum().backward()
    (expected * factor).sum().backward()
    wanted = tiny_policy.gradients(separate)
    for name, gradient in tiny_policy.gradients(packed.model).items():
        # Llama normalises in float32 whatever the type of its parameters.
        scale = float(wanted[name].abs().max())
        assert scale > 1e-3 or name == "lm_head.weight", name
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5 * scale, msg=name)


def test_a_group_shares_one_row_and_reads_its_prompt_once() -> None:
    batch = tiny_policy.rollouts([4, 1, 0, 6, 2, 5], group_size=3, prompt_lengths=(3, 5))
    rows = forward_rows(batch, 4096)
    assert rows.input_ids.shape == (2, max(5 + 3 + 0 + 0, 7 + 5 + 1 + 4))
    assert int((rows.input_ids[0] == batch.prompt_ids[0][0]).sum()) >= 1
    assert rows.position_ids[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rows.position_ids[1, :17].tolist() == [*range(7), *range(7, 12), 7, *range(7, 11)]
    mask = rows.attention_mask[1, 0]
    first, second = range(7, 12), [12]
    assert not mask[12, list(first)].any(), "a completion must not see its neighbour"
    assert mask[12, :7].all()
    assert mask[12, second].all()
    assert not mask[3, 4:].any(), "nobody sees what comes later"


def test_sequences_without_tokens_have_no_states_and_a_batch_of_them_works() -> None:
    batch = tiny_policy.rollouts([0, 0])
    assert tiny_policy.policy().hidden(batch).shape == (0, 16)
    assert tiny_policy.policy().logprobs(batch, 1.0).shape == (0,)


@given(LENGTHS, st.integers(1, 3), st.integers(1, 40))
def test_micro_batches_partition_the_sequences_within_the_budget(
    lengths: list[int], group_size: int, max_tokens: int
) -> None:
    batch = tiny_policy.rollouts(lengths, group_size=group_size)
    chosen = list(range(len(lengths)))[::2] or [0]
    batches = micro_batches(batch, chosen, max_tokens)
    assert sorted(i for part in batches for i in part) == chosen
    for part in batches:
        rows = forward_rows(packing.select(batch, part), max_tokens)
        assert rows.input_ids.numel() <= max_tokens or len(part) == 1


def test_micro_batches_are_few_when_the_budget_allows() -> None:
    batch = tiny_policy.rollouts([2] * 8, group_size=2, prompt_lengths=(3,))  # rows of 5 + 1 + 1 tokens
    assert len(micro_batches(batch, range(8), 28)) == 1
    assert len(micro_batches(batch, range(8), 27)) == 2
    assert len(micro_batches(batch, range(8), 7)) == 4


@given(LENGTHS, LENGTHS, st.randoms(use_true_random=False))
def test_select_undoes_concat_and_follows_any_order(first: list[int], second: list[int], random: object) -> None:
    one, two = tiny_policy.rollouts(first, seed=1), tiny_policy.rollouts(second, seed=2)
    both = packing.concat(one, two)
    assert_same(packing.select(both, range(len(first))), one)
    assert_same(packing.select(both, range(len(first), len(first) + len(second))), two)
    order = list(range(len(first) + len(second)))
    random.shuffle(order)  # type: ignore[attr-defined]
    back = [order.index(i) for i in range(len(order))]
    assert_same(packing.select(packing.select(both, order), back), both)


@given(LENGTHS, st.data())
def test_token_positions_are_those_of_the_sequences(lengths: list[int], data: st.DataObject) -> None:
    batch = tiny_policy.rollouts(lengths)
    order = data.draw(st.permutations(range(len(lengths))))
    parts = batch.token_ids.split(lengths)
    wanted = torch.cat([parts[i] for i in order])
    assert torch.equal(batch.token_ids[packing.token_positions(batch, order)], wanted)


def targets(algorithm: str, batch: Rollouts, old: Tensor, ref: Tensor) -> Targets:
    signal = (
        batch.rewards
        if algorithm in ("paced", "tb", "tb_group")
        else group_advantage(batch.rewards, torch.ones_like(batch.rewards, dtype=torch.bool), 4)
    )
    intercept = torch.linspace(0.1, 0.9, batch.num_sequences)
    return Targets(
        signal=signal, intercept=intercept, old_logprobs=old, ref_logprobs=ref, weights=torch.ones_like(signal)
    )


def gradients_of_split(algorithm: str, split: Sequence[Sequence[int]], batch: Rollouts) -> dict[str, Tensor]:
    policy = tiny_policy.policy(dtype=torch.float64)
    config = tiny_policy.settings(algorithm)
    noise = torch.linspace(-0.3, 0.4, batch.num_tokens)
    old = tiny_policy.naive_logprobs(policy.model, batch).detach().float() + noise
    all_targets = targets(algorithm, batch, old, old - 0.2 if algorithm == "flowrl" else old)
    for part in split:
        micro, tokens = packing.select(batch, part), packing.token_positions(batch, part)
        chosen = Targets(
            signal=all_targets.signal[list(part)],
            intercept=all_targets.intercept[list(part)],
            old_logprobs=all_targets.old_logprobs[tokens],
            ref_logprobs=all_targets.ref_logprobs[tokens],
            weights=all_targets.weights[list(part)],
        )
        loss = POLICY_LOSSES[algorithm](policy.hidden(micro), policy, micro, chosen, config, batch.num_sequences).loss
        loss.backward()
    return tiny_policy.gradients(policy.model)


@pytest.mark.parametrize("algorithm", sorted(POLICY_LOSSES))
@settings(max_examples=4)
@given(data=st.data())
def test_any_split_into_micro_batches_gives_the_same_gradient(algorithm: str, data: st.DataObject) -> None:
    batch = tiny_policy.rollouts([3, 0, 2, 1, 4, 1, 2, 2], group_size=4, rewards=[1, 0, 1, 0, 0, 0, 1, 0])
    order = data.draw(st.permutations(range(8)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 7), max_size=4)))
    split = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 8], strict=True)]
    whole, parts = gradients_of_split(algorithm, [range(8)], batch), gradients_of_split(algorithm, split, batch)
    scale = max(float(g.abs().max()) for g in whole.values())
    assert scale > 1e-3
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6 * scale, msg=name)

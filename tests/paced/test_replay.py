"""The ring of correct completions: who enters, who leaves, who is drawn, and what comes out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from paced_fast.config import ReplayConfig
from paced_fast.data import packing
from paced_fast.data.records import Completion, PromptRow, PromptTable, Rollouts
from paced_fast.paced.replay import ReplayBuffer

CPU = torch.device("cpu")
TABLE = PromptTable(
    rows=tuple(
        PromptRow(prompt=str(i), token_ids=(20 + i,) * (1 + i % 3), reward="exact", slice="s", columns={})
        for i in range(40)
    )
)
VALUES = torch.zeros(40)


def buffer(seed: int = 0, **settings: Any) -> ReplayBuffer:
    given = {"capacity": 8, "insert_per_step": 5, "draw_per_step": 4, "max_age": 4} | settings
    return ReplayBuffer(ReplayConfig(**given), max_completion_tokens=6, seed=seed, device=CPU)


def draw(ring: ReplayBuffer, values: torch.Tensor, version: int) -> Rollouts | None:
    return ring.take(*ring.choose(len(values), version).tolist(), TABLE)


def values_of(rollouts: Rollouts, priority: torch.Tensor, accuracy: torch.Tensor) -> torch.Tensor:
    """Values that give each sequence of a prompt of its own this priority."""
    values = torch.zeros(40)
    values[rollouts.prompt_index] = accuracy - priority
    return values


def batch(index: list[int], rewards: list[float], version: int) -> Rollouts:
    """Sequence k of prompt i holds token i, then k, repeated to a length of 1 to 6."""
    completions = [
        Completion(token_ids=[i, *[k] * (k % 6)], logprobs=[-0.1 * i - k] * (1 + k % 6), stopped=True)
        for k, i in enumerate(index)
    ]
    return packing.pack(completions, [TABLE.rows[i].token_ids for i in index], index, rewards, version, CPU)


def insert(ring: ReplayBuffer, index: list[int], version: int, *, accuracy: float = 0.5) -> None:
    count = len(index)
    rollouts = batch(index, [1.0] * count, version)
    ring.insert(rollouts, torch.zeros(40), torch.full((count,), accuracy))


def test_only_correct_completions_enter_those_of_largest_priority_first() -> None:
    ring = buffer(insert_per_step=3)
    rewards = [1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0]
    priority = torch.tensor([0.1, 0.9, 0.4, 0.3, 0.8, 0.2, 0.95])
    rollouts, accuracy = batch([0, 1, 2, 3, 4, 5, 6], rewards, 1), torch.linspace(0, 0.6, 7)
    entered = ring.insert(rollouts, values_of(rollouts, priority, accuracy), accuracy)
    assert entered == ring.inserted == 3
    assert ring.prompt_index[:3].tolist() == [2, 3, 5]
    assert ring.accuracy[:3].tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert ring.policy_version.tolist() == [1, 1, 1, -1, -1, -1, -1, -1]
    assert ring.insert(batch([7, 8], [0.0, 0.4], 2), VALUES, torch.ones(2)) == 0
    assert ring.inserted == 3


def test_the_oldest_leaves_first() -> None:
    ring = buffer()
    insert(ring, [1, 2, 3, 4, 5], 1)
    insert(ring, [6, 7, 8, 9, 10], 2)
    assert ring.prompt_index.tolist() == [9, 10, 3, 4, 5, 6, 7, 8]
    assert ring.policy_version.tolist() == [2, 2, 1, 1, 1, 2, 2, 2]
    insert(ring, [11], 3)
    assert ring.prompt_index.tolist() == [9, 10, 11, 4, 5, 6, 7, 8]
    small = buffer(capacity=3, insert_per_step=5)
    insert(small, [1, 2, 3, 4, 5], 1)
    assert sorted(small.prompt_index.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("max_age", [1, 2])
def test_age_counts_steps_since_sampling(max_age: int) -> None:
    ring = buffer(max_age=max_age)
    insert(ring, [1, 2], 10)
    assert draw(ring, VALUES, 10 + max_age) is not None
    assert draw(ring, VALUES, 10 + max_age + 1) is None
    insert(ring, [3], 10 + max_age)
    drawn = draw(ring, VALUES, 10 + max_age + 1)
    assert drawn is not None
    assert drawn.prompt_index.tolist() == [3]


def test_an_empty_ring_draws_nothing() -> None:
    assert draw(buffer(), VALUES, 1) is None


def test_priorities_use_the_values_of_now() -> None:
    ring = buffer()
    insert(ring, [1, 2], 1, accuracy=0.75)
    insert(ring, [3], 1, accuracy=0.25)
    values = torch.zeros(40)
    values[[1, 2, 3]] = torch.tensor([0.75, 0.25, 0.5])
    assert ring.priorities(values).tolist() == pytest.approx([0.0, 0.5, 0.25, 0, 0, 0, 0, 0])
    assert ring.priorities(values + 0.25).tolist() == pytest.approx([0.25, 0.25, 0.5, 0, 0, 0, 0, 0])


def test_every_prompt_is_as_likely_to_be_drawn_as_it_has_completions() -> None:
    """Prompts 1 to 5 with one completion each, prompt 6 with three; one is drawn at a time."""
    draws = 2000
    ring = buffer(capacity=12, insert_per_step=9, draw_per_step=1)
    insert(ring, [1, 2, 3, 4, 5, 6, 6, 6], 0)
    ring.policy_version[:8] = 1_000_000  # always young
    seen = torch.zeros(40)
    for step in range(1, draws + 1):
        drawn = draw(ring, VALUES, step)
        assert drawn is not None
        seen[drawn.prompt_index] += 1
    share = torch.tensor([1.0, 1, 1, 1, 1, 3]) / 8
    z = (seen[1:7] - draws * share) / (draws * share * (1 - share)).sqrt()
    assert float(seen.sum()) == float(seen[1:7].sum()) == draws
    assert float(z.abs().max()) < 4.5


def test_the_completions_of_a_prompt_are_drawn_together() -> None:
    """Five of 24 slots, whose prompts are mixed: all of one prompt, then two of another."""
    ring = buffer(capacity=24, insert_per_step=24, draw_per_step=5)
    insert(ring, [k % 8 for k in range(24)], 1)
    orders = set()
    for version in (2, 3, 4, 5):
        drawn = draw(ring, VALUES, version)
        assert drawn is not None
        first, second = drawn.prompt_index[0].item(), drawn.prompt_index[3].item()
        assert drawn.prompt_index.tolist() == [first] * 3 + [second] * 2
        assert first != second
        orders.add((first, second))
    assert len(orders) > 1


def test_a_draw_is_distinct_and_packed_like_the_original() -> None:
    ring = buffer(capacity=20, insert_per_step=20, draw_per_step=9)
    source = batch(list(range(10)), [1.0] * 10, 2)
    ring.insert(source, VALUES, torch.full((10,), 0.5))
    insert(ring, [11, 12], 4)
    for version in (3, 4, 5, 6):
        drawn = draw(ring, VALUES, version)
        assert drawn is not None
        assert drawn.num_sequences == 9
        index = drawn.prompt_index.tolist()
        assert len(set(index)) == 9
        assert drawn.cu_seqlens.tolist() == [0, *torch.tensor(drawn.lengths).cumsum(0).tolist()]
        assert drawn.cu_seqlens.dtype == torch.int32
        assert drawn.num_tokens == len(drawn.token_ids) == len(drawn.generator_logprobs)
        assert drawn.prompt_ids == tuple(TABLE.rows[i].token_ids for i in index)
        assert drawn.rewards.tolist() == [1.0] * 9
        for k, i in enumerate(index):
            if i < 10:
                one, other = packing.select(drawn, [k]), packing.select(source, [i])
                assert torch.equal(one.token_ids, other.token_ids)
                assert torch.equal(one.generator_logprobs, other.generator_logprobs)
                assert one.policy_version.tolist() == [2]


def test_no_more_is_drawn_than_there_is() -> None:
    ring = buffer(draw_per_step=7)
    insert(ring, [1, 2, 3], 1)
    drawn = draw(ring, VALUES, 2)
    assert drawn is not None
    assert sorted(drawn.prompt_index.tolist()) == [1, 2, 3]


def test_a_shorter_completion_in_a_used_slot_brings_no_old_tokens() -> None:
    ring = buffer(capacity=1, insert_per_step=1, draw_per_step=1)
    long = batch([1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1.0], 1)  # six tokens
    ring.insert(long, VALUES, torch.ones(6))
    ring.insert(batch([3], [1.0], 1), VALUES, torch.ones(1))  # one token
    drawn = draw(ring, VALUES, 2)
    assert drawn is not None
    assert drawn.token_ids.tolist() == [3]


def test_the_state_restores_the_next_draws() -> None:
    one = buffer()
    values = torch.rand(40)
    for version in (1, 2, 3):
        insert(one, [version, version + 5, version + 9], version)
        draw(one, values, version + 1)
    two = buffer()
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    two.load_state_dict(state)
    for version in (4, 5):
        first, second = draw(one, values, version), draw(two, values, version)
        assert first is not None
        assert second is not None
        assert first.prompt_index.tolist() == second.prompt_index.tolist()
        assert torch.equal(first.token_ids, second.token_ids)
        for ring in (one, two):
            insert(ring, [20 + version], version)
    assert one.inserted == two.inserted == 11
    for name, tensor in two.state_dict().items():
        assert torch.equal(tensor, one.state_dict()[name]), name


def test_draws_depend_on_seed_and_step() -> None:
    rings = [buffer(seed=seed, capacity=30, insert_per_step=30, draw_per_step=5) for seed in (0, 0, 1)]
    for ring in rings:
        insert(ring, list(range(1, 25)), 1)
    draw(rings[0], VALUES, 2)  # a draw more than the other has made
    drawn = [draw(ring, VALUES, 3) for ring in rings]
    first, second, third = (d.prompt_index.tolist() for d in drawn if d is not None)
    assert first == second != third
    assert math.comb(24, 5) > 10_000

"""Embeddings of prompts that share prefixes and repeat, against one plain pass for each prompt alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models import tiny_types
from paced_fast.policy import Policy
from paced_fast.policy.attention import PADDED
from paced_fast.policy.families import head_states
from paced_fast.policy.prefixes import PASSES_TOKENS, Behind, by_prefix

Prompt = tuple[int, ...]


def prompts_behind(prefix: Prompt, count: int, tokens: range, *, seed: int = 0) -> list[Prompt]:
    """Prompts of 1 to 9 tokens of `tokens` behind the prefix."""
    source = random.Random(seed)
    return [(*prefix, *source.choices(tokens, k=1 + (i + 1) % 9)) for i in range(count)]


def alone(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Tensor:
    """Mean and last state f32[N, 2H], a pass for each prompt."""
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            states = head_states(model, torch.tensor([prompt]))[0].float()
        rows.append(torch.cat([states.mean(0), states[-1]]))
    return torch.stack(rows)


def counted_tokens(policy: Policy, prompts: Sequence[Prompt]) -> int:
    """Tokens that the model reads while `prompts` are embedded, padding included."""
    read: list[int] = []
    hook = policy.body.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    policy.embed(prompts)
    hook.remove()
    return sum(read)


PREFIX = (3, 9, 3, 3, 7, 2, 10, 4, 4, 8, 6, 5, 1, 2)  # longer than the windows of the families
SHARED = prompts_behind(PREFIX, 14, range(2, 11))
CASES: dict[str, list[Prompt]] = {
    "prefix": SHARED,
    "and the prefix itself": [*SHARED, PREFIX],
    "another prefix": [*SHARED, *prompts_behind((5, *PREFIX), 13, range(2, 11), seed=1), (9,), (4, 4)],
    "nothing in common": [(9,), (8, 8), *prompts_behind((), 20, range(2, 11))],
    "twice": [*SHARED, *SHARED[:4], (9,), (9,)],
    "one": [PREFIX],
}


@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_embeddings_are_those_of_each_prompt_alone(family: str, case: str, max_tokens: int) -> None:
    policy, prompts = Policy(tiny_families.model(family), max_tokens=max_tokens), CASES[case]
    wanted = alone(policy.model, prompts)
    assert len(prompts) == 1 or float(wanted[:, 16:].std(0).mean()) > 0.1, "alike states would hide mistakes"
    torch.testing.assert_close(policy.embed(prompts, with_last=True), wanted, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(policy.embed(prompts), wanted[:, :16], rtol=1e-4, atol=2e-5)


def test_a_prefix_and_a_repeated_prompt_are_computed_once() -> None:
    policy = Policy(tiny_families.model("llama"), max_tokens=4096)
    rests = sum(len(prompt) - len(PREFIX) for prompt in dict.fromkeys(SHARED))
    assert len(set(SHARED)) == len(SHARED)
    assert counted_tokens(policy, SHARED) == len(PREFIX) + rests
    assert counted_tokens(policy, CASES["and the prefix itself"]) == len(PREFIX) + rests
    assert counted_tokens(policy, CASES["twice"]) == len(PREFIX) + rests + 1
    few = prompts_behind((), 5, range(2, 11))
    assert counted_tokens(policy, few) == sum(map(len, few)), "no padding"


def test_a_pass_holds_no_more_keys_than_rows_of_whole_prompts_would() -> None:
    policy = Policy(tiny_families.model("llama"), max_tokens=70)
    rows: list[int] = []
    inner = policy._packed

    def noted(row: Any, kernel: Any, masks: Any) -> Tensor:
        before = int(row.position_ids[0, 0])
        rows.append(len(row.lengths) * (before + max(row.lengths)))
        return inner(row, kernel, masks)

    policy._packed = noted
    policy.embed(SHARED)
    assert len(rows) > 2
    assert max(rows) <= 70


def test_bfloat16_is_as_near_to_float32_as_plain_passes_are() -> None:
    exact = tiny_families.model("qwen2").to(torch.bfloat16)
    plain = alone(exact, SHARED)
    found = Policy(exact, max_tokens=4096).embed(SHARED, with_last=True)
    wanted = alone(exact.float(), SHARED)
    allowed = 2 * (plain - wanted).abs().mean() + 1e-3
    assert float((plain - wanted).abs().max()) > 1e-3, "rounding shows"
    assert (found - wanted).abs().mean() <= allowed
    assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max()


TYPES: dict[str, dict[str, Any]] = {
    "gpt2": {},  # learned positions
    "opt": {"word_embed_proj_dim": 16},  # states of another width than the layers
    "gemma3": {},  # text settings inside those of images, windows in some layers
    "deepseek_v3": {},  # keys and values of different sizes
    "mixtral": {},  # experts
    "gemma2": {},  # capped scores: padded from here on
    "gpt_oss": {},  # attention sinks
    "llama4": {},  # chunks
    "lfm2": {},  # convolutions
    "mamba2": {},  # states
    "recurrent_gemma": {},  # a cache inside the model
    "roberta": {},  # positions counted by tokens of padding
}
TYPED = prompts_behind((7, 30, 9, 9, 41, 12, 5, 6, 20, 33), 16, range(3, 40))


def compare(name: str, changes: dict[str, Any]) -> None:
    model = tiny_types.tiny_model(name, **changes)
    wanted = alone(model, TYPED)
    found = Policy(model, max_tokens=400).embed(TYPED, with_last=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", TYPES)
def test_types_with_and_without_shared_rows_agree(name: str) -> None:
    compare(name, TYPES[name])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_type_that_can_be_a_policy_agrees() -> None:
    compared = 0
    for name in tiny_types.TYPES:
        try:
            model = tiny_types.tiny_model(name)
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
            Policy(model, max_tokens=400)
        except Exception:  # refused, or not built here: the sweep of test_model_types says which and why
            continue
        compare(name, {})
        compared += 1
    assert compared >= 150


def saved(prompts: Collection[Prompt], prefixes: Collection[Prompt], passes_tokens: int) -> int:
    """Tokens that need not be computed when each prefix is shared by all that begin with it."""
    shares = [sum(prompt[: len(prefix)] == prefix for prompt in prompts) for prefix in prefixes]
    return sum((n - 1) * len(prefix) - passes_tokens for n, prefix in zip(shares, prefixes, strict=True))


@pytest.mark.parametrize("passes_tokens", [0, 1, 3, 6])
def test_no_other_prefixes_save_more(passes_tokens: int) -> None:
    several = 0
    for seed in range(100):
        source = random.Random(seed)
        stems = [tuple(source.choices(range(2), k=source.randint(0, 4))) for _ in range(3)]
        drawn = {(*source.choice(stems), *source.choices(range(2), k=source.randint(1, 3))) for _ in range(8)}
        found = by_prefix(drawn, passes_tokens=passes_tokens)
        assert sorted(prompt for one in found for prompt in one.prompts) == sorted(drawn)
        chosen = [one.prefix for one in found if one.prefix]
        for one in found:
            wanted = {prompt for prompt in drawn if prompt[: len(one.prefix)] == one.prefix}
            assert set(one.prompts) == (wanted if one.prefix else drawn - {p for o in found[:-1] for p in o.prompts})
        candidates = {one[:k] for one in drawn for k in range(1, len(one) + 1)}
        most = max(
            saved(drawn, prefixes, passes_tokens)
            for count in range(4)
            for prefixes in itertools.combinations(sorted(candidates), count)
            if not any(b[: len(a)] == a for a, b in itertools.permutations(prefixes, 2))
        )
        assert len(chosen) > 3 or saved(drawn, chosen, passes_tokens) == most
        several += 1 < len(chosen) <= 3
    assert several > 20 or passes_tokens > 1


def test_a_prefix_that_saves_little_is_left_out() -> None:
    def prompts(tokens: int, count: int) -> list[Prompt]:
        return [(*range(100, 100 + tokens), i) for i in range(count)]

    assert PASSES_TOKENS == 128
    assert by_prefix(prompts(32, 5)) == [Behind(prefix=(), prompts=prompts(32, 5))], "4 x 32 are not more"
    assert by_prefix(prompts(33, 5)) == [Behind(prefix=tuple(range(100, 133)), prompts=prompts(33, 5))]
    assert by_prefix([]) == []


def test_each_prompt_may_continue_the_one_before() -> None:
    """More of them than Python lets a function call itself."""
    (one,) = by_prefix([(0,) * n for n in range(1, 1500)], passes_tokens=10**7)
    assert one.prefix == ()
    found = by_prefix([(0,) * n for n in range(1, 1500)], passes_tokens=10**5)
    assert [len(one.prefix) for one in found] == [750, 0]


def test_padded_is_asked_for_and_gives_the_same() -> None:
    model = tiny_families.model("llama")
    wanted = alone(model, SHARED)
    found = Policy(model, max_tokens=100, attention=PADDED).embed([*SHARED, SHARED[2]], with_last=True)
    torch.testing.assert_close(found, torch.cat([wanted, wanted[2:3]]), rtol=1e-4, atol=2e-5)

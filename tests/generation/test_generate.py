"""Sampling: log-probs, padding, stops, compaction and the distribution itself, against the plain model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_policy
import torch

from paced_fast.data import packing
from paced_fast.data.distributed import ALONE
from paced_fast.data.records import Completion
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.generation.over_ranks import SharedGenerator
from paced_fast.generation.reading import PaddedReader, Reading
from paced_fast.generation.transformers_generator import _Batch, _sample

PROMPTS = [(3, 4, 5, 6, 7), (2,), (9, 8, 7), (5, 5, 4), (10, 9)]


def sample(made: Any, prompts: list[tuple[int, ...]], **options: Any) -> list[Completion]:
    settings: dict[str, Any] = {"samples": 4, "max_completion_tokens": 12, "temperature": 1.0, "seed": 7} | options
    stops, most = settings.pop("stop_ids", [tiny_policy.STOP]), settings.pop("max_batch_sequences", 256)
    return TransformersGenerator(made, stop_ids=stops, max_batch_sequences=most).generate(prompts, Sampling(**settings))


def as_lists(completions: list[Completion]) -> list[tuple[list[int], bool]]:
    return [(c.token_ids, c.stopped) for c in completions]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_logprobs_are_those_of_a_full_forward_pass(temperature: float) -> None:
    made = tiny_policy.model()
    completions = sample(made, PROMPTS, temperature=temperature)
    ids = [prompt for prompt in PROMPTS for _ in range(4)]
    batch = packing.pack(completions, ids, [0] * 20, [0.0] * 20, 0, tiny_policy.CPU)
    assert len(set(batch.lengths)) > 3
    wanted = tiny_policy.naive_logprobs(made, batch, temperature).detach()
    torch.testing.assert_close(batch.generator_logprobs, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop_ids", [[1], [1, 4, 7]])
def test_sequences_end_with_their_first_stop_token_or_are_cut(stop_ids: list[int]) -> None:
    completions = sample(tiny_policy.model(), PROMPTS, stop_ids=stop_ids, samples=20, max_completion_tokens=9)
    ended = [c for c in completions if c.stopped]
    cut = [c for c in completions if not c.stopped]
    assert len(ended) > 5
    assert len(cut) > 5
    for c in completions:
        assert len(c.token_ids) == len(c.logprobs) >= 1
        assert not set(c.token_ids[:-1]) & set(stop_ids)
    assert all(c.token_ids[-1] in stop_ids for c in ended)
    assert all(len(c.token_ids) == 9 and c.token_ids[-1] not in stop_ids for c in cut)


def test_a_stop_in_the_last_place_counts_as_stopped() -> None:
    completions = sample(tiny_policy.model(), PROMPTS, samples=60, max_completion_tokens=1)
    stopped = [c.token_ids == [tiny_policy.STOP] for c in completions]
    assert 0 < sum(stopped) < len(stopped)
    assert [c.stopped for c in completions] == stopped


def test_padding_changes_nothing() -> None:
    made, stop = tiny_policy.model(), torch.tensor([tiny_policy.STOP])
    uniforms = torch.rand(len(PROMPTS), 3, 10, dtype=torch.float64)
    rest = (Sampling(samples=3, max_completion_tokens=10, temperature=1.0), stop, Reading("padded"))
    together = _Batch(made, PROMPTS, uniforms, *rest)
    assert together.padded
    with torch.inference_mode():
        batched = together.run()
        for i, prompt in enumerate(PROMPTS):
            alone = _Batch(made, [prompt], uniforms[i : i + 1], *rest).run()
            group = batched[3 * i : 3 * i + 3]
            assert as_lists(alone) == as_lists(group)
            for one, other in zip(alone, group, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_leaving_the_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_policy.model()
    compactions: list[int] = []
    keep = PaddedReader.keep

    def counted(self: PaddedReader, rows: torch.Tensor) -> None:
        compactions.append(len(rows))
        keep(self, rows)

    monkeypatch.setattr(PaddedReader, "keep", counted)
    whole = sample(made, PROMPTS, samples=6, max_completion_tokens=30, stop_ids=[1, 4])
    assert len(compactions) > 1
    compacted, one_by_one = (
        len(compactions),
        sample(made, PROMPTS, samples=6, max_completion_tokens=30, stop_ids=[1, 4], max_batch_sequences=6),
    )
    assert len(compactions) > compacted
    uniforms = torch.rand((5, 6, 30), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    naive = [
        _naive(made, prompt, uniforms[i, k].tolist(), {1, 4}) for i, prompt in enumerate(PROMPTS) for k in range(6)
    ]
    assert [c.token_ids for c in whole] == naive
    assert as_lists(one_by_one) == as_lists(whole)


def _naive(made: Any, prompt: tuple[int, ...], uniforms: list[float], stops: set[int]) -> list[int]:
    """One sequence without cache, padding or batch, by inversion of the cumulative distribution."""
    ids: list[int] = []
    for uniform in uniforms:
        with torch.no_grad():
            logits = made(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1]
        cumulative = logits.log_softmax(-1).double().exp().cumsum(0)
        ids.append(int((cumulative <= uniform * cumulative[-1]).sum()))
        if ids[-1] in stops:
            break
    return ids


def test_the_seed_decides_the_tokens() -> None:
    made = tiny_policy.model()
    first, again, other = (as_lists(sample(made, PROMPTS, seed=seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    torch.manual_seed(1)
    assert as_lists(sample(made, PROMPTS)) == first, "the ambient generator has no part in it"


def test_progress_is_called_per_token_position_through_every_wrapper() -> None:
    generator = TransformersGenerator(tiny_policy.model(), stop_ids=[tiny_policy.STOP], max_batch_sequences=256)
    shared, calls = SharedGenerator(generator, ALONE), []
    shared.progress = lambda: calls.append(1)
    found = shared.generate(PROMPTS, Sampling(samples=4, max_completion_tokens=12, temperature=1.0, seed=7))
    assert len(calls) == max(len(completion.token_ids) for completion in found) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_follow_the_distribution(temperature: float) -> None:
    """Chi-square over all pairs of first and second token, against exact probabilities."""
    made, prompt, draws = tiny_policy.model(sharpness=4.0), (3, 4), 20_000
    completions = sample(
        made, [prompt], samples=draws, max_completion_tokens=2, temperature=temperature, max_batch_sequences=draws
    )
    with torch.no_grad():
        first = (made(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        seconds = [
            (made(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1] / temperature).softmax(-1)
            for token in range(tiny_policy.VOCAB)
        ]
    expected = {
        (a,) if a == tiny_policy.STOP else (a, b): float(first[a] * (1.0 if a == tiny_policy.STOP else seconds[a][b]))
        for a in range(tiny_policy.VOCAB)
        for b in range(tiny_policy.VOCAB)
    }
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-5)
    counts = dict.fromkeys(expected, 0)
    for c in completions:
        counts[tuple(c.token_ids)] += 1
    large = [key for key, probability in expected.items() if probability * draws >= 5]
    assert len(large) > 10
    statistic = sum((counts[k] - draws * expected[k]) ** 2 / (draws * expected[k]) for k in large)
    degrees = len(large) - 1
    assert abs(statistic - degrees) < 4.5 * math.sqrt(2 * degrees)


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(4, 1)
    token, logprob = _sample(logits, torch.tensor([0.0, 0.4999, 0.5, 1 - 2.0**-53], dtype=torch.float64), 1.0)
    assert token.tolist() == [1, 1, 3, 3]
    assert logprob.tolist() == pytest.approx([-math.log(2)] * 4)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_a_token_is_where_the_distribution_passes_the_number_whatever_the_size_of_the_vocabulary(
    vocabulary: int,
) -> None:
    source = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(200, vocabulary, generator=source)
    if vocabulary > 1:
        logits[:, ::3] = -math.inf  # the first token, and ends of blocks
    before = logits.clone()
    uniforms = torch.rand(200, generator=source, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    token, logprob = _sample(logits, uniforms, 1.0)
    assert torch.equal(logits, before)
    mass = logits.double().softmax(-1)
    after = mass.cumsum(-1).gather(1, token[:, None])[:, 0]
    own = mass.gather(1, token[:, None])[:, 0]
    assert bool((own > 0).all())
    assert bool((uniforms < after + 1e-6).all())
    assert bool((uniforms >= after - own - 1e-6).all())
    torch.testing.assert_close(logprob.double(), own.log(), rtol=1e-5, atol=1e-5)


def test_the_order_of_the_result_is_the_callers() -> None:
    """Prompts are sorted by length inside; each completion must still belong to its own prompt."""
    made = tiny_policy.model()
    completions = sample(made, PROMPTS, temperature=1e-3, samples=2)  # so cold that sampling is the argmax
    for i, prompt in enumerate(PROMPTS):
        greedy = _naive(made, prompt, [], set())
        with torch.no_grad():
            while len(greedy) < 12 and greedy[-1:] != [tiny_policy.STOP]:
                greedy.append(int(made(input_ids=torch.tensor([[*prompt, *greedy]])).logits[0, -1].argmax()))
        assert completions[2 * i].token_ids == completions[2 * i + 1].token_ids == greedy


def test_a_group_larger_than_the_batch_is_sampled_in_parts() -> None:
    made = tiny_policy.model()
    whole = sample(made, PROMPTS, samples=7, max_batch_sequences=64)
    for most in (1, 3, 7, 8):
        assert as_lists(sample(made, PROMPTS, samples=7, max_batch_sequences=most)) == as_lists(whole)


def test_a_nucleus_holds_the_likeliest_tokens_and_no_others() -> None:
    """Masses 0.4, 0.3, 0.2, 0.1, not in order of id: 0.65 of them needs two tokens, 0.7 + a little three."""
    mass = torch.tensor([0.1, 0.4, 0.2, 0.3])
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for top_p, kept in ((0.05, [1]), (0.65, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        token, logprob = _sample(mass.log().repeat(1000, 1), uniforms, 1.0, top_p)
        wanted = torch.zeros(4)
        wanted[kept] = mass[kept] / mass[kept].sum()
        torch.testing.assert_close(token.bincount(minlength=4) / 1000, wanted, atol=2e-3, rtol=0)
        torch.testing.assert_close(logprob.exp(), wanted[token])


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_temperature_zero_takes_the_likeliest_token(top_p: float) -> None:
    made = tiny_policy.model()
    cold = sample(made, PROMPTS, temperature=1e-3, samples=2)
    found = sample(made, PROMPTS, temperature=0.0, top_p=top_p, samples=2)
    assert as_lists(found) == as_lists(cold)
    assert all(math.isfinite(value) for c in found for value in c.logprobs)


def test_the_nucleus_is_that_of_the_tempered_distribution() -> None:
    """At temperature 1 the first of two tokens holds 0.6, at a half 0.36 / (0.36 + 0.16) = 0.69: enough for 0.65."""
    logits = torch.tensor([[0.6, 0.4]]).log().repeat(2, 1)
    late = torch.tensor([0.5, 0.99], dtype=torch.float64)
    assert _sample(logits, late, 1.0, 0.65)[0].tolist() == [0, 1]
    assert _sample(logits, late, 0.5, 0.65)[0].tolist() == [0, 0]

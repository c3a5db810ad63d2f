"""Compare the policy's and the sampler's log-probs with the model's own, for each sequence alone.

T = packed completion tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.data import packing
from paced_fast.data.records import Completion, Rollouts
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.policy import SHARED, Attention, Policy, choose_attention
from paced_fast.policy import policy as policy_module
from paced_fast.policy.shape import text_settings

LENGTHS = (4, 1, 6, 2, 5, 9)
PROMPTS = (3, 8, 1)
LAYOUTS = ("masked", "blocks", "packed-sdpa", "padded")


def rollouts(vocabulary: range, *, seed: int = 0) -> Rollouts:
    """Return completions of different lengths, two for each of three prompts of different lengths."""
    source = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return (torch.randint(len(vocabulary), (count,), generator=source) + vocabulary.start).tolist()

    prompts = [tuple(ids(n)) for n in PROMPTS]
    index = [i // 2 for i in range(len(LENGTHS))]
    completions = [Completion(token_ids=ids(n), logprobs=[0.0] * n, stopped=True) for n in LENGTHS]
    return packing.pack(completions, [prompts[i] for i in index], index, [0.0] * len(index), 0, torch.device("cpu"))


def own_logprobs(model: PreTrainedModel, batch: Rollouts) -> Tensor:
    """Return log-probs [T] from one full pass per sequence, without cache, padding or mask; differentiable."""
    parts = []
    for prompt, tokens in zip(batch.prompt_ids, batch.token_ids.split(batch.lengths), strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return torch.cat(parts)


@contextlib.contextmanager
def policy_of(model: PreTrainedModel, layout: str, max_tokens: int = 40) -> Iterator[Policy]:
    """Yield a policy that runs the model in this layout; on a CPU the row length decides between mask and blocks."""
    with mock.patch.object(policy_module, "MASKED_ROW", 10**6 if layout == "masked" else 0):
        chosen: Attention = SHARED if layout in ("masked", "blocks") else choose_attention(layout, model)
        yield Policy(model, max_tokens=max_tokens, attention=chosen)


def sampling_error(model: PreTrainedModel, vocabulary: range, *, temperature: float = 1.0, tokens: int = 7) -> float:
    """Return the largest difference between the log-probs returned with sampled tokens and those of a full pass.

    Infinite if a sequence depends on the order of the batch, or a greedy sequence differs from that of transformers.
    """
    prompts = list(dict.fromkeys(rollouts(vocabulary, seed=1).prompt_ids))
    generator = TransformersGenerator(model, stop_ids=[vocabulary.start], max_batch_sequences=16)
    sampling = Sampling(samples=2, max_completion_tokens=tokens, temperature=temperature, seed=3)
    sampled = generator.generate(prompts, sampling)
    whole = [prompts[i // 2] for i in range(len(sampled))]
    batch = packing.pack(sampled, whole, [0] * len(whole), [0.0] * len(whole), 0, torch.device("cpu"))
    with torch.no_grad():
        error = float((own_logprobs(model, batch) - batch.generator_logprobs).abs().max())
    likeliest = dataclasses.replace(sampling, temperature=0.0)
    greedy = generator.generate(prompts, likeliest)
    swapped = generator.generate(prompts[::-1], likeliest)
    order = [4, 5, 2, 3, 0, 1]
    if [greedy[i].token_ids for i in order] != [one.token_ids for one in swapped]:
        return float("inf")
    for prompt, one in zip(prompts, greedy[::2], strict=True):
        if one.token_ids != _greedy(model, prompt, len(one.token_ids)):
            return float("inf")
    return error


def _greedy(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """Return the most likely tokens, each from a full pass."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether some layers carry a recurrent state instead of keys and values."""
    settings = text_settings(model.config)
    kinds = getattr(settings, "layer_types", None) or ()
    named = any("linear" in kind or "mamba" in kind or "hybrid" in kind for kind in kinds)
    return named or bool(getattr(model, "_is_stateful", False))

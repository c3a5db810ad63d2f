"""Sampling completions: token ids in, token ids and their log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from paced_fast.batch import Completion


class Generator(Protocol):
    """What the trainer asks of an engine. Completions come prompt by prompt, `group_size` of each in a row."""

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Completion]:
        """Sample `group_size` completions of each prompt; the same seed and weights give the same tokens."""
        ...


class TransformersGenerator:
    """Batched sampling with a key-value cache on the trainer's own model, so there are no weights to push.

    A prompt is read once and its cache repeated for the group. Every sequence owns its uniform random numbers, so what
    it samples does not depend on its neighbours in the batch. Sequences that ended leave the batch when half have.
    """

    def __init__(self, model: PreTrainedModel, *, stop_ids: Sequence[int], max_batch_sequences: int) -> None:
        """Sample from `model`; `stop_ids` end a completion and belong to it."""
        self.model = model
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=model.device)
        self.max_batch_sequences = max_batch_sequences

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        source = torch.Generator().manual_seed(seed)
        shape = (len(prompts), group_size, max_completion_tokens)
        uniforms = torch.rand(shape, generator=source, dtype=torch.float64).to(self.model.device)
        per_call = max(1, self.max_batch_sequences // group_size)
        # Prompts of similar length go together: less padding. The order of the result is the caller's.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(order), per_call):
            chosen = order[start : start + per_call]
            batch = _Batch(self.model, [prompts[i] for i in chosen], uniforms[chosen], temperature, self.stop_ids)
            completions = batch.run()
            for k, i in enumerate(chosen):
                result[i] = completions[k * group_size : (k + 1) * group_size]
        return [completion for group in result for completion in group]


class _Batch:
    """One batch on its way through the model. S = sequences, L = padded prompt length."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        uniforms: Tensor,  # f64[P, G, max_completion_tokens]
        temperature: float,
        stop_ids: Tensor,
    ) -> None:
        self.model, self.temperature, self.stop_ids = model, temperature, stop_ids
        self.group_size = uniforms.shape[1]
        self.uniforms = uniforms.flatten(0, 1)
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self.prompt_ids, self.prompt_mask = ids.to(model.device), mask.to(model.device)
        self.padded = any(len(prompt) != longest for prompt in prompts)

    def run(self) -> list[Completion]:
        """Sample until every sequence has stopped or is full."""
        num_sequences, max_tokens = self.uniforms.shape
        device = self.uniforms.device
        tokens = torch.zeros(num_sequences, max_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num_sequences, max_tokens, dtype=torch.float32, device=device)
        lengths = torch.full((num_sequences,), max_tokens, dtype=torch.int64, device=device)
        stopped = torch.zeros(num_sequences, dtype=torch.bool, device=device)
        logits, cache, mask, positions = self._read_prompts()
        live = torch.arange(num_sequences, device=device)  # sequence of each row of the batch
        for t in range(max_tokens):
            token, logprob = _sample(logits, self.uniforms[live, t], self.temperature)
            running = ~stopped[live]
            tokens[live, t] = token
            logprobs[live, t] = logprob
            ends = running & torch.isin(token, self.stop_ids)
            lengths[live[ends]] = t + 1
            stopped[live[ends]] = True
            running &= ~ends
            num_running = int(running.sum())
            if num_running == 0 or t + 1 == max_tokens:
                break
            if num_running <= len(live) // 2:
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, token, positions = live[keep], token[keep], positions[keep]
                mask = None if mask is None else mask[keep]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self._forward(token[:, None], mask, positions[:, None] + t, cache)
        return _completions(tokens, logprobs, lengths, stopped)

    def _read_prompts(self) -> tuple[Tensor, DynamicCache, Tensor | None, Tensor]:
        """Logits [S, V] of the first token, the cache repeated for each group, mask [S, L] and next position [S]."""
        cache = DynamicCache(config=self.model.config)
        mask = self.prompt_mask if self.padded else None
        lengths = self.prompt_mask.sum(1)
        positions = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(self.prompt_ids, mask, positions, cache)
        repeats = self.group_size
        cache.batch_repeat_interleave(repeats)
        mask = None if mask is None else mask.repeat_interleave(repeats, 0)
        return logits.repeat_interleave(repeats, 0), cache, mask, lengths.repeat_interleave(repeats, 0)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def _sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token i64[S] by inversion of the cumulative distribution at `uniform` f64[S], and its log-prob f32[S]."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    # In float64 the cumulative sum resolves every token that float32 log-probs can tell from zero.
    cdf = logprobs.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _completions(tokens: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor) -> list[Completion]:
    """The batch as host records; the one copy from the device."""
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
    return [
        Completion(token_ids=ids[:length], logprobs=values[:length], stopped=done) for ids, values, length, done in rows
    ]

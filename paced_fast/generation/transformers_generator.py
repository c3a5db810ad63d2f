"""Sampling from the trainer's own model through transformers, in batches with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.data.distributed import Queue
from paced_fast.data.records import Completion
from paced_fast.generation.interface import Sampling
from paced_fast.generation.packed_products import packed_products
from paced_fast.generation.reading import Reading, reading_of
from paced_fast.policy.families import check_length, refuse
from paced_fast.policy.shape import positions, text_settings

_BLOCK = 256
"""Tokens of a block of the vocabulary, when a token is looked for in the cumulative distribution."""


class TransformersGenerator:
    """Batched sampling with a key-value cache on the trainer's own model, so there are no weights to push.

    A prompt is read once and its cache repeated for the group. Every sequence owns its uniform random numbers, so what
    it samples does not depend on its neighbours in the batch. Finished sequences leave the batch when half have
    finished. On a CPU a call holds a copy of the weights (`packed_products`). A model that is not exact with a cache or
    with padding is decoded as `Reading` says.
    """

    def __init__(self, model: PreTrainedModel, *, stop_ids: Sequence[int], max_batch_sequences: int) -> None:
        """Sample from `model`; a completion ends with the first of `stop_ids`, inclusive. Raises InputError for a model
        that has no log-probs of completions."""
        refuse(model.config)
        self.model = model
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=model.device)
        self.max_batch_sequences = max_batch_sequences
        self.limit = positions(text_settings(model.config))
        self.progress: Callable[[], object] = lambda: None
        self._reading: Reading | None = None

    def generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0) -> list[Completion]:
        """See `Generator.generate`. Raises InputError for a prompt that leaves no room for a completion."""
        found = self.generate_taken(Queue(), prompts, sampling, first=first)
        return [completion for i in range(len(prompts)) for completion in found[i]]

    @torch.inference_mode()
    def generate_taken(
        self, queue: Queue, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0
    ) -> dict[int, list[Completion]]:
        """See `Generator.generate_taken`. Which prompts make a batch depends on their lengths and the number of ranks
        only, so that a completion is the same to the bit whichever rank samples it.

        Raises InputError for a prompt that leaves no room for a completion.
        """
        longest = max(map(len, prompts), default=0) + sampling.max_completion_tokens
        check_length(self.limit, longest, "lower the maximum length of prompts or completions")
        if self._reading is None:
            self._reading = reading_of(self.model)
        source = torch.Generator().manual_seed(sampling.seed)
        shape = (first + len(prompts), sampling.samples, sampling.max_completion_tokens)
        uniforms = torch.rand(shape, generator=source, dtype=torch.float64)[first:].to(self.model.device)
        per_call = max(1, min(self.max_batch_sequences // sampling.samples, queue.share(len(prompts))))
        part = min(sampling.samples, self.max_batch_sequences)
        rows = min(len(prompts) * sampling.samples, self.max_batch_sequences)
        # Prompts of similar length are batched together for less padding; the result keeps the caller's order.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = list(self._reading.batches(order, [len(prompt) for prompt in prompts], per_call))
        result: dict[int, list[Completion]] = {}
        with packed_products(self.model, rows=rows, tokens=sampling.max_completion_tokens):
            while taken := queue.take(1, len(batches)):
                chosen = batches[taken.start]
                result |= {i: [] for i in chosen}
                for numbers in uniforms[chosen].split(part, dim=1):
                    options = (numbers, sampling, self.stop_ids, self._reading)
                    completions = _Batch(self.model, [prompts[i] for i in chosen], *options).run(self.progress)
                    for k, i in enumerate(chosen):
                        result[i] += completions[k * numbers.shape[1] : (k + 1) * numbers.shape[1]]
        return result

    def before_training(self) -> None:
        """See `Generator.before_training`; the cache of keys and values is freed at the end of each call."""

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`; the generator uses the trainer's own parameters, so there is nothing to do."""
        return {}

    def close(self) -> None:
        """See `Generator.close`; there are no processes to end."""


class _Batch:
    """State of one batch while it is sampled. S = sequences, L = padded prompt length."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        uniforms: Tensor,  # f64[P, G, max_completion_tokens]
        sampling: Sampling,
        stop_ids: Tensor,
        reading: Reading,
    ) -> None:
        self.model, self.sampling, self.stop_ids, self.reading = model, sampling, stop_ids, reading
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

    def run(self, progress: Callable[[], object] = lambda: None) -> list[Completion]:
        """Sample until every sequence has stopped or reached the limit; `progress` is called per token position."""
        num_sequences, max_tokens = self.uniforms.shape
        device = self.uniforms.device
        tokens = torch.zeros(num_sequences, max_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num_sequences, max_tokens, dtype=torch.float32, device=device)
        lengths = torch.full((num_sequences,), max_tokens, dtype=torch.int64, device=device)
        stopped = torch.zeros(num_sequences, dtype=torch.bool, device=device)
        reader = self.reading.reader(self.model)
        logits = reader.read(self.prompt_ids, self.prompt_mask if self.padded else None, self.group_size)
        live = torch.arange(num_sequences, device=device)  # sequence of each row of the batch
        for t in range(max_tokens):
            progress()
            token, logprob = _sample(logits, self.uniforms[live, t], self.sampling.temperature, self.sampling.top_p)
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
                reader.keep(keep)
                live, token = live[keep], token[keep]
            logits = reader.next(token)
        return _completions(tokens, logprobs, lengths, stopped)


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token i64[S] by inversion of the cumulative distribution at `uniform` f64[S], and its log-prob f32[S]."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if top_p < 1.0:
        logprobs = _nucleus(logprobs, top_p)
    if temperature == 0.0:
        token = logprobs.argmax(-1)
    else:
        token = _invert(logprobs, uniform)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _invert(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Token i64[S] where the cumulative distribution passes `uniform` f64[S].

    Sums are float64, so that they resolve every token whose probability float32 can tell from zero. First those of
    blocks of tokens, then within the block that was hit: a cumulative sum of everything takes several times as long.
    """
    rows, vocabulary = logprobs.shape
    blocks = -(-vocabulary // _BLOCK)
    padded = logprobs.new_zeros(rows, blocks * _BLOCK)
    torch.exp(logprobs, out=padded[:, :vocabulary])
    mass = padded.view(rows, blocks, _BLOCK)
    sums = mass.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = (uniform * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, goal, right=True).clamp(max=blocks - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    hit = mass[torch.arange(rows, device=mass.device), block[:, 0]].double()
    inside = torch.searchsorted(before + hit.cumsum(-1), goal, right=True)
    # The two sums may round apart: what is beyond the block's last token that can be drawn is that token.
    last = (hit > 0) * torch.arange(_BLOCK, device=mass.device)
    return (block * _BLOCK + torch.minimum(inside, last.amax(-1, keepdim=True)))[:, 0]


def _nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probs [S, V] of the likeliest tokens that hold `top_p` of the mass, the one that reaches it included."""
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double().exp()
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass.cumsum(-1) - mass >= top_p)
    return torch.log_softmax(logprobs.masked_fill(dropped, -torch.inf), dim=-1)


def _completions(tokens: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor) -> list[Completion]:
    """Host records of the batch; the only copy from the device."""
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
    return [
        Completion(token_ids=ids[:length], logprobs=values[:length], stopped=done) for ids, values, length, done in rows
    ]

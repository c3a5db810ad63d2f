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
        sampled = _Sampled(num_sequences, max_tokens, self.uniforms.device)
        uniforms = self.uniforms.T.contiguous()
        running = None if self.stop_ids.numel() == 0 else uniforms.new_ones(num_sequences, dtype=torch.bool)
        reader = self.reading.reader(self.model)
        logits = reader.read(self.prompt_ids, self.prompt_mask if self.padded else None, self.group_size)
        for t in range(max_tokens):
            progress()
            token, logprob = _sample(logits, uniforms[t], self.sampling.temperature, self.sampling.top_p)
            sampled.append(token, logprob)
            if t + 1 == max_tokens:
                break
            if running is not None:
                running = running & (token[:, None] != self.stop_ids).all(-1)
                num_running = int(running.sum())
                if num_running == 0:
                    break
                if num_running <= len(running) // 2:
                    keep = running.nonzero()[:, 0]
                    reader.keep(keep)
                    sampled.keep(keep)
                    token, uniforms, running = token[keep], uniforms[:, keep], running[keep]
            logits = reader.next(token)
        return sampled.completions(self.stop_ids)


class _Sampled:
    """Tokens and log-probs of a batch, in the order in which they were sampled."""

    def __init__(self, num_sequences: int, max_tokens: int, device: torch.device) -> None:
        self._tokens = torch.zeros(num_sequences, max_tokens, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(num_sequences, max_tokens, dtype=torch.float32, device=device)
        self._live = torch.arange(num_sequences, device=device)  # sequence of each row of the batch
        self._start = 0
        self._steps: list[tuple[Tensor, Tensor]] = []  # of the rows in `live`, from `start` on

    def append(self, token: Tensor, logprob: Tensor) -> None:
        """Take the next token i64[S] and log-prob f32[S] of every row."""
        self._steps.append((token, logprob))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._write()
        self._live = self._live[rows]

    def _write(self) -> None:
        if self._steps:
            end = self._start + len(self._steps)
            for held, steps in zip((self._tokens, self._logprobs), zip(*self._steps, strict=True), strict=True):
                held[self._live, self._start : end] = torch.stack(steps, 1)
            self._start, self._steps = end, []

    def completions(self, stop_ids: Tensor) -> list[Completion]:
        """Host records of the sequences, each up to its first stop token; the only copy from the device."""
        self._write()
        ends = torch.isin(self._tokens, stop_ids)
        stopped = ends.any(1)
        lengths = torch.where(stopped, ends.int().argmax(1) + 1, self._tokens.shape[1])
        rows = zip(self._tokens.tolist(), self._logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [Completion(token_ids=ids[:n], logprobs=values[:n], stopped=done) for ids, values, n, done in rows]


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token i64[S] by inversion of the cumulative distribution at `uniform` f64[S], and its log-prob f32[S]."""
    scaled = logits if temperature in (0.0, 1.0) else logits / temperature
    if top_p < 1.0:
        scaled = _nucleus(torch.log_softmax(scaled, dim=-1), top_p)
    if temperature == 0.0:
        token = scaled.argmax(-1, keepdim=True)
        return token[:, 0], torch.log_softmax(scaled, dim=-1).gather(-1, token)[:, 0]
    highest = scaled.amax(-1, keepdim=True)
    token, total = _invert(scaled, highest, uniform[:, None])
    return token[:, 0], (scaled.gather(-1, token) - highest - total.log().float())[:, 0]


def _invert(logits: Tensor, highest: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Token i64[S, 1] where the cumulative distribution passes `uniform` f64[S, 1], and the total f64[S, 1] of
    exp(logits - highest).

    First the block of tokens is found and then the token within it: a cumulative sum of everything takes several times
    as long. Blocks are summed in float32, which changes their probabilities in the seventh digit, as rounded logits do;
    the token is drawn by the exact share of its block, so that one that is all but impossible gains nothing.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // _BLOCK)
    if blocks == 1:
        token, _, total = _pass((logits - highest).exp().double(), uniform)
        return token, total
    mass = logits.new_empty(rows, blocks * _BLOCK)
    torch.sub(logits, highest, out=mass[:, :vocabulary])
    mass[:, vocabulary:] = -torch.inf
    mass = mass.exp_().view(rows, blocks, _BLOCK)
    block, share, total = _pass(mass.sum(-1).double(), uniform)
    inside, _, _ = _pass(mass[torch.arange(rows, device=mass.device), block[:, 0]].double(), share)
    return (block * _BLOCK + inside).clamp_(max=vocabulary - 1), total


def _pass(mass: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Element i64[S, 1] in which the cumulative sum of `mass` f64[S, N] passes `share` f64[S, 1] of the total, the
    share of that element which lies before, and the total. An element without mass is never found."""
    sums = mass.cumsum(-1)
    total = sums[:, -1:]
    goal = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(sums, goal, right=True).clamp_(max=mass.shape[1] - 1)  # past the end where it is NaN
    own = mass.gather(1, index)
    return index, ((goal - sums.gather(1, index) + own) / own).clamp_(min=0.0), total


def _nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probs [S, V] of the likeliest tokens that hold `top_p` of the mass, the one that reaches it included."""
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double().exp()
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass.cumsum(-1) - mass >= top_p)
    return torch.log_softmax(logprobs.masked_fill(dropped, -torch.inf), dim=-1)

"""Sampling completions: token ids in, token ids and their log-probs out.

Two ways: the trainer's own model through transformers, and a vLLM engine in the same process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from paced_fast import engine
from paced_fast.batch import Completion
from paced_fast.config import stream_seed
from paced_fast.errors import InputError, TrainingError

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 30.0


class Generator(Protocol):
    """What the trainer asks of an engine. Completions come prompt by prompt, `group_size` of each in a row."""

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
    ) -> list[Completion]:
        """Sample `group_size` completions of each prompt; the same seed and weights give the same tokens.

        Temperature 0 takes the likeliest token. `top_p` keeps the likeliest tokens that hold so much of the mass;
        log-probs are of what is left.
        """
        ...

    def before_training(self) -> None:
        """Nothing is sampled until `after_update`: memory that only sampling needs may go."""
        ...

    def after_update(self) -> dict[str, float]:
        """The policy's parameters have changed: sample from the new ones. Figures for the metrics record."""
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
        top_p: float = 1.0,
        seed: int,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        source = torch.Generator().manual_seed(seed)
        shape = (len(prompts), group_size, max_completion_tokens)
        uniforms = torch.rand(shape, generator=source, dtype=torch.float64).to(self.model.device)
        per_call = max(1, self.max_batch_sequences // group_size)
        part = min(group_size, self.max_batch_sequences)
        # Prompts of similar length go together: less padding. The order of the result is the caller's.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(order), per_call):
            chosen = order[start : start + per_call]
            for numbers in uniforms[chosen].split(part, dim=1):
                options = (numbers, temperature, top_p, self.stop_ids)
                completions = _Batch(self.model, [prompts[i] for i in chosen], *options).run()
                for k, i in enumerate(chosen):
                    result[i] += completions[k * numbers.shape[1] : (k + 1) * numbers.shape[1]]
        return [completion for group in result for completion in group]

    def before_training(self) -> None:
        """See `Generator.before_training`; the cache of keys and values lives as long as a call."""

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`; there is one model and so nothing to do."""
        return {}


class _Batch:
    """One batch on its way through the model. S = sequences, L = padded prompt length."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        uniforms: Tensor,  # f64[P, G, max_completion_tokens]
        temperature: float,
        top_p: float,
        stop_ids: Tensor,
    ) -> None:
        self.model, self.temperature, self.top_p, self.stop_ids = model, temperature, top_p, stop_ids
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
            token, logprob = _sample(logits, self.uniforms[live, t], self.temperature, self.top_p)
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


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token i64[S] by inversion of the cumulative distribution at `uniform` f64[S], and its log-prob f32[S]."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if top_p < 1.0:
        logprobs = _nucleus(logprobs, top_p)
    if temperature == 0.0:
        token = logprobs.argmax(-1)
    else:
        # In float64 the cumulative sum resolves every token that float32 log-probs can tell from zero.
        cdf = logprobs.double().exp().cumsum(-1)
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probs [S, V] of the likeliest tokens that hold `top_p` of the mass, the one that reaches it included."""
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double().exp()
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass.cumsum(-1) - mass >= top_p)
    return torch.log_softmax(logprobs.masked_fill(dropped, -torch.inf), dim=-1)


def _completions(tokens: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor) -> list[Completion]:
    """The batch as host records; the one copy from the device."""
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
    return [
        Completion(token_ids=ids[:length], logprobs=values[:length], stopped=done) for ids, values, length, done in rows
    ]


class Sync(Protocol):
    """How the engine learns of an update; `weight_sync` has the two ways."""

    mode: str

    def after_update(self) -> dict[str, float]:
        """Make the engine see the new weights; figures for the metrics record."""
        ...


class VLLMGenerator:
    """vLLM in the trainer's process. Its weights are shared or pushed by what `attach` is given.

    Every sample has its own seed, so what it draws does not depend on its group or on the order of requests. The
    samples of a prompt are requests of their own that read the prompt's keys and values from the prefix cache.
    """

    def __init__(self, settings: engine.EngineSettings, *, stop_ids: Sequence[int]) -> None:
        """Start the engine, which takes 10 to 60 s. Raises InputError when it does not start, naming the knob."""
        self.settings, self.stop_ids = settings, list(stop_ids)
        self.can_sleep = settings.device == "cuda"
        self.sync: Sync | None = None
        self.calls = 0
        self._buffers: dict[str, Tensor] = {}
        started = time.perf_counter()
        try:
            self.engine = engine.start(settings)
            self.tensor_parallel_size = int(self.engine.vllm_config.parallel_config.tensor_parallel_size)
            # A kernel that does not know this model fails at its first token: now, not after the first evaluation.
            self._run([(0,)], [self._sampling(1, 0.0, 0)])
        except engine.FAILURES as error:
            raise InputError(engine.start_failure(error, settings)) from error
        logger.info("vllm: ready after %.0f s", time.perf_counter() - started)

    def attach(self, sync: Sync) -> None:
        """Use `sync` after every update."""
        self.sync = sync

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        keep_cache: bool = False,
    ) -> list[Completion]:
        """See `Generator.generate`. With `keep_cache` the prefix cache is read as earlier calls left it: for a check.

        Raises InputError for a prompt that does not fit, TrainingError when the engine fails midway.
        """
        for prompt in prompts:
            if len(prompt) + max_completion_tokens > self.settings.max_tokens:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens and a completion of {max_completion_tokens} are longer than the "
                    f"engine's {self.settings.max_tokens}: lower --generation.max-completion-tokens or "
                    "--data.max-prompt-tokens"
                )
        if not keep_cache:
            # What earlier calls left in the prefix cache would make a call depend on them, after a resume above all.
            self.reset_prefix_cache()
        seeds = [stream_seed(seed, i, f"sample/{j}") for i in range(len(prompts)) for j in range(group_size)]
        sampling = [self._sampling(max_completion_tokens, temperature, each, top_p) for each in seeds]
        outputs = self._answer([prompt for prompt in prompts for _ in range(group_size)], sampling)
        return [_completion(output.outputs[0]) for output in outputs]

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probs of every token but the first, at temperature 1; the prefix cache has no part in it."""
        sampling = engine.scoring()
        outputs = self._answer(sequences, [sampling] * len(sequences))
        return [
            [float(output.prompt_logprobs[t][ids[t]].logprob) for t in range(1, len(ids))]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def before_training(self) -> None:
        """See `Generator.before_training`: on a GPU the keys and values go, and the weights at sleep levels 1 and 2."""
        if not self.can_sleep:
            return
        engine.settle(self.engine)
        level = self.settings.sleep_level
        if level == 2:  # vLLM restores parameters by loading them; what is not a parameter would stay lost
            self._buffers = self._of_model(
                lambda model: {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()}
            )
        self.engine.sleep(level)
        if level == 0:
            self.engine.release_kv_cache_memory()

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`: wake, synchronise, and forget every key and value of the old weights."""
        if self.can_sleep and self.settings.sleep_level > 0:
            with self._named("taking its weights back"):
                self.engine.wake_up(["weights"])
                self._of_model(self._restore_buffers)
        figures = self.sync.after_update() if self.sync is not None else {}
        if self.can_sleep:
            with self._named("taking its key-value cache back"):
                self.engine.wake_up(["kv_cache"])
                self.engine.wake_up(["scheduling"])
        self.reset_prefix_cache()
        return figures

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values. vLLM refuses while a request lives, so the refusal is an error here."""
        with self._named("emptying its prefix cache"):
            engine.settle(self.engine)
            done = self.engine.reset_prefix_cache()
        if not done:
            raise TrainingError("vllm kept its prefix cache, so it would sample from old weights: update vllm")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """A failure of the engine between samplings as one line that says what it was doing and which knob helps."""
        try:
            yield
        except engine.FAILURES as error:
            raise TrainingError(
                f"vllm failed at {what} ({engine.first_line(error)}): --resume auto continues from the last "
                "checkpoint; where memory ran out, lower --weight-sync.kv-cache-gib or --optimizer.micro-batch-tokens"
            ) from error

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The engine's own parameters by name, tied ones once."""
        return self._of_model(lambda model: dict(model.named_parameters()))

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy weights in the Hugging Face layout into the engine's, packed or fused as it keeps them."""
        with self._named("loading the pushed weights"):
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _of_model(self, function: Any) -> Any:
        return self.engine.apply_model(function)[0]

    def _restore_buffers(self, model: torch.nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if name in self._buffers:
                buffer.data.copy_(self._buffers[name])

    def _sampling(self, max_tokens: int, temperature: float, seed: int, top_p: float = 1.0) -> Any:
        return engine.sampling(self.stop_ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)

    def _answer(self, prompts: Sequence[tuple[int, ...]], sampling: Sequence[Any]) -> list[Any]:
        """As `_run`; a failure becomes one line, and what was under way is dropped."""
        try:
            return self._run(prompts, sampling)
        except engine.FAILURES as error:
            with contextlib.suppress(*engine.FAILURES):  # an engine past that too is reported by what broke it
                self.engine.abort_request([f"{self.calls}-{i}" for i in range(len(prompts))])
            raise TrainingError(
                f"vllm failed while sampling ({engine.first_line(error)}): nothing of this step is kept; --resume auto "
                "continues from the last checkpoint, and fewer --generation.max-batch-sequences need less memory"
            ) from error

    def _run(self, prompts: Sequence[tuple[int, ...]], sampling: Sequence[Any]) -> list[Any]:
        """The finished request of every prompt, in order."""
        self.calls += 1
        found: dict[int, Any] = {}
        for i, (prompt, options) in enumerate(zip(prompts, sampling, strict=True)):
            self.engine.add_request(f"{self.calls}-{i}", engine.rendered(self.engine, prompt), options)
        started = told = time.perf_counter()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    found[int(output.request_id.split("-")[1])] = output
            now = time.perf_counter()
            if now - told > _PROGRESS_SECONDS:
                told = now
                logger.info("vllm: %d of %d completions after %.0f s", len(found), len(prompts), now - started)
        return [found[i] for i in range(len(prompts))]


def _completion(output: Any) -> Completion:
    flat = output.logprobs
    return Completion(
        token_ids=list(output.token_ids),
        logprobs=[float(flat.logprobs[start]) for start in flat.start_indices],
        stopped=output.finish_reason == "stop",
    )

"""The parity guard: trainer and engine score the same tokens, and a run stops when they disagree.

An engine's log-probs come from scoring or from sampling, and each path has faults that the other does not show. Scoring
a prompt reads the weights alone. Sampling reads the prefix cache and goes through the sampler, so it also shows keys
and values of old weights and log-probs renormalised by a filter. Both are compared, on sequences of several cache
blocks: a stale cache changes nothing for a prompt shorter than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paced_fast.config import Config, stream_seed
from paced_fast.data import packing
from paced_fast.data.records import Completion
from paced_fast.errors import TrainingError
from paced_fast.generation.interface import Sampling
from paced_fast.generation.mismatch import mismatch_metrics
from paced_fast.policy import Policy

_DEFAULT_BOUNDS = {"float32": 0.002, "bfloat16": 0.03}
"""Nats. In float32 a healthy engine stays below a hundredth of its bound (1.6e-5 for SmolLM2). bfloat16 rounds 2^16
times as coarsely: means of about 0.0012 are usual."""
_COARSE_BOUND = 0.01
"""Bound in nats for float32 with reduced matmul precision (`model.matmul_precision`) on one or both sides."""
_SAMPLED_TOKENS = 16
_SAMPLES = 2
_WEIGHTS = "a parameter that did not reach the engine, or reached it in another layout"
_SAMPLING = "keys and values of old weights in the prefix cache, or a sampling filter (top-p, top-k, min-p)"


class ScoringEngine(Protocol):
    """Methods of an engine that a check calls."""

    def generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, keep_cache: bool) -> list[Completion]:
        """See `Generator.generate`; with `keep_cache` the prefix cache is not cleared first."""
        ...

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probs of every token but the first, at temperature 1."""
        ...


class ParityGuard:
    """Compares an engine with the policy it samples for, every `weight_sync.check_every` steps and at step 0."""

    def __init__(
        self, engine: ScoringEngine, policy: Policy, config: Config, *, sequences: Sequence[tuple[int, ...]]
    ) -> None:
        """`sequences` are scored, and, without their last tokens, used as prompts to sample from; see
        `long_sequences`."""
        self.engine, self.policy, self.sequences = engine, policy, list(sequences)
        self.every, self.seed = config.weight_sync.check_every, config.seed
        self.temperature = config.generation.temperature
        usual = _DEFAULT_BOUNDS[config.weight_sync.dtype]
        if config.model.matmul_precision != "highest":
            usual = max(usual, _COARSE_BOUND)
        self.bound = config.weight_sync.max_mean_difference or usual
        self.cap = config.mismatch.cap
        self.prompts = [sequence[:-_SAMPLED_TOKENS] for sequence in self.sequences]

    def due(self, step: int) -> bool:
        """Whether `step` ends with a check."""
        return self.every > 0 and step % self.every == 0

    def prime(self) -> None:
        """Fill the prefix cache before an update, so that a cache that is not cleared shows afterwards."""
        self._sample(self.prompts, 1, 1, 0)

    def check(self, step: int) -> dict[str, float]:
        """Mean and largest absolute difference of a token's log-prob (nats), for scored and for sampled tokens.

        Raises TrainingError when a mean is above the bound, with the causes that fit.
        """
        return self.judge(step, *self.ask(step))

    def ask(self, step: int) -> tuple[list[Completion], list[list[float]]]:
        """Completions that the engine samples, and its log-probs of the sequences; the part of a check that can fail on
        a rank."""
        # Sample first: scoring would leave its own keys and values in the cache.
        return self._sample(self.prompts, _SAMPLES, _SAMPLED_TOKENS, step), self.engine.score(self.sequences)

    def judge(self, step: int, completions: list[Completion], scores: list[list[float]]) -> dict[str, float]:
        """Compare them with the policy's log-probs, which sharded ranks compute together."""
        repeated = [prompt for prompt in self.prompts for _ in range(_SAMPLES)]
        sampled = self._compare(repeated, completions, self.temperature)
        scored = self._compare(
            [sequence[:1] for sequence in self.sequences],
            [
                Completion(token_ids=list(sequence[1:]), logprobs=values, stopped=False)
                for sequence, values in zip(self.sequences, scores, strict=True)
            ],
            1.0,
        )
        figures = {f"scored_{k}": v for k, v in scored.items()} | {f"sampled_{k}": v for k, v in sampled.items()}
        # A NaN is above every bound.
        if not (scored["mean"] <= self.bound and sampled["mean"] <= self.bound):
            cause = _SAMPLING if scored["mean"] <= self.bound else _WEIGHTS
            raise TrainingError(
                f"trainer and engine disagree after step {step}: log-probs differ by {scored['mean']:.2g} on average "
                f"(at most {scored['max']:.2g}) where the engine scores a prompt, and by {sampled['mean']:.2g} (at "
                f"most {sampled['max']:.2g}) where it samples; the average may be {self.bound:.2g}; likely cause: "
                f"{cause}; --weight-sync.mode push avoids sharing, and --generator transformers avoids the engine"
            )
        return figures

    def _sample(self, prompts: Sequence[tuple[int, ...]], samples: int, tokens: int, step: int) -> list[Completion]:
        sampling = Sampling(
            samples=samples,
            max_completion_tokens=tokens,
            temperature=self.temperature,
            seed=stream_seed(self.seed, step, "parity"),
        )
        return self.engine.generate(prompts, sampling, keep_cache=True)

    def _compare(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], temperature: float
    ) -> dict[str, float]:
        count = len(completions)
        rollouts = packing.pack(completions, prompts, range(count), [0.0] * count, 0, self.policy.device)
        values = self.policy.logprobs(rollouts, temperature)
        found = mismatch_metrics(rollouts.generator_logprobs, values, rollouts.cu_seqlens, cap=self.cap)
        return {name: float(found[name]) for name in ("mean", "max")}


def long_sequences(prompts: Sequence[tuple[int, ...]], *, count: int, length: int) -> list[tuple[int, ...]]:
    """`count` different sequences of `length` tokens, concatenated from the run's own prompts.

    Rounding errors are then those of training; on random tokens the model would be far less certain.
    """
    sequences = []
    position = 0
    for _ in range(count):
        tokens: list[int] = []
        while len(tokens) < length:
            tokens.extend(prompts[position % len(prompts)])
            position += 1
        sequences.append(tuple(tokens[:length]))
    return sequences

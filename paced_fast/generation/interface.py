"""The interface of a generator, and the settings of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from paced_fast.data.distributed import Queue
from paced_fast.data.records import Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Settings of one call of a generator."""

    samples: int
    """Completions per prompt."""
    max_completion_tokens: int
    """Completions that reach this length are cut there."""
    temperature: float
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keeps only the likeliest tokens that together hold this share of the mass; log-probs are renormalised."""
    seed: int = 0
    """The same seed, prompts and weights give the same tokens."""


class Generator(Protocol):
    """A source of completions: the trainer's own model, an engine, or one of those on every rank."""

    progress: Callable[[], object]
    """Called at least once per token position while completions are sampled, so that a watchdog sees the generator
    work."""

    def generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0) -> list[Completion]:
        """Sample `sampling.samples` completions of each prompt, returned prompt by prompt.

        `first` is the position of the first of these prompts in a larger batch. What is sampled depends on seed and
        position only, so a batch can be split over several calls or ranks.
        """
        ...

    def generate_taken(
        self, queue: Queue, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0
    ) -> dict[int, list[Completion]]:
        """Sample the part of the prompts that this rank takes from the `queue`, as `generate` would.

        The next prompts are taken when there is room for them, so that a rank whose completions are short takes more.
        Returns completions by their prompt's position.
        """
        ...

    def before_training(self) -> None:
        """Release memory that only sampling needs; nothing is sampled until `after_update`."""
        ...

    def after_update(self) -> dict[str, float]:
        """Switch to the policy's new parameters; returns figures for the metrics record."""
        ...

    def close(self) -> None:
        """End the engine's processes and process groups; nothing is sampled afterwards."""
        ...


def without_unknown_ids(completions: Sequence[Completion], vocabulary: int) -> list[Completion]:
    """Empty every completion that has an id outside [0, vocabulary): such an id has no log-prob and no text.

    A generator can sample such ids from the padding of its output layer. A sampled completion has at least one token,
    so an empty one marks a rejected completion: `score_sampled` leaves it unscored.
    """
    return [
        Completion(token_ids=[], logprobs=[], stopped=True)
        if completion.token_ids and not 0 <= min(completion.token_ids) <= max(completion.token_ids) < vocabulary
        else completion
        for completion in completions
    ]

"""What the trainer asks of whoever samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paced_fast.data.records import Completion


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
        first: int = 0,
    ) -> list[Completion]:
        """Sample `group_size` completions of each prompt; the same seed and weights give the same tokens.

        `first` is the place of the first prompt in a batch of which these are a part: what is sampled depends on seed
        and place, so that a batch may be shared out. Temperature 0 takes the likeliest token. `top_p` keeps the
        likeliest tokens that hold so much of the mass; log-probs are of what is left.
        """
        ...

    def before_training(self) -> None:
        """Nothing is sampled until `after_update`: memory that only sampling needs may go."""
        ...

    def after_update(self) -> dict[str, float]:
        """The policy's parameters have changed: sample from the new ones. Figures for the metrics record."""
        ...

    def close(self) -> None:
        """Sampling is over: processes and process groups of an engine end."""
        ...


def without_unknown_ids(completions: Sequence[Completion], vocabulary: int) -> list[Completion]:
    """The completions, one with an id outside [0, vocabulary) without any tokens: it has no log-prob and no text.

    A generator can sample such ids from the padding of its output layer. A sampled completion has at least one token,
    so one without was left out: `score_sampled` gives it no verdict.
    """
    return [
        Completion(token_ids=[], logprobs=[], stopped=True)
        if completion.token_ids and not 0 <= min(completion.token_ids) <= max(completion.token_ids) < vocabulary
        else completion
        for completion in completions
    ]

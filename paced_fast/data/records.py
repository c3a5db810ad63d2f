"""The records that flow through one training step.

P = prompts drawn, G = completions per prompt, B = P * G sequences, T = packed completion tokens, N = prompts in the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """One row of a prompt table: what the policy reads, and what its completions are judged by.

    Example: `PromptRow(prompt="1951=2:", token_ids=(2, 10), slice="k4", reward="signed_sums", columns={"answer": "2"})`
    """

    prompt: str | list[dict[str, str]]
    """The prompt as reward functions see it: text, or a list of chat messages."""
    token_ids: tuple[int, ...]
    """The prompt as the policy reads it, template and special tokens included."""
    reward: str
    """Name or import path of the reward function that judges this row."""
    slice: str
    """Name of the part of the data this row belongs to; evaluation reports each slice on its own."""
    columns: Mapping[str, Any]
    """Everything else of the data row, `answer` included; handed to the reward function by name."""
    where: str = ""
    """What names the row in messages: its file and line, or its source and number."""
    demonstration: str | None = None
    """A completion to imitate in the supervised warm start, without the stop token."""
    in_chat: bool = False
    """Whether the chat template wrote the prompt, so that an answer closes a turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTable:
    """N prompt rows; `prompt_index` everywhere else is a position in `rows`."""

    rows: tuple[PromptRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> list[PromptRow]:
        """The rows at `indices`, in that order."""
        return [self.rows[i] for i in indices]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Sampled token ids after a prompt, the stop token included when it was reached."""

    token_ids: list[int]
    logprobs: list[float]
    """The generator's log-prob of each sampled token, at the sampling temperature."""
    stopped: bool
    """True when a stop token ended it, False when `max_completion_tokens` did."""


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


def score_sampled(
    score: Callable[[Sequence[PromptRow], Sequence[str]], list[float | None]],
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    completions: Sequence[Completion],
) -> list[float | None]:
    """The rewards of `score`, which is not shown the completions without tokens; None, no verdict, for those."""
    sampled = [i for i, completion in enumerate(completions) if completion.token_ids]
    rewards: list[float | None] = [None] * len(completions)
    for i, reward in zip(sampled, score([rows[i] for i in sampled], [texts[i] for i in sampled]), strict=True):
        rewards[i] = reward
    return rewards


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt with their rewards."""

    prompt_index: int
    completions: list[Completion]
    rewards: list[float | None]  # None: no verdict
    shaping: list[float]  # as it came from the shaping functions; empty without any

    @property
    def scored(self) -> list[float]:
        """The rewards that there are."""
        return [reward for reward in self.rewards if reward is not None]

    @property
    def accuracy(self) -> float | None:
        """Mean reward of the scored completions; None without any."""
        return sum(self.scored) / len(self.scored) if self.scored else None

    @property
    def is_mixed(self) -> bool:
        """Whether some completions are better than others."""
        return len(set(self.scored)) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """B sequences with their prompts, packed: sequence i owns rows `cu_seqlens[i]:cu_seqlens[i+1]`."""

    token_ids: Tensor  # i64[T], completion tokens only
    cu_seqlens: Tensor  # i32[B + 1]
    lengths: tuple[int, ...]  # host copy of the B lengths, so that nothing asks the device for them
    prompt_ids: tuple[tuple[int, ...], ...]  # B prompts on the host
    prompt_index: Tensor  # i64[B]
    rewards: Tensor  # f32[B], raw correctness, 0 where unscored
    shaping: Tensor  # f32[B], what the policy's loss adds to it; sums to 0 within a group
    scored: tuple[bool, ...]  # B, on the host; False where there was no verdict
    generator_logprobs: Tensor  # f32[T]
    policy_version: Tensor  # i64[B], the version that sampled it

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(sum(self.lengths))

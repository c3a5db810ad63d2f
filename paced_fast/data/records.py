"""The records that flow through one training step.

P = prompts drawn, G = completions per prompt, B = P * G sequences, T = packed completion tokens, N = prompts in the
table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """One row of a prompt table: the prompt, and the data that its completions are scored with.

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
    """Other columns of the data row, `answer` included; passed to the reward function by name."""
    where: str = ""
    """Name of the row in messages: its file and line, or its source and number."""
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


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt with their rewards."""

    prompt_index: int
    completions: list[Completion]
    rewards: list[float | None]  # None: no verdict
    shaping: list[float]  # unprocessed, from the shaping functions; empty without any

    @property
    def scored(self) -> list[float]:
        """Rewards of the scored completions."""
        return [reward for reward in self.rewards if reward is not None]

    @property
    def accuracy(self) -> float | None:
        """Mean reward of the scored completions; None without any."""
        return sum(self.scored) / len(self.scored) if self.scored else None

    @property
    def is_mixed(self) -> bool:
        """Whether the scored rewards differ."""
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


class GroupSource(Protocol):
    """Source of a step's groups, in place of drawing prompts, sampling and scoring."""

    def groups(self, step: int, round_: int = 0) -> list[Group]:
        """The groups of the step's batch, then those that were sampled and left out of it; all in the first round."""
        ...


@dataclass(frozen=True, slots=True)
class Fresh:
    """The groups sampled in this step. P groups of G, B = P * G."""

    rollouts: Rollouts
    groups: list[Group]  # P, those of the batch
    dropped: list[Group]  # sampled and left out
    prompt_index: Tensor  # i64[P]
    accuracy: Tensor  # f32[P], of the scored completions; 0 where there is none
    scored: Tensor  # bool[B]

    @property
    def num_sampled(self) -> int:
        """Completions sampled, those of dropped groups included."""
        return sum(len(group.completions) for group in (*self.groups, *self.dropped))

    @property
    def num_tokens(self) -> int:
        """Tokens sampled, those of dropped groups included."""
        groups = (*self.groups, *self.dropped)
        return sum(len(completion.token_ids) for group in groups for completion in group.completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Results of a step on the device."""

    fresh: Fresh
    rollouts: Rollouts  # fresh and replayed
    replayed: Rollouts | None
    targets: Targets
    update: UpdateResult
    learning_rate: Tensor  # f32[]
    visits: Tensor  # i64[N]
    values: Tensor | None  # f32[N], as they were before the update
    head: tuple[Tensor, Tensor] | None  # loss and gradient norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Quantities that the policy loss compares the current log-probs with."""

    signal: Tensor  # f32[B]: raw reward, group-normalised advantage or scaled advantage
    intercept: Tensor  # f32[B]: beta * log Z or log Z; 0 for a loss without one
    old_logprobs: Tensor  # f32[T], the policy at the start of the step
    ref_logprobs: Tensor  # f32[T], old_logprobs, or the initial policy's where that is the reference
    weights: Tensor  # f32[B], constant factor of each sequence: 1, or what corrects for the policy that sampled it
    unscored: frozenset[int] = frozenset()
    """Sequences whose entries of `old_logprobs`, and of `weights`, the first optimiser step of the update writes: there
    the policy is still the old one, and its own forward pass has them."""
    from_generator: frozenset[int] = frozenset()
    """Sequences whose old log-probs are the generator's, which is the policy itself: they say nothing about it."""
    num_sampled: int = 0
    """The first so many sequences were sampled in this step; the weights of others stay 1."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Result of `update_policy`; tensors are in the order of the rollouts."""

    loss: Tensor  # f32[], mean over the optimiser steps
    grad_norm: Tensor  # f32[], likewise, before clipping
    log_ratio: Tensor  # f32[B], sum of log pi - log pi_old at the last time the sequence was trained on
    weight: Tensor  # f32[B], importance weight at that time, 0 for a sequence left out
    skipped: Tensor  # i64[], optimiser steps left out for a non-finite loss or gradient
    taken: Tensor  # i64[], optimiser steps made

"""The lines of metrics.jsonl: the record of a step, and that of the policy before training.

A field is a key of the line, and the order of the fields is that of the keys. Needs no tensor library, so that a reader
of run folders can use it.

N = prompts in the table, P = prompts drawn of which a completion was scored, C = completions that replay holds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final


class Absent(Enum):
    """The type of `ABSENT`."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
"""Value of a field that does not apply: its key is left out of the line. None is written, as null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    step: int = 0
    rollouts: int = 0
    """Completions sampled so far."""
    train_seconds: float = 0.0
    """Time of all steps so far, without evaluations."""

    def line(self) -> dict[str, Any]:
        """The record as a mapping, without fields that are absent."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if value is not ABSENT}


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRecord(_Record):
    """The policy before training, as step 0."""

    parity: dict[str, float] | Absent = ABSENT
    """Differences between the log-probs of trainer and engine, in nats."""
    eval: dict[str, Any] | Absent = ABSENT
    """`Evaluation.record`, with slices and ids of the held-out prompts."""
    overlap: dict[str, Any] | Absent = ABSENT
    """Training prompts, how many of them are held-out prompts, and of which slices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(_Record):
    """One step of a run."""

    loss: float
    """Mean over the optimiser steps."""
    grad_norm: float
    """Mean over the optimiser steps, before clipping."""
    learning_rate: float
    reward_mean: float
    """Over the scored completions of this step."""
    unscored_share: float
    """Share of the completions that have no reward."""
    unknown_ids: int
    """Completions with token ids outside the vocabulary."""
    mixed_group_share: float
    """Share of groups whose rewards differ, those sampled and left out included."""
    trained_sequences: int
    """Sequences in the update, replayed ones included."""
    prompts_visited_share: float
    """Share of the N prompts drawn at least once."""
    entropy: float | None
    """Mean negative log-prob of the sampled tokens, in nats; None without a token."""
    mean_length: float
    """Tokens per completion."""
    truncated_share: float
    """Share of completions that reached the length limit."""
    log_ratio_mean: float
    """Mean over completions of log pi - log pi_old, in nats."""
    kl: float
    """Mean over completions of exp(r) - 1 - r, r being the log-ratio."""
    effective_sample_share: float
    """Effective sample size of the importance weights, over the number of sequences."""
    generator_mismatch_mean: float
    """Mean over tokens of |log-prob of the trainer - log-prob of the generator|, in nats. These figures leave out
    sequences whose log-probs were taken over from a generator that decodes with the policy itself."""
    generator_mismatch_max: float
    generator_mismatch_token_ratio: float
    """Mean over tokens of the exponential of that difference's size."""
    generator_mismatch_sequence_ratio: float
    """Mean over sequences of the exponential of the size of the sum."""
    generator_mismatch_outside_share: float
    """Share of tokens whose ratio is outside the cap."""
    shaping_mean: float | Absent = ABSENT
    """Mean of what shaping adds to the rewards."""
    head_loss: float | Absent = ABSENT
    head_grad_norm: float | Absent = ABSENT
    skipped_steps: int
    """Optimiser steps left out so far, for a loss or gradient that is not finite."""
    verdicts: dict[str, dict[str, int]]
    """Verdicts by kind of each reward that counts them."""
    seconds: dict[str, float]
    """Time of each phase."""
    memory: dict[str, int]
    """Peak bytes of each phase."""
    tokens_per_second: float
    """Tokens sampled, over the time of the whole step."""
    value_mean: float | Absent = ABSENT
    """Mean over the N prompts of the predicted accuracy, before the update; absent where the value is no accuracy."""
    value_brier: float | Absent = ABSENT
    value_ece: float | Absent = ABSENT
    """Expected calibration error."""
    value_rank_correlation: float | Absent | None = ABSENT
    value_fresh: list[float] | Absent = ABSENT
    """Predicted accuracy of the P prompts."""
    accuracy_fresh: list[float] | Absent = ABSENT
    """Measured accuracy of the P prompts."""
    value_histogram: list[float] | Absent = ABSENT
    """Prompts by value, in bins of equal width from 0 to 1."""
    replay_size: int | Absent = ABSENT
    """C."""
    replay_age_mean: float | Absent | None = ABSENT
    """Steps; None while replay is empty."""
    replay_ages: list[int] | Absent = ABSENT
    """Steps since each of the C completions was sampled."""
    replay_priorities: list[float] | Absent = ABSENT
    """Priority of each of the C completions."""
    weight_sync: dict[str, float] | Absent = ABSENT
    """Cost of bringing the engine's weights up to date."""
    parity: dict[str, float] | Absent = ABSENT
    """Differences between the log-probs of trainer and engine, in nats."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """Names of the guards' warnings that hold."""
    eval: dict[str, Any] | Absent | None = ABSENT
    """`Evaluation.record`; None where one was due and there are no prompts to evaluate on."""
    eval_value: dict[str, Any] | Absent = ABSENT
    """The value's forecast of the last evaluation, and its errors."""


KEYS = frozenset(field.name for record in (StartRecord, StepRecord) for field in dataclasses.fields(record))
"""Every key that a line can have."""

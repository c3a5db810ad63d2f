"""Held-out evaluation: sample every prompt of a table, score the completions, and estimate the policy's accuracy.

P = prompts, n = scored samples of a prompt, which may differ from prompt to prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paced_fast.config import stream_seed
from paced_fast.data.records import Completion, PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.evaluation.estimates import majority_at_k, mean_intervals, pass_at_each
from paced_fast.generation import Generator, Sampling
from paced_fast.generation.interface import without_unknown_ids
from paced_fast.rewards.scorer import score_sampled
from paced_fast.rewards.votes import answer_key

logger = logging.getLogger(__name__)

_MAX_TOKENS_PER_CALL = 1 << 25
"""Most completion tokens per call: the transformers generator holds eight bytes of random numbers for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion with its reward and vote."""

    row: PromptRow
    text: str
    reward: float | None
    """None for unscored."""
    vote: str | None
    """Final answer, normalised by `answer_key`."""
    tokens: int
    stopped: bool
    """False when it was cut."""

    @property
    def correct(self) -> bool:
        """A completion counts as correct when its reward is above one half."""
        return self.reward is not None and self.reward > 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Scores on some prompts. Every prompt counts the same; one without a scored sample is left out of the means."""

    accuracy: float | None
    """mean@n: mean over prompts of the share of correct samples; None when nothing was scored."""
    accuracy_interval: tuple[float, float] | None
    """Its 95 % confidence interval, for prompts drawn from a population of such prompts."""
    pass_at_8: float | None
    """Unbiased pass@8; None when a prompt has fewer than 8 scored samples."""
    pass_at_k: dict[str, float]
    """Unbiased pass@k for every k up to the least n of a prompt."""
    pass_at_k_interval: dict[str, tuple[float, float]]
    """Confidence intervals of those."""
    maj_at_k: dict[str, float]
    """Chance that the commonest answer of k samples is correct, for powers of two up to the least n and for that."""
    maj_at_k_interval: dict[str, tuple[float, float]]
    """Confidence intervals of those."""
    distinct_correct: float | None
    """Distinct correct completions among the samples of a prompt, mean over prompts."""
    truncated_share: float
    """Share of all completions that were cut."""
    tokens_mean: float
    """Tokens of a completion, mean over all completions."""
    prompts: int
    """Prompts, those without a scored sample included."""
    unscored: int
    """Completions without a verdict, which count neither as right nor as wrong."""
    unscored_prompts: int
    """Prompts left out because none of their samples was scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of one policy on a table of held-out prompts."""

    overall: Figures
    """Figures over the prompts of the headline slices."""
    headline: tuple[str, ...]
    """Names of the headline slices; empty for all."""
    slices: dict[str, Figures]
    """Figures of each slice."""
    sampling: Sampling
    """Settings that its completions were sampled with."""
    tokens: int
    """Completion tokens sampled."""
    seconds: float
    """Time spent sampling them."""
    verdicts: dict[str, dict[str, int]]
    """Verdicts by kind of each reward that counts them, as `Scorer.take_counts` has them."""
    prompt_accuracy: list[float | None]
    """Share of correct samples of every prompt of the table; None where none was scored."""

    def record(self) -> dict[str, Any]:
        """Record for metrics.jsonl: every figure, and the accuracy of each prompt (null where none was scored)."""
        return {
            **dataclasses.asdict(self.overall),
            **dataclasses.asdict(self.sampling),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds > 0 else None,
            "verdicts": self.verdicts,
            "headline": list(self.headline),
            "slices": {name: dataclasses.asdict(figures) for name, figures in self.slices.items()},
            "prompt_accuracy": [None if share is None else round(share, 6) for share in self.prompt_accuracy],
        }


def prompt_columns(table: PromptTable) -> dict[str, list[str]]:
    """Slice and id of every prompt, in the order of `prompt_accuracy`; prompts of the same text have the same id."""
    texts = [json.dumps(row.prompt, sort_keys=True).encode() for row in table.rows]
    return {
        "prompt_slices": [row.slice for row in table.rows],
        "prompt_ids": [hashlib.sha256(text).hexdigest()[:12] for text in texts],
    }


def evaluate(
    generator: Generator,
    table: PromptTable,
    *,
    score: Callable[[Sequence[PromptRow], Sequence[str]], list[float | None]],
    take_counts: Callable[[], dict[str, dict[str, int]]] = dict,
    decode: Callable[[list[int]], str],
    sampling: Sampling,
    headline: Sequence[str] = (),
    keep: Callable[[Sequence[Sample]], None] | None = None,
    vocabulary: int | None = None,
) -> Evaluation:
    """Sample every prompt of `table`, score the completions and compute the figures; `keep` receives every sample.

    `take_counts` is called before and after scoring, so that verdicts of training and evaluation are counted apart.
    Completions with ids outside `vocabulary` are unscored.
    """
    check_headline(headline, table)
    started = time.perf_counter()
    completions = _sample(generator, table, sampling)
    seconds = time.perf_counter() - started
    if vocabulary is not None:
        completions = without_unknown_ids(completions, vocabulary)
    rows = [row for row in table.rows for _ in range(sampling.samples)]
    texts = [decode(completion.token_ids) for completion in completions]
    take_counts()
    rewards = score_sampled(score, rows, texts, completions)
    verdicts = take_counts()
    samples = [
        Sample(
            row=row,
            text=text,
            reward=reward,
            vote=answer_key(row.reward, text),
            tokens=len(completion.token_ids),
            stopped=completion.stopped,
        )
        for row, text, reward, completion in zip(rows, texts, rewards, completions, strict=True)
    ]
    if keep is not None:
        keep(samples)
    groups = [samples[i : i + sampling.samples] for i in range(0, len(samples), sampling.samples)]
    names = dict.fromkeys(row.slice for row in table.rows)
    return Evaluation(
        overall=_figures([g for g in groups if not headline or g[0].row.slice in headline], sampling.seed),
        headline=tuple(headline),
        slices={name: _figures([g for g in groups if g[0].row.slice == name], sampling.seed) for name in names},
        sampling=sampling,
        tokens=sum(sample.tokens for sample in samples),
        seconds=seconds,
        verdicts=verdicts,
        prompt_accuracy=[_accuracy(group) for group in groups],
    )


def check_headline(headline: Sequence[str], table: PromptTable) -> None:
    """Raises InputError when `headline` names a slice that the held-out prompts do not have."""
    names = {row.slice for row in table.rows}
    missing = set(headline) - names
    if missing and names:
        raise InputError(f"--data.headline names {min(missing)!r}: give some of the held-out slices {sorted(names)}")


def _sample(generator: Generator, table: PromptTable, sampling: Sampling) -> list[Completion]:
    """`sampling.samples` completions per prompt, prompt by prompt; split into several calls above the token limit."""
    per_call = max(1, _MAX_TOKENS_PER_CALL // (sampling.samples * sampling.max_completion_tokens))
    completions: list[Completion] = []
    for start in range(0, len(table), per_call):
        if start:
            logger.info("evaluation: %d of %d prompts sampled", start, len(table))
        seed = stream_seed(sampling.seed, start, "evaluation call") if start else sampling.seed
        prompts = [row.token_ids for row in table.rows[start : start + per_call]]
        completions += generator.generate(prompts, dataclasses.replace(sampling, seed=seed))
    return completions


def _accuracy(group: Sequence[Sample]) -> float | None:
    marks = [sample.correct for sample in group if sample.reward is not None]
    return sum(marks) / len(marks) if marks else None


def _figures(groups: Sequence[Sequence[Sample]], seed: int) -> Figures:
    """Figures of some prompts, each with its samples."""
    everything = [sample for group in groups for sample in group]
    scored = [kept for group in groups if (kept := [sample for sample in group if sample.reward is not None])]
    passed, passed_interval, voted, voted_interval = _curves(scored, seed)
    return Figures(
        accuracy=passed.get("1"),
        accuracy_interval=passed_interval.get("1"),
        pass_at_8=passed.get("8"),
        pass_at_k=passed,
        pass_at_k_interval=passed_interval,
        maj_at_k=voted,
        maj_at_k_interval=voted_interval,
        distinct_correct=_mean([len({s.text for s in group if s.correct}) for group in scored]) if scored else None,
        truncated_share=_mean([not sample.stopped for sample in everything]),
        tokens_mean=_mean([sample.tokens for sample in everything]),
        prompts=len(groups),
        unscored=sum(sample.reward is None for sample in everything),
        unscored_prompts=len(groups) - len(scored),
    )


def _curves(groups: Sequence[Sequence[Sample]], seed: int) -> tuple[Any, Any, Any, Any]:
    """pass@k and maj@k by k, each with its intervals; empty without a scored prompt."""
    if not groups:
        return {}, {}, {}, {}
    least = min(len(group) for group in groups)
    ks = sorted({*(2**i for i in range(least.bit_length())), least})
    passed = pass_at_each([len(g) for g in groups], [sum(s.correct for s in g) for g in groups], least)
    voted = [[majority_at_k([s.vote for s in g], [s.correct for s in g], k) for k in ks] for g in groups]
    figures = np.hstack([passed, np.array(voted)])  # [P, least + number of ks]
    low, high = mean_intervals(figures, seed=seed)
    names = [str(k) for k in (*range(1, least + 1), *ks)]
    means = [float(mean) for mean in figures.mean(0)]
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return (
        dict(zip(names[:least], means[:least], strict=True)),
        dict(zip(names[:least], intervals[:least], strict=True)),
        dict(zip(names[least:], means[least:], strict=True)),
        dict(zip(names[least:], intervals[least:], strict=True)),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

"""Sampling and judging shared out over the ranks: each does its part of the batch, and all of them get the whole.

What a completion is depends on the seed and its place in the batch, so it is the same on any number of ranks, but for
rounding in batches of another size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from paced_fast.data.records import Completion, PromptRow
from paced_fast.distributed import World, joined
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation import Generator

T = TypeVar("T")

Scores = list[float | None]
Judge = Callable[[Sequence[PromptRow], Sequence[str]], Scores]


class SharedGenerator:
    """A generator on every rank as one: each samples a part of the prompts."""

    def __init__(
        self,
        own: Generator,
        world: World,
        engine_ranks: int = 1,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`own` is this rank's generator; all hold the same weights. `whole` is entered by all around a sampling.

        Of `engine_ranks` consecutive ranks that share an engine out, all ask it the same and the first one answers.
        """
        self.own, self.world, self.engine_ranks, self.whole = own, world, engine_ranks, whole

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
        """See `Generator.generate`; every rank gets all completions. What fails on one rank is raised on all."""
        rank, ways = self.world.rank, self.engine_ranks
        part = World(rank // ways, self.world.size // ways).share(len(prompts))
        with self.whole():
            completions = together(
                self.world,
                lambda: (
                    self.own.generate(
                        prompts[part.start : part.stop],
                        group_size=group_size,
                        max_completion_tokens=max_completion_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        seed=seed,
                        first=first + part.start,
                    )
                    if part
                    else []
                ),
            )
        return gather_completions(self.world, completions if rank % ways == 0 else [])

    def before_training(self) -> None:
        """See `Generator.before_training`."""
        together(self.world, self.own.before_training)

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`; the figures are this rank's."""
        return together(self.world, self.own.after_update)

    def close(self) -> None:
        """See `Generator.close`."""
        self.own.close()


def together(world: World, function: Callable[[], T], patient: bool = False) -> T:
    """What `function` returns; a TrainingError or InputError on one rank is raised on all, so that none waits.

    `patient`: the others may take far longer than an exchange should.
    """
    failure: Exception | None = None
    result: list[T] = []
    try:
        result.append(function())
    except (TrainingError, InputError) as error:
        failure = error
    if patient:
        world.wait()
    world.agree(failure)
    return result[0]


def gather_completions(world: World, own: Sequence[Completion]) -> list[Completion]:
    """The completions of all ranks, in order of rank."""
    if world.size == 1:
        return list(own)
    lengths = joined(world.gather(torch.tensor([len(c.token_ids) for c in own], dtype=torch.int64)))
    ids = joined(world.gather(torch.tensor([i for c in own for i in c.token_ids], dtype=torch.int64)))
    logprobs = joined(world.gather(torch.tensor([x for c in own for x in c.logprobs], dtype=torch.float64)))
    stopped = joined(world.gather(torch.tensor([c.stopped for c in own], dtype=torch.uint8)))
    found, start = [], 0
    for length, ended in zip(lengths, stopped, strict=True):
        cut = slice(start, start + length)
        found.append(Completion(token_ids=ids[cut], logprobs=logprobs[cut], stopped=bool(ended)))
        start += length
    return found


def gather_scores(world: World, own: Scores) -> Scores:
    """The rewards of all ranks, in order of rank; None, no verdict, travels as NaN, which no reward is."""
    if world.size == 1:
        return own
    coded = torch.tensor([float("nan") if score is None else score for score in own], dtype=torch.float64)
    return [None if score != score else score for score in joined(world.gather(coded))]


def shared_judge(world: World, judge: Judge) -> Judge:
    """`judge` over the ranks: each scores its part of the completions, and all get every score."""

    def score(rows: Sequence[PromptRow], texts: Sequence[str]) -> Scores:
        part = world.share(len(texts))
        cut = slice(part.start, part.stop)
        return gather_scores(world, together(world, lambda: judge(rows[cut], texts[cut])))

    return judge if world.size == 1 else score


def summed_counts(world: World, own: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Verdicts by kind of each reward, counted over all ranks."""
    if world.size == 1:
        return own
    total: dict[str, Counter[str]] = {}
    for text in world.gather_text(json.dumps(own)):
        for name, counts in json.loads(text).items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(counts) for name, counts in total.items()}

"""Scoring split over ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from paced_fast.data.distributed import World, joined
from paced_fast.data.records import PromptRow

Scores = list[float | None]


Judge = Callable[[Sequence[PromptRow], Sequence[str]], Scores]


def gather_scores(world: World, own: Scores) -> Scores:
    """Return the rewards of all ranks, in rank order. None (unscored) is sent as NaN, which is never a reward."""
    if world.size == 1:
        return own
    coded = torch.tensor([float("nan") if score is None else score for score in own], dtype=torch.float64)
    return [None if score != score else score for score in joined(world.gather(coded))]


def shared_judge(world: World, judge: Judge) -> Judge:
    """Return `judge` split over the ranks: each rank scores its share of the completions and receives all scores."""

    def score(rows: Sequence[PromptRow], texts: Sequence[str]) -> Scores:
        part = world.share(len(texts))
        cut = slice(part.start, part.stop)
        with world.agreement():
            own = judge(rows[cut], texts[cut])
        return gather_scores(world, own)

    return judge if world.size == 1 else score


def summed_counts(world: World, own: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return the verdicts by kind of each reward, summed over all ranks."""
    if world.size == 1:
        return own
    total: dict[str, Counter[str]] = {}
    for text in world.gather_text(json.dumps(own)):
        for name, counts in json.loads(text).items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(counts) for name, counts in total.items()}

"""Idle time of ranks that sample together: a simulation of who takes which prompts when.

A pass takes as long on every rank and for any number of sequences, so that times are counted in token positions. G =
completions per prompt.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from paced_fast.config import Config
from paced_fast.data.distributed import Queue, World

_STEPS = 16
"""Steps that are simulated."""
_MEAN_SHARE = 0.25
"""Mean length of the completions of a prompt, as a share of the limit."""


class Sampler(NamedTuple):
    """How a rank decodes: `most` prompts at once; one by one as sequences end, or batch after batch."""

    most: int
    refills: bool


def drawn_lengths(config: Config, seed: int) -> list[list[int]]:
    """Lengths of a step's completions, prompt by prompt.

    Hard prompts have long ones: a prompt's mean is exponential with a quarter of the limit as its mean, and lengths are
    spread evenly from half of it to one and a half, cut at the limit.
    """
    generation = config.generation
    source = torch.Generator().manual_seed(seed)
    shape, limit = (generation.prompts_per_step, generation.group_size), generation.max_completion_tokens
    means = -torch.rand(shape[0], 1, generator=source, dtype=torch.float64).clamp(min=1e-12).log() * _MEAN_SHARE * limit
    spread = 0.5 + torch.rand(shape, generator=source, dtype=torch.float64)
    return (means * spread).ceil().clamp(1, limit).long().tolist()


def ends(lengths: Sequence[Sequence[int]], ranks: int, sampler: Sampler, *, queued: bool) -> list[int]:
    """Token position at which each rank has finished its last completion; `lengths` are those of every prompt's."""
    shared, shares = Queue(), [World(rank, ranks).share(len(lengths)) for rank in range(ranks)]
    own, group = [Queue() for _ in range(ranks)], len(lengths[0])
    running: list[list[int]] = [[] for _ in range(ranks)]  # ends of the unfinished sequences, a heap each
    result = [0] * ranks

    def begun(rank: int, now: int) -> Iterator[int]:
        """Ends of the completions that the rank begins at `now`."""
        room = sampler.most - -(-len(running[rank]) // group)
        if room <= 0 or (running[rank] and not sampler.refills):
            return
        if queued:
            taken = shared.take(room, len(lengths))
        else:
            taken = [shares[rank][i] for i in own[rank].take(room, len(shares[rank]))]
        yield from (now + length for prompt in taken for length in lengths[prompt])

    waiting = [(0, rank) for rank in range(ranks)]  # when something next happens on each rank
    while waiting:
        now, rank = heapq.heappop(waiting)
        while running[rank] and running[rank][0] <= now:
            heapq.heappop(running[rank])
        for end in list(begun(rank, now)):
            heapq.heappush(running[rank], end)
        if running[rank]:
            heapq.heappush(waiting, (running[rank][0], rank))
        else:
            result[rank] = now
    return result


def share(found: Sequence[int]) -> float:
    """Share of all ranks' time until the last has finished in which a rank has nothing to do."""
    return 1.0 - sum(found) / (len(found) * max(found)) if max(found) else 0.0


def shares(config: Config, ranks: int, at_once: int) -> dict[str, float]:
    """Idle share of `ranks` generators that decode `at_once` sequences each, by `--distributed.prompts`."""
    generation = config.generation
    most = max(1, min(at_once // generation.group_size, -(-generation.prompts_per_step // ranks)))
    steps, sampler = [drawn_lengths(config, seed) for seed in range(_STEPS)], Sampler(most, config.generator == "vllm")
    return {
        name: statistics.fmean(share(ends(lengths, ranks, sampler, queued=name == "queue")) for lengths in steps)
        for name in ("queue", "parts")
    }

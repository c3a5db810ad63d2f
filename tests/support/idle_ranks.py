"""Idle time of 2 and 4 ranks that sample prompts from a shared queue or in equal parts: measured beside simulated.

    PYTHONPATH=.:kernels:tests/support python tests/support/idle_ranks.py

Ranks exchange by gloo and a real queue. A token position is a pause instead of a pass, so that ranks on few cores do
not slow each other down.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import tiny_policy

from benchmarks.ranks import on_ranks
from paced_fast.data.distributed import Queue, World
from paced_fast.data.records import Completion
from paced_fast.generation import Sampling
from paced_fast.generation.over_ranks import SharedGenerator
from paced_fast.run.plan import idle

PROMPTS, GROUP, LIMIT, AT_ONCE, STEPS = 64, 4, 1000, 8, 3
POSITION_SECONDS = 5e-4
CONFIG = tiny_policy.settings(
    generation__prompts_per_step=PROMPTS, generation__group_size=GROUP, generation__max_completion_tokens=LIMIT
)


class Pausing:
    """A generator whose completions have given lengths; a batch of `AT_ONCE` sequences lasts as long as its longest."""

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self.lengths, self.seconds = lengths, 0.0

    def generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0) -> list[Completion]:
        found = self.generate_taken(Queue(), prompts, sampling, first=first)
        return [completion for i in range(len(prompts)) for completion in found[i]]

    def generate_taken(
        self, queue: Queue, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0
    ) -> dict[int, list[Completion]]:
        started, found = time.perf_counter(), {}
        while taken := queue.take(AT_ONCE // sampling.samples, len(prompts)):
            lengths = {i: self.lengths[first + i] for i in taken}
            time.sleep(POSITION_SECONDS * max(max(own) for own in lengths.values()))
            for i, own in lengths.items():
                found[i] = [Completion(token_ids=[i] * n, logprobs=[0.0] * n, stopped=True) for n in own]
        self.seconds = time.perf_counter() - started
        return found


def sampled(world: World, deal: Any, seed: int) -> tuple[float, list[int]]:
    """Seconds in which this rank was sampling, and the lengths of all completions."""
    own: Any = Pausing(idle.drawn_lengths(CONFIG, seed))
    shared = SharedGenerator(own, world, deal=deal)
    world.wait()
    completions = shared.generate(
        [(1,)] * PROMPTS, Sampling(samples=GROUP, max_completion_tokens=LIMIT, temperature=1.0)
    )
    return own.seconds, [len(completion.token_ids) for completion in completions]


def main() -> None:
    for ranks in (2, 4):
        for deal in ("parts", "queue"):
            measured, simulated, seconds = [], [], []
            for seed in range(STEPS):
                found = on_ranks(ranks, sampled, deal, seed)
                lengths = idle.drawn_lengths(CONFIG, seed)
                assert all(own == [n for group in lengths for n in group] for _, own in found)
                measured.append(1 - sum(busy for busy, _ in found) / (ranks * max(busy for busy, _ in found)))
                ends = idle.ends(lengths, ranks, idle.Sampler(AT_ONCE // GROUP, False), queued=deal == "queue")
                simulated.append(idle.share(ends))
                seconds.append(max(busy for busy, _ in found))
            sys.stdout.write(
                f"{ranks} ranks, {deal}: idle {statistics.fmean(measured):.1%} (simulated "
                f"{statistics.fmean(simulated):.1%}), {statistics.fmean(seconds):.2f} s until the last has finished\n"
            )


if __name__ == "__main__":
    main()

"""Generation split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from transformers import PreTrainedModel

from paced_fast.data.distributed import Queue, World, joined
from paced_fast.data.records import Completion
from paced_fast.generation import Generator, Sampling, TransformersGenerator

Deal = Literal["queue", "parts"]


class SharedGenerator:
    """Combines the generators of all ranks: each samples a part of the prompts.

    By default the ranks take prompts from a queue, so that one with short completions takes more of them.
    """

    def __init__(
        self,
        own: Generator,
        world: World,
        engine_ranks: int = 1,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
        deal: Deal = "queue",
    ) -> None:
        """`own` is this rank's generator; all hold the same weights. Every rank enters `whole` while completions are
        sampled.

        Each engine is split over `engine_ranks` consecutive ranks: all of them make the same call, and the first one's
        completions are used. Such engines always have equal parts of the prompts, because their ranks cannot take
        from a queue together.
        """
        self.own, self.world, self.engine_ranks, self.whole = own, world, engine_ranks, whole
        self.deal = deal if engine_ranks == 1 else "parts"
        self.progress: Callable[[], object] = lambda: None
        own.progress = lambda: self.progress()

    def generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0) -> list[Completion]:
        """See `Generator.generate`; every rank gets all completions. An error on one rank is raised on all."""
        if self.deal == "queue":
            return self._generate_queued(prompts, sampling, first=first)
        rank, ways = self.world.rank, self.engine_ranks
        part = World(rank // ways, self.world.size // ways).share(len(prompts))
        completions: list[Completion] = []
        with self.whole(), self.world.agreement():
            if part:
                completions = self.own.generate(prompts[part.start : part.stop], sampling, first=first + part.start)
        return gather_completions(self.world, completions if rank % ways == 0 else [])

    def _generate_queued(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int
    ) -> list[Completion]:
        found: dict[int, list[Completion]] = {}
        with self.whole(), self.world.agreement():
            found = self.generate_taken(self.world.queue(), prompts, sampling, first=first)
        places = joined(self.world.gather(torch.tensor(list(found), dtype=torch.int64)))
        gathered = gather_completions(self.world, [completion for group in found.values() for completion in group])
        start = {place: k * sampling.samples for k, place in enumerate(places)}
        return [gathered[start[i] + j] for i in range(len(prompts)) for j in range(sampling.samples)]

    def generate_taken(
        self, queue: Queue, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0
    ) -> dict[int, list[Completion]]:
        """See `Generator.generate_taken`; this rank's completions. After an error no rank takes more."""
        try:
            return self.own.generate_taken(queue, prompts, sampling, first=first)
        except BaseException:
            queue.close()
            raise

    def before_training(self) -> None:
        """See `Generator.before_training`."""
        with self.world.agreement():
            self.own.before_training()

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`; the figures are this rank's."""
        with self.world.agreement():
            figures = self.own.after_update()
        return figures

    def close(self) -> None:
        """See `Generator.close`."""
        self.own.close()


def samples_exactly(generator: Generator, model: PreTrainedModel) -> bool:
    """Whether a generator's log-probs are those of `model` up to rounding in float32: it decodes with that model on a
    CPU. A GPU may round the operands of float32 products, and bfloat16 rounds whatever the device."""
    own = generator.own if isinstance(generator, SharedGenerator) else generator
    is_same = isinstance(own, TransformersGenerator) and own.model is model
    return is_same and model.device.type == "cpu" and model.dtype == torch.float32


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

"""Collect a batch for drawn prompts: completions, rewards, packed rollouts.

P = prompts drawn, G = completions per prompt, B = P * G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from paced_fast.config import Config, stream_seed
from paced_fast.data import packing, prompts
from paced_fast.data.distributed import ALONE, World
from paced_fast.data.records import Completion, Fresh, Group, GroupSource, PromptRow, PromptTable
from paced_fast.data.transfer import to_device
from paced_fast.errors import EVERYWHERE, UnscoredError
from paced_fast.generation import Generator, Sampling
from paced_fast.generation.interface import without_unknown_ids
from paced_fast.generation.over_ranks import samples_exactly
from paced_fast.paced.targets import group_accuracy
from paced_fast.rewards import Scorer, Shaper
from paced_fast.rewards.over_ranks import Scores, gather_scores
from paced_fast.rewards.scorer import score_sampled
from paced_fast.rewards.shaping import centred

Phase = Callable[[str], AbstractContextManager[None]]
"""Context manager that enters the named phase of a step, so that its time can be measured."""


def untimed(name: str) -> AbstractContextManager[None]:
    """`Phase` without measurement."""
    del name
    return nullcontext()


class Collector:
    """Samples groups of completions for prompts, scores them, and packs them.

    With several ranks `generator` returns the whole batch on every rank (`generation.over_ranks`), and each rank scores
    its part.
    """

    def __init__(
        self,
        config: Config,
        *,
        generator: Generator,
        scorer: Scorer,
        shaper: Shaper,
        decode: prompts.Decoder,
        table: PromptTable,
        vocabulary: int,
        device: torch.device,
        world: World = ALONE,
        recorded: GroupSource | None = None,
        phase: Phase = untimed,
    ) -> None:
        """`vocabulary`: ids below it are tokens. With `recorded`, groups are read from it and nothing is sampled."""
        self.config, self.table, self.decode, self.vocabulary = config, table, decode, vocabulary
        self.generator, self.scorer, self.shaper = generator, scorer, shaper
        self.device, self.world, self.recorded, self.phase = device, world, recorded, phase

    def samples_exactly(self, model: PreTrainedModel) -> bool:
        """Whether the log-probs of what is sampled are those of `model` up to rounding in float32; recorded rollouts
        are taken for those of this run's generator, so that a replayed run has the bits of the first."""
        return samples_exactly(self.generator, model)

    def groups(self, prompt_index: Sequence[int], step: int, round_: int = 0) -> list[Group]:
        """Sample and score one group per prompt. Raises UnscoredError when too many rewards failed."""
        if self.recorded is not None:
            return self.recorded.groups(step, round_)
        config, size = self.config.generation, self.config.generation.group_size
        rows = self.table.select(prompt_index)
        sampling = Sampling(
            samples=size,
            max_completion_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            seed=stream_seed(self.config.seed, step, f"generate/{round_}"),
        )
        with self.phase("generate"):
            completions = self.generator.generate([row.token_ids for row in rows], sampling)
            completions = without_unknown_ids(completions, self.vocabulary)
        with self.phase("reward"):
            part = self.world.share(len(completions))
            own = slice(part.start, part.stop)
            each = [row for row in rows for _ in range(size)]
            with self.world.agreement():
                rewards, shaping = self.judge(each[own], completions[own])
            rewards = gather_scores(self.world, rewards)
            shaping = [x or 0.0 for x in gather_scores(self.world, [*shaping])]
        cuts = [slice(k * size, (k + 1) * size) for k in range(len(rows))]
        return [
            Group(i, completions[cut], rewards[cut], shaping[cut]) for i, cut in zip(prompt_index, cuts, strict=True)
        ]

    def judge(self, rows: Sequence[PromptRow], completions: Sequence[Completion]) -> tuple[Scores, list[float]]:
        """Score this rank's part; returns rewards, and shaping terms (empty without shaping functions)."""
        texts = [self.decode(completion.token_ids) for completion in completions]
        rewards = score_sampled(self.scorer.score, rows, texts, completions)
        self.scorer.check_failures()
        limit = self.config.generation.max_completion_tokens
        return rewards, self.shaper.shape(rows, texts, completions, limit) if self.shaper else []

    def pack(self, groups: list[Group], dropped: list[Group], step: int) -> Fresh:
        """Pack the batch of P `groups` on the device. Raises UnscoredError when no completion has a verdict."""
        size = self.config.generation.group_size
        index = [group.prompt_index for group in groups]
        each = [i for i in index for _ in range(size)]
        completions = [completion for group in groups for completion in group.completions]
        rewards = [reward for group in groups for reward in group.rewards]
        if all(reward is None for reward in rewards):
            error = UnscoredError(f"no completion of step {step} could be scored: the warnings above say why")
            error.add_note(EVERYWHERE)  # every rank has all rewards
            raise error
        shaping = [x for g in groups if g.shaping for x in centred(g.shaping, [r is not None for r in g.rewards])]
        prompt_ids = [self.table.rows[i].token_ids for i in each]
        with self.phase("pack"):
            rollouts = packing.pack(completions, prompt_ids, each, rewards, step, self.device, shaping)
            scored = to_device(list(rollouts.scored), torch.bool, self.device)
            return Fresh(
                rollouts=rollouts,
                groups=groups,
                dropped=dropped,
                prompt_index=to_device(index, torch.int64, self.device),
                accuracy=group_accuracy(rollouts.rewards, scored, size),
                scored=scored,
            )

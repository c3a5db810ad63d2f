"""`--quick` for the cases that train: the same run in a few seconds, to check that everything works."""

from __future__ import annotations

import dataclasses
import re

from paced_fast.config import Config

_SUMS = "rg:chain_sum?size={size}&seed={seed}&min_terms=2&max_terms=2&min_digits=1&max_digits=1&reward=number"


def quick(config: Config) -> Config:
    """Return `config` with one or two steps of a few rollouts, a warm start of two steps and hardly any evaluation.

    The preset `tiny` keeps its data and `small` its easiest task; other models get sums, one step of short completions,
    and no warm start.
    """
    small = {
        "steps": 2,
        "generation": dataclasses.replace(config.generation, prompts_per_step=2, group_size=4),
        "scheduler": dataclasses.replace(config.scheduler, warmup_steps=1),
        "replay": dataclasses.replace(config.replay, insert_per_step=2, draw_per_step=2),
        "evaluation": dataclasses.replace(config.evaluation, every=1, samples=8, final_samples=8),
        "run": dataclasses.replace(config.run, threads=1),
        "optimizer": dataclasses.replace(config.optimizer, warmup_steps=0),
    }
    steps = 2 if config.model.name == "tiny" else 0
    phases = {
        name: dataclasses.replace(
            (phase := getattr(config.warm_start, name)),
            steps=steps if phase.sources else 0,
            batch_size=8,
            warmup_steps=0,
            sources=tuple(re.sub(r"size=\d+", "size=100", source) for source in phase.sources),
        )
        for name in ("first", "second")
    }
    small["warm_start"] = dataclasses.replace(config.warm_start, **phases)
    if config.model.name == "tiny" and config.model.alphabet == "ascii":
        sources = {"train": config.data.train[:1], "eval": config.data.eval[:1], "headline": ()}
    elif config.model.name == "tiny":
        sources = {"train": ("task:signed_sums?split=train&size=200&seed=42",)}
    else:
        small |= {"steps": 1, "evaluation": dataclasses.replace(small["evaluation"], every=0)}
        small["generation"] = dataclasses.replace(small["generation"], max_completion_tokens=16)
        sources = {
            "train": (_SUMS.format(size=8, seed=1),),
            "eval": (_SUMS.format(size=2, seed=2),),
            "headline": (),
        }
    return dataclasses.replace(config, **small, data=dataclasses.replace(config.data, **sources))

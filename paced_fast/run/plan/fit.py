"""What a run spends memory on: of the ways to train that the settings leave open, the fastest that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from paced_fast.config import Config
from paced_fast.policy.shape import ModelShape
from paced_fast.run.plan import memory
from paced_fast.run.plan.memory import Layout

SHARE_OF_DEVICE = 0.85
"""Share of a device's memory that the plan may use; the rest is for fragmentation, communication buffers and graphs."""


_Plan = Callable[["Way"], dict[str, int]]


class Way(NamedTuple):
    """One way to train: how parameters and gradients lie on the ranks, and whether layers are computed again."""

    mode: memory.Mode
    gradients: memory.Gradients
    recompute: Literal["on", "off"]

    def config(self, config: Config) -> Config:
        """The settings with this way's gradient checkpointing."""
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, gradient_checkpointing=self.recompute)
        )

    def layout(self, layout: Layout) -> Layout:
        """The ranks with this way's mode."""
        return dataclasses.replace(layout, mode=self.mode, gradients=self.gradients)


class Fit(NamedTuple):
    """The chosen way as settings and layout, with the reasons for both in a sentence each."""

    config: Config
    layout: Layout
    mode: str
    recompute: str


def choose(config: Config, shape: ModelShape, num_prompts: int, layout: Layout, *, can_recompute: bool = True) -> Fit:
    """The fastest way that fits in `SHARE_OF_DEVICE` of the memory that the layout knows, or else the smallest.

    `can_recompute`: whether the model has layers that can be computed again.
    """

    def plan(way: Way) -> dict[str, int]:
        return memory.at_a_time(memory.plan(shape, way.config(config), num_prompts, way.layout(layout)))

    ways = _ways(config, layout, can_recompute=can_recompute)
    limit = None if layout.device_bytes is None else int(SHARE_OF_DEVICE * layout.device_bytes)
    chosen = next((way for way in ways if limit is None or sum(plan(way).values()) <= limit), ways[-1])
    return Fit(
        config=chosen.config(config),
        layout=chosen.layout(layout),
        mode=_mode_reason(config, layout.ranks, chosen, ways, plan, limit),
        recompute=_recompute_reason(config, chosen, plan(chosen._replace(recompute="off")), limit, can_recompute),
    )


def _ways(config: Config, layout: Layout, *, can_recompute: bool) -> list[Way]:
    """What the settings leave open, the fastest first."""
    recompute = config.model.gradient_checkpointing
    again: list[Literal["on", "off"]] = ["off", "on"] if recompute == "auto" else [recompute]
    if recompute == "auto" and (config.model.device == "cpu" or not can_recompute):
        again = ["off"]  # a host has memory that the plan does not count, and fewer tokens than the plan's limits
    asked = config.distributed.gradients
    gradients: list[memory.Gradients] = ["whole", "split"] if asked == "auto" else [asked]
    if layout.ranks == 1:
        return [Way("replicated", "whole", each) for each in again]
    replicated = [Way("replicated", each, other) for other in again for each in gradients]
    if layout.nodes > 1:  # between machines an exchange per micro-batch takes longer than another forward pass
        replicated = [Way("replicated", each, other) for each in gradients for other in again]
    sharded = [Way("sharded", "split", each) for each in again]
    return {"auto": replicated + sharded, "replicated": replicated, "sharded": sharded}[config.distributed.mode]


def _mode_reason(config: Config, ranks: int, chosen: Way, ways: list[Way], plan: _Plan, limit: int | None) -> str:
    split = ", with split gradients" if chosen.mode == "replicated" and chosen.gradients == "split" else ""
    if ranks == 1:
        return "replicated: one process holds everything"
    if config.distributed.mode != "auto":
        return f"{chosen.mode}, as --distributed.mode says{split}"
    if limit is None:
        return f"{chosen.mode}{split}: the memory of the device is not known"
    tried = chosen if chosen.mode == "replicated" else [way for way in ways if way.mode == "replicated"][-1]
    parts = plan(tried)
    largest = max(parts, key=lambda name: parts[name])
    owned = "gradients and optimiser's state" if tried.gradients == "split" else "the optimiser's state"
    return (
        f"{chosen.mode}{split}: all parameters and 1/{ranks} of {owned} need "
        f"{_gib(sum(parts.values()))} per rank ({_gib(parts[largest])} of it for {largest}), "
        f"{_beside(sum(parts.values()), limit)}"
    )


def _recompute_reason(
    config: Config, chosen: Way, without: Mapping[str, int], limit: int | None, can_recompute: bool
) -> str:
    if config.model.gradient_checkpointing != "auto":
        return f"{chosen.recompute}, as --model.gradient-checkpointing says"
    if config.model.device == "cpu":
        return "off: on a CPU it is on demand only"
    if not can_recompute:
        return "off: this model has no layers that can be computed again"
    if limit is None:
        return f"{chosen.recompute}: the memory of the device is not known"
    needed = sum(without.values())
    return f"{chosen.recompute}: without it a rank needs {_gib(needed)}, {_beside(needed, limit)}"


def _beside(needed: int, limit: int) -> str:
    """The limit, and on which side of it the need is."""
    where = "within" if needed <= limit else "more than"
    return f"{where} {_gib(limit)}, {SHARE_OF_DEVICE:.0%} of the device's memory"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"

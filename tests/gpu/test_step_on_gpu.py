"""A training step on a GPU: the host never waits between its crossings, and what can be captured replays as it ran.

N = prompts, P = prompts drawn in a step, G = completions of each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paced_fast.config import LogZConfig, ReplayConfig, SchedulerConfig
from paced_fast.config.resolve import resolve_log_z
from paced_fast.data.records import Rollouts
from paced_fast.paced.log_z import LogZ
from paced_fast.paced.replay import ReplayBuffer
from paced_fast.paced.scheduler import PromptScheduler

DEVICE = torch.device("cuda")
PROMPTS = 5000
DRAWN, GROUP, LENGTH = 16, 4, 6
REPLAYS = 100


class Schedule:
    """Scheduler, replay and head around made-up completions: everything of a step but the policy."""

    def __init__(self, rule: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.now = torch.zeros((), dtype=torch.int64, device=DEVICE)
        embeddings = torch.randn(PROMPTS, 8, generator=generator).to(DEVICE)
        settings = resolve_log_z(LogZConfig(hidden_size=16, scored_per_step=900), remembers=True)
        self.head = LogZ(embeddings, settings, seed=1, bounded=True)
        config = SchedulerConfig(rule=rule, warmup_steps=3, max_visits=2)  # type: ignore[arg-type]
        self.scheduler = PromptScheduler(PROMPTS, config, seed=2, device=DEVICE)
        replay = ReplayConfig(max_age=6)
        self.replay = ReplayBuffer(replay, max_completion_tokens=LENGTH, seed=3, device=DEVICE)
        num = DRAWN * GROUP
        self.cu_seqlens = torch.arange(0, num * LENGTH + 1, LENGTH, dtype=torch.int32, device=DEVICE)
        self.tokens = torch.arange(num * LENGTH, device=DEVICE)
        self.truth = torch.rand(PROMPTS, generator=generator).to(DEVICE)

    def step(self) -> tuple[Tensor, ...]:
        """One step; all of it on the device."""
        self.now += 1
        values = self.head.score()
        chosen = self.replay.choose(PROMPTS, self.now)
        drawn = self.scheduler.draw(DRAWN, self.now, values)
        index = drawn.repeat_interleave(GROUP)
        self.head.rescore(index)
        # Right or wrong by a hash of prompt, step and sample.
        noise = ((index * 7919 + self.now * 104729 + torch.arange(len(index), device=DEVICE) * 31) % 1000) / 1000
        rewards = (noise < self.truth[index]).float()
        accuracy = rewards.view(DRAWN, GROUP).mean(1)
        rollouts = Rollouts(
            token_ids=self.tokens,
            cu_seqlens=self.cu_seqlens,
            lengths=(LENGTH,) * len(index),
            prompt_ids=((1,),) * len(index),
            prompt_index=index,
            rewards=rewards,
            generator_logprobs=-noise.repeat_interleave(LENGTH).float(),
            policy_version=self.now.expand(len(index)),
        )
        groups, eight = index[::GROUP], torch.full_like(accuracy, GROUP)
        self.head.observe(groups, accuracy * GROUP, eight, accuracy)
        loss, norm = self.head.fit(index, rewards, groups=len(groups))
        self.scheduler.observe(drawn, accuracy)
        self.replay.insert(rollouts, values, accuracy.repeat_interleave(GROUP))
        return drawn, chosen, values, loss, norm

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on."""
        parts = {"scheduler": self.scheduler, "replay": self.replay, "head": self.head}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def error_on_wait(function: Callable[[], Any]) -> Any:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["tree", "greedy", "mopps", "history", "uniform"])
def test_a_schedule_never_waits_and_its_replays_equal_eager_steps(rule: str) -> None:
    captured, eager = Schedule(rule), Schedule(rule)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured.step()
    for replay in range(REPLAYS):
        graph.replay()
        for found, expected in zip(results, error_on_wait(eager.step), strict=True):
            assert torch.equal(found, expected), replay
    found, expected = captured.state(), eager.state()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert int(captured.now) == REPLAYS + 3
    assert len(captured.scheduler.visits.nonzero()) > DRAWN


def stepper_on_gpu(folder: Path, *arguments: str, **changes: Any) -> Any:
    """A whole trainer; skips where its packages are missing, which the rest of these tests does not need."""
    for name in ("transformers", "tyro", "rich", "nvtx", "safetensors", "math_verify", "reasoning_gym"):
        pytest.importorskip(name)
    import tiny_run

    settings = tiny_run.config(tiny_run.write_rewards(folder), *arguments, model__device="cuda", **changes)
    return tiny_run.build(settings, folder / "run").stepper


@pytest.mark.parametrize("algorithm", ["paced", "tb_group", "flowrl", "grpo"])
def test_learning_from_a_batch_never_waits(algorithm: str, tmp_path: Path) -> None:
    """Between the copies to the device and the one of the figures, with the real policy and the real loss."""
    stepper = stepper_on_gpu(tmp_path, algorithm, optimizer__micro_batch_tokens=64, mismatch__mode="token_mask")
    for _ in range(4):
        stepper.step()  # replay is filled, kernels are compiled
    try:
        result = stepper.trainer.step(5, stepper.counters.num_updates, lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(result.update.taken) == 2
    assert result.rollouts.num_sequences > 16 or algorithm != "paced"


def test_phases_are_charged_for_the_work_they_launch(tmp_path: Path) -> None:
    stepper = stepper_on_gpu(tmp_path)
    for _ in range(3):
        record = stepper.step().record
    seconds = record.seconds
    phases = {"generate", "reward", "pack", "old_logprobs", "update", "head", "schedule", "replay", "metrics"}
    assert phases <= set(seconds)
    assert all(value >= 0 for value in seconds.values())
    assert seconds["update"] > seconds["metrics"]

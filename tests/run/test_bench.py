"""Timed steps on random rollouts: it is the trainer's step, the figures add up, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import tiny_run
import torch

from paced_fast import train
from paced_fast.config import Config
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.data.distributed import World
from paced_fast.data.records import PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.generation import TransformersGenerator
from paced_fast.paced.trainer import Trainer
from paced_fast.run.plan import bench, devices
from paced_fast.run.plan.devices import DEVICES

PEAK = 1e9


@pytest.fixture(autouse=True)
def _known_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = dataclasses.replace(DEVICES["4090"], name="cpu", float32_flops=PEAK, capability=None)
    monkeypatch.setattr(devices, "measured_cpu", lambda dtype: made)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)


def small(tmp_path: Path, **changes: Any) -> Config:
    return resolve(tiny_run.config(tmp_path / "rewards.py", **changes))


def test_it_is_the_trainers_step_and_nobody_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    own = Trainer.step

    def step(self: Trainer, number: int, *rest: Any) -> Any:
        steps.append(number)
        return own(self, number, *rest)

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("nothing is sampled")

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(TransformersGenerator, "generate", refuse)
    result = bench.measure(small(tmp_path), steps=3, lengths="full")
    assert steps == [1, 2, 3]
    assert result["steps"] == 2, "the first step warms up"
    assert {"old_logprobs", "update", "head", "replay"} <= result["seconds"].keys()
    assert all(loss == loss for loss in result["loss"])
    # 16 completions of 5 tokens to 4 prompts of 12; the median step is as fast as its tokens.
    assert (
        result["tokens_per_second"] * result["step_seconds_most"]
        >= 80
        >= (result["tokens_per_second"] * result["step_seconds_least"])
    )
    assert result["row_tokens_per_second"] / result["tokens_per_second"] == pytest.approx((80 + 48) / 80, rel=1e-6)
    assert result["mfu"] == result["model_flops_per_second"] / PEAK
    assert result["peak_bytes"]["update"] > 1 << 20


def test_model_operations_by_hand(tmp_path: Path) -> None:
    """Two prompts of 3 tokens with two completions each: rows of 3 + 5 and 3 + 4 tokens."""
    config = small(tmp_path, algorithm="tb")
    shape = bench.shape_of(tiny_policy.model())
    rows = [PromptRow(prompt="", token_ids=(i, 1, 2), reward="none", slice="s", columns={}) for i in range(2)]
    groups = [
        bench.Group(i, [bench.Completion(token_ids=[1] * n, logprobs=[0.0] * n, stopped=True) for n in each], [], [])
        for i, each in enumerate(((2, 3), (4, 0)))
    ]
    work = bench._totals(PromptTable(rows=tuple(rows)), groups)
    pairs = 2 * 4 + (2 * 3 + 2) + (3 * 3 + 4) + (4 * 3 + 8)
    assert dataclasses.astuple(work) == (15, 9, pairs)
    body = 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    forward = 2 * body * 15 + 4 * 2 * 16 * pairs + 2 * 11 * 16 * 9
    assert config.optimizer.minibatches == 2, "so half of the old log-probs take a pass"
    assert bench._model_flops(shape, config, work) == 3.5 * forward
    flowrl = bench._model_flops(shape, small(tmp_path, algorithm="flowrl"), work)
    assert flowrl == 4.5 * forward, "the reference's log-probs as well"


def test_rollouts_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    config = small(tmp_path)
    rows = [PromptRow(prompt="", token_ids=(i,), reward="none", slice="s", columns={}) for i in range(20)]
    table = PromptTable(rows=tuple(rows))

    def groups(step: int, lengths: str = "even") -> Any:
        return bench.RandomRollouts(config, table, 17, lengths=lengths).groups(step)

    assert groups(1) == groups(1) != groups(2)
    completions = [c for step in range(1, 9) for group in groups(step) for c in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    assert {1, 5} == {min(lengths), max(lengths)}
    assert abs(sum(lengths) / len(lengths) - 3) < 0.5
    assert all(len(c.token_ids) == len(c.logprobs) for c in completions)
    assert {len(c.token_ids) for group in groups(1, "full") for c in group.completions} == {5}
    assert len({group.prompt_index for group in groups(1)}) == 4


def test_several_ranks_are_timed_replicated_or_not_at_all(tmp_path: Path) -> None:
    config = small(tmp_path, distributed__mode="sharded")
    with pytest.raises(InputError, match=r"^--bench with 2 processes supports replicated parameters only"):
        bench.measure(config, steps=1, lengths="full", world=World(0, 2))
    assert bench.measure(config, steps=1, lengths="full")["mode"] == "replicated", "a process alone shards nothing"


@pytest.mark.parametrize("algorithm", ["grpo", "flowrl"])
def test_other_algorithms_are_timed_too(tmp_path: Path, algorithm: str) -> None:
    result = bench.measure(small(tmp_path, algorithm=algorithm), steps=1, lengths="even")
    assert result["steps"] == 1
    assert result["mfu"] > 0
    assert result["estimated_seconds"] == {}, "an estimate is of full lengths"


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    words = [
        "tiny",
        "--generation.prompts-per-step",
        "4",
        "--run.threads",
        "1",
        "--bench",
        "2",
        "--bench-json",
        "b.json",
    ]
    train.main(words)
    text = capsys.readouterr().out
    for expected in (
        "training steps on random rollouts",
        "completion tokens/s",
        "update",
        "times the estimate of",
        "random weights",
        "1 rank, replicated",
    ):
        assert expected in text
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["parameters"] == 224_928
    assert result["estimated_seconds"].keys() == {"old_logprobs", "update"}
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"], "no run folder"
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny", "--bench", "--bench-json", "nowhere/b.json"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: --bench-json nowhere/b.json: the folder nowhere does not exist: create it first\n"
    )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_step_of_smollm2_without_its_weights(tmp_path: Path) -> None:
    config = tiny_policy.replaced(
        preset("smollm2"), generation__prompts_per_step=2, generation__group_size=2, data__max_prompt_tokens=16
    )
    result = bench.measure(resolve(config), steps=1, lengths="full")
    assert result["parameters"] == 134_515_008
    assert result["seconds"]["update"] > 0

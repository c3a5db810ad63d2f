"""Rollouts in a file: a replayed run ends with the recorded run's parameters, and a bad file is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import tiny_run
import torch
from safetensors.torch import load_file

from paced_fast import train
from paced_fast.config import Config
from paced_fast.data.records import Completion, Group, PromptRow, PromptTable
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation import TransformersGenerator
from paced_fast.run.record.rollouts_file import FILE_NAME, RecordedRollouts, Recorder, replayed_settings

STEPS = 3


def settings(rewards: Path, folder: Path, **changes: Any) -> Config:
    made = tiny_run.config(
        rewards, steps=STEPS, run__save_rollouts=True, run__checkpoint_every=2, replay__draw_per_step=4, **changes
    )
    return dataclasses.replace(made, run_dir=str(folder))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A recorded run of three steps with replay, shaping and completions without a verdict."""
    folder = tmp_path_factory.mktemp("recorded")
    config = settings(tiny_run.write_rewards(folder), folder / "run", reward__shaping=("0.1*length",))
    train.run(config, tiny_run.quiet())
    return config, folder / "run"


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = folder / "checkpoints" / f"step_{STEPS:06d}"
    return load_file(newest / "policy" / "model.safetensors") | load_file(newest / "state.safetensors")


def replay(config: Config, file: Path, folder: Path) -> Path:
    again = dataclasses.replace(config, run_dir=str(folder), run=dataclasses.replace(config.run, save_rollouts=False))
    train.run(again, tiny_run.quiet(), replay=file)
    return folder


def test_a_replayed_run_ends_with_the_same_bits_and_samples_nothing(
    recorded: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = recorded

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("nothing is sampled")

    monkeypatch.setattr(TransformersGenerator, "generate", refuse)
    expected, found = final(folder), final(replay(config, folder, tmp_path / "again"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    first, second = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, tmp_path / "again")
    )
    assert [row["loss"] for row in second] == [row["loss"] for row in first if row["step"]]
    assert all(row.get("eval") is None for row in second)


def test_every_completion_is_there_with_what_it_needs(recorded: tuple[Config, Path]) -> None:
    config, folder = recorded
    rows = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    per_step = config.rollouts_per_step
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3) for _ in range(per_step)]
    assert [row["position"] for row in rows] == STEPS * list(range(per_step))
    assert [row["group"] for row in rows] == STEPS * [i // 4 for i in range(per_step)]
    assert not any(row["dropped"] for row in rows)
    assert all(len(row["token_ids"]) == len(row["logprobs"]) == row["num_tokens"] for row in rows)
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    assert len({row["shaping"] for row in rows}) > 1
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in metrics[1:]:
        own = [row for row in rows if row["step"] == record["step"]]
        assert record["reward_mean"] == sum(row["reward"] for row in own) / per_step


def test_a_resumed_run_keeps_no_record_twice(recorded: tuple[Config, Path], tmp_path: Path) -> None:
    """Killed while it wrote step 3, after the checkpoint of step 2."""
    config, folder = recorded
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    shutil.rmtree(run / "checkpoints" / "step_000003")
    (run / "summary.json").unlink()
    whole = (folder / FILE_NAME).read_bytes()
    (run / FILE_NAME).write_bytes(whole[:-700])
    train.run(dataclasses.replace(config, run_dir=str(run), resume="auto"), tiny_run.quiet())
    assert (run / FILE_NAME).read_bytes() == whole


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    return lambda text: "".join(change(text.splitlines(keepends=True)))


def _with(line: int, **values: Any) -> Callable[[str], str]:
    def change(lines: list[str]) -> list[str]:
        return [*lines[:line], json.dumps(json.loads(lines[line]) | values) + "\n", *lines[line + 1 :]]

    return _lines(change)


BAD_FILES: list[tuple[Callable[[str], str], str]] = [
    (lambda text: "", "the file is empty"),
    (lambda text: text[:-40], "line 48 is cut off or is not a record: give --steps 2 to use the complete steps"),
    (_lines(lambda lines: lines[:-3]), "step 3 is cut off after 13 completions: give --steps 2"),
    (_lines(lambda lines: lines[:32]), "step 3 is missing: the file ends at step 2: give --steps 2"),
    (_lines(lambda lines: lines[:16] + lines[32:]), "step 2 is missing: step 1 is followed by step 3"),
    (_lines(lambda lines: lines[16:]), "the file begins at step 2: steps 1 to 1 were not recorded"),
    (_lines(lambda lines: [lines[1], lines[0], *lines[2:]]), "line 1 has position 1 of step 1 instead of 0"),
    (_with(0, prompt_index=40), "line 1 has prompt 40, but there are 40: give the same --data"),
    (_with(4, prompt="0" * 16), "line 5 has another prompt [0-9]+ than the training data"),
    (_with(4, prompt_ids="0" * 16), "line 5 has other tokens for prompt [0-9]+: give the tokenizer"),
    (_with(4, num_tokens=6), "line 5 has 6 tokens, but --generation.max-completion-tokens is 5"),
    (_with(4, reward=float("nan")), "line 5 is cut off or is not a record: give a rollouts_full.jsonl that"),
    (_with(4, stopped=1), "line 5 is cut off or is not a record"),
    (_with(17, stopped=None), "line 18 is cut off or is not a record: give --steps 1 to use the complete steps"),
    (_with(16, stopped=None), "line 17 is cut off or is not a record: give --steps 1 to use the complete steps"),
    (
        _with(4, num_tokens=1, token_ids=[17], logprobs=[-1.0]),
        "line 5 has the token id 17, but the vocabulary is 0 to 16",
    ),
    (_with(4, num_tokens=1, token_ids=[-1], logprobs=[-1.0]), "line 5 has the token id -1, "),
    (_with(4, num_tokens=1, token_ids=[True], logprobs=[-1.0]), "line 5 has the token id true, "),
    (
        _with(4, num_tokens=1, token_ids=[3], logprobs=[float("nan")]),
        "line 5 has the log-prob NaN, which is not a finite",
    ),
    (_with(4, num_tokens=1, token_ids=[3], logprobs=[1e39]), "line 5 has the log-prob 1e.39, which is not a finite"),
    (_with(4, num_tokens=1, token_ids=[3], logprobs=["-1"]), "line 5 has the log-prob .-1., which is not a finite"),
    (
        _with(4, num_tokens=1, token_ids="3", logprobs=["-1"]),
        "line 5 (does not have 1 token ids and|is cut off or is not a record)",
    ),
    (_with(4, num_tokens=1, token_ids=[3], logprobs=[]), "line 5 does not have 1 token ids and 1 log-probs"),
    (
        lambda text: "# Read me\n",
        "line 1 is cut off or is not a record: give a rollouts_full.jsonl that --run.save-rollouts",
    ),
]


@pytest.mark.parametrize(("damage", "words"), BAD_FILES, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_bad_file_is_one_line_before_anything_is_trained(
    recorded: tuple[Config, Path], tmp_path: Path, damage: Callable[[str], str], words: str
) -> None:
    config, folder = recorded
    bad = tmp_path / "bad.jsonl"
    bad.write_text(damage((folder / FILE_NAME).read_text()))
    with pytest.raises(InputError, match=words) as error:
        replay(config, bad, tmp_path / "again")
    assert str(error.value).startswith(f"--replay-rollouts {bad}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation__group_size": 2}, "line 3 is in group 0, but --generation.group-size 2 puts it in group 1"),
        ({"generation__prompts_per_step": 3}, "step 1 has a batch of 16 completions, but these settings make 12"),
        ({"steps": 4}, "step 4 is missing: the file ends at step 3: give --steps 3"),
    ],
)
def test_other_settings_than_the_recorded_ones_are_one_line(
    recorded: tuple[Config, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config, folder = recorded
    with pytest.raises(InputError, match=words):
        replay(tiny_policy.replaced(config, **change), folder, tmp_path / "again")


def test_fewer_steps_need_less_of_the_file(recorded: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = recorded
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes((folder / FILE_NAME).read_bytes()[:-40])
    train.run(dataclasses.replace(config, steps=2, run_dir=str(tmp_path / "again")), tiny_run.quiet(), replay=torn)
    assert (tmp_path / "again" / "summary.json").exists()


def test_a_bad_record_of_a_later_step_names_its_line(recorded: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = recorded
    bad = tmp_path / "bad.jsonl"
    bad.write_text(_with(20, num_tokens=1, token_ids=[3], logprobs=[float("-inf")])((folder / FILE_NAME).read_text()))
    with pytest.raises(TrainingError, match=r"step 2: .*bad.jsonl: line 21 has the log-prob -Infinity"):
        replay(config, bad, tmp_path / "again")


def test_what_a_kill_tore_off_after_the_last_step_is_not_read(recorded: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = recorded
    torn = tmp_path / "torn.jsonl"
    lines = (folder / FILE_NAME).read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:16]) + lines[16][:-40])
    replay(dataclasses.replace(config, steps=1), torn, tmp_path / "again")


def test_an_absent_file_and_one_in_the_runs_own_folder(recorded: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = recorded
    with pytest.raises(InputError, match=r"there is no such file: a run with --run.save-rollouts writes"):
        replay(config, tmp_path / "nothing.jsonl", tmp_path / "again")
    with pytest.raises(InputError, match=r"is in --run-dir .*: give the replay another --run-dir"):
        replayed_settings(config, folder / FILE_NAME)


def test_numbers_come_back_as_the_float32_they_were(tmp_path: Path) -> None:
    """Groups left out of a batch, completions without a verdict or tokens, and log-probs of awkward digits."""
    rows = [PromptRow(prompt=f"p{i}", token_ids=(i, 7), reward="exact", slice="s", columns={}) for i in range(4)]
    table = PromptTable(rows=tuple(rows))
    source = torch.Generator().manual_seed(0)
    draws = [(torch.rand(n, generator=source).log() * 10).tolist() for n in (5, 0, 3, 4, 1, 2)]
    completions = [Completion(token_ids=[3] * len(d), logprobs=d, stopped=bool(d)) for d in draws]
    groups = [
        Group(2, completions[:2], [1.0, None], [0.1, -0.1]),
        Group(0, completions[2:4], [0.25, 0.0], [1 / 3, 0.0]),
        Group(3, completions[4:], [0.0, 0.0], [0.0, 0.0]),
    ]
    config = tiny_policy.settings(
        steps=1, generation__prompts_per_step=2, generation__group_size=2, optimizer__minibatches=1
    )
    Recorder(tmp_path, table).write(1, groups[:2], groups[2:])
    found = RecordedRollouts(tmp_path, config, table, 8).groups(1)
    assert [g.prompt_index for g in found] == [2, 0, 3]
    assert [(g.rewards, g.shaping) for g in found] == [(g.rewards, g.shaping) for g in groups]
    back = [completion for group in found for completion in group.completions]
    assert [(c.token_ids, c.stopped) for c in back] == [(c.token_ids, c.stopped) for c in completions]
    for one, other in zip(back, completions, strict=True):
        assert torch.equal(torch.tensor(one.logprobs), torch.tensor(other.logprobs))

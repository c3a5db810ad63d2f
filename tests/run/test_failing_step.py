"""A step that fails by what the user gave: the run ends with a checkpoint of the last whole one, and goes on from there
as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from torch import Tensor

from paced_fast import train
from paced_fast.config import Config
from paced_fast.errors import EVERYWHERE, InputError, TrainingError, UnscoredError
from paced_fast.run import checkpoint
from paced_fast.train import loop

REWARD = """
import random
from pathlib import Path

def own(prompts, completions, **columns):
    metrics, fault = (Path(__file__).parent / name for name in ("run/metrics.jsonl", "fault"))
    lines = metrics.read_text().count("\\n") if metrics.is_file() else 0
    values = [float((sum(map(ord, p + c)) % 3 == 0) != (random.random() < 0.2)) for p, c in zip(prompts, completions)]
    at, kind, size = fault.read_text().split() if fault.is_file() else ("-1", "", "0")
    if lines != int(at) or len(values) != int(size):
        return values
    if kind == "raises":
        raise KeyError("gone")
    return {"nan": [float("nan")] * len(values), "count": values[1:], "none": [None] * len(values)}[kind]
"""
"""A third of what a model says that knows nothing, with noise of the process. The file `fault` says after how many
lines of the record it fails, how, and for which number of completions: 16 are a step's, 24 an evaluation's."""

KINDS = {
    "raises": r"step 4: the reward function '.*:own' failed: KeyError: 'gone' .*",
    "nan": r"step 4: the reward function '.*:own' returned nan for completion 0: return a number .*",
    "count": r"step 4: the reward function '.*:own' returned 15 rewards for 16 completions: .*",
    "none": r"step 4: reward '.*:own' left 16 of the last 64 completions .*: it returned None for these: .*",
}


def settings(folder: Path, **changes: Any) -> Config:
    folder.mkdir(exist_ok=True)
    own = folder / "own.py"
    own.write_text(REWARD)
    small = {"steps": 6, "data__eval": (), "evaluation__every": 0, "run__checkpoint_every": 0}
    windowed = {"log_z__scored_per_step": 7, "scheduler__max_visits": 2}
    found = tiny_run.config(own, reward="own", reward__max_unscored_share=0.05, **(small | windowed | changes))
    return dataclasses.replace(found, run_dir=str(folder / "run"))


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").iterdir())


def figures(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "train_seconds", "tokens_per_second", "memory", "eval")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def state(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and ambient generators of a checkpoint."""
    place = folder / "run" / "checkpoints" / f"step_{step:06d}"
    paths = [place / "state.safetensors", *sorted((place / "tensors").iterdir())]
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    return tensors, json.loads((place / "random" / "rank_00000.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_fails_costs_no_step_and_the_rest_is_as_undisturbed(tmp_path: Path, kind: str) -> None:
    failing, whole = tmp_path / "failing", tmp_path / "whole"
    config = settings(failing)
    (failing / "fault").write_text(f"3 {kind} 16")
    how = f"continue with --resume {failing / 'run'}, which stands for all other options"
    with pytest.raises(TrainingError, match=KINDS[kind]) as raised:
        train.run(config, tiny_run.quiet())
    assert str(raised.value).endswith(f"; stopped after step 3, which is saved: mend this, then {how}")
    assert "\n" not in str(raised.value)
    assert steps_of(failing) == [3]
    with pytest.raises(TrainingError, match=r"^step 4: .*; stopped after step 3, which is saved: "):
        train.run(dataclasses.replace(config, resume="auto"), tiny_run.quiet())
    (failing / "fault").unlink()
    train.run(dataclasses.replace(config, resume="auto"), tiny_run.quiet())
    train.run(settings(whole), tiny_run.quiet())
    assert figures(failing) == figures(whole)
    (ours, ambient), (expected, wanted) = state(failing, 6), state(whole, 6)
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    assert ambient == wanted


@pytest.mark.parametrize("rule", ["tree", "greedy", "uniform", "dynamic", "mopps"])
def test_a_failing_step_leaves_what_the_next_draw_depends_on(tmp_path: Path, rule: str) -> None:
    failing, whole = tmp_path / "failing", tmp_path / "whole"
    for folder in (failing, whole):
        config = settings(folder, steps=5, scheduler__rule=rule)
        if folder is failing:
            (folder / "fault").write_text("3 raises 16")
            with pytest.raises(TrainingError, match="stopped after step 3, which is saved"):
                train.run(config, tiny_run.quiet())
            (folder / "fault").unlink()
            config = dataclasses.replace(config, resume="auto")
        train.run(config, tiny_run.quiet())
    assert figures(failing) == figures(whole)


def test_an_evaluation_that_fails_costs_its_own_figures_only(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=4, evaluation__every=2, data__eval=("task:signed_sums?split=eval&size=12",))
    own = tmp_path / "own.py"
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval=(f"task:signed_sums?reward={own}:own&split=eval&size=12",))
    )
    # The first line is that of the evaluation before training, so the third is that of step 2.
    (tmp_path / "fault").write_text("2 raises 24")
    with pytest.raises(TrainingError, match=r"^evaluation after step 2: .*; stopped after step 2, which is saved: "):
        train.run(config, tiny_run.quiet())
    assert [line["step"] for line in figures(tmp_path)] == [0, 1, 2]
    (tmp_path / "fault").write_text("4 raises 24")
    with pytest.raises(TrainingError, match=rf"which is saved: mend this, then evaluate {tmp_path / 'run'}$"):
        train.run(dataclasses.replace(config, resume="auto"), tiny_run.quiet())
    assert steps_of(tmp_path)[-1] == 4
    assert [line["step"] for line in figures(tmp_path)] == [0, 1, 2, 3, 4]


def test_one_that_fails_before_any_step_is_wrong_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = settings(tmp_path)
    (tmp_path / "fault").write_text("0 raises 16")
    with pytest.raises(InputError, match=r"^step 1: .*; then continue with --resume "):
        train.run(config, tiny_run.quiet())
    (tmp_path / "fault").unlink()
    with caplog.at_level("WARNING", logger="paced_fast"):
        train.run(dataclasses.replace(config, steps=1, resume="auto"), tiny_run.quiet())
    assert f"{tmp_path / 'run'} has no checkpoint yet, so the run starts over at step 1" in caplog.text


def test_the_command_leaves_with_the_status_of_a_run_that_stopped_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path)
    (tmp_path / "fault").write_text("3 count 16")
    monkeypatch.setattr(train, "run", lambda *_, **__: loop.run(config, tiny_run.quiet()))
    with pytest.raises(SystemExit) as ended:
        train.main(["tiny"])
    assert ended.value.code == 3
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("stopped: step 4: the reward function ")
    assert f"; stopped after step 3, which is saved: mend this, then continue with --resume {tmp_path}" in told


@pytest.mark.parametrize("everywhere", [True, False])
def test_ranks_save_only_what_all_of_them_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    run = tiny_run.build(settings(tmp_path, steps=3), tmp_path / "run")
    step, two = run.stepper.step, dataclasses.replace(run.world, size=2)

    def failing() -> Any:
        if run.stepper.counters.step < 2:
            return step()
        error = UnscoredError("rank 1 alone: nothing is scored")
        if everywhere:
            error.add_note(EVERYWHERE)
        object.__setattr__(run.stepper, "world", two)  # an exchange would wait for the other rank
        raise error

    saved: list[int] = []
    monkeypatch.setattr(run.stepper, "step", failing)
    monkeypatch.setattr(loop, "save", lambda run, saver, *, last: saved.append(run.stepper.counters.step))
    with pytest.raises(TrainingError) as raised:
        train.train(run, tiny_run.quiet())
    words = "which is saved" if everywhere else "which is not saved, because other ranks go on"
    assert f"step 3: rank 1 alone: nothing is scored; stopped after step 2, {words}: mend this" in str(raised.value)
    assert saved == ([2] if everywhere else [])
    assert getattr(raised.value, "__notes__", []) == ([EVERYWHERE] if everywhere else [])


def test_a_checkpoint_that_cannot_be_written_is_told_with_the_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    (tmp_path / "fault").write_text("3 raises 16")

    def full(*_: Any, **__: Any) -> None:
        raise TrainingError("the final checkpoint was not written: no space left")

    monkeypatch.setattr(checkpoint.Saver, "save", full)
    with pytest.raises(TrainingError, match=r"KeyError: 'gone' .*, which is not saved \(the final .* no space left\)"):
        train.run(config, tiny_run.quiet())

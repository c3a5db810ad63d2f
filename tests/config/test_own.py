"""A model of the user's own begins with nothing that belongs to a demonstration, and says so with every setting."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paced_fast.config import Config, DataConfig, ModelConfig, cli, flatten
from paced_fast.config.presets import PRESETS, preset
from paced_fast.config.resolve import check, placed, resolve
from paced_fast.config.resuming import differences
from paced_fast.data.sources import read_drafts
from paced_fast.errors import InputError

OWN = ["--model", "a/Some-Model.2", "--data", "rg:chain_sum?size=5"]


def test_a_model_without_a_preset_begins_at_own() -> None:
    for words in (OWN, ["own", *OWN], ["--model.name=a/Some-Model.2", "--data.train=rg:chain_sum?size=5"]):
        config = cli.parse(words)
        expected = flatten(preset("own")) | {"model.name": "a/Some-Model.2", "data.train": ("rg:chain_sum?size=5",)}
        assert flatten(config) == expected
        assert config.label == "Some-Model.2-paced-0"
    more = cli.parse([*OWN, "--eval-data", "x.csv", "y.csv", "--reward=f.py:g", "--algorithm", "grpo", "--seed", "2"])
    assert (more.data.eval, more.reward.name, more.label) == (("x.csv", "y.csv"), "f.py:g", "Some-Model.2-grpo-2")


def test_nothing_of_a_demonstration_is_in_it() -> None:
    config, plain = cli.parse(OWN), Config()
    assert config.warm_start == plain.warm_start, "no warm start, and no sources of one"
    assert (config.warm_start.first.steps, config.warm_start.second.steps) == (0, 0)
    assert (config.data.eval, config.data.headline, config.run.threads) == ((), (), 0)
    assert (config.model.device, config.model.dtype, config.model.matmul_precision) == ("auto", "auto", "auto")
    assert (config.data.template, config.data.too_long) == ("auto", "skip")
    # What it changes of the defaults is meant for any model.
    changed = {name for name, value in flatten(config).items() if value != flatten(plain)[name]}
    assert changed == {
        *("preset", "model.name", "model.matmul_precision", "data.train", "data.template", "data.too_long"),
        *("generation.max_completion_tokens", "optimizer.micro_batch_tokens", "optimizer.decay"),
        *("evaluation.samples", "evaluation.final_samples"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.jsonl"], "--data is given without a model: give --model NAME, or a preset as the first word"),
        (["--eval-data=x"], "--eval-data is given without a model: give --model NAME, or a preset as the first word"),
        (["own", "--data", "rg:chain_sum"], "--model names no model: give a folder or a hub id, as in --model Qwen/"),
        (
            ["--model", "a/b"],
            "--data names no source of training prompts: give at least one, such as --data train.jsonl",
        ),
        (["--model"], "--model.name needs a value"),
        ([*OWN, "--model.liger", "on", "--model.device", "cpu"], "--model.liger on needs a GPU, and --model.device is"),
        ([*OWN, "--generation.group-size", "1", "--algorithm", "grpo"], "--generation.group-size is 1: give 2 or more"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check(cli.parse(words))
    assert str(raised.value).startswith(message)


def test_what_fits_some_device_is_left_to_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # not to be asked
    check(cli.parse([*OWN, "--model.liger", "on"]))  # fits a GPU
    check(cli.parse([*OWN, "--model.attention", "packed-sdpa"]))  # fits both
    monkeypatch.setattr("paced_fast.config.resolve.util.find_spec", lambda name: SimpleNamespace(origin=name))
    check(cli.parse([*OWN, "--generation.temperature", "3"]))  # too hot for vLLM, which auto means on a GPU


@pytest.mark.parametrize(
    ("gpu", "name", "found"),
    [
        (True, "a/b", ("cuda", "bfloat16", "high")),
        (False, "a/b", ("cpu", "float32", "highest")),
        (True, "tiny", ("cpu", "float32", "highest")),
    ],
)
def test_auto_fits_the_machine(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, name: str, found: tuple[str, str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = ModelConfig(name=name, matmul_precision="auto").placed()
    assert (model.device, model.dtype, model.matmul_precision) == found
    given = ModelConfig(name="a/b", device="cpu", dtype="bfloat16", matmul_precision="highest")
    assert given.placed() == given
    assert resolve(cli.parse([*OWN, "--model", name])).model == dataclasses.replace(model, name=name)


def test_demonstrations_on_a_cpu_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True))
    on_cpu = {name for name in PRESETS if placed(preset(name)).model.device == "cpu"}
    assert on_cpu == {"tiny", "small", "smollm2"}
    assert {placed(preset(name)).model.dtype for name in on_cpu} == {"float32"}


def test_the_reward_of_the_command_is_that_of_sources_without_one(tmp_path: Path) -> None:
    """And the sources stay as they were typed, in the settings that a run saves and shows."""
    (tmp_path / "a.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    wanted = "0.5*math+0.5*r&d.py:f%"
    typed = ["a.jsonl?reward=exact", "a.jsonl", "--eval-data", "a.jsonl?slice=x", "--reward", wanted]
    config = cli.parse([*OWN, *typed])
    found = resolve(config)
    assert (found.data, found.reward) == (config.data, config.reward)
    assert found.data.train[1:] == ("a.jsonl?reward=exact", "a.jsonl")
    folder = str(tmp_path)
    judged = [read_drafts(spec, folder, reward=wanted)[1][0].reward for spec in (*typed[:2], *found.data.eval)]
    assert judged == ["exact", wanted, wanted]
    assert read_drafts("a.jsonl", folder)[1][0].reward == "math", "by the format of the rows"
    with pytest.raises(InputError, match=r"^--data.train: source 'nothing' must start with one of "):
        resolve(cli.parse(["--model", "a/b", "--data", "nothing", "--reward", "math"]))


def test_a_run_whose_folder_has_the_reward_in_its_sources_is_the_same_run() -> None:
    """Older runs saved them so."""
    now = cli.parse(["--model", "a/b", "--data", "a.jsonl", "--eval-data", "b.csv?slice=x", "--reward", "r.py:f"])
    saved = DataConfig(train=("a.jsonl?reward=r.py:f",), eval=("b.csv?slice=x&reward=r.py:f",))
    then = dataclasses.replace(now, data=dataclasses.replace(now.data, train=saved.train, eval=saved.eval))
    assert differences(then, now) == []
    other = dataclasses.replace(now, data=dataclasses.replace(now.data, train=("c.jsonl",)))
    assert differences(now, other) == ["--data.train was a.jsonl in that run and is c.jsonl now"]
    judged = dataclasses.replace(now, reward=dataclasses.replace(now.reward, name="r.py:g"))
    assert differences(now, judged) == ["--reward.name was r.py:f in that run and is r.py:g now"]

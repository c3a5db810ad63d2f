"""Configuration files in and out, the settings of a run taken again, and what is wrong with a file in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from paced_fast.config import Config, cli, flatten
from paced_fast.config.files import read_config, replaced, write_config
from paced_fast.config.presets import BASES, preset
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError

TOML = """
preset = "tiny"
steps = 7

[optimizer]
learning-rate = 1
warmup_steps = 3

[warm_start.first]
steps = 0

[data]
headline = ["k3", "k4"]
"""
YAML = """
preset: tiny
steps: 7
optimizer: {learning_rate: 1.0, warmup_steps: 3}
warm_start.first.steps: 0
data:
  headline: [k3, k4]
"""
WANTED = {
    "steps": 7,
    "optimizer.learning_rate": 1.0,
    "optimizer.warmup_steps": 3,
    "warm_start.first.steps": 0,
    "data.headline": ("k3", "k4"),
}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_a_file_changes_what_it_names_and_options_override_it(tmp_path: Path, name: str, text: str) -> None:
    file = write(tmp_path / name, text)
    assert cli.parse(["--config", file]) == replaced(preset("tiny"), WANTED)
    assert cli.parse([f"--config={file}", "--steps", "9"]) == replaced(preset("tiny"), WANTED | {"steps": 9})
    assert cli.parse(["tiny", "--seed", "2", "--config", file]) == replaced(preset("tiny"), WANTED | {"seed": 2})


def test_short_names_and_a_model_alone_begin_at_own(tmp_path: Path) -> None:
    text = 'model = "a/b"\ndata = "x.jsonl"\neval_data = ["y.csv", "z.csv"]\nreward = "exact"\n'
    expected = {
        "model.name": "a/b",
        "data.train": ("x.jsonl",),
        "data.eval": ("y.csv", "z.csv"),
        "reward.name": "exact",
    }
    assert cli.parse(["--config", write(tmp_path / "a.toml", text)]) == replaced(preset("own"), expected)


def test_what_yaml_takes_for_something_else_is_read_as_the_setting_wants_it(tmp_path: Path) -> None:
    text = "preset: tiny\noptimizer: {learning_rate: 1e-6}\nreplay: {mode: on}\ndata: {date: 2026-01-31}\n"
    config = read_config(Path(write(tmp_path / "a.yaml", text)))
    assert (config.optimizer.learning_rate, config.replay.mode, config.data.date) == (1e-6, "on", "2026-01-31")


@pytest.mark.parametrize("ending", ["toml", "yaml", "json"])
@pytest.mark.parametrize("name", sorted(BASES))
def test_saved_settings_are_read_back(tmp_path: Path, ending: str, name: str) -> None:
    base = preset(name)
    for config in (
        base,
        replaced(
            base,
            {
                "data.template": 'say "{prompt}"\n\\ \u00e9 \x7f',
                "data.system_prompt": "one\ttwo",
                "loss.importance_cap": math.inf,
                "optimizer.learning_rate": 3e-7,
                "data.template_args": ("a=1", "b=[2]"),
                "run.report": False,
                "warm_start.second.steps": 5,
                "guard.stop_on": ("kl",),
                "seed": 2**62,
            },
        ),
    ):
        write_config(config, tmp_path / f"a.{ending}")
        assert read_config(tmp_path / f"a.{ending}") == config
    assert len((tmp_path / f"a.{ending}").read_text().splitlines()) < 45, "what differs, and nothing else"


def test_the_settings_of_a_run_are_a_file(tmp_path: Path) -> None:
    config = resolve(
        replaced(preset("tiny"), {"algorithm": "grpo", "seed": 3, "run_dir": "somewhere", "resume": "auto"})
    )
    file = write(tmp_path / "config.json", json.dumps(dataclasses.asdict(config)))
    again = cli.parse(["--config", file, "--steps", "5"])
    assert again == dataclasses.replace(config, steps=5, run_dir=None, resume="never")
    with pytest.raises(InputError, match="holds the settings of a run of the preset 'tiny': leave small out"):
        cli.parse(["small", "--config", file])


MISTAKES = [
    ("a.toml", "steps = ", r"--config .*a.toml is not TOML: Invalid value .*"),
    ("a.yaml", "a: [", r"--config .*a.yaml is not YAML: .*"),
    ("a.json", "{", r"--config .*a.json is not JSON: .*"),
    ("a.json", "[1]", r"--config .*a.json holds no settings by name, such as steps = 100"),
    ("a.txt", "", r"--config .*a.txt: the ending must be .toml, .yaml, .yml or .json"),
    ("a.toml", "steps = 3", r".*a.toml names neither a model nor a preset: add model, or preset"),
    ("a.toml", 'preset = "tniy"', r"unknown preset 'tniy': did you mean tiny\? .*"),
    ("a.toml", 'preset = "tiny"\nstep = 3', r".*a.toml: unknown setting step: did you mean --steps\?"),
    (
        "a.toml",
        "lr = 3\n[optimizer]\nbeta3 = 1\n[lora]\nr = 8",
        r".*: unknown settings: lr \(did you mean --optimizer.learning-rate\?\); optimizer.beta3 \(.*\); lora.r \(.*\)",
    ),
    ("a.toml", 'preset = "tiny"\nlr = 3', r".*a.toml: unknown setting lr: did you mean --optimizer.learning-rate\?"),
    (
        "a.toml",
        'preset = "tiny"\n[optimizer]\nlearning_rat = 3',
        r".*: unknown setting optimizer.learning_rat: did you mean --optimizer.learning-rate\?",
    ),
    ("a.toml", 'preset = "tiny"\nsteps = "x"', r'.*a.toml: steps is "x": give a whole number'),
    ("a.toml", 'preset = "tiny"\nsteps = true', r".*a.toml: steps is true: give a whole number"),
    ("a.toml", 'preset = "tiny"\nsteps = -1', r".*a.toml: --steps is -1: give a value from 0 to 1e\+09"),
    ("a.toml", 'preset = "tiny"\nalgorithm = "ppo"', r'.*: algorithm is "ppo": give paced or paced_paper or .*grpo'),
    ("a.toml", 'preset = "tiny"\noptimizer = 3', r".*a.toml: optimizer is 3, not a table of settings"),
    ("a.toml", 'preset = "tiny"\n[data]\ntrain = [3]', r".*a.toml: data.train is \[3\]: give a list of a text"),
]


@pytest.mark.parametrize(("name", "text", "message"), MISTAKES)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        cli.parse(["--config", write(tmp_path / name, text)])
    assert "\n" not in str(raised.value)
    raised.match(f"^{message}$")


def test_a_preset_beside_a_file_must_be_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'preset = "tiny"\nsteps = 3\n')
    assert cli.parse(["tiny", "--config", file]).steps == 3
    with pytest.raises(InputError, match=r"a.toml names the preset 'tiny', and the command names 'small': leave one"):
        cli.parse(["small", "--config", file])
    for words in (["--config"], ["--config", "--steps", "3"]):
        with pytest.raises(InputError, match="--config needs a value"):
            cli.parse(words)
    with pytest.raises(InputError, match="--config is given twice: give it once"):
        cli.parse(["--config", file, "--config", file])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the settings of a run of GRPO."""
    config = resolve(replaced(preset("tiny"), {"algorithm": "grpo", "seed": 3, "run_dir": "elsewhere"}))
    write(tmp_path / "config.json", json.dumps(dataclasses.asdict(config)))
    return tmp_path


def test_resume_with_a_folder_needs_nothing_else(run: Path) -> None:
    saved = resolve(replaced(preset("tiny"), {"algorithm": "grpo", "seed": 3}))
    expected = dataclasses.replace(saved, run_dir=str(run), resume="auto")
    for words in (["--resume", str(run)], [f"--resume={run}"], ["tiny", "--resume", str(run)]):
        assert cli.parse(words) == expected
    assert cli.parse(["--resume", "auto", "--run-dir", str(run)]) == expected
    longer = cli.parse(["--resume", str(run), "--steps", "300", "--run.no-report"])
    changed = {name for name, value in flatten(longer).items() if value != flatten(expected)[name]}
    assert changed == {"steps", "run.report"}
    # With a preset the command says what it wants, as a job that is submitted again does.
    assert cli.parse(["tiny", "--resume", "auto", "--run-dir", str(run)]).algorithm == "paced"
    assert cli.parse(["--resume", "auto", "--run-dir", str(run / "new")]).algorithm == "paced"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--seed", "4"],
            r"--resume (\S+): --seed was 3 in that run and is 4 now: leave it out to continue the run \(--resume \1 "
            r"needs nothing else\), or start a new run with --config \1/config.json",
        ),
        (
            ["--seed", "4", "--algorithm", "paced", "--loss.beta", "1", "--generation.group-size", "2"],
            r"--resume \S+: --algorithm was grpo in that run and is paced now, --seed was .*, --generation.group-size "
            r"was 4 in that run and is 2 now, and 1 more: leave them out .*",
        ),
        (
            ["--data", "a.jsonl", "b c.jsonl", "--data.headline", "k3", "--run.no-report"],
            r"--resume \S+: --data.train was 'task:signed_sums\S*' in that run and is a.jsonl 'b c.jsonl' now, "
            r"--data.headline was k3 k4 k5 k6 in that run and is k3 now: leave them out .*",
        ),
        (["--config", "a.toml"], r"--resume \S+ has its settings in its folder: leave --config out"),
        (["--resume", "auto"], "--resume is given twice: give it once"),
    ],
)
def test_what_differs_from_the_resumed_run_is_one_line(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        cli.parse(["--resume", str(run), *words])
    raised.match(f"^{message}$")


def test_another_preset_and_no_run_are_named(run: Path) -> None:
    with pytest.raises(InputError, match=r"is a run of the preset 'tiny': leave small out"):
        cli.parse(["small", "--resume", str(run)])
    with pytest.raises(InputError, match=r"--resume 'atuo': did you mean auto\?"):
        cli.parse(["--resume", "atuo"])


def test_every_setting_can_stand_in_a_file(tmp_path: Path) -> None:
    config = Config(preset="tiny")
    nested = dataclasses.asdict(config)
    for name in ("run_dir", "resume"):
        del nested[name]  # with them it is the file of a run
    given = {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in nested.items()
    }
    given["warm_start"]["first"] = dict(nested["warm_start"]["first"])
    (tmp_path / "a.json").write_text(json.dumps(given))
    found = read_config(tmp_path / "a.json")
    assert {n for n, v in flatten(found).items() if v != flatten(config)[n]} <= {"run_dir", "resume"}

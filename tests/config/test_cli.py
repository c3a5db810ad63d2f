"""The command line: what each mistake says, in one line, and that help names everything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from paced_fast import train
from paced_fast.config import Config, cli, flatten
from paced_fast.config.presets import BASES, preset
from paced_fast.errors import InputError


def test_nothing_is_the_tiny_preset() -> None:
    assert cli.parse([]) == cli.parse(["tiny"]) == preset("tiny")


@pytest.mark.parametrize("name", sorted(BASES))
def test_every_preset_is_read_and_keeps_its_settings(name: str) -> None:
    assert cli.parse([name]) == preset(name)
    assert cli.parse([name, "--steps", "7"]).steps == 7


def test_help_says_what_resume_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    shown = [line.partition("--resume ")[2].split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [words for words in shown if words] == ["auto|never|RUN_DIR", "auto|never|RUN_DIR"]


def test_values_reach_their_fields() -> None:
    config = cli.parse(
        [
            "tiny",
            "--algorithm=grpo",
            "--loss.importance_cap",
            "2.5",
            "--data.headline",
            "k3",
            "k4",
            "--run.no-report",
            "--replay.max-age=2",
            "--warm-start.first.steps",
            "3",
            "--run-dir",
            "somewhere",
        ]
    )
    assert config.algorithm == "grpo"
    assert config.loss.importance_cap == 2.5
    assert config.data.headline == ("k3", "k4")
    assert config.run.report is False
    assert config.replay.max_age == 2
    assert config.warm_start.first.steps == 3
    assert config.warm_start.second.steps == preset("tiny").warm_start.second.steps
    assert config.run_dir == "somewhere"


MISTAKES = [
    (["tniy"], r"unknown preset 'tniy': did you mean tiny\? the presets are .*tiny.*"),
    (["tiny", "--loss.bta", "1"], r"unknown option --loss.bta: did you mean --loss.beta\?"),
    (["tiny", "--steps=3", "--sed=1"], r"unknown option --sed: did you mean --seed\?"),
    (["tiny", "--zzzzqqqq"], r"unknown option --zzzzqqqq: --help-all lists all options"),
    (["tiny", "--steps", "many"], r".*steps.*many.*"),
    (["tiny", "--steps", "1.5"], r".*steps.*1\.5.*"),
    (["tiny", "--optimizer.decay", "cosine"], r"--optimizer.decay 'cosine': the choices are none, linear"),
    (["tiny", "--algorithm", "ppo"], r"--algorithm 'ppo': .*the choices are paced, paced_paper, tb, tb_group, .*"),
    (["tiny", "--steps"], r".*steps.*"),
    (["tiny", "3"], r".*3.*"),
    (["tiny", "--loss.beta", "-1"], r"--loss.beta is -1.0: give a value from 1e-06 to 1e\+06"),
    (["tiny", "--loss.beta", "nan"], r"--loss.beta is nan: give a value from .*"),
    (["tiny", "--scheduler.tau", "1.5"], r"--scheduler.tau is 1.5: give a value from 0 to 1"),
    (["tiny", "--steps", "-2"], r"--steps is -2: give a value from 0 to 1e\+09"),
    (["tiny", "--algorithm", "grpo", "--replay.mode", "on"], r"--replay.mode on needs .*"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_line_and_status_two(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.isascii()
    assert re.fullmatch(f"error: {words}\n", complaint)
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_setting_with_its_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # narrow: side by side, boxes would cut sentences apart
    with pytest.raises(SystemExit) as stop:
        cli.parse(["--help-all"])
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for name in flatten(Config()):
        assert re.search(rf"--{re.escape(name.replace('_', '-'))}\b", text), name
    plain = " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())
    for sentence in (
        "Seed of every draw of the run.",
        "Upper bound of a sequence's importance weight exp(log pi - log pi_old), through which no gradient flows.",
        "Width of the bell around tau in the `tree` rule.",
        "AdamW's second-moment decay.",
        "Signed sums on a CPU",
    ):
        assert sentence in plain, sentence


@pytest.mark.process
def test_the_real_process_says_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paced_fast.train", "tiny", "--optimizer.learning-rat", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: unknown option --optimizer.learning-rat: did you mean --optimizer.learning-rate?\n")
    assert list(tmp_path.iterdir()) == []


def test_input_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)

"""What a run leaves for those who watch it: groups worth reading, its origin, the report while it goes on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from steady import wait_for

from paced_fast import train
from paced_fast.data.records import Completion, Group, PromptRow, PromptTable
from paced_fast.run.record import live_report, origin
from paced_fast.run.record.groups_file import GroupsFile
from paced_fast.run.record.live_report import LiveReport

SIZE = 4


def table(count: int) -> PromptTable:
    rows = [
        PromptRow(prompt=f"p{i}", token_ids=(i,), reward="r", slice=f"s{i}", columns={"answer": i})
        for i in range(count)
    ]
    return PromptTable(rows=tuple(rows))


def group(prompt: int, right: int, *, size: int = SIZE, unscored: bool = False) -> Group:
    completions = [Completion(token_ids=[prompt, k], logprobs=[0.0, 0.0], stopped=k != 0) for k in range(size)]
    return Group(prompt, completions, [None if unscored else float(k < right) for k in range(size)], [])


def written(file: GroupsFile, folder: Path) -> dict[str, Any]:
    file.write()
    return {found["kind"]: found for found in json.loads((folder / "groups.json").read_text())}


def test_the_best_the_worst_and_the_most_surprising_group_are_kept_whole(tmp_path: Path) -> None:
    file = GroupsFile(tmp_path, table(9), lambda ids: " ".join(map(str, ids)))
    file.see(1, [group(0, 2), group(1, 4), group(2, 0)], [0.5, 0.9, 0.1])
    file.see(2, [group(3, 3), group(4, 1), group(5, 4)], [0.1, 0.9, 0.2])
    found = written(file, tmp_path)
    assert {kind: (one["step"], one["prompt"]) for kind, one in found.items()} == {
        "best": (1, "p1"),  # p5 is as good, and further from its estimate: it is the surprising one
        "worst": (1, "p2"),
        "surprising": (2, "p5"),
    }
    assert (found["surprising"]["value"], found["surprising"]["accuracy"]) == (0.2, 1.0)
    assert (found["worst"]["answer"], found["worst"]["slice"], found["worst"]["size"]) == ("2", "s2", SIZE)
    assert found["worst"]["completions"] == [{"text": f"2 {k}", "reward": 0.0, "stopped": k != 0} for k in range(SIZE)]


def test_only_the_last_steps_count_and_nothing_is_decoded_before(tmp_path: Path) -> None:
    decoded: list[list[int]] = []
    file = GroupsFile(tmp_path, table(9), lambda ids: decoded.append(ids) or "", steps=2)
    for step, right in enumerate((4, 3, 1), start=1):
        file.see(step, [group(step, right)], [0.5])
    assert decoded == []
    found = written(file, tmp_path)
    assert {one["step"] for one in found.values()} == {2, 3}


def test_without_estimates_there_is_no_surprise_and_without_groups_no_file(tmp_path: Path) -> None:
    file = GroupsFile(tmp_path, table(9), lambda ids: "x" * 9000)
    file.write()
    file.see(1, [group(0, 0, unscored=True)], None)
    file.write()
    assert list(tmp_path.iterdir()) == []
    file.see(2, [group(0, 2), group(1, 49, size=50), group(2, 0)], None)
    found = written(file, tmp_path)
    assert list(found) == ["best", "worst"]
    assert found["best"]["value"] is None
    assert (found["best"]["size"], len(found["best"]["completions"])) == (50, 32)
    assert found["best"]["completions"][0]["text"] == f"{'x' * 2000} ... 5,000 more characters ... {'x' * 2000}"


def test_every_start_is_noted_and_a_file_that_cannot_be_written_costs_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "paced_fast.train", "tiny", "--run-dir", "a b"])
    assert origin.newest_start(tmp_path) == {}
    origin.note_start(tmp_path, torch="2.13")
    origin.note_start(tmp_path, torch="2.14")
    starts = json.loads((tmp_path / "origin.json").read_text())
    assert [start["torch"] for start in starts] == ["2.13", "2.14"]
    assert starts[0]["command"] == "python -m paced_fast.train tiny --run-dir 'a b'"
    assert {"started", "host", "system", "commit"} <= starts[0].keys()
    assert origin.newest_start(tmp_path)["torch"] == "2.14"
    (tmp_path / "origin.json").write_text("torn")
    origin.note_start(tmp_path)
    assert len(json.loads((tmp_path / "origin.json").read_text())) == 1
    origin.note_start(tmp_path / "origin.json")  # no folder
    assert "origin.json was not written" in caplog.text


@pytest.mark.process
def test_the_commit_is_that_of_a_checkout(tmp_path: Path) -> None:
    assert origin.commit(tmp_path) is None
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    (tmp_path / "file").write_text("1")
    who = ("-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main")
    for words in (("init", "-q"), ("add", "file"), ("commit", "-q", "-m", "m")):
        subprocess.run(["git", *who, *words], cwd=tmp_path, env=env, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert origin.commit(tmp_path) == head[:12]
    (tmp_path / "file").write_text("2")
    assert origin.commit(tmp_path) == f"{head[:12]}, changed"


class Process:
    """Stands for the writing process: ends when told to."""

    def __init__(self) -> None:
        self.pid, self.returncode, self.killed = os.getpid(), None, False

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.killed, self.returncode = True, -9

    def wait(self, seconds: float) -> None:
        pass


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    made: list[Process] = []

    def popen(*words: Any, stderr: Any, **_: Any) -> Process:
        stderr.write(b"error: no space\n")
        made.append(Process())
        return made[-1]

    monkeypatch.setattr(live_report.subprocess, "Popen", popen)
    monkeypatch.setattr(live_report.os, "setpriority", lambda *_: None)
    return made


def test_a_report_is_due_every_few_steps_one_at_a_time_and_takes_a_small_share(
    tmp_path: Path, begun: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(live_report.time, "monotonic", lambda: now[0])
    with LiveReport(tmp_path, 5) as live:
        assert [step for step in range(1, 11) if live.due(step)] == [5, 10]
        live.write()
        now[0] += 3
        assert not live.due(15), "still writing"
        begun[0].returncode = 0
        assert not live.due(16)
        now[0] += 56
        assert not live.due(20), "3 s in 59 would be more than a twentieth"
        now[0] += 1
        assert live.due(25)
        live.write()
    assert [process.killed for process in begun] == [False, True], "the report of the whole run follows"
    with LiveReport(tmp_path, 0) as live:
        assert not any(live.due(step) for step in range(50))


def test_a_report_that_fails_is_told_once(
    tmp_path: Path, begun: list[Process], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(live_report.time, "monotonic", lambda: now[0])
    with LiveReport(tmp_path, 1) as live:
        for step in range(3):
            now[0] += 1000
            assert live.due(step)
            live.write()
            begun[-1].returncode = 2
            live.due(step)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("the report was not written during training (error: no space")


@pytest.mark.process
def test_the_page_is_written_while_the_run_goes_on(tmp_path: Path) -> None:
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path), steps=4, run__report=True, run__report_every=2, run_dir=str(tmp_path / "run")
    )
    run = tiny_run.build(settings, tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    step, seen = run.stepper.step, list[str]()

    def watched() -> Any:
        if run.stepper.counters.step == 2:
            wait_for(page.exists)
            seen.append(page.read_text())
        return step()

    run.stepper.step = watched  # type: ignore[method-assign]
    train.train(run, tiny_run.quiet())
    (text,) = seen
    assert 'data-refresh="15"' in text
    assert "step 2 of 4" in " ".join(text.split())
    assert '<section id="groups">' in text
    assert '<section id="origin">' in text
    groups = json.loads((tmp_path / "run" / "groups.json").read_text())
    assert {found["kind"] for found in groups} <= {"best", "worst", "surprising"}
    assert all(len(found["completions"]) == 4 for found in groups)
    assert json.loads((tmp_path / "run" / "origin.json").read_text())[0]["device"].startswith("cpu")
    again = dataclasses.replace(settings, resume="auto", steps=5, run=dataclasses.replace(settings.run, report_every=0))
    train.run(again, tiny_run.quiet())
    assert [start["resumed_after"] for start in json.loads((tmp_path / "run" / "origin.json").read_text())] == [None, 4]
    assert "data-refresh=" not in page.read_text()

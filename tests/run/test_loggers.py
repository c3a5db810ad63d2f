"""What only records costs its records and never the run: loggers that fail, disks that are full, reports."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import steady
import tiny_policy
from loggers_alike import Wandb
from tiny_run import config, quiet, write_rewards

from paced_fast import train
from paced_fast.errors import InputError
from paced_fast.run.record import journal, loggers
from paced_fast.run.record.journal import Journal
from paced_fast.run.record.sinks import RunInfo
from paced_fast.run.record.writer import MetricsWriter


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    made = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["init", "log"])
def test_a_logger_that_fails_is_told_once_and_tried_again_ever_more_rarely(
    wandb: Wandb, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    wandb.failing = {name}
    with MetricsWriter(tmp_path, sinks=["wandb"]) as writer:
        for step in range(1, 41):
            writer.write({"step": step, "loss": 1.0})
        (told,) = warnings(caplog)
        assert told == (
            f"logger wandb failed (ConnectionError: {name}: no network): the run continues without it, and tries "
            "it again at growing intervals"
        )
        # init is first tried before step 1, log at it; then 1, 2, 4, 8, 16 steps are left out in between.
        assert wandb.count(name) == 6
        wandb.failing = set()
        for step in range(41, 81):
            writer.write({"step": step, "loss": 1.0})
    assert warnings(caplog)[1:] == ["logger wandb works again after 6 failed attempts"]
    assert wandb.asked[-1] == ("finish", None)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 80


def test_a_logger_that_does_not_close_is_told(wandb: Wandb, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wandb.failing = {"finish"}
    MetricsWriter(tmp_path, sinks=["wandb"]).close()
    assert [told[:34] for told in warnings(caplog)] == ["logger wandb failed (ConnectionErr"]


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_a_logger_that_does_not_return_is_left_behind(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    is_over = threading.Event()

    def hang(*_: Any, **given: Any) -> Any:
        wandb.asked.append((name, given))
        is_over.wait()
        return wandb

    def limit(call: str) -> None:
        monkeypatch.setattr(loggers, "_SECONDS", 0.05 if call == name else 60.0)

    monkeypatch.setattr(wandb, name, hang)
    limit("init")
    writer = MetricsWriter(tmp_path, sinks=["wandb"])
    limit("log")
    for step in range(1, 5):
        writer.write({"step": step, "loss": 1.0})
    limit("finish")
    writer.close()
    assert warnings(caplog)[0].startswith(
        "logger wandb failed (TimeoutError: the call did not return within 0.05 s): the run"
    )
    assert wandb.count(name) == 1, "nothing is asked of it beside a call that has not returned"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    is_over.set()


def test_a_logger_that_returns_late_is_asked_again(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_over = threading.Event()
    log = wandb.log

    def late(scalars: dict[str, float], step: int) -> None:
        is_over.wait()
        log(scalars, step)

    monkeypatch.setattr(loggers, "_SECONDS", 0.05)
    made = loggers.Logger("wandb", RunInfo(folder=tmp_path))
    made.open()
    monkeypatch.setattr(wandb, "log", late)
    made.log({"loss": 1.0}, 1)
    is_over.set()
    monkeypatch.setattr(loggers, "_SECONDS", 60.0)
    steady.wait_for(lambda: ("log", 1) in wandb.asked)
    for step in range(2, 9):
        made.log({"loss": 1.0}, step)
    assert ("log", 8) in wandb.asked
    assert warnings(caplog)[1].startswith("logger wandb works again after ")


def test_a_wandb_that_cannot_go_on_with_a_run_begins_another(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    init = wandb.init

    def old(project: str, name: str, dir: str, config: object) -> Any:
        return init(project=project, name=name, dir=dir, config=config)

    MetricsWriter(tmp_path, sinks=["wandb"]).close()
    monkeypatch.setattr(wandb, "init", old)
    wandb.id = "run-2"
    MetricsWriter(tmp_path, sinks=["wandb"]).close()
    assert warnings(caplog) == ["this version of wandb cannot resume a run: metrics go to a new wandb run"]
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "run-2"}


def test_a_folder_of_its_name_is_no_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # where wandb leaves its files, beside the program that is started
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("wandb") is not None
    try:
        for ask in (lambda: loggers.require_sinks(["wandb"]), lambda: MetricsWriter(tmp_path, sinks=["wandb"])):
            with pytest.raises(
                InputError, match=r"^--run.loggers: the package of 'wandb' is not installed: pip install"
            ):
                ask()
    finally:
        sys.modules.pop("wandb", None)


def test_a_package_that_breaks_when_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise TypeError('Descriptors cannot be\\ncreated directly')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match=r"'wandb' cannot be imported \(TypeError: Descriptors cannot be created"):
        MetricsWriter(tmp_path, sinks=["wandb"])


def test_tensorboard_that_fails_is_told_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def writer(folder: str) -> Any:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    with MetricsWriter(tmp_path, sinks=["tensorboard"]) as made:
        made.write({"step": 1, "loss": 1.0})
    assert [told[:26] for told in warnings(caplog)] == ["logger tensorboard failed "]


def test_a_resumed_run_goes_on_with_its_run_at_wandb(wandb: Wandb, tmp_path: Path) -> None:
    for _ in range(3):
        MetricsWriter(tmp_path, sinks=["wandb"]).close()
    given = [asked for name, asked in wandb.asked if name == "init"]
    assert ["id" in each for each in given] == [False, True, True]
    assert (given[1]["id"], given[1]["resume"]) == ("run-1", "allow")
    (tmp_path / "wandb.json").write_text("torn")
    MetricsWriter(tmp_path, sinks=["wandb"]).close()
    assert "id" not in wandb.asked[-2][1]
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "run-1"}


def test_a_run_whose_logger_fails_ends_as_it_would(wandb: Wandb, tmp_path: Path) -> None:
    settings = config(write_rewards(tmp_path), steps=2, run__loggers=("wandb",), evaluation__every=0)
    wandb.failing = {"init", "log", "finish"}
    summaries = []
    for name in ("failing", "whole"):
        wandb.failing = wandb.failing if name == "failing" else set()
        summaries.append(train.run(_in(settings, tmp_path / name), quiet()))
    first, second = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("failing", "whole"))
    assert [json.loads(line)["loss"] for line in first[1:]] == [json.loads(line)["loss"] for line in second[1:]]
    assert summaries[0]["accuracy_after"] == summaries[1]["accuracy_after"]
    # Continued, it is the same run at wandb; replaced, it is another.
    train.run(_in(settings, tmp_path / "whole", steps=3, resume="auto"), quiet())
    assert [asked for name, asked in wandb.asked if name == "init"][-1]["id"] == "run-1"
    train.run(_in(settings, tmp_path / "whole", run__overwrite=True), quiet())
    assert "id" not in [asked for name, asked in wandb.asked if name == "init"][-1]


def _in(settings: Any, folder: Path, **changes: Any) -> Any:
    return tiny_policy.replaced(settings, run_dir=str(folder), **changes)


class Disk:
    """Takes so many bytes more, a part of the last write among them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self._write = room, os.write
        monkeypatch.setattr(journal, "os", types.SimpleNamespace(**{**vars(os), "write": self.write}))

    def write(self, descriptor: int, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, bytes(data)[: self.room])
        self.room -= written
        return written


def test_lines_that_a_full_disk_does_not_take_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    file = Journal(path, keep_bytes=100)
    disk = Disk(monkeypatch, room=5)
    for line in ("aa", "bb", "cc"):
        file.append([line])
        assert path.read_text() == "aa\n", "never a part of a line"
    disk.room = 1000
    file.append(["dd"])
    assert path.read_text() == "aa\nbb\ncc\ndd\n"
    assert warnings(caplog) == [
        f"{path} cannot be written (No space left on device): the run continues, and tries again with the next lines",
        f"{path} can be written again",
    ]


def test_lines_beyond_what_is_kept_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    file = Journal(path, keep_bytes=4)
    disk = Disk(monkeypatch, room=0)
    file.append(["a", "b"])
    file.append(["c", "d"])
    disk.room = 1000
    file.append(["e"])
    assert path.read_text() == "a\nb\ne\n"
    assert warnings(caplog)[1] == f"{path} can be written again: 2 lines are missing"
    disk.room = 0
    file.append(["f"])
    file.close()
    assert warnings(caplog)[-1] == f"{path} is incomplete: 1 line is missing"


def test_a_run_on_a_full_disk_ends_with_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(write_rewards(tmp_path), steps=2, evaluation__every=0, run__save_rollouts=True)
    Disk(monkeypatch, room=0)
    assert train.run(_in(settings, tmp_path / "run"), quiet()) == {}
    assert (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()
    told = warnings(caplog)
    for name in ("metrics.jsonl", "rollouts.jsonl", "rollouts_full.jsonl"):
        assert sum(f"{name} cannot be written" in line for line in told) == 1
        assert sum(f"{name} is incomplete" in line for line in told) == 1
    assert any(line.startswith("summary.json was not written (") for line in told)


def test_a_report_that_fails_leaves_the_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> Path:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("paced_fast.report.run_page.make_report", fail)
    settings = config(write_rewards(tmp_path), steps=1, evaluation__every=0, run__report=True)
    assert train.run(_in(settings, tmp_path / "run"), quiet())["steps"] == 1
    assert warnings(caplog)[-1] == (
        "the report was not written (RuntimeError('no\\nfonts')): "
        f"try again by python -m paced_fast report {tmp_path / 'run'}"
    )

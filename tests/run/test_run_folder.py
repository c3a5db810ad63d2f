"""The run folder's lock: one run at a time, told by name, and free as soon as the process that held it is gone."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.distributed import ALONE
from paced_fast.errors import InputError
from paced_fast.run.record import files
from paced_fast.run.start.resume import newest_checkpoint
from paced_fast.run.start.run_folder import LOCK_NAME, RunLock, claim, run_folder

HOLDER = """
import os, sys, time
from pathlib import Path
from paced_fast.config.resolve import resolve
from paced_fast.run.start.run_folder import RunLock
RunLock().take(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
    time.sleep(600)
else:
    os.close(1)
    time.sleep(600)
"""


def holder(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process that holds the lock, and one forked from it without exec."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.process
def test_a_second_run_is_refused_until_the_first_is_gone_whatever_it_forked(tmp_path: Path) -> None:
    settings = dataclasses.replace(preset("tiny"), run_dir=str(tmp_path), resume="never")
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, overwrite=True))
    (tmp_path / "checkpoints").mkdir()
    resumed = resolve(dataclasses.replace(settings, resume="auto"))
    files.write_json_atomic(tmp_path / "config.json", dataclasses.asdict(resumed))
    process, child = holder(tmp_path)
    try:
        with RunLock() as lock:
            acts: list[Callable[[], object]] = [
                lambda: run_folder(settings, lock),
                lambda: claim(tmp_path, settings, lock),
                lambda: newest_checkpoint(resumed, tmp_path, lock, ALONE),
            ]
            for act in acts:
                with pytest.raises(InputError) as raised:
                    act()
                assert f"--run-dir {tmp_path} is in use by another run (process {process.pid} on " in str(raised.value)
                assert socket.gethostname() in str(raised.value)
        assert (tmp_path / "checkpoints").is_dir(), "nothing was removed"
        process.kill()
        process.wait()
        assert alive(child)
        with RunLock() as lock:  # a rank that torchrun starts again
            assert run_folder(settings, lock) == tmp_path
            assert refused_elsewhere(tmp_path)
            claim(tmp_path, settings, lock)
            assert refused_elsewhere(tmp_path), "what an earlier run left goes, the lock stays"
        assert not refused_elsewhere(tmp_path), "the end of a run is the end of its lock"
    finally:
        process.kill()
        os.kill(child, 9)
        process.communicate()


def refused_elsewhere(folder: Path) -> bool:
    """Whether another process cannot have the lock."""
    pid = os.fork()
    if pid == 0:
        try:
            RunLock().take(folder)
        except InputError as error:
            os._exit(7 if f"process {os.getppid()} on {socket.gethostname()}" in str(error) else 8)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_lock_alone_is_no_earlier_run(tmp_path: Path) -> None:
    settings = dataclasses.replace(preset("tiny"), run_dir=str(tmp_path), resume="never")
    (tmp_path / LOCK_NAME).write_text("process 1 on elsewhere\n")
    with RunLock() as lock:
        claim(run_folder(settings, lock), settings, lock)
    with RunLock() as lock, pytest.raises(InputError, match=r"already holds a run \(it has config.json\)"):
        run_folder(settings, lock)


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_that_came_while_this_one_started_is_not_removed(tmp_path: Path, resume: str) -> None:
    folder = tmp_path / "run"
    settings = dataclasses.replace(preset("tiny"), run_dir=str(folder), resume=resume)
    with RunLock() as lock:
        assert run_folder(settings, lock) == folder
        assert not folder.exists()
        (folder / "checkpoints" / "step_000001").mkdir(parents=True)
        with pytest.raises(
            InputError, match=r"already holds a run|another run wrote to --run-dir .* while this one was starting"
        ):
            claim(folder, settings, lock)
    assert (folder / "checkpoints" / "step_000001").is_dir()


def test_without_locks_a_warning_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)
    assert len(caplog.records) == 1
    assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text


STARTER = """
import dataclasses, sys
from paced_fast.config.presets import preset
from paced_fast.run.start.run_folder import RunLock, claim, run_folder

settings = preset("tiny")
with RunLock() as lock:
    folder = run_folder(settings, lock)
    print(folder, flush=True)
    if sys.stdin.readline() == "go\\n":
        claim(folder, settings, lock)
    print("over", flush=True)
"""


@pytest.mark.process
def test_runs_that_start_at_once_without_a_folder_take_different_numbers(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        folders = []
        for process in started:  # both are between their choice and their first file
            assert process.stdout is not None
            folders.append(process.stdout.readline().strip())
        assert sorted(folders) == ["runs/tiny-paced-0", "runs/tiny-paced-0-2"]
        for process, answer in zip(started, ("go\n", "failed\n"), strict=True):
            assert process.stdin is not None
            process.stdin.write(answer)
            process.stdin.flush()
            assert process.communicate()[0] == "over\n"
            assert process.returncode == 0
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert sorted(path.name for path in tmp_path.glob("runs/*/*")) == [".lock", "config.json"]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("runs/*")] == [folders[0]], "no empty one is left"


def test_many_choose_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = preset("tiny")
    with RunLock() as first, RunLock() as second:
        assert str(run_folder(settings, first)) == "runs/tiny-paced-0"
        (tmp_path / "runs" / "tiny-paced-0-2").mkdir()
        assert str(run_folder(settings, second)) == "runs/tiny-paced-0-3"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-paced-0-2"]


@pytest.mark.process
@pytest.mark.parametrize("there", ["runs", "above"])
def test_a_reserved_folder_goes_with_what_was_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    (tmp_path / there).mkdir()
    monkeypatch.chdir(tmp_path)
    with RunLock() as lock:
        folder = run_folder(preset("tiny"), lock)
        assert refused_elsewhere(folder)
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_a_folder_that_cannot_be_made_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with (
        RunLock() as lock,
        pytest.raises(InputError, match=r"the run folder runs/tiny-paced-0 cannot be created .*--run-dir"),
    ):
        run_folder(preset("tiny"), lock)

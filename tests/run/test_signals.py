"""A request to stop: heard once, agreed on by all ranks, and a second one ends the process at once."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from steady import LIMIT_SECONDS, wait_for

from paced_fast import train
from paced_fast.data.distributed import ALONE, World
from paced_fast.errors import StopRequested, interrupts_in_one_line
from paced_fast.evaluation import held_out
from paced_fast.policy import warm_start
from paced_fast.run.start import signals
from paced_fast.run.start.signals import HEARD, StopRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", HEARD)
def test_a_signal_raises_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in HEARD]
    with StopRequest() as stop:
        assert not stop.agreed(ALONE)
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.name)
        assert stop.name == number.name
        assert stop.agreed(ALONE)
    assert [signal.getsignal(each) for each in HEARD] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_any_rank_s_flag_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def any_(self: World, flag: bool) -> bool:
        told.append(flag)
        return True  # another rank was asked

    monkeypatch.setattr(World, "any", any_)
    with StopRequest() as stop:
        assert stop.agreed(World(rank=1, size=2))
        assert not stop.agreed(ALONE)  # and one process exchanges nothing
    assert told == [False]


def test_signals_close_together_are_one_request_and_a_later_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequest() as stop:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: stop.name)
        time.sleep(0.05)
        assert ended == []
        monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: ended)
    assert ended == [128 + signal.SIGUSR1]
    assert "at once" in capsys.readouterr().err


def test_other_signals_are_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            wait_for(lambda: heard)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_before_training_a_signal_stops_where_the_run_is() -> None:
    stopped = r"^SIGINT: stopped before the first step: start it again with the same command$"
    with pytest.raises(StopRequested, match=stopped), StopRequest(at_once=True):  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: False)
        except Exception as error:  # such as a reader that would try another format
            raise AssertionError("an ordinary handler holds it up") from error
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(at_once=True) as stop:
        stop.waits()
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.name)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_is_a_second_request_unless_a_launcher_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert signals._same_request_seconds(signal.SIGINT) == signals.SAME_KEY_SECONDS
    assert signals._same_request_seconds(signal.SIGTERM) == signals.SAME_REQUEST_SECONDS
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert signals._same_request_seconds(signal.SIGINT) == signals.SAME_REQUEST_SECONDS


def test_a_thread_can_train_without_hearing_signals() -> None:
    found: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            found.append(stop.agreed(ALONE))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_run_under_torchrun_leaves_with_0_as_torchrun_restarts_any_other() -> None:
    assert signals.status(launched=True) == 0
    assert signals.status(launched=False) == os.EX_TEMPFAIL


_HUNG = """
import ctypes
from paced_fast.run.start import signals
signals.SAME_REQUEST_SECONDS = 0.2
with signals.StopRequest():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(1000)  # in C, as in a collective: no Python handler runs
"""

_LEFT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
"""

_RANK = """
import os, sys, time
from paced_fast.run.start import signals
with signals.StopRequest() as stop:
    signals.end_with_parent()
    print("ready", flush=True)
    while stop.name is None:
        time.sleep(0.01)
"""


def _start(*words: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", *words], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    )


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_hangs_in_c_leaves_at_the_second_signal(number: signal.Signals) -> None:
    process = _start(_HUNG)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert process.wait(LIMIT_SECONDS) == 128 + number
    finally:
        process.kill()
        process.communicate()


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_rank_whose_launcher_is_gone_stops() -> None:
    launcher = _start(_LEFT, _RANK)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.wait(20)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())
    launcher.communicate()


def test_a_signal_ends_a_run_of_one_process_with_a_checkpoint(tmp_path: Path) -> None:
    settings = tiny_run.config(tiny_run.write_rewards(tmp_path), steps=6, evaluation__every=0, run__checkpoint_every=0)
    run = tiny_run.build(settings, tmp_path / "run")
    with StopRequest() as stop:
        step = run.stepper.step

        def signalled() -> Any:
            if run.stepper.counters.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                while stop.name is None:
                    pass
            return step()

        run.stepper.step = signalled  # type: ignore[method-assign]
        how = f"continue with --resume {tmp_path / 'run'}, which stands for all other options"
        with pytest.raises(StopRequested, match=f"^SIGTERM: stopped after step 3, which is saved: {re.escape(how)}$"):
            train.train(run, tiny_run.quiet(), stop)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"]
    whole, rest = (
        train.run(dataclasses.replace(settings, run_dir=str(tmp_path / name)), tiny_run.quiet())
        for name, settings in (("whole", settings), ("run", dataclasses.replace(settings, resume="auto")))
    )
    for summary in (whole, rest):
        for name in ("run_dir", "train_seconds", "curve"):
            del summary[name]
    assert whole == rest


@pytest.mark.parametrize("place", ["warm start", "first evaluation"])
def test_ctrl_c_before_the_first_step_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path), steps=2, warm_start__first__steps=3, run_dir=str(tmp_path / "run")
    )
    module, name = {"warm start": (warm_start, "_run_phase"), "first evaluation": (held_out, "_sample")}[place]

    def interrupted(*given: Any, **__: Any) -> Any:
        if place == "warm start":
            given[-1]("loss 1")  # it has made a step
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: False)

    with monkeypatch.context() as during:
        during.setattr(module, name, interrupted)
        with pytest.raises(StopRequested) as stopped:
            train.run(settings, tiny_run.quiet())
    assert str(stopped.value) == (
        "SIGINT: stopped in the warm start after 1 of 3 steps, which are not kept, so that it starts over next time: "
        "start it again with the same command"
        if place == "warm start"
        else "SIGINT: stopped before the first step: continue with "
        f"--resume {tmp_path / 'run'}, which stands for all other options"
    )
    assert (tmp_path / "run").exists() == (place == "first evaluation")
    assert not list(tmp_path.glob("cache/*.partial"))
    assert train.run(dataclasses.replace(settings, resume="auto"), tiny_run.quiet())["steps"] == 2


def test_a_command_leaves_with_the_status_of_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(train, "run", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            train.main(["tiny"])
        os.kill(os.getpid(), signal.SIGINT)  # pressed again while the process ends
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == f"{signals.TOO_EARLY}\n"


def test_other_commands_end_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended, interrupts_in_one_line():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "SIGINT: stopped, nothing was written\n"


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see what is imported")
@pytest.mark.parametrize(("command", "words"), [("train", "tiny"), ("evaluate", "none"), ("export", "none out")])
def test_ctrl_c_while_a_command_imports_is_one_line(command: str, words: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", f"paced_fast.{command}", *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=LIMIT_SECONDS)
    assert (process.returncode, told) == (os.EX_TEMPFAIL, f"{signals.TOO_EARLY}\n")

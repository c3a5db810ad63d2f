"""The stall watchdog: silent while a run goes on, and able to say who is behind when it does not."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from paced_fast import distributed, train, watchdog
from paced_fast.distributed import ALONE, World
from paced_fast.presets import preset
from paced_fast.watchdog import Place, Watchdog, describe


class Notes(dict[str, str]):
    """A store of this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    monkeypatch.setattr(logging.getLogger("paced_fast"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_stall_is_reported_with_phase_step_and_stacks(
    lines: Callable[[], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    with Watchdog(ALONE, stall_seconds=0.1) as dog:
        dog.count = lambda: 7
        dog.phase("reward")
        wait_for(lambda: dog.reports)
        dog.phase("update")
        wait_for(lambda: any("phase update" in line for line in lines()))
    assert {line.split(" for ")[0] for line in lines()} == {"rank 0: no progress"}
    assert "in phase reward of step 7" in lines()[0]
    assert "in phase update of step 7" in lines()[-1]
    stacks = capfd.readouterr().err
    assert "most recent call first" in stacks
    assert "test_a_stall_is_reported_with" in stacks


def test_a_stall_that_goes_on_is_reported_each_time_it_has_doubled(lines: Callable[[], list[str]]) -> None:
    with Watchdog(ALONE, stall_seconds=0.05) as dog:
        dog.phase("reward")
        wait_for(lambda: len(dog.reports) >= 4)
    assert dog.reports[0] > 0.05
    assert all(later > 2 * earlier for earlier, later in itertools.pairwise(dog.reports))


@pytest.mark.parametrize("call", ["phase", "progress"])
def test_nothing_is_said_while_the_run_goes_on(lines: Callable[[], list[str]], call: str) -> None:
    with Watchdog(ALONE, stall_seconds=0.5) as dog:
        for _ in range(60):  # far longer than a stall in all, and each wait far shorter
            dog.phase("generate") if call == "phase" else dog.progress()
            time.sleep(0.02)
        assert dog.reports == []
    assert lines() == []


def place(rank: int, phase: str = "update", beats: int = 5, exchange: str = "", looked: float = 100.0) -> Place:
    return Place(rank, phase, step=3, beats=beats, exchange=exchange, still_seconds=40.0, looked=looked)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # One works, the rest are in an exchange.
        (
            [place(0, "reward", exchange="gather"), place(1, "reward"), place(2, "reward", exchange="gather")],
            "rank 1 is behind, in reward, step 3; rank 0, 2 waiting in gather of reward, step 3",
        ),
        # Stopped: its thread says nothing any more.
        (
            [place(0, exchange="sum_"), place(1, "generate", beats=4, looked=60.0), place(2, exchange="sum_")],
            "rank 1 is silent for 40 s, last in generate, step 3 (stopped or dead); "
            "rank 0, 2 waiting in sum_ of update, step 3",
        ),
        # Never heard of.
        (
            [place(0, exchange="any")],
            "rank 1 is silent (stopped or dead); rank 0 waiting in any of update, step 3",
        ),
        # Two different exchanges: the one that has come less far is behind.
        (
            [place(0, "sync", beats=6, exchange="any"), place(1, "update", beats=5, exchange="sum_")],
            "rank 1 is behind, in sum_ of update, step 3; rank 0 waiting in any of sync, step 3",
        ),
        # Nobody waits for another.
        ([place(0), place(1)], "rank 0, 1 in update, step 3"),
    ],
    ids=["one works", "one stopped", "one never came", "mismatched", "all work"],
)
def test_who_is_behind_and_what_the_others_wait_for(places: list[Place], expected: str) -> None:
    size = max(2, len(places))
    assert describe({p.rank: p for p in places}, size, now=100.0, silent_seconds=9.0) == expected


def test_ranks_see_each_other_and_the_lead_speaks(lines: Callable[[], list[str]]) -> None:
    notes = Notes()
    dogs = [Watchdog(World(rank, 2), stall_seconds=0.3, board=notes, name="x") for rank in (0, 1)]
    with dogs[0], dogs[1]:
        for dog in dogs:
            dog.count = lambda: 2
            dog.phase("generate")
        dogs[1].phase("update")
        wait_for(lambda: all(dog.reports for dog in dogs))
    said = {line.split(":")[0]: line for line in lines()}
    assert said["rank 0"].endswith(
        "; rank 0 is behind, in generate, step 2; rank 1 waiting in update, step 2; its stacks:"
    )
    assert "behind" not in said["rank 1"]


def test_another_rank_speaks_when_the_lead_is_stopped(lines: Callable[[], list[str]]) -> None:
    notes = Notes()
    lead = Watchdog(World(0, 2), stall_seconds=0.3, board=notes)
    with lead:
        lead.phase("save")
        wait_for(lambda: notes)
    with Watchdog(World(1, 2), stall_seconds=0.3, board=notes) as dog:
        dog.phase("wait")
        wait_for(lambda: dog.reports)
    assert "rank 0 is silent for" in lines()[-1]
    assert "last in save, step 0 (stopped or dead); rank 1 waiting in wait, step 0" in lines()[-1]


def test_an_earlier_attempt_is_not_read(lines: Callable[[], list[str]]) -> None:
    notes = Notes()
    with Watchdog(World(0, 2), stall_seconds=0.3, board=notes, name="attempt 0"):
        wait_for(lambda: notes)
    with Watchdog(World(1, 2), stall_seconds=0.3, board=notes, name="attempt 1") as dog:
        wait_for(lambda: dog.reports)
    assert "rank 0 is silent (stopped or dead)" in lines()[-1]


def test_a_store_that_is_gone_does_not_end_the_run(lines: Callable[[], list[str]]) -> None:
    class Gone(Notes):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

    with Watchdog(World(0, 2), stall_seconds=0.1, board=Gone()) as dog:
        wait_for(lambda: dog.reports)
    assert "rank 1 is silent" in lines()[-1]


def test_a_thread_in_an_exchange_is_seen_there(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck(parts: list[torch.Tensor], own: torch.Tensor, group: None = None) -> None:
        entered.set()
        leave.wait(20)
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(distributed.dist, "all_gather", stuck)

    def work() -> None:
        World(0, 2).any(False)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    entered.wait(20)
    try:
        frame = watchdog.sys._current_frames()[thread.ident or 0]
        assert watchdog._exchange_of(frame) == "any"
    finally:
        leave.set()
        thread.join()
    assert watchdog._exchange_of(None) == ""


def test_one_process_has_no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:29500")  # as Kubernetes sets it beside a service "master"
    train._watchdog(preset("tiny"), ALONE)
    monkeypatch.setattr(watchdog, "_STORE_SECONDS", 0.2)
    assert watchdog.open_board(ALONE, "localhost", 1) is None
    assert watchdog.open_board(World(0, 2), "localhost", 1) is None  # nobody listens: on alone

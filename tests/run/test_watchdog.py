"""The stall watchdog: silent while a run goes on, and able to say who is behind when it does not."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from steady import LIMIT_SECONDS, wait_for

from paced_fast.config.presets import preset
from paced_fast.data import distributed
from paced_fast.data.distributed import ALONE, World
from paced_fast.run.start import session, watchdog
from paced_fast.run.start.watchdog import Place, Watchdog, describe


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


class Simulated:
    """A clock that stands in for the module `time` in the watchdog, and moves when all that watch are waiting."""

    def __init__(self, dogs: list[Watchdog]) -> None:
        self.now, self.is_over, self.moved = 1000.0, False, threading.Condition()
        self.waiting: dict[int, float] = {}  # by number of the dog, until when
        self.dogs = dogs
        for i, dog in enumerate(dogs):
            dog._stop = _Waits(self, i)  # type: ignore[assignment]

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def advance(self, seconds: float) -> None:
        """Let so much time pass; of those whose waits end together the first dog goes on first."""
        end = self.now + seconds
        while True:
            wait_for(lambda: len(self.waiting) == len(self.dogs))
            with self.moved:
                until, first = min((until, i) for i, until in self.waiting.items())
                self.now = max(self.now, min(until, end))
                if until > end:
                    return
                del self.waiting[first]
                self.moved.notify_all()


@dataclass
class _Waits:
    """An event as the watchdog uses it, on the simulated clock."""

    clock: Simulated
    number: int

    def wait(self, seconds: float) -> bool:
        with self.clock.moved:
            self.clock.waiting[self.number] = self.clock.now + seconds
            self.clock.moved.wait_for(lambda: self.clock.is_over or self.number not in self.clock.waiting)
        return self.clock.is_over

    def set(self) -> None:
        with self.clock.moved:
            self.clock.is_over = True
            self.clock.moved.notify_all()


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
def test_nothing_is_said_while_the_run_goes_on(
    lines: Callable[[], list[str]], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(ALONE, stall_seconds=10.0)
    clock = Simulated([dog])
    monkeypatch.setattr(watchdog, "time", clock)
    with dog:
        for _ in range(20):  # twenty stalls long in all, and each wait a little shorter than one
            dog.phase("generate") if call == "phase" else dog.progress()
            clock.advance(8.9)
        assert dog.reports == []
        assert lines() == []
        clock.advance(4.0)
        assert [10 < seconds < 12 for seconds in dog.reports] == [True]


def place(rank: int, phase: str = "update", beats: int = 5, exchange: str = "", looked: float = 100.0) -> Place:
    return Place(rank, phase, step=3, beats=beats, exchange=exchange, still_seconds=40.0, looked=looked)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # One works, the rest are in an exchange.
        (
            [place(0, "reward", exchange="gather"), place(1, "reward"), place(2, "reward", exchange="gather")],
            "rank 1 is behind, in phase reward of step 3; ranks 0, 2 are waiting in gather(), phase reward of step 3",
        ),
        # Stopped: its thread says nothing any more.
        (
            [place(0, exchange="sum_"), place(1, "generate", beats=4, looked=60.0), place(2, exchange="sum_")],
            "rank 1 has been silent for 40 s, last in phase generate of step 3 (stopped or dead); "
            "ranks 0, 2 are waiting in sum_(), phase update of step 3",
        ),
        # Never heard of.
        (
            [place(0, exchange="any")],
            "rank 1 has not reported yet (stopped or dead); rank 0 is waiting in any(), phase update of step 3",
        ),
        # Two different exchanges: the one that has come less far is behind.
        (
            [place(0, "sync", beats=6, exchange="any"), place(1, "update", beats=5, exchange="sum_")],
            "rank 1 is behind, in sum_(), phase update of step 3; rank 0 is waiting in any(), phase sync of step 3",
        ),
        # Nobody waits for another.
        ([place(0), place(1)], "ranks 0, 1 are in phase update of step 3"),
    ],
    ids=["one works", "one stopped", "one never came", "mismatched", "all work"],
)
def test_who_is_behind_and_what_the_others_wait_for(places: list[Place], expected: str) -> None:
    size = max(2, len(places))
    assert describe({p.rank: p for p in places}, size, now=100.0, silent_seconds=9.0) == expected


def test_ranks_see_each_other_and_the_lead_speaks(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    dogs = [Watchdog(World(rank, 2), stall_seconds=30.0, board=notes, name="x") for rank in (0, 1)]
    clock = Simulated(dogs)
    monkeypatch.setattr(watchdog, "time", clock)
    with dogs[0], dogs[1]:
        for dog in dogs:
            dog.count = lambda: 2
            dog.phase("generate")
        dogs[1].phase("update")
        clock.advance(45.0)
    assert [len(dog.reports) for dog in dogs] == [1, 1]
    said = {line.split(":")[0]: line for line in lines()}
    assert said["rank 0"].endswith(
        "; rank 0 is behind, in phase generate of step 2; rank 1 is waiting in phase update of step 2; "
        "stacks of this rank:"
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
    assert "rank 0 has been silent for" in lines()[-1]
    assert "last in phase save of step 0 (stopped or dead); rank 1 is waiting in phase wait of step 0" in lines()[-1]


def test_an_earlier_attempt_is_not_read(lines: Callable[[], list[str]]) -> None:
    notes = Notes()
    with Watchdog(World(0, 2), stall_seconds=0.3, board=notes, name="attempt 0"):
        wait_for(lambda: notes)
    with Watchdog(World(1, 2), stall_seconds=0.3, board=notes, name="attempt 1") as dog:
        wait_for(lambda: dog.reports)
    assert "rank 0 has not reported yet (stopped or dead)" in lines()[-1]


def test_a_store_that_is_gone_does_not_end_the_run(lines: Callable[[], list[str]]) -> None:
    class Gone(Notes):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

    with Watchdog(World(0, 2), stall_seconds=0.1, board=Gone()) as dog:
        wait_for(lambda: dog.reports)
    assert "rank 1 has not reported yet" in lines()[-1]


def test_a_thread_in_an_exchange_is_seen_there(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck(parts: list[torch.Tensor], own: torch.Tensor, group: None = None) -> None:
        entered.set()
        leave.wait(LIMIT_SECONDS)
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(distributed.dist, "all_gather", stuck)

    def work() -> None:
        World(0, 2).any(False)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert entered.wait(LIMIT_SECONDS)
    try:
        frame = watchdog.sys._current_frames()[thread.ident or 0]
        assert watchdog._exchange_of(frame) == "any"
    finally:
        leave.set()
        thread.join()
    assert watchdog._exchange_of(None) == ""


def test_one_process_has_no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:29500")  # as Kubernetes sets it beside a service "master"
    session.watchdog_of_rank(preset("tiny"), ALONE)
    monkeypatch.setattr(watchdog, "_STORE_SECONDS", 0.2)
    assert watchdog.open_board(ALONE, "localhost", 1) is None
    assert watchdog.open_board(World(0, 2), "localhost", 1) is None  # nobody listens: on alone

"""Watchdog of a hanging run: reports which rank is behind, which call the others wait in, and the stack of every rank.

A thread of each rank looks whether the main thread still goes on from phase to phase. The ranks tell each other where
they are through torchrun's key-value store, by a connection of the thread's own: it works while the main thread is
stuck in a collective, and what a stopped rank said last stays there. A stall is reported, and again each time its
duration has doubled; the run is not ended: `distributed.timeout_seconds` does that, in the exchange or, where one has
no limit, here.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Protocol

import torch.distributed as dist

from paced_fast.data import distributed
from paced_fast.data.distributed import World

logger = logging.getLogger(__name__)

_LOOKS_PER_STALL = 10
_MOST_SECONDS_BETWEEN_LOOKS = 10.0
_LOOKS_UNTIL_SILENT = 3
_STORE_SECONDS = 5.0


class Board(Protocol):
    """Key-value store of the ranks' states: a torch.distributed store, or None for one process."""

    def set(self, key: str, value: str) -> None:
        """Replace the value of a key."""
        ...

    def get(self, key: str) -> bytes:
        """The value of a key; waits a little for one that is not there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all the keys are there."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """State of a rank. Phases come in the same order on every rank, so `beats` shows which rank is behind."""

    rank: int
    phase: str
    step: int
    beats: int
    """Phases begun so far."""
    exchange: str
    """Call in which it waits for other ranks; "" while it works."""
    still_seconds: float
    """Time since it last made progress."""
    looked: float
    """Time of this report, in seconds since 1970."""


class Watchdog:
    """Watches the main thread while it is entered.

    `phase` is given every phase of the run as it begins, `progress` is called within long ones: by each micro-batch and
    each token of a generator. Neither waits, takes a lock or asks a device.
    """

    def __init__(
        self,
        world: World,
        *,
        stall_seconds: float,
        gone_seconds: float = math.inf,
        board: Board | None = None,
        name: str = "",
    ) -> None:
        """`board` shares states between ranks; `name` separates them from those of an earlier attempt.

        `gone_seconds`: a rank whose watchdog is silent for this long has died or lost its connection; a rank that waits
        for it ends its process.
        """
        self.world, self.stall_seconds, self.gone_seconds, self.board = world, stall_seconds, gone_seconds, board
        self.count: Callable[[], int] = lambda: 0
        """The step under way, or the last."""
        self.reports: list[float] = []
        """Seconds without progress of the main thread, at each report."""
        self._key = f"paced_fast/watchdog/{name}"
        self._phase, self._beats, self._marks = "start", 0, 0
        self._stop = threading.Event()
        self._every = min(stall_seconds / _LOOKS_PER_STALL, _MOST_SECONDS_BETWEEN_LOOKS)

    def phase(self, name: str) -> None:
        """The main thread begins `name`."""
        self._phase = name
        self._beats += 1
        self._marks += 1

    def progress(self) -> None:
        """The main thread goes on within its phase."""
        self._marks += 1

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(_STORE_SECONDS)

    def _watch(self) -> None:
        seen, since, patience = -1, time.monotonic(), self.stall_seconds
        while not self._stop.wait(self._every):
            now = time.monotonic()
            if seen != self._marks:
                seen, since, patience = self._marks, now, self.stall_seconds
            self._write(now - since)
            if now - since > _LOOKS_UNTIL_SILENT * self._every:
                self._leave_if_alone()
            if now - since > patience:
                # The other ranks' states may be one look old; after a moment all have found the stall.
                if self.world.size > 1 and self._stop.wait(2 * self._every):
                    return
                patience = 2 * (time.monotonic() - since)  # a first report may come before all ranks were heard of
                if seen == self._marks:
                    self._report(patience / 2)

    def _place(self, still_seconds: float) -> Place:
        exchange = _exchange_of(sys._current_frames().get(threading.main_thread().ident or 0))
        return Place(self.world.rank, self._phase, self.count(), self._beats, exchange, still_seconds, time.time())

    def _write(self, still_seconds: float) -> None:
        if self.board is not None:
            with _forgiven():
                self.board.set(f"{self._key}/{self.world.rank}", json.dumps(asdict(self._place(still_seconds))))

    def _read(self) -> dict[int, Place]:
        """Latest states of the other ranks, without those never reported."""
        places: dict[int, Place] = {}
        for rank in range(self.world.size):
            key = f"{self._key}/{rank}"
            with _forgiven():
                if self.board is not None and rank != self.world.rank and self.board.check([key]):
                    places[rank] = Place(**json.loads(self.board.get(key)))
        return places

    def _leave_if_alone(self) -> None:
        """End this process when it waits for a rank that is gone; some waits, such as for a warm start, have no time
        limit."""
        if math.isinf(self.gone_seconds) or not self._place(0.0).exchange:
            return
        now = time.time()
        gone = {rank: place for rank, place in self._read().items() if now - place.looked > self.gone_seconds}
        if gone:
            logger.error("%s", "; ".join(_silent(rank, place, now) for rank, place in sorted(gone.items())))
            with contextlib.suppress(OSError, ValueError):
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            os._exit(1)

    def _report(self, still_seconds: float) -> None:
        self.reports.append(still_seconds)
        others = self._read()
        own = self._place(still_seconds)
        message = f"rank {own.rank}: no progress for {still_seconds:.0f} s in phase {own.phase} of step {own.step}"
        places = {**others, own.rank: own}
        now, silent_seconds = own.looked, _LOOKS_UNTIL_SILENT * self._every  # this rank is heard, however late it is
        # Rank 0 reports the ranks' states, or the first rank after it that can.
        if self.world.size > 1 and min(_heard(places, now, silent_seconds), default=own.rank) == own.rank:
            message += f"; {describe(places, self.world.size, now, silent_seconds)}"
        logger.warning("%s; stacks of this rank:", message)
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed, or a pipe without a reader
            faulthandler.dump_traceback(sys.stderr, all_threads=True)


def _heard(places: Mapping[int, Place], now: float, silent_seconds: float) -> list[int]:
    return sorted(rank for rank, place in places.items() if now - place.looked <= silent_seconds)


def describe(places: Mapping[int, Place], size: int, now: float, silent_seconds: float) -> str:
    """Report in one line which rank is behind, and which call the others wait in.

    A rank not heard of for `silent_seconds` is stopped or dead; one that works while others are in an exchange is
    behind; where all are in one, or none, those that have begun fewer phases are.
    """
    heard = _heard(places, now, silent_seconds)
    silent = [rank for rank in range(size) if rank not in heard]
    most = max((places[rank].beats for rank in heard), default=0)
    behind = [rank for rank in heard if not places[rank].exchange]
    if len(behind) == len(heard):
        behind = []
    if not behind and not silent:
        behind = [rank for rank in heard if places[rank].beats < most]
    parts: list[str] = []
    for rank in silent:
        parts.append(_silent(rank, places.get(rank), now))
    parts += [f"rank {rank} is behind, in {_where(places[rank])}" for rank in behind]
    others: dict[str, list[int]] = {}
    for rank in heard:
        if rank not in behind:
            others.setdefault(_where(places[rank]), []).append(rank)
    waiting = "waiting in" if parts else "in"
    for where, ranks in others.items():
        who = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
        parts.append(f"{who} {waiting} {where}")
    return "; ".join(parts)


def _silent(rank: int, last: Place | None, now: float) -> str:
    if last is None:
        return f"rank {rank} has not reported yet (stopped or dead)"
    return f"rank {rank} has been silent for {now - last.looked:.0f} s, last in {_where(last)} (stopped or dead)"


def _where(place: Place) -> str:
    return f"{f'{place.exchange}(), ' if place.exchange else ''}phase {place.phase} of step {place.step}"


def _exchange_of(frame: FrameType | None) -> str:
    """The outermost call into an exchange between ranks on the stack of `frame`; "" when there is none."""
    found = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path == distributed.__file__ or "/torch/distributed/" in path:
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def open_board(world: World, host: str, port: int) -> Board | None:
    """A connection of our own to the store that the ranks met at; None for one process, or when it cannot be had."""
    if world.size == 1:
        return None
    with _forgiven():
        wait = datetime.timedelta(seconds=_STORE_SECONDS)
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, is_master=False, wait_for_workers=False, timeout=wait
        )
    return None


@contextlib.contextmanager
def _forgiven() -> Iterator[None]:
    """A watchdog that cannot hear the others goes on alone: it must not end a run that works."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        logger.debug("watchdog: %s", error)

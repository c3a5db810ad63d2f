"""Thread of a `WorkerPool`: it owns the processes, distributes the requests and kills workers that are late."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

TURN_SECONDS = 0.25
# A turn is half its length by the clock, then half in processor time: on a busy machine the clock alone says little.
_HALF_TURN = TURN_SECONDS / 2
_START_SECONDS = 120.0
_TICK_SECONDS = 0.02
# The pool gives up after _MOST_LOSSES processes lost before they did anything within _LOSS_SECONDS.
_MOST_LOSSES = 6
_LOSS_SECONDS = 60.0
_CHUNK = 16
_CHUNK_BYTES = 1 << 15
_MEMORY_BYTES = 2 << 30
_SERVER = Path(__file__).with_name("fork_server.py")


class Reply(NamedTuple):
    """Outcome of a request; `value` is the judge's reply if `kind` is `answered`."""

    kind: Literal["answered", "timeout", "died"]
    value: Any = None


@dataclass(eq=False)
class _Call:
    requests: Sequence[Any]
    deadline: float
    fresh: deque[int]
    slow: deque[int] = field(default_factory=deque)
    """Requests that had a turn and need longer."""
    replies: dict[int, Reply] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    running: int = 0
    has_time: bool = False
    """True once only slow requests are left and the deadline has been set for them."""
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Worker:
    connection: socket.socket
    pid: int = 0
    call: _Call | None = None
    sent: deque[int] = field(default_factory=deque)
    """Indices of the requests sent to this worker; it works on the first."""
    is_slow: bool = False
    began: float = 0.0
    cpu_began: float | None = None
    """Processor seconds of the worker when its request had run for half a turn."""
    until: float = 0.0
    incoming: bytes = b""
    outgoing: bytes = b""


class PoolLoop:
    """The thread that owns the processes. Other threads only append to `_arrived` and wait."""

    def __init__(self, program: Path, name: str, num_workers: int, seconds: float) -> None:
        self._command = [sys.executable, "-P", str(_SERVER), str(program), str(_MEMORY_BYTES)]
        self._name, self._num_workers, self._seconds = name, num_workers, seconds
        self.failure: str | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._arrived: deque[_Call] = deque()
        self._calls: deque[_Call] = deque()
        self._workers: list[_Worker] = []
        self._stopping = self._is_ready = False
        self._losses: deque[float] = deque(maxlen=_MOST_LOSSES)
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._start_server()
        self._thread = threading.Thread(target=self._serve, name=f"{name} pool", daemon=True)
        self._thread.start()

    def call(self, requests: Sequence[Any]) -> list[Reply]:
        """Return one reply per request, in order; blocks until all are there."""
        allowed = self._seconds + max(0, len(requests) - 1) * TURN_SECONDS / self._num_workers
        call = _Call(requests, time.monotonic() + allowed, deque(range(len(requests))))
        with self._lock:
            if not self._stopping and self.failure is None:
                self._arrived.append(call)
                self._wake()
            else:
                call.done.set()
        call.done.wait()
        if self.failure is not None:
            raise InputError(self.failure)
        return [call.replies.get(i, Reply("died")) for i in range(len(requests))]

    def stop(self) -> None:
        """End the processes and the thread."""
        if self._pid != os.getpid():
            return
        self._stopping = True  # no lock: the garbage collector may call this anywhere
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: it wakes anyway; closed: the thread has ended
            self._wake_in.send(b"w")

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair()
        null = subprocess.DEVNULL
        with theirs:
            self._server = subprocess.Popen(
                self._command, stdin=theirs.fileno(), stdout=null, stderr=null, start_new_session=True
            )
        self._selector.register(self._control, selectors.EVENT_READ)
        self._is_ready, self._started, self._heard = False, time.monotonic(), b""

    def _stop_server(self) -> None:
        self._selector.unregister(self._control)
        self._control.close()
        self._server.kill()
        self._server.wait()

    def _serve(self) -> None:
        try:
            while not self._stopping and self.failure is None:
                self._turn()
        except Exception as error:
            logger.exception("%s: the pool of worker processes failed", self._name)
            self.failure = f"reward {self._name!r}: its worker pool failed: {type(error).__name__}: {error}"
        with self._lock:
            self._stopping = True  # no more calls arrive
        try:
            for worker in list(self._workers):
                self._drop(worker)
            self._stop_server()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()
        finally:
            for call in (*self._calls, *self._arrived):
                call.done.set()

    def _turn(self) -> None:
        is_idle = self._is_ready and not self._calls
        for key, _ in self._selector.select(None if is_idle else _TICK_SECONDS):
            if key.fileobj is self._wake_out:
                self._wake_out.recv(4096)
            elif key.fileobj is self._control:
                self._hear_server()
            elif key.data in self._workers:
                self._hear(key.data)
        with self._lock:
            while self._arrived:
                self._calls.append(self._arrived.popleft())
        if not self._is_ready:
            if time.monotonic() > self._started + _START_SECONDS:
                self.failure = f"reward {self._name!r}: its workers do not start in {_START_SECONDS:g} s"
            return
        now = time.monotonic()
        for worker in list(self._workers):
            self._watch(worker, now)
        for call in list(self._calls):
            self._settle(call, now)
        self._assign(now)

    def _hear_server(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except ConnectionError:  # it was killed before it read a request
            data = b""
        self._heard += data
        if data and not self._heard.endswith(b"\n"):
            return
        message = json.loads(self._heard) if data else {}
        self._heard = b""
        if message.get("ready"):
            self._is_ready = True
            took = time.monotonic() - self._started
            for call in self._calls:
                call.deadline = max(call.deadline, min(call.deadline + took, time.monotonic() + self._seconds))
        elif "failed" in message or not self._is_ready:
            reason = message.get("failed", "the process ended")
            self.failure = f"reward {self._name!r}: its worker processes do not start: {reason}"
        else:  # the server was killed: its workers end with it, and their requests are tried again
            logger.warning("%s: the process that forks the workers has died; starting another", self._name)
            self._stop_server()
            self._start_server()
            self._note_loss()

    def _note_loss(self) -> None:
        self._losses.append(time.monotonic())
        if len(self._losses) == _MOST_LOSSES and self._losses[0] > time.monotonic() - _LOSS_SECONDS:
            self.failure = (
                f"reward {self._name!r}: its workers are killed as fast as they start: "
                "look for a limit on memory or processes"
            )

    def _hear(self, worker: _Worker) -> None:
        if worker.outgoing:
            self._send(worker)
        try:
            data = worker.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        *lines, worker.incoming = (worker.incoming + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "reply" in message and worker.call is not None and worker.sent:
                worker.call.replies[worker.sent.popleft()] = Reply("answered", message["reply"])
                worker.call.running -= 1
                worker.began, worker.cpu_began = time.monotonic(), None
                if not worker.sent:
                    worker.call = None
            elif "retired" in message:
                self._give_back(worker, blame=False)
                self._drop(worker)
                return
            else:
                worker.pid = message.get("pid", worker.pid)
        if not data:
            if not worker.pid and self._is_ready:
                self._note_loss()
            worker.pid = 0
            self._give_back(worker, blame=True)
            self._drop(worker)

    def _watch(self, worker: _Worker, now: float) -> None:
        """Take the work from a worker that is stopped or has used its time, and drop the worker."""
        call = worker.call
        if call is None:
            return
        ran, is_late = now - worker.began, now > call.deadline or (worker.is_slow and now > worker.until)
        if ran < _HALF_TURN and not is_late:
            return
        state, cpu = _state_of(worker.pid)
        if worker.cpu_began is None:
            worker.cpu_began = cpu
        had_turn = cpu - worker.cpu_began > _HALF_TURN or ran > 4 * TURN_SECONDS
        if state in "Tt":
            self._give_back(worker, blame=True)
        elif is_late:
            call.running -= 1
            call.replies[worker.sent.popleft()] = Reply("timeout")
            self._give_back(worker, blame=False)
        elif had_turn and (len(worker.sent) > 1 or self._is_waited_for()):
            call.running -= 1
            call.slow.append(worker.sent.popleft())
            self._give_back(worker, blame=False)
        else:
            if had_turn and not worker.is_slow:  # no other request waits: it continues as a slow one
                worker.is_slow, worker.until = True, call.deadline
            return
        self._drop(worker)

    def _is_waited_for(self) -> bool:
        is_full = len(self._workers) == self._num_workers and all(w.call is not None for w in self._workers)
        return is_full and any(call.fresh for call in self._calls)

    def _give_back(self, worker: _Worker, *, blame: bool) -> None:
        """Return a worker's requests to the front of the queue; with `blame` it was lost during the first of them."""
        call = worker.call
        if call is None:
            return
        if blame and worker.sent:
            first = worker.sent[0]
            call.deaths[first] = call.deaths.get(first, 0) + 1
            if call.deaths[first] > 1:
                call.replies[worker.sent.popleft()] = Reply("died")
                call.running -= 1
        call.running -= len(worker.sent)
        call.fresh.extendleft(reversed(worker.sent))
        worker.call = None
        worker.sent.clear()

    def _settle(self, call: _Call, now: float) -> None:
        """End a call that is complete or late."""
        if not call.fresh and not call.has_time and not any(w.call is call and not w.is_slow for w in self._workers):
            call.has_time, call.deadline = True, min(call.deadline, now + self._seconds)
        if now > call.deadline and not call.running:
            for index in (*call.fresh, *call.slow):
                call.replies[index] = Reply("died" if index in call.deaths else "timeout")
            call.fresh.clear()
            call.slow.clear()
        if not call.fresh and not call.slow and not call.running:
            self._calls.remove(call)
            call.done.set()

    def _assign(self, now: float) -> None:
        """Give free workers the fresh requests, taking calls in turn, then the slow ones; fork missing workers."""
        for worker in self._workers:
            if worker.call is not None or not worker.pid:
                continue
            call = next((c for c in self._calls if c.fresh and now < c.deadline), None)
            if call is not None:
                share = -(-len(call.fresh) // (2 * self._num_workers))
                self._give(worker, call, call.fresh, min(share, _CHUNK), now)
            elif call := next((c for c in self._calls if c.slow and now < c.deadline), None):
                turns = -(-len(call.slow) // self._num_workers)
                worker.until = now + max(2 * TURN_SECONDS, (call.deadline - now) / turns)
                self._give(worker, call, call.slow, 1, now)
                worker.is_slow = True
            else:
                break
            self._calls.remove(call)
            self._calls.append(call)
        if self._calls:
            for _ in range(self._num_workers - len(self._workers)):
                self._fork()

    def _give(self, worker: _Worker, call: _Call, queue: deque[int], most: int, now: float) -> None:
        lines: list[bytes] = []
        while queue and len(lines) < most and sum(map(len, lines)) < _CHUNK_BYTES:
            worker.sent.append(queue.popleft())
            lines.append(json.dumps(call.requests[worker.sent[-1]], ensure_ascii=True).encode() + b"\n")
        call.running += len(lines)
        worker.call, worker.is_slow = call, False
        worker.began, worker.cpu_began = now, None
        worker.outgoing = b"".join(lines)
        self._send(worker)

    def _send(self, worker: _Worker) -> None:
        try:
            worker.outgoing = worker.outgoing[worker.connection.send(worker.outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            worker.outgoing = b""  # the worker is gone; the next read notices
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
        self._selector.modify(worker.connection, events, worker)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            except OSError:  # the server is gone; the next read notices
                ours.close()
                return
        ours.setblocking(False)
        worker = _Worker(ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _drop(self, worker: _Worker) -> None:
        if worker.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, 9)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        self._workers.remove(worker)


def _state_of(pid: int) -> tuple[str, float]:
    """Return the state of a process (a letter) and the processor seconds it has used."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X", 0.0  # gone; its socket will end
    fields = text.rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

"""Trainer's side of a sandbox: its keepers (servers), and a program with its pipes, clock and byte counts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paced_fast.rewards.sandbox.limits import Ending, Limits, Outcome, SandboxError, SandboxTimeout

_PACKAGE = str(Path(__file__).resolve().parent)
# Makes the modules of this folder importable under their names without the other imports of their packages.
_BOOT = """
import sys, types
for name, path in (("paced_fast", []), ("paced_fast.rewards", []), ("paced_fast.rewards.sandbox", [sys.argv[2]])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from paced_fast.rewards.sandbox import keeper
{"keeper": keeper.main, "harness": keeper.inside}[sys.argv[1]]()
"""
_CHUNK = 1 << 16
_GRACE_SECONDS = 10.0
_HELLO_SECONDS = 60.0


class Keeper:
    """One server process. It runs one program at a time, for one thread at a time."""

    def __init__(self, settings: dict[str, Any], python: str, uid: int) -> None:
        ours, theirs = socket.socketpair()
        command = [python, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, "keeper", _PACKAGE]
        given = json.dumps({**settings, "uid": uid, "boot": _BOOT, "package": _PACKAGE})
        null = subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [*command, given],
                stdin=theirs.fileno(),
                stdout=null,
                stderr=null,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise SandboxError(f"{python} does not start: {error.strerror}") from error
        finally:
            theirs.close()
        self._socket = ours
        try:
            hello = self._receive(_HELLO_SECONDS)
            if "failed" in hello:
                raise SandboxError(hello["failed"])
        except SandboxError:
            self.close()
            raise
        self.layers: dict[str, Any] = hello["layers"]
        self.missing: list[str] = hello["missing"]
        self.pid = self._process.pid

    def start(self, limits: Limits, descriptors: list[int]) -> int:
        """Start a process with `descriptors` as its own and return its pidfd.

        Raises:
            SandboxError: the keeper failed or has died.
            SandboxTimeout: it took longer than `limits.start_seconds`.
        """
        request = {key: getattr(limits, key) for key in ("memory_mib", "cpu_seconds", "file_mib", "threads", "files")}
        try:
            socket.send_fds(self._socket, [json.dumps({"limits": request}).encode()], descriptors)
            self._socket.settimeout(limits.start_seconds)
            message, received, _, _ = socket.recv_fds(self._socket, 8, 1)
        except TimeoutError as error:
            raise SandboxTimeout(f"its keeper starts no process within {limits.start_seconds:g} s") from error
        except OSError as error:
            raise SandboxError(f"its keeper failed: {error}") from error
        if message != b"started\n" or len(received) != 1:
            raise SandboxError("its keeper has died")
        return received[0]

    def status(self) -> dict[str, Any]:
        """Return the status of the process started last, which has ended."""
        return self._receive(_GRACE_SECONDS)

    def close(self) -> None:
        """End the server and any program that it still runs."""
        self._socket.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, seconds: float) -> dict[str, Any]:
        data, deadline = b"", time.monotonic() + seconds
        while not data.endswith(b"\n"):
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                part = self._socket.recv(_CHUNK)
            except TimeoutError as error:
                raise SandboxTimeout(f"its keeper does not answer within {seconds:g} s") from error
            except OSError as error:
                raise SandboxError(f"its keeper process does not answer: {error}") from error
            if not part:
                raise SandboxError("its keeper has died")
            data += part
        return json.loads(data)


class Program:
    """A process in the sandbox with its pipes. All of its output is counted and none is trusted."""

    def __init__(self, keeper: Keeper, limits: Limits) -> None:
        self._keeper, self._limits = keeper, limits
        pairs = [os.pipe() for _ in range(5)]
        theirs = [pairs[0][0], pairs[1][1], pairs[2][1], pairs[3][0], pairs[4][1]]
        self._stdin, self._requests = pairs[0][1], pairs[3][1]
        self._stdout, self._stderr, self._answers = pairs[1][0], pairs[2][0], pairs[4][0]
        self._open = [self._stdin, self._requests, self._stdout, self._stderr, self._answers]
        self._received = {self._stdout: bytearray(), self._stderr: bytearray(), self._answers: bytearray()}
        self._to_send: dict[int, memoryview] = {}
        self._ending: Ending | None = None
        self._has_ended = False
        try:
            self._pidfd = keeper.start(limits, theirs)
        except SandboxError:
            self.release()
            raise
        finally:
            _close(theirs)
        self._open.append(self._pidfd)
        for descriptor in self._open:
            os.set_blocking(descriptor, False)
        ready = self._line(time.monotonic() + limits.start_seconds)
        if ready != b"ready":
            reason = ready or bytes(self._received[self._stderr])
            self.release()
            if self._ending == "timeout":
                raise SandboxTimeout(f"a program was not ready within {limits.start_seconds:g} s")
            raise SandboxError(f"a program did not start: {reason.decode(errors='replace').strip() or 'it died'}")
        self._began = time.monotonic()

    def send(self, request: bytes, stdin: bytes | None = None) -> None:
        """Queue a line for the harness and, if given, all of the program's input; written as the program reads."""
        self._to_send[self._requests] = memoryview(request + b"\n")
        if stdin is not None:
            self._to_send[self._stdin] = memoryview(stdin)

    def answer(self) -> bytes | None:
        """Return the next line from the harness, None if there will be none. The parent's clock limits the wait."""
        return self._line(time.monotonic() + self._limits.seconds)

    def wait(self) -> None:
        """Wait until the process has ended, by itself or at a limit; not until its pipes are closed."""
        self._pump(time.monotonic() + self._limits.seconds, until_line=False)

    def finish(self) -> Outcome:
        """Kill the process if it still runs, and return its outcome.

        Raises:
            SandboxError: the keeper has died.
        """
        wall = time.monotonic() - getattr(self, "_began", time.monotonic())
        try:
            if not self._has_ended:
                self._kill("stopped")
            status = self._keeper.status()
            for descriptor in self._received:
                self._read(descriptor)
        finally:
            self.release()
        code = status["status"]
        return Outcome(
            ended=self._ending or ("signal" if code < 0 or code > 128 else "exit"),
            status=code,
            stdout=bytes(self._received[self._stdout]),
            stderr=bytes(self._received[self._stderr]),
            wall_seconds=wall,
            cpu_seconds=status["cpu"],
            peak_mib=status["peak_kib"] / 1024,
        )

    def release(self) -> None:
        """Close the open descriptors; the keeper ends the process if it still runs."""
        _close(self._open)
        self._open = []

    def _line(self, deadline: float) -> bytes | None:
        self._pump(deadline, until_line=True)
        line, found, rest = self._received[self._answers].partition(b"\n")
        if not found:
            return None
        self._received[self._answers] = rest
        return bytes(line)

    def _pump(self, deadline: float, *, until_line: bool) -> None:
        """Move bytes both ways until a line arrives (if `until_line`), or the process ends or is killed at a limit."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        for descriptor in self._received:
            poll.register(descriptor, select.POLLIN)
        for descriptor in self._to_send:
            poll.register(descriptor, select.POLLOUT)
        while not self._has_ended and not (until_line and b"\n" in self._received[self._answers]):
            left = deadline - time.monotonic()
            if left <= 0:
                self._kill("timeout")
                return
            for descriptor, _ in poll.poll(left * 1000 + 1):
                if descriptor == self._pidfd:
                    self._has_ended = True
                elif descriptor in self._to_send:
                    if not self._write(descriptor):
                        poll.unregister(descriptor)
                elif not self._read(descriptor):
                    poll.unregister(descriptor)
            if sum(map(len, self._received.values())) > self._limits.output_kib * 1024:
                self._kill("output")
        if self._has_ended:
            for descriptor in self._received:
                self._read(descriptor)

    def _read(self, descriptor: int) -> bool:
        """Read the available bytes, up to about the output limit; return True if more may come."""
        received = self._received[descriptor]
        while len(received) <= self._limits.output_kib * 1024:
            try:
                part = os.read(descriptor, _CHUNK)
            except BlockingIOError:
                return True
            if not part:
                return False
            received += part
        return True

    def _write(self, descriptor: int) -> bool:
        """Write as much as possible; return True if more is left."""
        left = self._to_send[descriptor]
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            left = left[:0]
        self._to_send[descriptor] = left
        if left:
            return True
        del self._to_send[descriptor]
        if descriptor == self._stdin:
            _close([descriptor])
            self._open.remove(descriptor)
        return False

    def _kill(self, why: Ending) -> None:
        self._ending = self._ending or why
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._has_ended = True


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Box:
    """A sandbox: up to `workers` keepers, each started when first needed and replaced when it fails."""

    def __init__(self, name: str, settings: dict[str, Any], python: str, limits: Limits, workers: int) -> None:
        self.strength = name
        self._settings, self._python, self._limits = settings, python, limits
        # Keepers alive at the same time, and one that has just ended, all have different user ids.
        self._uids = itertools.cycle(settings.pop("uids"))
        self._slots: queue.LifoQueue[Keeper | None] = queue.LifoQueue()
        self._lock, self._keepers = threading.Lock(), set[Keeper]()
        for _ in range(workers):
            self._slots.put(None)

    def run(self, program: str, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """As `Sandbox` says."""
        for attempt in (0, 1):
            try:
                with self._program(limits or self._limits) as started:
                    started.send(json.dumps({"program": program, "function": None}).encode(), stdin)
                    started.wait()
                    return started.finish()
            except SandboxError:
                if attempt:
                    raise
        raise AssertionError

    def session(
        self, program: str, function: str, limits: Limits | None = None, *, more: Mapping[str, Any] | None = None
    ) -> _Session:
        """As `Sandbox` says."""
        first = json.dumps({"program": program, "function": function, **(more or {})}).encode()
        for attempt in (0, 1):
            try:
                return _Session(self._program(limits or self._limits), first)
            except SandboxError:
                if attempt:
                    raise
        raise AssertionError

    def layers(self) -> tuple[dict[str, Any], list[str]]:
        """Return the active layers of one keeper, and the missing ones with the reasons."""
        with self._keeper() as keeper:
            return keeper.layers, keeper.missing

    def keepers(self) -> Sequence[int]:
        """As `Sandbox` says."""
        with self._lock:
            return [keeper.pid for keeper in self._keepers]

    def close(self) -> None:
        """As `Sandbox` says. A closed sandbox starts anew when it is used again."""
        with self._lock:
            closing, self._keepers = self._keepers, set()
        for keeper in closing:
            keeper.close()

    @contextlib.contextmanager
    def _program(self, limits: Limits) -> Iterator[Program]:
        with self._keeper() as keeper:
            program = Program(keeper, limits)
            try:
                yield program
            finally:
                program.release()

    @contextlib.contextmanager
    def _keeper(self) -> Iterator[Keeper]:
        """Borrow a keeper; if an error occurs, the keeper is ended and its slot is freed."""
        keeper = self._slots.get()
        try:
            if keeper is None or keeper not in self._keepers:
                with self._lock:
                    uid = next(self._uids)
                keeper = Keeper(self._settings, self._python, uid)
                with self._lock:
                    self._keepers.add(keeper)
            yield keeper
        except BaseException:
            if keeper is not None:
                with self._lock:
                    self._keepers.discard(keeper)
                keeper.close()
            keeper = None
            raise
        finally:
            self._slots.put(keeper)


class _Session:
    """A program whose function is called; its keeper runs no other program until `finish`."""

    def __init__(self, program: contextlib.AbstractContextManager[Program], first: bytes) -> None:
        self._context = program
        self._program = program.__enter__()
        self._first: bytes | None = first

    def ask(self, request: bytes | None) -> bytes | None:
        """As `Session` says."""
        # The first arguments are sent together with the program, which is read and run before they are read.
        if self._first is not None:
            self._program.send(self._first if request is None else self._first + b"\n" + request, stdin=b"")
            self._first = None
        elif request is not None:
            self._program.send(request)
        return self._program.answer()

    def finish(self) -> Outcome:
        """As `Session` says."""
        error: BaseException | None = None
        try:
            return self._program.finish()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if error is None:
                self._context.__exit__(None, None, None)
            else:
                with contextlib.suppress(type(error)):
                    self._context.__exit__(type(error), error, error.__traceback__)

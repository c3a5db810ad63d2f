"""Competitors in separate processes that alternate, so that memory is per competitor and a slowdown affects all.

A process creates its model, reports once that it is ready, and then measures one turn per line it reads.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from benchmarks import environment
from benchmarks.loss import memory_probe
from paced_fast.errors import InputError


class Process:
    """Process of one competitor: `python -m MODULE WORDS`, whose module uses `Turns`."""

    def __init__(self, name: str, module: str, words: Sequence[str], *, limit_s: float = 900.0) -> None:
        """Start the process and wait until it is ready, for at most `limit_s`, which also limits every turn."""
        self.name, self.limit_s = name, limit_s
        self._errors = tempfile.NamedTemporaryFile("r", suffix=".err")  # noqa: SIM115 - closed by `end`
        with open(self._errors.name, "wb") as sink:
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=environment.child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
            )
        self.ready = self._answer()

    def turn(self, **asked: Any) -> dict[str, Any]:
        """Request and return one measurement; `asked` is passed on unchanged."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(asked) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        found, _, _ = select.select([self._child.stdout], [], [], self.limit_s)
        line = self._child.stdout.readline() if found else ""
        if line:
            return json.loads(line)
        self._child.kill()
        self._child.wait()
        said = [text for text in self._errors.read().splitlines() if text.strip()]
        reason = said[-1].strip() if found and said else f"no answer within {self.limit_s:.0f} s"
        raise InputError(f"{self.name}: {reason}")

    def end(self) -> None:
        """Close the process's input, on which it should exit; kill it if it does not."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        if self._child.poll() is None:
            self._child.stdin.close()
            try:
                self._child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._child.stdout.close()
        self._errors.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.end()


class Turns:
    """Other end, in the competitor's process; its prints go to stderr, because stdout carries the answers."""

    def __init__(self, device: torch.device) -> None:
        """Take over stdin and stdout. CPU memory is counted from here, so import before and create models after."""
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._on_gpu = device.type == "cuda"
        self.count_memory_from_here()
        self._began = self._began_cpu = 0.0

    def count_memory_from_here(self) -> None:
        """Exclude memory allocated so far, such as models and inputs, from the measurement."""
        self._before = torch.cuda.memory_allocated() if self._on_gpu else memory_probe.status_bytes("VmRSS")

    def ready(self, **said: Any) -> None:
        """Report that everything is created."""
        self._send(said)

    def begin(self) -> dict[str, Any]:
        """Wait for a turn, start its clock, and return the request. SystemExit if there are no more turns."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        asked = json.loads(line)
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            torch.set_num_threads(asked.get("threads", torch.get_num_threads()))
            memory_probe.reset_high_water_mark()
        self._began, self._began_cpu = time.perf_counter(), time.process_time()
        return asked

    def end(self, **said: Any) -> None:
        """Stop the clocks and answer with seconds, CPU seconds, and peak bytes above the excluded memory."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._began_cpu
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else memory_probe.status_bytes("VmHWM")
        self._send({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak - self._before, **said})

    def _send(self, said: dict[str, Any]) -> None:
        self._out.write(json.dumps(said) + "\n")
        self._out.flush()


def note_progress(path: str, text: str) -> None:
    """Write the current measurement to the file that a supervisor watches; no-op without one."""
    if path:
        Path(path).write_text(text)

"""Competitors in processes of their own that take turns: what memory each holds is its own, and a machine that slows
down slows all of them.

A process makes its model, answers once that it is ready, and then measures one turn for every line it reads.
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
    """One competitor: `python -m MODULE WORDS`, whose module calls `Turns`."""

    def __init__(self, name: str, module: str, words: Sequence[str], *, limit_s: float = 900.0) -> None:
        """Start it, and wait until it is ready; at most `limit_s` for that and for every turn."""
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
        """One measurement; `asked` is handed over as it is."""
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
        """Close its input, on which it ends; it is killed where it does not."""
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
    """The other end, in the competitor's process; what it prints goes to stderr, for stdout carries the answers."""

    def __init__(self, device: torch.device) -> None:
        """Take stdin and stdout over. Memory on a CPU is counted from here, so import before and make models after."""
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._on_gpu = device.type == "cuda"
        self.count_memory_from_here()
        self._began = self._began_cpu = 0.0

    def count_memory_from_here(self) -> None:
        """What is there already, such as models and inputs, is nobody's."""
        self._before = torch.cuda.memory_allocated() if self._on_gpu else memory_probe.status_bytes("VmRSS")

    def ready(self, **said: Any) -> None:
        """Everything is made."""
        self._send(said)

    def begin(self) -> dict[str, Any]:
        """Wait for a turn and start its clock; what was asked. SystemExit when there are no more."""
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
        """Stop the clocks and answer: seconds, those of its cores, peak bytes above what is not counted."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._began_cpu
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else memory_probe.status_bytes("VmHWM")
        self._send({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak - self._before, **said})

    def _send(self, said: dict[str, Any]) -> None:
        self._out.write(json.dumps(said) + "\n")
        self._out.flush()


def note_progress(path: str, text: str) -> None:
    """Name what is being measured in the file that a supervisor watches; nothing without one."""
    if path:
        Path(path).write_text(text)

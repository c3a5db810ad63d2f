"""Compile the kernels of the fused operations side by side into Triton's cache, so that tests on a GPU find them there.

Kernels are specialised by dtype, by options, by whether sizes are multiples of 16 and rows of 16 bytes, and by nothing
else of a shape: small heads lead to the kernels of large ones.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import environment


@dataclass(frozen=True)
class Arguments:
    """Compile the kernels of the fused operations into Triton's cache."""

    device: str = "cuda"
    """cuda, or cpu (the same calls, which find nothing to compile there)."""
    workers: int = 16
    """Most processes at once; never more than cores. 0 compiles in this process."""
    heads: int = 0
    """Only the first so many heads; 0 means all."""
    only: tuple[str, ...] = ()
    """Heads with exactly these names; none means all."""
    seconds: float = 0.0
    """Begin no further head after this many seconds; 0 means no limit."""
    progress: str = ""
    """File that names the head that was finished last."""


class Job(NamedTuple):
    """A head, and what its operations will be asked for."""

    dtype: str
    hidden_size: int
    vocab_size: int
    with_weights: bool
    is_stage_1: bool

    @property
    def name(self) -> str:
        """What to call it in a report."""
        options = " weights" * self.with_weights + " stage 1" * self.is_stage_1
        return f"{self.dtype} H{self.hidden_size} V{self.vocab_size}{options}"


def jobs() -> list[Job]:
    """Every head that differs in a kernel, those with most kernels first."""
    kinds = [("bfloat16", False), ("bfloat16", True), ("float16", True), ("float32", True)]
    # Rows of 70 are not aligned; 8193 is no multiple of 16, and stage 1 steps by 8192 columns from there on.
    sizes = itertools.product((64, 70), (8192, 8193), (True, False))
    return [
        Job(dtype, hidden_size, vocab_size, with_weights, is_stage_1)
        for (dtype, is_stage_1), (hidden_size, vocab_size, with_weights) in itertools.product(kinds, tuple(sizes))
    ]


def compile_job(job: Job, device_name: str) -> float:
    """Compile one head's kernels, in a process of its own; returns seconds."""
    from paced_kernels import warm_up
    from paced_kernels._loss import tiles

    started = time.monotonic()
    device = torch.device(device_name)
    if job.is_stage_1:
        tiles.choose_config = lambda *_: None  # this process does nothing else
    weight = torch.zeros(job.vocab_size, job.hidden_size, dtype=getattr(torch, job.dtype), device=device)
    warm_up(weight, with_weights=job.with_weights, with_entropy=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Compile every head; a failure is recorded, and found again by the tests."""
    del path
    environment.choose_device(arguments.device)
    started = time.monotonic()
    found: dict[str, Any] = {"jobs": [], "not_reached": []}
    chosen = [job for job in jobs() if not arguments.only or job.name in arguments.only][: arguments.heads or None]
    with contextlib.ExitStack() as stack:
        waiting = _submitted(chosen, arguments, stack)
        for job, future in waiting.items():
            if arguments.seconds and time.monotonic() - started > arguments.seconds and future.cancel():
                found["not_reached"].append(job.name)
                continue
            error = future.exception()
            row = {"name": job.name, "failed": str(error)[:300]} if error else {"name": job.name}
            found["jobs"].append(row | ({} if error else {"seconds": future.result()}))
            if arguments.progress:
                Path(arguments.progress).write_text(job.name)
    found["seconds"] = time.monotonic() - started
    failed = [f"{row['name']}: {row['failed']}" for row in found["jobs"] if "failed" in row]
    print("\n".join([f"{len(found['jobs'])} heads compiled in {found['seconds']:.0f} s", *failed]))
    return found


def _submitted(chosen: list[Job], arguments: Arguments, stack: contextlib.ExitStack) -> dict[Job, Future[float]]:
    """The jobs under way: a process for each, because what stage 1 replaces must not meet another head."""
    if arguments.workers:
        workers = max(1, min(arguments.workers, os.cpu_count() or 1))
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1))
        return {job: pool.submit(compile_job, job, arguments.device) for job in chosen}
    pool = stack.enter_context(ThreadPoolExecutor(1))
    return {job: pool.submit(compile_job, job, arguments.device) for job in chosen}

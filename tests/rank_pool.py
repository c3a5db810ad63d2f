"""Processes on the CPU that meet as 1, 2 or 4 ranks with gloo, kept alive over tests: their imports take seconds."""

from __future__ import annotations

import datetime
import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS_PER_CALL = 120
PRELOADED = [
    *("pytest", "transformers.models.llama.modeling_llama", "torch.distributed.tensor"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"),
]
"""Imported once, in the process that the ranks are forked from."""


class RankPool:
    """Up to `size` processes; one that does not answer in time is killed, so a collective that hangs is a failure."""

    def __init__(self, size: int, folder: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder, self.calls = folder, 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process shows
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """`function(rank, *arguments)` of every rank of a new group; fails with the tracebacks of all that failed."""
        self.calls += 1
        meeting = str(self.folder / f"meeting{self.calls}")
        for rank, pipe in enumerate(self.pipes[:size]):
            pipe.send((meeting, rank, size, function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes[:size]):
            try:
                failure, result = pipe.recv() if pipe.poll(SECONDS_PER_CALL) else ("no answer in time", None)
            except EOFError:
                failure, result = "the process ended", None
            results.append(result)
            if failure:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@contextmanager
def pools(size: int, folder: Path) -> Iterator[Callable[[], RankPool]]:
    """A function that gives the pool, a new one after a failure."""
    made: list[RankPool] = []

    def pool() -> RankPool:
        if not made or not made[-1].processes:
            made.append(RankPool(size, folder / str(len(made))))
            made[-1].folder.mkdir()
        return made[-1]

    yield pool
    for one in made:
        one.stop()


def _serve(pipe: Connection) -> None:
    """The life of one process: answers each call with the traceback of its failure, or its result."""
    torch.set_num_threads(1)
    while True:
        meeting, rank, size, function, arguments = pipe.recv()
        failure, result = "", None
        try:
            timeout = datetime.timedelta(seconds=30)
            dist.init_process_group("gloo", f"file://{meeting}", timeout, rank=rank, world_size=size)
            torch.manual_seed(0)
            result = function(rank, *arguments)
        except BaseException:
            failure = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send((failure, result))

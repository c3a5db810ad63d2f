"""Processes that begin in milliseconds and may be killed: forked from a server that has imported torch already."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paced_fast import distributed
from paced_fast.distributed import ALONE, World

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["benchmarks.ranks"])


def _enter(rank: int, size: int, meeting: str, answers: Any, act: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    world = ALONE
    if size > 1:
        store = dist.FileStore(meeting, size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        world = World(rank, size, rank, size)
        distributed._patient[0] = dist.new_group(backend="gloo")
    try:
        answers.put((rank, None, act(world, *arguments)))
    except Exception as error:  # the caller raises it
        answers.put((rank, f"{type(error).__name__}: {error}", None))
    if size > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def started(size: int, act: Callable[..., Any], *arguments: Any) -> Iterator[tuple[list[BaseProcess], Any]]:
    """`size` processes that call `act(world, *arguments)`, and a queue of (rank, error, result); killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        answers = _SERVER.Queue()
        meeting = str(Path(folder, "store"))
        ranks = [_SERVER.Process(target=_enter, args=(r, size, meeting, answers, act, arguments)) for r in range(size)]
        for process in ranks:
            process.start()
        try:
            yield ranks, answers
        finally:
            for process in ranks:
                process.kill()
                process.join()
            answers.close()


def on_ranks(size: int, act: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
    """What `act(world, *arguments)` returned on each of `size` ranks. Raises AssertionError when it failed on any."""
    results: dict[int, Any] = {}
    with started(size, act, *arguments) as (_, answers):
        for _ in range(size):
            rank, error, result = answers.get(timeout=seconds)
            assert error is None, f"rank {rank}: {error}"
            results[rank] = result
    return [results[rank] for rank in range(size)]

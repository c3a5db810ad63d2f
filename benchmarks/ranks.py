"""Processes that begin in milliseconds and may be killed: forked from a server that has imported torch already."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paced_fast import distributed
from paced_fast.distributed import ALONE, World

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["benchmarks.ranks", "paced_fast.checkpoint", "torch.distributed.device_mesh"])


Started = tuple[list[BaseProcess], list[Connection]]


def import_ahead(module: str) -> None:
    """Let processes begin with `module` imported; counts before the first of them starts."""
    _SERVER.set_forkserver_preload(["benchmarks.ranks", module])


def _enter(rank: int, size: int, meeting: str, answer: Connection, act: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    world = ALONE
    if size > 1:
        store = dist.FileStore(meeting, size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        world = World(rank, size, rank, size)
        distributed._patient[0] = dist.new_group(backend="gloo")
    try:
        answer.send((None, act(world, *arguments)))
    except Exception as error:  # the caller raises it
        answer.send((f"{type(error).__name__}: {error}", None))
    distributed.stop()


@contextlib.contextmanager
def started(
    size: int, act: Callable[..., Any], *arguments: Any
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """`size` processes that call `act(world, *arguments)`, and where each sends (error, result); killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder, "store"))
        processes, answers = [], []
        for rank in range(size):
            answer, sender = _SERVER.Pipe(duplex=False)
            process = _SERVER.Process(target=_enter, args=(rank, size, meeting, sender, act, arguments))
            process.start()
            sender.close()  # a rank that dies ends the pipe
            processes.append(process)
            answers.append(answer)
        try:
            yield processes, answers
        finally:
            for process in processes:
                process.kill()
                process.join()
            for answer in answers:
                answer.close()


def on_ranks(size: int, act: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
    """What `act(world, *arguments)` returned on each of `size` ranks. Raises AssertionError when it failed on any."""
    results = []
    with started(size, act, *arguments) as (_, answers):
        for rank, answer in enumerate(answers):
            assert answer.poll(seconds), f"rank {rank}: nothing after {seconds} s"
            try:
                error, result = answer.recv()
            except EOFError:
                error, result = "it died", None
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
    return results

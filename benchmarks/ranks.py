"""Processes that start in milliseconds and may be killed: forked from a server that has imported their modules.

Several processes form ranks with gloo, in the environment that torchrun would give them. Every call starts fresh ones,
so that calls do not affect each other.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from paced_fast.data import distributed
from paced_fast.data.distributed import ALONE

EXCHANGE_SECONDS = 180.0
"""Seconds after which a collective fails if some rank does not join."""

_SERVER = multiprocessing.get_context("forkserver")
_AHEAD = ["benchmarks.ranks", "paced_fast.run.checkpoint", "torch.distributed.device_mesh"]
_SERVER.set_forkserver_preload(_AHEAD)


def import_ahead(*modules: str) -> None:
    """Preload `modules` in all processes; has an effect only before the first process starts."""
    _AHEAD.extend(modules)
    _SERVER.set_forkserver_preload(_AHEAD)


def _enter(rank: int, size: int, port: int, answer: Connection, task: bytes) -> None:
    torch.set_num_threads(1)
    failure, result = None, None
    try:
        world = ALONE
        if size > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in own.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            world = distributed.start("cpu", EXCHANGE_SECONDS)
        act, arguments = pickle.loads(task)
        result = act(world, *arguments)
    except BaseException:  # re-raised by the caller
        failure = traceback.format_exc()
    # Pickle by value: multiprocessing would send a tensor as a handle that dies with this process.
    answer.send_bytes(pickle.dumps((failure, result)))
    distributed.stop()


@contextlib.contextmanager
def started(
    size: int, act: Callable[..., Any], *arguments: Any
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """Yield `size` processes that call `act(world, *arguments)`, and their result pipes; kills them at the end."""
    wait = datetime.timedelta(seconds=EXCHANGE_SECONDS)
    # The store at which the ranks meet, as torchrun provides it.
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait
    )
    task = pickle.dumps((act, arguments))
    processes: list[BaseProcess] = []
    answers: list[Connection] = []
    try:
        for rank in range(size):
            answer, sender = _SERVER.Pipe(duplex=False)
            process = _SERVER.Process(target=_enter, args=(rank, size, store.port, sender, task), daemon=True)
            process.start()
            sender.close()  # so that the pipe ends when a rank dies
            processes.append(process)
            answers.append(answer)
        yield processes, answers
    finally:
        for process in processes:
            process.kill()
            process.join()
        for answer in answers:
            answer.close()


def on_ranks(size: int, act: Callable[..., Any], *arguments: Any, seconds: float = 600.0) -> list[Any]:
    """Return the results of `act(world, *arguments)` on each of `size` ranks.

    Raises AssertionError with the tracebacks of failed ranks and the names of those that died or are late.
    """
    results, failures, ends = [], [], time.monotonic() + seconds
    with started(size, act, *arguments) as (_, answers):
        for rank, answer in enumerate(answers):
            failure, result = f"no result after {seconds} s", None
            with contextlib.suppress(EOFError):
                if answer.poll(max(0.0, ends - time.monotonic())):
                    failure = "it died"
                    failure, result = pickle.loads(answer.recv_bytes())
            results.append(result)
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
    assert not failures, "\n".join(failures)
    return results

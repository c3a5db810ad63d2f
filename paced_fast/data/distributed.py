"""The processes that train together: ranks, and the few exchanges between them.

torchrun starts one process per GPU (or several on a CPU) and sets ranks in the environment. Every rank makes the same
decisions from the same numbers; generation, rewards and passes through the policy are split over the ranks, and their
results gathered. Tensors on the device travel by the device's backend (nccl), lists and flags of the host by gloo, so
that exchanging a number never waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from paced_fast.errors import EVERYWHERE, InputError, TrainingError, UnscoredError


@dataclass(frozen=True, slots=True)
class World:
    """R ranks; a process without torchrun is a world of size one, in which every exchange returns its argument."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    """Process group of `gather` and the methods based on it; None for all ranks."""

    @property
    def is_rank0(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.size // self.local_size

    def share(self, count: int) -> range:
        """This rank's contiguous part of `count` items; the parts are in order of rank."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, bit-equal on all; tensors on the policy's device."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast_(self, *tensors: Tensor) -> None:
        """Replace each tensor by rank 0's; tensors on the policy's device."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, host: Tensor) -> list[Tensor]:
        """Gather the one-dimensional host tensor of every rank, in order of rank; lengths may differ."""
        if self.size == 1:
            return [host]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(host)]), group=self.group)
        longest = int(max(lengths))
        if longest == 0:
            return [host] * self.size
        padded = torch.nn.functional.pad(host, (0, longest - len(host)))
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self.group)
        return [part[: int(length)] for part, length in zip(found, lengths, strict=True)]

    def gather_text(self, text: str) -> list[str]:
        """Gather the text of every rank, in order of rank."""
        coded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(part.tolist()).decode() for part in self.gather(coded)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(bool(part) for part in self.gather(torch.tensor([flag], dtype=torch.uint8)))

    def agree(self, error: Exception | None, kind: type[Exception] = TrainingError) -> None:
        """Raise on every rank if any rank has an error: `kind` with the messages, each with its rank.

        Every rank calls this at the same place, with None if it has no error, so that no rank waits for one that
        failed. An InputError or UnscoredError stays one, on every rank.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        mark = next((name for name, own in _OWN_KINDS.items() if isinstance(error, own)), "other")
        messages = self.gather_text("" if error is None else f"{mark} {str(error) or type(error).__name__}")
        met = {r: message.split(" ", 1) for r, message in enumerate(messages) if message}
        if not met:
            return
        ranks: dict[str, list[str]] = {}  # equal messages are combined
        for r, (_, text) in met.items():
            ranks.setdefault(text, []).append(str(r))
        whole = "; ".join(
            text if len(who) == self.size else f"rank {', '.join(who)}: {text}" for text, who in ranks.items()
        )
        marks = {mark for mark, _ in met.values()}
        failure = next((own for name, own in _OWN_KINDS.items() if name in marks), kind)(whole)
        failure.add_note(EVERYWHERE)
        raise failure from error

    @contextmanager
    def agreement(self, *, patient: bool = False) -> Iterator[None]:
        """Raise a TrainingError or InputError that the body raises on any rank on all ranks, so that none waits.

        Every rank enters this at the same place. `patient`: wait without a time limit, because a rank may take far
        longer than an exchange should.
        """
        failure: Exception | None = None
        try:
            yield
        except (TrainingError, InputError) as error:
            failure = error
        if patient:
            self.wait()
        self.agree(failure)

    def beside(self) -> World:
        """The same ranks with a separate process group, so that another thread may exchange at the same time.

        Every rank calls this at the same place.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        return dataclasses.replace(self, group=group)

    def queue(self) -> Queue:
        """A queue that the ranks share; every rank calls this at the same place.

        Between two queues the ranks exchange something, so that nobody takes from the one before the last any more.
        """
        if self.size == 1:
            return Queue()
        number = next(_numbers)
        if self.is_rank0 and number > 1:
            _queues[0].delete_key(str(number - 2))
        return Queue(self.size, _queues[0], str(number))

    def wait(self) -> None:
        """Wait, without a time limit, until every rank has arrived; fails on the others if a rank dies."""
        if self.size > 1:
            dist.barrier(_patient[0])


class Queue:
    """Work that the ranks share: each item is taken by one rank, whenever that one has room for it."""

    def __init__(self, ranks: int = 1, store: Any = None, name: str = "") -> None:
        """`store` holds under `name` how many items were taken, for all `ranks`; None for one process."""
        self.ranks = ranks
        self._store, self._name, self._taken = store, name, 0

    def share(self, count: int) -> int:
        """Part of `count` items that a rank would have if all took as many, rounded up."""
        return -(-count // self.ranks)

    def take(self, most: int, count: int) -> range:
        """The next `most` of `count` items, fewer at the end; no other rank gets them. Waits for no other rank."""
        if self._taken >= count:
            return range(0)
        self._taken = self._taken + most if self._store is None else int(self._store.add(self._name, most))
        return range(min(self._taken - most, count), min(self._taken, count))

    def close(self) -> None:
        """Leave nothing to take, on any rank."""
        self.take(_ALL, _ALL)


ALONE = World()

_OWN_KINDS: dict[str, type[Exception]] = {"input": InputError, "unscored": UnscoredError}
"""Errors that stay what they are when ranks agree on them; the first that any rank has."""
_PATIENCE = datetime.timedelta(days=7)
_ALL = 1 << 40
"""More items than any queue has; every rank of a run may add as many without an overflow."""
_queues: dict[int, Any] = {}
"""Store that holds what was taken from each queue, under 0."""
_numbers = itertools.count()
"""Numbers of queues, the same on every rank."""
_patient: dict[int, Any] = {}
"""gloo group in which ranks wait for rank 0 while it prepares shared inputs; a warm start can take hours."""


def usable_cores() -> int:
    """Number of cores that this process may run on; under taskset, containers and batch systems fewer than the machine
    has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of(wanted: int, processes: int = 1) -> int:
    """Threads of torch for each of `processes` on this machine: `wanted`, or for 0 what OMP_NUM_THREADS says, else the
    usable cores divided among them. torchrun sets that variable to 1 by itself, so under it nobody is known to have
    asked."""
    asked = os.environ.get("OMP_NUM_THREADS", "") if "TORCHELASTIC_RUN_ID" not in os.environ else ""
    if not wanted and asked.isdecimal():
        wanted = int(asked)
    return wanted or max(1, usable_cores() // processes)


def start(device: str, timeout_seconds: float) -> World:
    """Join the processes that torchrun started; without torchrun, return a world of size one.

    A collective that some rank does not join fails on the others after `timeout_seconds`. Raises InputError when the
    environment is not torchrun's or there are more ranks than GPUs.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values: dict[str, Any] = {name: os.environ.get(name, "") for name in names}
    if values["WORLD_SIZE"] in ("", "1") and "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    wrong = [name for name, value in values.items() if not value.isdecimal()]
    if wrong:
        raise InputError(f"{wrong[0]} must be a number: start several processes with torchrun --nproc-per-node N")
    rank, size, local_rank, local_size = (int(values[name]) for name in names)
    world = World(rank, size, local_rank, local_size)
    backend = "cpu:gloo"
    if device == "cuda":
        if world.local_size > torch.cuda.device_count():
            raise InputError(
                f"{world.local_size} processes run on this machine, which has {torch.cuda.device_count()} GPUs: start "
                "at most one process per GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        wait = datetime.timedelta(seconds=timeout_seconds)
        store = _store(world, wait)
        dist.init_process_group(backend, timeout=wait, store=store, rank=world.rank, world_size=world.size)
        _patient[0] = dist.new_group(backend="gloo", timeout=_PATIENCE)
        # torchrun keeps the store through its restarts, and a queue must not begin where an earlier attempt left it.
        attempt = int(world.gather(torch.tensor([secrets.randbits(62)]))[0])
        _queues[0] = dist.PrefixStore(f"queues {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
    started = joined(world.gather(torch.tensor([local_size])))
    if len(set(started)) > 1:
        raise InputError(
            f"the machines started different numbers of processes ({min(started)} and {max(started)}): give all of "
            "them the same torchrun --nproc-per-node"
        )
    return world


def _store(world: World, wait: datetime.timedelta) -> Any:
    """Rendezvous store of the ranks, with a prefix that separates it from an earlier attempt.

    torchrun keeps one store through its restarts, and a rank that reads the address of its dead predecessor cannot
    connect. On several machines the attempt numbers differ, so there the store is used without a prefix.
    """
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=wait))
    if world.nodes > 1:
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def stop() -> None:
    """Leave the group that `start` joined; does nothing without one, or if an engine has destroyed it."""
    if _patient and dist.is_initialized():
        dist.destroy_process_group()
    _patient.clear()
    _queues.clear()


def joined(parts: Sequence[Tensor]) -> list[Any]:
    """Concatenate the ranks' tensors into one list, in order of rank."""
    return torch.cat(list(parts)).tolist()


T = TypeVar("T")

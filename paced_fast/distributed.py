"""The processes that train together: who they are, and the few things they tell each other.

torchrun starts one process a GPU (or several on a CPU) and says who is who in the environment. What happens in a step
is decided alike on every rank from the same numbers; generation, rewards and passes through the policy are shared out,
and their results gathered. Tensors on the device travel by the device's backend (nccl), lists and flags of the host by
gloo, so that nobody waits for a GPU to exchange a number.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from paced_fast.errors import InputError, TrainingError


@dataclass(frozen=True, slots=True)
class World:
    """R ranks; one process without torchrun is a world of one, in which every exchange returns what it was given."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    """Who exchanges what `gather` and all that follows from it carry; None for all that torchrun started."""

    @property
    def is_lead(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines that take part."""
        return self.size // self.local_size

    def share(self, count: int) -> range:
        """Which of `count` items are this rank's: a contiguous part, those of all ranks in order of rank."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, the same bits everywhere; tensors on the policy's device."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def lead_(self, *tensors: Tensor) -> None:
        """Replace each tensor by the lead's; tensors on the policy's device."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, host: Tensor) -> list[Tensor]:
        """The one-dimensional host tensor of every rank, in order of rank; lengths may differ."""
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
        """The text of every rank, in order of rank."""
        coded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(part.tolist()).decode() for part in self.gather(coded)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(bool(part) for part in self.gather(torch.tensor([flag], dtype=torch.uint8)))

    def agree(self, error: Exception | None, kind: type[Exception] = TrainingError) -> None:
        """Raise on every rank what one of them met: `kind` with the messages, each with its rank.

        Every rank calls this at the same place, with None where all went well; so nobody waits for a rank that gave up.
        An InputError stays one, on every rank.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        mark = "input" if isinstance(error, InputError) else "other"
        messages = self.gather_text("" if error is None else f"{mark} {str(error) or type(error).__name__}")
        met = {r: message.split(" ", 1) for r, message in enumerate(messages) if message}
        if not met:
            return
        ranks: dict[str, list[str]] = {}  # what several met is said once
        for r, (_, text) in met.items():
            ranks.setdefault(text, []).append(str(r))
        whole = "; ".join(
            text if len(who) == self.size else f"rank {', '.join(who)}: {text}" for text, who in ranks.items()
        )
        failure = (InputError if any(mark == "input" for mark, _ in met.values()) else kind)(whole)
        failure.add_note(EVERYWHERE)
        raise failure from error

    @contextmanager
    def agreement(self, *, patient: bool = False) -> Iterator[None]:
        """Raise a TrainingError or InputError that the body raises on one rank on all of them, so that none waits.

        Every rank enters this at the same place. `patient`: the others may take far longer than an exchange should.
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
        """The same ranks in a group of their own for `gather`, so that another thread may exchange at the same time.

        Every rank calls this at the same place.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        return dataclasses.replace(self, group=group)

    def wait(self) -> None:
        """Go on when every rank has come here, however long that takes; a rank that dies ends it on the others."""
        if self.size > 1:
            dist.barrier(_patient[0])


ALONE = World()
EVERYWHERE = "raised on every rank"
"""Note on an error that all ranks raise together, so that one of them tells it."""

_PATIENCE = datetime.timedelta(days=7)
_patient: dict[int, Any] = {}
"""The group of gloo in which ranks wait for the lead while it prepares what they share: a warm start takes hours."""


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine has under taskset, containers and batch systems."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(device: str, timeout_seconds: float) -> World:
    """Join the processes that torchrun started, or be alone where it started none.

    A collective that some rank does not join fails on the others after `timeout_seconds`. Raises InputError when the
    environment is not torchrun's or there are more ranks than GPUs.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values: dict[str, Any] = {name: os.environ.get(name, "") for name in names}
    if values["WORLD_SIZE"] in ("", "1") and "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    wrong = [name for name, value in values.items() if not value.isdecimal()]
    if wrong:
        raise InputError(f"several processes: {wrong[0]} is not set: start them with torchrun --nproc-per-node N")
    rank, size, local_rank, local_size = (int(values[name]) for name in names)
    world = World(rank, size, local_rank, local_size)
    backend = "cpu:gloo"
    if device == "cuda":
        if world.local_size > torch.cuda.device_count():
            raise InputError(
                f"{world.local_size} processes on this machine and {torch.cuda.device_count()} GPUs: one process a "
                "GPU, torchrun --nproc-per-node of at most the GPUs"
            )
        torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        wait = datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group(
            backend, timeout=wait, store=_store(world, wait), rank=world.rank, world_size=world.size
        )
        _patient[0] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    started = joined(world.gather(torch.tensor([local_size])))
    if len(set(started)) > 1:
        raise InputError(
            f"the machines started different numbers of processes ({min(started)} and {max(started)}): give all of "
            "them the same torchrun --nproc-per-node"
        )
    return world


def _store(world: World, wait: datetime.timedelta) -> Any:
    """Where the ranks find each other, apart from what an earlier attempt left there.

    torchrun keeps one store through its restarts, and a rank that reads the address of its dead predecessor is refused.
    Over several machines the attempts are not counted alike, so there the store is taken as it is.
    """
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=wait))
    if world.nodes > 1:
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def stop() -> None:
    """Leave the group that `start` joined; nothing happens when it joined none, or an engine has ended it."""
    if _patient and dist.is_initialized():
        dist.destroy_process_group()
    _patient.clear()


def joined(parts: Sequence[Tensor]) -> list[Any]:
    """The values of all ranks' tensors as one list, in order of rank."""
    return torch.cat(list(parts)).tolist()


T = TypeVar("T")

"""Tensors spread over ranks, in safetensors files that every rank writes and reads its own part of.

Planning and files are those of torch.distributed.checkpoint in its Hugging Face format. Its own `save` and `load`
exchange plans between ranks. No exchange is needed here, because names, sizes and placements are known on all ranks and
determine which rank writes what: its shard of a DTensor, and its share of the tensors that all ranks hold whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from paced_fast.data.distributed import World
from paced_fast.errors import InputError, counted

_FILE_BYTES = 2**30
"""A file is put together in memory before it is written, so it ends here."""


class HostMemory:
    """Copies of tensors on the host; those of CUDA tensors go to pinned memory that later copies use again."""

    def __init__(self) -> None:
        """Start without any copy."""
        self._pinned: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, there once `wait` has returned; `name` tells the tensors of one save apart."""
        source = tensor.detach()
        if not source.is_cuda:
            return source.clone(memory_format=torch.contiguous_format)
        target = self._pinned.get(name)
        if target is None or target.shape != source.shape or target.dtype != source.dtype:
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._pinned[name] = target
        target.copy_(source, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return target

    def wait(self) -> None:
        """Wait for the copies; the training stream does not wait."""
        if self._copied is not None:
            self._copied.synchronize()


class HostPart(DefaultSavePlanner):
    """One rank's part of a flat dict of tensors, copied so that training may change the originals meanwhile."""

    def __init__(self, tensors: Mapping[str, Tensor], world: World, memory: HostMemory) -> None:
        """Copy this rank's part of `tensors`; every rank names the same tensors."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._world = world
        self.set_up_planner(dict(tensors), is_coordinator=True)
        turns = _turns(tensors, world.size)
        plan = self.create_local_plan()
        own = [item for item in plan.items if self._is_own(tensors[item.index.fqn], item, turns)]
        self.plan = dataclasses.replace(plan, items=own)
        self._host = {item.index: memory.copy(item.index.fqn, self._live(item)) for item in own}
        self.state_dict = {}  # what is written is the copy
        self.bytes = sum(copy.nbytes for copy in self._host.values())

    def _live(self, item: WriteItem) -> Tensor:
        found = super().resolve_data(item)
        assert isinstance(found, Tensor)
        return found

    def _is_own(self, tensor: Tensor, item: WriteItem, turns: Mapping[str, int]) -> bool:
        if not isinstance(tensor, DTensor):
            return turns[item.index.fqn] == self._world.rank
        assert item.tensor_data is not None
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        first = all(place == 0 for place, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate())
        return first and 0 not in item.tensor_data.chunk.sizes  # fewer rows than ranks leave some without any

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the copy."""
        return self._host[write_item.index]

    def write(self, folder: Path) -> None:
        """Write the copies to files of this rank in `folder`."""
        if not self._host:
            return
        files: dict[str, int] = {}
        written = 0
        for index, copy in self._host.items():
            files[index.fqn] = written // _FILE_BYTES + 1
            written += copy.nbytes
        numbers = {number: i + 1 for i, number in enumerate(sorted(set(files.values())))}
        writer = HuggingFaceStorageWriter(
            str(folder),
            fqn_to_index_mapping={name: numbers[number] for name, number in files.items()},
            save_distributed=True,
        )
        writer.per_thread_copy_ahead = 0  # the data is on the host: looking ahead would wait for the training stream
        writer.set_up_storage_writer(False)
        plans = writer.prepare_global_plan([self.plan] * (self._world.rank + 1))  # a plan's place numbers its files
        writer.write_data(plans[-1], self).wait()


def rank_files(folder: Path, rank: int) -> list[Path]:
    """The files in `folder` that `HostPart.write` made on `rank`."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*"))


def _turns(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Which rank writes each tensor that all hold whole: the rank with the fewest bytes so far."""
    load = [0] * ranks
    turns: dict[str, int] = {}
    for name in sorted(tensors):
        if not isinstance(tensors[name], DTensor):
            turns[name] = load.index(min(load))
            load[turns[name]] += max(tensors[name].nbytes, 1)
    return turns


def read_tensors(folder: Path, into: Mapping[str, Tensor], *, partly: bool = False) -> None:
    """Fill the tensors `into`, however they are spread, from the files of all ranks in `folder`.

    Raises InputError when names or shapes differ; nothing is filled then. `partly` leaves other tensors of the folder
    alone.
    """
    reader = HuggingFaceStorageReader(str(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        metadata = reader.read_metadata()
        _check_same(folder, _shapes(metadata), into, partly)
        planner.set_up_planner(dict(into), metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except SafetensorError as error:
        raise InputError(f"{folder} has a file that is not in safetensors format ({error})") from error


def tensor_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of the tensors in `folder`."""
    return _shapes(HuggingFaceStorageReader(str(folder)).read_metadata())


def _shapes(metadata: Metadata) -> dict[str, torch.Size]:
    entries = metadata.state_dict_metadata.items()
    return {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _check_same(folder: Path, saved: Mapping[str, torch.Size], into: Mapping[str, Tensor], partly: bool) -> None:
    unknown = set() if partly else saved.keys() - into.keys()
    for names, what in ((into.keys() - saved.keys(), "lacks"), (unknown, "has an unexpected")):
        if names:
            more = f" and {counted(len(names) - 1, 'more tensor')}" if len(names) > 1 else ""
            raise InputError(f"{folder} {what} {min(names)}{more}: it belongs to a run with other settings")
    for name, tensor in into.items():
        if saved[name] != tensor.shape:
            raise InputError(
                f"{folder}: {name} has the shape {tuple(saved[name])} instead of {tuple(tensor.shape)}: "
                "it belongs to a run with other settings"
            )


def full_copies(tensors: Mapping[str, Tensor], world: World, memory: HostMemory) -> dict[str, Tensor]:
    """Gather whole tensors on the host of rank 0, one tensor at a time; every rank takes part, and tied tensors are
    gathered once.

    The other ranks get an empty dict.
    """
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_rank0:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            key = (local.data_ptr(), tensor.shape)
            if key not in copies:
                copies[key] = memory.copy(f"whole {name}", whole)
            result[name] = copies[key]
    return result


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add `prefix.` to every name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose name begins with `prefix.`, and remove it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}

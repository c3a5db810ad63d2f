"""Parts of parameters that a rank steps, and the exchanges in which ranks sum gradients and gather parameters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard


@dataclass(frozen=True, slots=True)
class Part:
    """Part of one parameter that one rank updates."""

    name: str
    parameter: nn.Parameter  # what the model computes with
    master: Tensor  # f32: the rows of this rank, or all; a view of the parameter where that is float32
    mesh: DeviceMesh | None  # None: this rank has all of it
    placements: tuple[Placement, ...]
    rows: tuple[tuple[int, int], ...]  # of every rank, first and past the last; empty unless a replica is split

    @property
    def is_even(self) -> bool:
        """Whether every rank has the same number of rows."""
        return self.parameter.shape[0] % len(self.rows) == 0

    def spread(self, local: Tensor) -> Tensor:
        """A tensor shaped as `master`, as part of one shaped as the parameter."""
        if self.mesh is None:
            return local
        shape, stride = self.parameter.shape, self.parameter.stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)


def part_of(name: str, parameter: nn.Parameter, mesh: DeviceMesh | None) -> Part:
    """Part of a parameter that this rank updates: its own rows of a matrix, all of a vector, its shard of a sharded
    one."""
    if isinstance(parameter, DTensor):
        local = parameter.to_local().detach()
        assert local.dtype == torch.float32, f"{name}: sharded parameters are their own masters"
        return Part(name, parameter, local, parameter.device_mesh, tuple(parameter.placements), ())
    is_master = parameter.dtype in (torch.float32, torch.float64)
    if mesh is None or parameter.dim() < 2 or parameter.shape[0] < mesh.size():
        master = parameter if is_master else parameter.detach().float()
        return Part(name, parameter, master, None, (), ())
    assert parameter.is_contiguous(), f"{name}: rows that are gathered in place must lie together"
    count, size = parameter.shape[0], -(-parameter.shape[0] // mesh.size())  # as torch.chunk and DTensor split
    starts = [min(rank * size, count) for rank in range(mesh.size() + 1)]
    rows = tuple(itertools.pairwise(starts))
    start, stop = rows[mesh.get_local_rank()]
    master = parameter.detach()[start:stop]
    return Part(name, parameter, master if is_master else master.float(), mesh, (Shard(0),), rows)


def own_rows(part: Part, whole: Tensor) -> Tensor:
    """This rank's rows of a tensor shaped as the parameter."""
    if not part.rows:
        return whole
    assert part.mesh is not None
    start, stop = part.rows[part.mesh.get_local_rank()]
    return whole[start:stop]


def all_reduce(tensor: Tensor) -> dist.Work:
    """Begin to replace the tensor by its sum over the ranks."""
    return _begun(dist.all_reduce(tensor, async_op=True))


def reduce_scatter(own: Tensor, whole: Tensor) -> dist.Work:
    """Begin to write this rank's rows of the sum of `whole` into `own`; every rank has as many rows."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name before torch 2.13
    return _begun(reduce(own, whole, async_op=True))


def all_gather(whole: Tensor, own: Tensor) -> dist.Work:
    """Begin to write the rows of all ranks into `whole`; every rank has as many."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _begun(gather(whole, own, async_op=True))


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work

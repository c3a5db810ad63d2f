"""Distribution of the policy's parameters over ranks: all of them on every rank, or a shard on each (FSDP2).

Replicated, a rank computes without waiting for the others and the engine may share its weights; sharded, the whole
policy never lies on one device, and every pass gathers one layer after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from paced_fast.data.distributed import World
from paced_fast.errors import InputError
from paced_fast.policy.shape import layer_list

T = TypeVar("T")


def replicas_mesh(world: World, device: torch.device) -> DeviceMesh | None:
    """All ranks in one dimension, for the optimiser of replicated parameters; None for a world of one."""
    return init_device_mesh(device.type, (world.size,)) if world.size > 1 else None


def shards_mesh(world: World, device: torch.device) -> DeviceMesh:
    """The ranks among which parameters are split: all of one node, or each node's, with nodes as replicas."""
    if world.nodes == 1:
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world.nodes, world.local_size), mesh_dim_names=("replicate", "shard"))


class Shards:
    """A model that FSDP2 has split: its layers one by one, embeddings and head with the root.

    FSDP2 gathers parameters when a module is called. The head's weight is read after the model has returned its
    states, and a tied one twice, so it is a function that computes both that is called, with the root around it.
    """

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, *, dtype: torch.dtype) -> None:
        """Split `model` in place; it may lie on the host, and only shards reach the device of `mesh`.

        Shards are float32 and the optimiser's masters. Passes compute in `dtype`, gradients are summed in float32.
        """
        layers = layer_list(model)
        if layers is None:
            raise InputError(
                f"--distributed.mode sharded: a {model.config.model_type} model has no list of layers to split by: "
                "use replicated"
            )
        rounded = dtype if dtype != torch.float32 else None
        # Masks come in the type of the computation, and everything that is float32 is meant to stay so.
        precision = MixedPrecisionPolicy(
            param_dtype=rounded, reduce_dtype=torch.float32 if rounded else None, cast_forward_inputs=False
        )
        self.root = _Root(model)
        for module in (*layers, self.root):  # a layer at a time: the whole model in float32 need not fit anywhere
            for parameter in module.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            fully_shard(module, mesh=mesh, mp_policy=precision)
        self.modules = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for module in self.modules:  # ranks add up, as in the replicated mode: the loss divides by the whole batch
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the only kind of sum that gloo has
        with torch.no_grad():
            self.run(lambda: None)  # the first call makes the root the root, whichever module is called later
        self._root_module.reshard()

    @property
    def _root_module(self) -> FSDPModule:
        assert isinstance(self.root, FSDPModule)
        return self.root

    def run(self, compute: Callable[[], T]) -> T:
        """`compute()`, in which the model may be called and its head be read; all ranks together, equally often.

        What is differentiated later has to be a tensor, or in a (named) tuple, among what `compute` returns.
        """
        return self.root(compute)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Every parameter gathered, for passes without gradients that each rank makes as often as it likes."""
        with torch.no_grad():
            for module in self.modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        try:
            yield
        finally:
            self._forget_passes()
            for module in self.modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.root, recurse=False)

    def _forget_passes(self) -> None:
        """Empty FSDP2's list of passes: backward passes prefetch by it, and it must be the same on every rank.

        The end of any backward pass does that. This one reaches no parameter.
        """
        with torch.enable_grad():
            device = next(self.root.parameters()).device
            self.run(lambda: torch.zeros((), device=device, requires_grad=True)).backward()

    def settle(self) -> None:
        """Give back what the root keeps gathered after a pass without gradients, so that names mean shards again."""
        self._root_module.reshard()


class _Root(nn.Module):
    """Module that FSDP2 wraps, around a computation that uses the model and then its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()

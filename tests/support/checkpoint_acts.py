"""What ranks do in the tests of checkpoints; a module of its own, so that other processes can import it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from paced_fast.data.distributed import ALONE, World
from paced_fast.run import checkpoint
from paced_fast.run.checkpoint import save as saving

SHAPES = {"policy.head": (7, 3), "optimizer.0.exp_avg": (5, 2), "optimizer.1.exp_avg": (1, 4), "optimizer.0.step": ()}
"""Seven and five rows over two ranks are uneven, one row leaves a rank without any."""


def whole(step: int) -> dict[str, Tensor]:
    """Numbers that say which step they are of."""
    source = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}
    tensors["policy.half"] = torch.randn(6, generator=source).bfloat16()
    return tensors


def control(step: int) -> dict[str, Tensor]:
    """State that all ranks hold alike."""
    return {"scheduler.visits": torch.arange(4) + step, "log_z.head.weight": torch.full((2, 2), float(step))}


def model(step: int) -> dict[str, Tensor]:
    """A policy with a tied parameter."""
    embedding = torch.full((4, 2), float(step))
    return {"embed": embedding, "head": embedding, "norm": torch.ones(2)}


def write_policy(folder: Path, state: dict[str, Tensor]) -> None:
    """A folder with files in the place of a model's."""
    folder.mkdir(exist_ok=True)
    assert state["head"] is state["embed"]
    (folder / "model.bin").write_bytes(state["embed"].numpy().tobytes())
    (folder / "config.json").write_text("{}")


def spread(tensors: Mapping[str, Tensor], world: World, kind: str) -> dict[str, Tensor]:
    """The tensors as the ranks hold them: whole, in shards, or in shards of each half of the ranks."""
    if kind == "whole":
        return {name: tensor.clone() for name, tensor in tensors.items()}
    if kind == "halves":
        mesh, places = init_device_mesh("cpu", (world.size // 2, 2)), (Replicate(), Shard(0))
    else:
        mesh, places = init_device_mesh("cpu", (world.size,)), (Shard(0),)
    return {
        name: distribute_tensor(tensor, mesh, places) if tensor.ndim else tensor.clone()
        for name, tensor in tensors.items()
    }


def saver(root: Path, world: World = ALONE, *, keep: int = 2, background: bool = True) -> checkpoint.Saver:
    """Writes to `root`."""
    return checkpoint.Saver(root, keep=keep, write_policy=write_policy, background=background, world=world)


def save_steps(world: World, root: Path, kind: str, steps: list[int]) -> None:
    """Save, change everything at once, and go on."""
    own = saver(root, world)
    for step in steps:
        tensors, parts = spread(whole(step), world, kind), control(step)
        parameters = model(step)
        own.save(step, tensors=tensors | parts, model=parameters, state={"step": step})
        for tensor in (*tensors.values(), *parts.values(), *parameters.values()):
            tensor.zero_()  # the next update
    assert own.wait() is None
    own.close()


def as_lists(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """The same numbers, in what travels between processes."""
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def loaded(world: World, root: Path, kind: str) -> tuple[str, dict[str, Any], dict[str, Any], Any, bool]:
    """What is loaded into tensors spread in a way of their own: folder, whole tensors, control, state, and whether the
    rank found generators of its own."""
    folder = checkpoint.newest(root, world)
    assert folder is not None
    into = spread({name: torch.full_like(tensor, torch.nan) for name, tensor in whole(0).items()}, world, kind)
    found, state, generators = checkpoint.load(folder, into, world)
    full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in into.items()}
    return folder.name, as_lists(full), as_lists(found), state, generators is not None


def fails_on_one(world: World, root: Path, number: int) -> tuple[str | None, list[str], str | None]:
    """A save whose second rank meets a full disk, then a good one: failure, what was left, failure of the second."""
    own = saver(root, world)
    own.save(1, tensors=spread(whole(1), world, "shards") | control(1), model=model(1), state={})
    assert own.wait() is None
    original = saving.HostPart.write

    def full(self: saving.HostPart, folder: Path) -> None:
        if world.rank == 1:
            raise OSError(number, "No space left on device", str(folder / "shard"))
        original(self, folder)

    saving.HostPart.write = full
    own.save(2, tensors=spread(whole(2), world, "shards") | control(2), model=model(2), state={})
    failure = own.wait()
    saving.HostPart.write = original
    world.wait()
    left = sorted(path.name for path in root.iterdir())
    world.wait()
    own.save(3, tensors=spread(whole(3), world, "shards") | control(3), model=model(3), state={})
    return failure, left, own.wait()


def bug_on_one(world: World, root: Path, bug: type[BaseException] = RuntimeError) -> tuple[str, list[str]]:
    """A save with a mistake in the program on the second rank: what is raised, and what was left."""
    own = saver(root, world)

    def broken(self: saving.HostPart, folder: Path) -> None:
        if world.rank == 1:
            raise bug("a mistake")

    saving.HostPart.write = broken
    own.save(1, tensors=spread(whole(1), world, "shards"), model=model(1), state={})
    try:
        own.wait()
    except BaseException as error:
        world.wait()
        return f"{type(error).__name__}: {error}", [path.name for path in root.iterdir()]
    raise AssertionError("nothing was raised")


def generators_of_ranks(world: World, root: Path) -> tuple[list[float], list[float]]:
    """Numbers drawn after a save, and after a load on the same rank."""
    checkpoint.seed_random_state(world.rank)
    own = saver(root, world)
    own.save(1, tensors=whole(1), model=model(1), state={})
    first = torch.rand(3).tolist()
    assert own.wait() is None
    _, _, state = checkpoint.load(root / "step_000001", whole(0), world)
    assert state is not None
    checkpoint.restore_random_state(state)
    return first, torch.rand(3).tolist()


def limited(world: World, root: Path, size: int) -> tuple[str | None, str]:
    """A save by a process that may write files of `size` bytes only: its failure, and what a last save raises."""
    import resource

    own = saver(root, world)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    own.save(2, tensors={"optimizer.big": torch.zeros(size)}, model=model(2), state={})
    failure = own.wait()
    try:
        own.save(3, tensors={"optimizer.big": torch.zeros(size)}, model=model(3), state={}, last=True)
    except Exception as error:
        return failure, f"{type(error).__name__}: {error}"
    return failure, ""

"""The engine's weights: the trainer's own tensors (shared), or a copy brought up to date after every update (push).

Shared: every parameter of the trainer's model becomes a view into the engine's tensor, so an optimiser step in place
is all the engine needs. Done once and never rebound: the engine, and the graphs it captured, hold the addresses. Push:
vLLM reloads from an iterator over the trainer's parameters, by the names that checkpoints have.

V = vocabulary, H = hidden size; engines pad V, and keep q, k, v and gate, up as one matrix each.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from paced_fast.config import WeightSyncConfig
from paced_fast.errors import InputError, TrainingError
from paced_fast.policy import StoredNames, is_adapted, plain_buffers, plain_parameters

logger = logging.getLogger(__name__)

MAPPED_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
"""Model types whose parameters have the same layout on both sides, except for fused matrices."""

_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_FUSED = {part: ("qkv_proj", _QKV) for part in _QKV} | {part: ("gate_up_proj", _GATE_UP) for part in _GATE_UP}
_PADDED = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")


class LayoutError(ValueError):
    """Raised when the two layouts cannot share memory; the message is the reason, without a remedy."""


@dataclass(frozen=True, slots=True)
class EngineSlice:
    """Rows `start:start + rows` of the engine's parameter `name`: the place of one of the trainer's parameters."""

    name: str
    start: int
    rows: int

    def of(self, engine: Mapping[str, Tensor]) -> Tensor:
        """View of these rows."""
        return engine[self.name].detach()[self.start : self.start + self.rows]


class Engine(Protocol):
    """Methods that synchronising needs of an engine with its own parameters."""

    tensor_parallel_size: int

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the engine by name, tied ones once. Raises LayoutError where they are not in this process."""
        ...

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy named weights, in the Hugging Face layout, into the engine's own."""
        ...


class WeightSync(Protocol):
    """Brings the engine's weights up to date. `mode` is `shared` or `push`."""

    mode: str

    def after_update(self) -> dict[str, float]:
        """Make the engine use the new weights; returns figures for the metrics record: `bytes` copied, `seconds`."""
        ...


def map_parameters(
    model_type: str, trainer: Mapping[str, Tensor], engine: Mapping[str, Tensor]
) -> dict[str, EngineSlice]:
    """Map each of the trainer's parameters to its rows in the engine; tied parameters appear once on both sides.

    Reads shapes only. Raises LayoutError when a parameter has no place, a size differs, or rows of the engine are left
    over that are not padding of the vocabulary.
    """
    if model_type not in MAPPED_MODELS:
        raise LayoutError(f"model type {model_type!r} has no mapping (only {', '.join(MAPPED_MODELS)} have one)")
    slices: dict[str, EngineSlice] = {}
    for name, tensor in trainer.items():
        found = _place(name, trainer, engine)
        target = engine.get(found.name)
        if target is None:
            raise LayoutError(f"the engine has no parameter for {name}")
        if target.numel() == 0 or target.dim() != tensor.dim():
            raise LayoutError(f"the engine holds {found.name} packed or quantised, not as a plain matrix")
        if target.shape[1:] != tensor.shape[1:] or found.start + found.rows > target.shape[0]:
            raise LayoutError(f"{name} {list(tensor.shape)} does not fit {found.name} {list(target.shape)}")
        slices[name] = found
    covered = dict.fromkeys(engine, 0)
    for found in slices.values():
        covered[found.name] += found.rows
    for name, rows in covered.items():
        total = engine[name].shape[0] if engine[name].dim() else 0
        if rows != total and not (name.endswith(_PADDED) and 0 < rows < total):
            raise LayoutError(f"rows {rows} to {total} of the engine's {name} belong to no parameter of the trainer")
    return slices


def _place(name: str, trainer: Mapping[str, Tensor], engine: Mapping[str, Tensor]) -> EngineSlice:
    """Find the slice by name alone; in the fused matrix when the engine has it."""
    rows = trainer[name].shape[0]
    *head, module, kind = name.split(".")
    fused, parts = _FUSED.get(module, ("", ()))
    fused_name = ".".join([*head, fused, kind])
    if fused_name not in engine:
        return EngineSlice(name, 0, rows)
    siblings = [".".join([*head, part, kind]) for part in parts]
    missing = [sibling for sibling in siblings if sibling not in trainer]
    if missing:
        raise LayoutError(f"the engine's {fused_name} needs {missing[0]}, which the trainer does not have")
    before = siblings[: parts.index(module)]
    return EngineSlice(fused_name, sum(trainer[sibling].shape[0] for sibling in before), rows)


def verify(trainer: Mapping[str, Tensor], engine: Mapping[str, Tensor], slices: Mapping[str, EngineSlice]) -> None:
    """Compare type, device, stride and values of each pair before anything is shared. Raises LayoutError for the first
    difference.

    The engine has loaded the trainer's weights by its own code, so equal values prove the mapping.
    """
    for name, tensor in trainer.items():
        view, at = slices[name].of(engine), f"{name} and the engine's {slices[name].name}"
        if view.dtype != tensor.dtype:
            raise LayoutError(f"{name} is {_short(tensor)} and the engine's is {_short(view)}")
        if view.device != tensor.device:
            raise LayoutError(f"{name} is on {tensor.device} and the engine's is on {view.device}")
        if view.is_inference():
            raise LayoutError(f"the engine's {slices[name].name} is an inference tensor, which autograd cannot use")
        if type(tensor.data) is not Tensor or not tensor.is_contiguous():
            raise LayoutError(f"{name} is sharded over ranks or not contiguous")
        if view.stride() != tensor.stride():
            raise LayoutError(f"{at} differ in stride: {tensor.stride()} and {view.stride()}")
        if not torch.equal(view, tensor):
            raise LayoutError(f"{at} differ in value")


class SharedWeights:
    """Sync by shared memory: the trainer's parameters are views of the engine's; made by `share`."""

    mode = "shared"

    def __init__(
        self,
        trainer: Mapping[str, torch.nn.Parameter],
        engine: Mapping[str, torch.nn.Parameter],
        slices: Mapping[str, EngineSlice],
    ) -> None:
        """Rebind `.data` of every parameter of `trainer` to the engine's memory; the parameter objects stay the
        same."""
        self.trainer, self.engine, self.slices = dict(trainer), dict(engine), dict(slices)
        for name, parameter in self.trainer.items():
            parameter.data = self.slices[name].of(self.engine)
        self.check()

    def check(self) -> None:
        """Raises TrainingError when a parameter no longer uses the engine's memory because something rebound it."""
        for name, parameter in self.trainer.items():
            found = self.slices[name]
            target = self.engine[found.name]
            address = target.data_ptr() + found.start * target.stride(0) * target.element_size()
            if parameter.data_ptr() != address:
                raise TrainingError(
                    f"{name} no longer shares memory with the engine's {found.name}: its data was rebound after "
                    "sharing; use --weight-sync.mode push, or update parameters in place"
                )

    def after_update(self) -> dict[str, float]:
        """Check that every parameter still uses the engine's memory; nothing is copied."""
        started = time.perf_counter()
        self.check()
        return {"bytes": 0.0, "seconds": time.perf_counter() - started}


class PushedWeights:
    """Sync by copying with vLLM's own loader, which supports every layout."""

    mode = "push"

    def __init__(
        self,
        trainer: Callable[[], Iterable[tuple[str, Tensor]]],
        engine: Engine,
        *,
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
        names: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]] = lambda name, tensor: [(name, tensor)],
    ) -> None:
        """`trainer` gives the named weights as they are now. Nothing is copied yet: the engine has just loaded them.

        `names` turns a whole weight into those that a checkpoint has in its place, which is what an engine reads.

        Sharded matrices travel in the engine's `dtype` where that is the smaller one: it would round them itself.
        Vectors travel as they are: they are small, and engines keep some of them in float32.
        """
        self.trainer, self.engine, self.bucket_bytes, self.dtype = trainer, engine, bucket_bytes, dtype
        self.names = names

    def after_update(self) -> dict[str, float]:
        """Copy every parameter; `bytes` counts what was handed to the engine."""
        started = time.perf_counter()
        size = 0
        weights = self._buckets()

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal size
            for name, tensor in weights:
                size += tensor.nbytes
                yield name, tensor

        with torch.no_grad():
            try:
                self.engine.reload(counted())
            finally:
                # Gathering is collective, so the remaining weights are gathered even if this rank's engine has failed.
                for _ in weights:
                    pass
        seconds = time.perf_counter() - started
        logger.debug("pushed %d bytes in %.3f s", size, seconds)
        return {"bytes": float(size), "seconds": seconds}

    def _buckets(self) -> Iterator[tuple[str, Tensor]]:
        """Named weights; sharded ones are gathered a bucket at a time, so that one bucket is all that is held whole."""
        bucket: list[tuple[str, Tensor]] = []
        held = 0
        for name, tensor in self.trainer():
            whole = _whole(tensor.detach(), self.dtype)
            bucket += self.names(name, whole)
            held += whole.nbytes
            if held >= self.bucket_bytes:
                yield from bucket
                bucket, held = [], 0
        yield from bucket


def connect(engine: Engine, model: PreTrainedModel, config: WeightSyncConfig) -> WeightSync:
    """Share the weights, or set up pushing, as `config.mode` says; call it before the optimiser is made.

    Raises InputError in mode `shared` when the layouts do not allow it, with the reason, and for a model whose weights
    cannot be pushed.
    """
    trainer = dict(model.named_parameters())
    if config.mode != "push" and is_adapted(model):
        if config.mode == "shared":
            raise InputError(
                "--weight-sync.mode shared: the engine needs merged weights, which --lora.rank keeps separate: give "
                "push"
            )
        logger.info("weights are merged and pushed after every update, not shared: --lora.rank keeps them separate")
    elif config.mode != "push":
        try:
            return share(engine, model.config.model_type, trainer)
        except LayoutError as error:
            if config.mode == "shared":
                raise InputError(
                    f"--weight-sync.mode shared: {error}: give push, or auto to fall back to it"
                ) from error
            logger.warning("weights are pushed after every update, not shared: %s", error)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    return PushedWeights(
        # An engine that is given one weight of a layer expects all of them, also those that never change.
        lambda: itertools.chain(plain_parameters(model), plain_buffers(model)),
        engine,
        bucket_bytes=config.bucket_mib << 20,
        dtype=dtype,
        names=StoredNames(model).of,
    )


def share(engine: Engine, model_type: str, trainer: Mapping[str, torch.nn.Parameter]) -> SharedWeights:
    """Verify the layouts and share memory. Raises LayoutError before anything has changed."""
    if engine.tensor_parallel_size != 1:
        raise LayoutError(f"the engine splits its weights over {engine.tensor_parallel_size} ranks")
    parameters = engine.parameters()
    slices = map_parameters(model_type, trainer, parameters)
    verify(trainer, parameters, slices)
    return SharedWeights(trainer, parameters, slices)


def _whole(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Gather a sharded tensor, rounded to a smaller `dtype` before the exchange; return any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # A partial sum would be rounded before it is complete.
    is_final = not any(placement.is_partial() for placement in tensor.placements)
    if dtype is None or dtype.itemsize >= tensor.dtype.itemsize or tensor.ndim < 2 or not is_final:
        return tensor.full_tensor()
    rounded = tensor.to(dtype)
    assert isinstance(rounded, DTensor)
    return rounded.full_tensor()


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

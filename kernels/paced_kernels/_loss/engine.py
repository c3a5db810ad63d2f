"""Build the row engine from the arguments of an operator, and set the torch state in which it runs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._backend import is_torch, require_kernels
from .._shard import VocabShard
from . import pingpong_plan, tiles
from .gradients import RowEngine
from .head import Head
from .products import HostProducts
from .torch_rows import DEFAULT_WORKSPACE_BYTES, TorchRows


def make_engine(
    head: Head,
    hidden: Tensor,  # [T, H]
    token_ids: Tensor,  # [T]
    with_entropy: bool,
    workspace_bytes: int | None,
    backend: str,
) -> RowEngine:
    """Return the row engine of a resolved backend."""
    token_ids = token_ids.contiguous()  # kernels read them, and the bias, contiguously
    if is_torch(backend):
        return make_torch_engine(head, hidden, token_ids, with_entropy, workspace_bytes, backend)
    if backend == "pingpong":
        from .pingpong import PingPongRows

        return PingPongRows(head, hidden, token_ids, with_entropy, workspace_bytes)
    require_kernels("hidden", hidden)
    from .triton_gemm import GemmRows
    from .triton_logits import LogitRows

    config = tiles.plan(hidden, head.weight)
    if config is None:
        return LogitRows(head, hidden, token_ids, with_entropy, workspace_bytes)
    config = tiles.adapt_to_alignment(config, hidden, head.weight)
    return GemmRows(head, hidden, token_ids, with_entropy, workspace_bytes, config)


def make_torch_engine(
    head: Head, hidden: Tensor, token_ids: Tensor, with_entropy: bool, workspace_bytes: int | None, backend: str
) -> TorchRows:
    """Return the row engine of a resolved backend that runs in PyTorch; tensors as in `make_engine`."""
    budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    products = HostProducts(head) if backend == "compiled" else None
    return TorchRows(head, hidden, token_ids.contiguous(), with_entropy, budget, products)


def make_head(weight: Tensor, bias: Tensor | None, temperature: float, shard_group: str, shard_start: int) -> Head:
    """Return the head for one call; operator schemas pass a process group by its name."""
    group = _resolve_group(shard_group) if shard_group else None
    return Head(weight, None if bias is None else bias.contiguous(), temperature, group, shard_start)


def shard_options(shard: VocabShard | None, head_weight: Tensor) -> tuple[str, int, int]:
    """Return name of the group, first id of this rank, and size of the whole vocabulary."""
    if shard is None:
        return "", 0, head_weight.shape[0]
    return shard.group.group_name, shard.start, shard.vocab_size


def even_workspace(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    workspace_bytes: int | None,
    backend: str,
    shard_group: str,
    vocab_size: int,
) -> int | None:
    """Return the workspace with which this rank processes as many rows at a time as every other rank.

    Ranks with different chunks would deadlock in their collectives. All ranks therefore use the chunk size of an even
    split of the vocabulary, and a larger shard gets proportionally more workspace.
    """
    if not shard_group or (workspace_bytes is None and not is_torch(backend)):
        return workspace_bytes
    config = tiles.plan(hidden, weight) if backend == "triton" else None
    if backend == "pingpong":
        config = pingpong_plan.CONFIG
    workspace = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    itemsize = weight.dtype.itemsize if config else max(4, weight.dtype.itemsize)
    even_row = -(-vocab_size // _resolve_group(shard_group).size()) * itemsize
    if not is_torch(backend):
        return max(1, workspace // even_row) * tiles.bytes_per_row(config, weight.shape[0], weight.dtype)
    own_row = weight.shape[0] * itemsize
    if weight.dtype.itemsize == itemsize or backend == "compiled":
        return max(1, workspace // even_row) * own_row
    # The reference reserves a quarter for blocks of the weight in the wider dtype.
    return -(-4 * own_row * max(1, workspace * 3 // 4 // even_row) // 3)


def _resolve_group(name: str) -> Any:
    from torch.distributed import distributed_c10d  # missing in some builds of torch

    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 in float32, whatever the process allows (`torch.set_float32_matmul_precision`): with TF32
    log-probs would be off by 1e-3."""
    changed = []
    backends = torch.backends
    for settings in (backends.cuda.matmul, backends.mkldnn.matmul):  # pyright: ignore[reportAttributeAccessIssue]
        before = settings.fp32_precision
        if before not in ("ieee", "none"):
            settings.fp32_precision = "ieee"
            changed.append((settings, before))
    try:
        yield
    finally:
        for settings, before in changed:
            settings.fp32_precision = before


class Guard:
    """Context for arithmetic inside an operator: no autocast, no gradient, exact float32, the CUDA device of the
    inputs."""

    def __init__(self, device: torch.device) -> None:
        self._contexts: list[Any] = [torch.no_grad(), torch.autocast(device.type, enabled=False), exact_products()]
        if device.type == "cuda":
            self._contexts.append(torch.cuda.device(device))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)

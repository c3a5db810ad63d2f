"""Only module of the benchmarks that uses private parts of paced_kernels: variants, launch table, planned work.

Stage 2 is the Triton projection with the exponentials in its epilogue, stage 1 a library GEMM with row kernels over
its logits, stage 3 the ping-pong projection, where its package and its chip are there. `_loss.tiles.plan` chooses among
the first two, and the block sizes; a variant overrides that choice during a call.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.loss.problems import Batch
from paced_kernels._backend import resolve_backend
from paced_kernels._loss import engine, fused_pass, gradients, head, matmul, tiles

GEMM_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"is_flat": False, "num_stages": 3, "is_split": False},
    {"is_flat": False, "num_stages": 3},
    {"is_split": False},
    {"num_stages": 3},
    {"block_t": 128, "block_v": 256, "block_h": 64, "pieces": 1, "num_warps": 8, "num_stages": 3},
    {"block_t": 256, "block_v": 128, "block_h": 64, "pieces": 1, "num_warps": 8, "num_stages": 3},
    {"block_t": 128, "block_v": 128, "block_h": 64, "pieces": 1, "num_warps": 8, "num_stages": 4},
    {"block_t": 128, "block_v": 128, "block_h": 128, "pieces": 1, "num_warps": 8, "num_stages": 3},
    {"block_t": 64, "block_v": 256, "block_h": 64, "pieces": 1, "num_warps": 4, "num_stages": 4},
    {"group_v": 4},
    {"group_v": 16},
)
"""Changes to the shipped configuration of the projection for the sweep to try; {} is the shipped one."""

INTERPRETER_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"block_t": 16, "block_v": 128})


@contextmanager
def planned(config: Any) -> Iterator[None]:
    """Run the projection with this configuration; None = stage 1."""
    with mock.patch.object(tiles, "plan", return_value=config):
        yield


def make_engine(batch: Batch, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the row engine that a call with these options would use, and the name of its backend."""
    resolved = resolve_backend(options.get("backend", "auto"), batch.hidden)
    if tiles.plan(batch.hidden, batch.head_weight) == engine.pingpong_plan.CONFIG:  # inside `planned`
        resolved = resolve_backend("pingpong", batch.hidden)
    own = head.Head(batch.head_weight, None, 1.0)
    workspace = options.get("workspace_bytes")
    return engine.make_engine(own, batch.hidden, batch.token_ids, False, workspace, resolved), resolved


def planned_thv(mode: str, batch: Batch, options: dict[str, Any]) -> float:
    """THV of one step of our loss; logits count twice for sequences longer than a chunk that cannot be streamed."""
    if mode == "forward":
        return 2.0
    rows_engine, backend = make_engine(batch, options)
    is_firm = options.get("workspace_bytes") is not None or backend == "reference"
    wanted = gradients.Wanted(True, mode == "full", False)
    can_stream = fused_pass.streamed_rows(rows_engine, wanted, is_firm) > 0
    base, twice = (4.0 if mode == "frozen" else 6.0), 0
    for group in fused_pass.plan_groups(batch.cu_seqlens, batch.shape.tokens, rows_engine.rows_per_chunk):
        rows = group.rows.stop - group.rows.start
        is_sequence = group.sequences.stop - group.sequences.start == 1
        if rows > rows_engine.rows_per_chunk and not (is_sequence and can_stream):
            twice += rows
    return base + 2.0 * twice / batch.shape.tokens


def sweep_configs(batch: Batch) -> dict[str, Any]:
    """Return name -> configuration of the projection: the shipped one, its variants, then stage 1 (None)."""
    shipped = tiles.plan(batch.hidden, batch.head_weight)
    variants = GEMM_VARIANTS if batch.hidden.device.type == "cuda" else INTERPRETER_VARIANTS
    configs = {}
    if shipped is not None:
        known = {field.name for field in dataclasses.fields(shipped)}
        for changes in variants:
            config = dataclasses.replace(shipped, **{key: value for key, value in changes.items() if key in known})
            configs.setdefault(describe_config(config), config)
    configs["stage 1, library GEMM"] = None
    if has_pingpong(batch.hidden.device, batch.hidden.dtype):
        configs["stage 3, ping-pong"] = engine.pingpong_plan.CONFIG
    return configs


def stages(batch: Batch) -> dict[str, tuple[Any, str]]:
    """Return name -> (configuration, backend) of every stage that runs here: "table", and those that only a name takes.

    A stage beyond the first two is a backend of its own.
    """
    found = {"table": (tiles.plan(batch.hidden, batch.head_weight), "triton")}
    for name, config in sweep_configs(batch).items():
        if name.startswith("stage "):
            stage = name.split(",")[0]
            found[stage] = config, "triton" if stage == "stage 1" else "pingpong"
    return found


def product_calls(batch: Batch, config: Any) -> dict[str, Callable[[int], object]]:
    """Return name -> call of the large products of the loss, each over all rows as one chunk: 2 THV.

    "logits and exp" masks rows as the trainer does, "sums" only gives log-probs; "dX" and "dW" multiply the
    exponentials.
    """
    with planned(config):
        rows_engine, _ = make_engine(batch, {})
    rows, hidden, weight = slice(0, batch.shape.tokens), batch.hidden, batch.head_weight
    live = torch.ones(batch.shape.tokens, dtype=torch.bool, device=hidden.device)
    total = torch.zeros(weight.shape, dtype=rows_engine.weight_gradient_dtype, device=weight.device)
    with torch.no_grad():
        matrix = rows_engine.exponentials(rows, live).matrix
    calls: dict[str, Callable[[], object]] = {
        "logits and exp": lambda: rows_engine.exponentials(rows, live),
        "sums": lambda: rows_engine.score(rows),
        "dX": lambda: rows_engine.back_project(matrix),
        "dW": lambda: rows_engine.add_outer(total, matrix, hidden, begins=True),
    }

    def without_gradient(call: Callable[[], object]) -> Callable[[int], object]:
        def run(turn: int) -> object:
            del turn
            with torch.no_grad():
                return call()

        return run

    return {name: without_gradient(call) for name, call in calls.items()}


def products_in_float32() -> dict[str, bool]:
    """Return whether torch multiplies bfloat16 on this GPU into float32 (mm), and adds it up there (addmm)."""
    return {"mm": matmul._has_mm_out_dtype(), "addmm": matmul._has_addmm_out_dtype()}


def describe_config(config: Any) -> str:
    """Format a configuration as its constructor call, ready to be pasted into the table."""
    values = ", ".join(f"{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config))
    return f"{type(config).__name__}({values})"


def exponentials_call(batch: Batch, config: Any, num_rows: int) -> Callable[[int], Tensor]:
    """Return a function turn -> log-probs [R] of a chunk of `num_rows` rows, through the projection and its epilogue.

    Turns use different rows; each computes exponentials, row sums and log-probs of every row.
    """
    with planned(config):
        rows_engine, _ = make_engine(batch, {"backend": "triton"})
    assert num_rows <= rows_engine.rows_per_chunk
    num_chunks = batch.shape.tokens // num_rows

    def call(turn: int) -> Tensor:
        start = turn % num_chunks * num_rows
        with torch.no_grad():
            return rows_engine.exponentials(slice(start, start + num_rows), None).stats.logprobs

    return call


def has_pingpong(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether stage 3 can run here."""
    try:
        resolve_backend("pingpong", torch.empty(0, 8, device=device, dtype=dtype))
    except ValueError:
        return False
    return tiles.device_facts(device.index or 0)[0] == (9, 0)


def stage_of(config: Any) -> int:
    """Return the number of the stage that a configuration belongs to."""
    if config is None:
        return 1
    return 3 if config == engine.pingpong_plan.CONFIG else 2

"""Rate of our vocabulary projection for every block-size configuration, to maintain the static table.

    python -m benchmarks.run gemm_sweep

Nothing is tuned at run time: a better configuration found here is entered in the table by hand.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.loss import our_engines, report
from benchmarks.loss.problems import TOY_SHAPE, Batch, Shape, make_batch, make_weight
from benchmarks.timing import Clock, Failure, attempt, interleave

CHUNKS = 3
REPETITIONS = 20
TOLERANCE = 0.05
"""Largest allowed difference of log-probs from the shipped configuration, in nats."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time every configuration of the vocabulary projection."""

    device: str = "auto"
    """cuda, cpu (the kernels then run in Triton's interpreter), or auto."""
    shapes: tuple[str, ...] = ()
    """Shapes of one chunk such as T8192-H4096-V151936; none means every hidden size of the grid."""
    repetitions: int = REPETITIONS
    """Number of repetitions per configuration."""
    seconds: float = 0.0
    """Seconds after which no further shape starts; 0 means no limit."""
    progress: str = ""
    """File that names the current measurement."""


def default_shapes(device: torch.device) -> list[Shape]:
    """Return one chunk per hidden size of the grid, or a toy shape for the interpreter."""
    if device.type != "cuda":
        return [TOY_SHAPE]
    return [Shape(tokens=8192, hidden_size=size, vocab_size=151936) for size in (4096, 2048, 896, 3584, 5120)]


def compile_side_by_side(names: list[str], done: Callable[[str], None]) -> None:
    """Compile configurations in parallel processes into Triton's cache; on one core this would take minutes.

    `done` is called with the name of each that is over. Failures are ignored here; the sweep meets and records them.
    """
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(names), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for name, future in [(name, pool.submit(_compile_one, name)) for name in names]:
            future.exception()
            done(f"{name} (compiled)")


def _compile_one(name: str) -> None:
    # Kernels are specialised by divisibility of sizes by 16, not by the sizes: a toy shape compiles the same kernels.
    device = torch.device("cuda", 0)
    shape = replace(TOY_SHAPE, tokens=128)
    batch = make_batch(shape, make_weight(shape, device, torch.bfloat16, 0), "peaked", 1)
    our_engines.exponentials_call(batch, our_engines.sweep_configs(batch)[name], shape.tokens)(0)
    torch.cuda.synchronize()


def sweep(device: torch.device, shape: Shape, repetitions: int, starting: Callable[[str], None]) -> dict[str, Any]:
    """Measure every configuration at one shape; fastest first, wrong and failing ones last with the reason."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = make_weight(shape, device, dtype, 0)
    batch = make_batch(replace(shape, tokens=CHUNKS * shape.tokens), weight, "peaked", 1)
    clock = Clock(device)
    calls: dict[str, Callable[[int], object]] = {}
    entries: dict[str, dict[str, Any]] = {}
    shipped: torch.Tensor | None = None
    for name, config in our_engines.sweep_configs(batch).items():
        starting(f"{name} ({shape.name}, sweep)")
        entries[name] = {"config": name, "hidden_size": shape.hidden_size, "stage": our_engines.stage_of(config)}
        made = attempt(functools.partial(_prepare, batch, config, shape.tokens), clock)
        if isinstance(made, Failure):
            entries[name]["failed"] = made.reason
            continue
        call, logprobs = made
        if shipped is None:
            shipped = logprobs
        gap = float((logprobs - shipped).abs().max())
        if not gap <= TOLERANCE:  # NaN fails too
            entries[name]["failed"] = f"wrong: log-probs off by {gap:.2g} nats"
            continue
        calls[name] = call
    warm_ups = 1 if device.type == "cuda" else 0
    few = min(5, repetitions)
    results = interleave(calls, clock, repetitions=repetitions, min_repetitions=few, warm_ups=warm_ups)
    for name, result in results.items():
        if isinstance(result, Failure):
            entries[name]["failed"] = result.reason
        else:
            operations = shape.operations(2.0)
            entries[name] |= {**result.to_json(), "tflops": 1e-9 * operations / result.median_ms}
    ranked = sorted(entries.values(), key=lambda entry: entry.get("median_ms", math.inf))
    return {"shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "entries": ranked}


def _prepare(batch: Batch, config: Any, num_rows: int) -> tuple[Callable[[int], torch.Tensor], torch.Tensor]:
    call = our_engines.exponentials_call(batch, config, num_rows)
    return call, call(0).clone()


def sweep_text(result: dict[str, Any]) -> str:
    """Format the entries of one shape as a table."""
    rows = [("configuration", "ms (p10-p90)", "TFLOP/s")]
    for entry in result["entries"]:
        if "failed" in entry:
            rows.append((entry["config"], f"failed: {entry['failed'][:100]}", ""))
        else:
            time_ms = f"{entry['median_ms']:.2f} ({entry['p10_ms']:.2f}-{entry['p90_ms']:.2f})"
            rows.append((entry["config"], time_ms, f"{entry['tflops']:.3g}"))
    return f"\nprojection with exponentials, {result['shape']}, {result['dtype']}\n" + report.aligned(rows)


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Sweep every shape; `path` always holds the finished shapes."""
    device = environment.choose_device(arguments.device)
    shapes = [Shape.parse(name) for name in arguments.shapes] or default_shapes(device)
    started = time.perf_counter()
    result: dict[str, Any] = {"settings": asdict(arguments), "device": environment.device(device), "shapes": []}
    result["not_reached"] = []

    def starting(name: str) -> None:
        if arguments.progress:
            Path(arguments.progress).write_text(name)

    if device.type == "cuda":
        batch = make_batch(TOY_SHAPE, make_weight(TOY_SHAPE, device, torch.bfloat16, 0), "peaked", 1)
        compile_side_by_side(list(our_engines.sweep_configs(batch)), starting)
    for shape in shapes:
        if arguments.seconds and time.perf_counter() - started > arguments.seconds:
            result["not_reached"].append(shape.name)
            continue
        found = sweep(device, shape, arguments.repetitions, starting)
        result["shapes"].append(found)
        environment.write_json(path, environment.headed("gemm_sweep", result))
        print(sweep_text(found), flush=True)
    return result

"""Our log-probs and trajectory-balance loss against plain PyTorch and other projects: speed, memory and accuracy.

    python -m benchmarks.run trajectory_balance
    python -m benchmarks.run logprobs --quick

A cell is (shape, inputs) and has a row per method and per ceiling. Results are written after each cell, so an
interrupted run keeps its finished cells. `README.md` in this folder explains the tables.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.loss import accuracy, gemm_sweep, memory_probe, report
from benchmarks.loss.methods import Method, UnavailableError, answer_of, ceilings, our_methods, run_step, torch_makers
from benchmarks.loss.peers import peer_makers
from benchmarks.loss.problems import (
    COMMON_THV,
    CPU_SHAPE,
    MODES,
    QUICK_SHAPE,
    TOY_SHAPE,
    Batch,
    Shape,
    gpu_grid,
    make_batch,
    make_weight,
)
from benchmarks.timing import (
    Clock,
    DeviceLostError,
    Failure,
    GpuMonitor,
    Timing,
    attempt,
    failure_of,
    interleave,
    peak_bytes,
)
from paced_fast.errors import InputError

KINDS = ("peaked", "flat")
SLOW = 3.0
MODE_SHARES = {"full": 2.0, "forward": 1.0, "frozen": 1.0}
DEVICE_LOST = 75
"""Exit status if a competitor broke the GPU context; the result names it, and a new process can continue."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure time, memory and accuracy of methods for log-probs or the trajectory-balance loss."""

    device: str = "auto"
    """cuda, cpu, or auto (cuda if available)."""
    quick: bool = False
    """A small shape and few repetitions, to check that everything runs."""
    shapes: tuple[str, ...] = ()
    """Shapes such as T16384-H4096-V151936; none means the grid of the device."""
    inputs: tuple[str, ...] = KINDS
    """peaked, flat or both."""
    modes: tuple[str, ...] = MODES
    """full, forward, frozen (no gradient of the head), or several."""
    only: tuple[str, ...] = ()
    """Keep the methods whose name contains one of these words, and with `ceiling` the bounds; none means all."""
    exclude: tuple[str, ...] = ()
    """Exclude the methods with exactly these names."""
    dtype: str = "auto"
    """bfloat16, float32, or auto: bfloat16 on a GPU and float32 on a CPU. With --resume cells of another are kept."""
    repetitions: int = 0
    """Repetitions of each method; 0 means 30 on a GPU and 5 on a CPU."""
    cell_seconds: float = 0.0
    """Seconds for the timed part of the first cell, half for later ones: slow methods get fewer repetitions (at least
    5 on a GPU, 3 on a CPU), and a method three times as slow as ours is dropped after the first cell. 0 means no
    limit."""
    seconds: float = 0.0
    """Seconds after which no further cell starts; the remaining cells are listed. 0 means no limit."""
    resume: bool = False
    """Keep the cells in the result file and measure only the others."""
    progress: str = ""
    """File that names the method being measured."""
    sweep: bool = False
    """Afterwards also time every configuration of our vocabulary projection, for the static table."""
    memory: bool = True
    """Also measure peak memory; on a CPU this needs one more process per method."""
    seed: int = 0
    """Seed of the inputs."""


def plan(arguments: Arguments, device: torch.device) -> list[tuple[Shape, str]]:
    """Return the cells, most important first: peaked inputs at every shape, flat ones only at the first."""
    try:
        shapes = [Shape.parse(text) for text in arguments.shapes]
    except ValueError as error:
        raise InputError(str(error)) from None
    for name in arguments.inputs:
        if name not in KINDS:
            raise InputError(f"--inputs {name!r}: give {' or '.join(KINDS)}")
    for name in arguments.modes:
        if name not in MODES:
            raise InputError(f"--modes {name!r}: the modes are {', '.join(MODES)}")
    if not shapes:
        on_cpu = device.type == "cpu"
        shapes = [QUICK_SHAPE] if arguments.quick else ([CPU_SHAPE] if on_cpu else gpu_grid())
    cells = [(shape, "peaked") for shape in shapes] if "peaked" in arguments.inputs else []
    if "flat" in arguments.inputs:
        cells.insert(len(cells) if len(cells) < 6 else 5, (shapes[0], "flat"))
    return cells


class Measurement:
    """Run of one case: resolved options, chosen methods, and cells measured one by one."""

    def __init__(self, case: str, arguments: Arguments) -> None:
        self.case, self.arguments = case, arguments
        self.device = environment.choose_device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        dtype = arguments.dtype if arguments.dtype != "auto" else ("bfloat16" if self.on_gpu else "float32")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise InputError(f"--dtype {dtype!r}: give bfloat16, float16 or float32")
        self.dtype = getattr(torch, dtype)
        few = 2 if arguments.quick else 3
        self.repetitions = arguments.repetitions or (30 if self.on_gpu else few if arguments.quick else 5)
        self.min_repetitions = min(self.repetitions, 5 if self.on_gpu else few)
        self.clock = Clock(self.device)
        self.running = ""
        self.too_slow: dict[str, str] = {}

    def makers(self) -> dict[str, Callable[[], Method]]:
        """Return methods by name, ours first, after applying `only` and `exclude`."""
        ours = our_methods(self.case, self.device, self.dtype)
        every: dict[str, Callable[[], Method]] = {method.name: functools.partial(_same, method) for method in ours}
        every |= torch_makers() | peer_makers(self.device, self.dtype)
        only, exclude = self.arguments.only, self.arguments.exclude
        chosen = {name: make for name, make in every.items() if not only or any(word in name for word in only)}
        return {name: _excluded if name in exclude else make for name, make in chosen.items()}

    def starting(self, name: str) -> None:
        """Record what runs now, for a report after a crash."""
        self.running = name
        if self.arguments.progress:
            Path(self.arguments.progress).write_text(name)

    def note_slow(self, cell: dict[str, Any]) -> None:
        """With a time limit, drop methods that took three times as long as ours."""
        own = report.median_ms(report.find(cell, report.OURS), "full")
        for row in report.peers(cell):
            taken = report.median_ms(row, "full")
            if self.arguments.cell_seconds and own and taken and taken > SLOW * own:
                self.too_slow[row["name"]] = f"took {taken / own:.1f} x the time of ours at {cell['name']}"

    def cell(self, shape: Shape, kind: str, is_first: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Measure every row of one (shape, inputs); `save` gets the unfinished cell after each mode."""
        started = time.perf_counter()
        weight = make_weight(shape, self.device, self.dtype, self.arguments.seed)
        batches = []
        for index in range(3):  # three buffers in rotation, so that no method finds its inputs cached
            own = weight if index == 0 else weight.clone()
            batches.append(make_batch(shape, own, kind, self.arguments.seed + 1 + index))
        rows: dict[str, dict[str, Any]] = {}
        methods: dict[str, Method] = {}
        for name, make in self.makers().items():
            rows[name] = {"name": name, "status": "ok", "modes": {}}
            try:
                method = make()
            except UnavailableError as error:
                rows[name] |= {"status": "skipped", "reason": str(error)}
                continue
            except Exception as error:  # other projects' set-up may fail in any way; the row records how
                rows[name] |= {"status": "failed", "reason": failure_of(error).reason, "ours": False, "ceiling": False}
                continue
            if method.first_only and not is_first:
                rows[name] |= {"status": "skipped", "reason": f"measured only at the first shape ({method.first_only})"}
                continue
            if name in self.too_slow and not is_first:
                rows[name] |= {"status": "skipped", "reason": self.too_slow[name]}
                continue
            rows[name] |= {"ours": method.ours, "ceiling": method.is_ceiling, "note": method.note}
            if method.plain_loss is not None and self.case == "logprobs":
                rows[name] |= {"status": "skipped", "reason": "has no log-probs of tokens"}
                continue
            methods[name] = method
        exact = accuracy.oracle(self.case, batches[0], accuracy.oracle_dtype(self.device))
        for name, method in methods.items():
            self._check(rows[name], method, batches[0], exact)
        del exact
        cell = {
            "shape": asdict(shape),
            "name": shape.name,
            "inputs": kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sequences": shape.num_sequences,
            "longest_sequence": batches[0].longest,
            "mean_logprob": batches[0].mean_logprob,
            "oracle": str(accuracy.oracle_dtype(self.device)).removeprefix("torch."),
            "gpu": None,
            "partial": True,
            "commit": environment.describe()["commit"],
        }
        with GpuMonitor(self.device) as monitor:
            for mode in self.arguments.modes:
                self._time(mode, batches, methods, rows, self._mode_seconds(mode, is_first))
                save({**cell, "seconds": time.perf_counter() - started, "rows": list(rows.values())})
            cell["gpu"] = monitor.read()
        cell |= {"partial": False, "seconds": time.perf_counter() - started}
        return {**cell, "rows": list(rows.values())}

    def _check(self, row: dict[str, Any], method: Method, batch: Batch, exact: accuracy.Answer) -> None:
        """Check accuracy and peak memory of one full step; a failure here fails the row."""
        self.starting(f"{method.name} ({batch.shape.name}, full, accuracy)")
        answer = attempt(lambda: answer_of(self.case, method, batch), self.clock)
        if isinstance(answer, Failure):
            row |= {"status": "failed", "reason": answer.reason}
            return
        if not method.is_ceiling:
            row["accuracy"] = accuracy.errors(answer, exact)
        del answer
        if not self.arguments.memory:
            return
        if self.on_gpu:
            call = functools.partial(run_step, self.case, method, batch, "full")
            peak = attempt(lambda: peak_bytes(call, self.device), self.clock)
        else:
            spec = memory_probe.Spec(self.case, method.name, batch.shape.name, str(self.dtype).removeprefix("torch."))
            peak = attempt(lambda: memory_probe.in_subprocess(spec), self.clock)
        row["peak_bytes"] = None if isinstance(peak, Failure) else peak

    def _mode_seconds(self, mode: str, is_first: bool) -> float:
        """Return the seconds for one mode: half of the cell's for the full step; later cells get half as much."""
        if not self.arguments.cell_seconds:
            return math.inf
        share = MODE_SHARES[mode] / sum(MODE_SHARES[name] for name in self.arguments.modes)
        return self.arguments.cell_seconds * share * (1.0 if is_first else 0.5)

    def _time(
        self,
        mode: str,
        batches: list[Batch],
        methods: dict[str, Method],
        rows: dict[str, dict[str, Any]],
        seconds: float,
    ) -> None:
        """Time one mode of every method whose full step succeeded, and the ceilings in the same rounds."""
        shape = batches[0].shape
        working = {name: method for name, method in methods.items() if rows[name]["status"] == "ok"}

        def step(method: Method, turn: int) -> None:
            run_step(self.case, method, batches[turn % len(batches)], mode)

        calls: dict[str, Callable[[int], object]] = {
            name: functools.partial(step, method) for name, method in working.items()
        }
        bounds = {}
        if mode == "full" and (not self.arguments.only or "ceiling" in self.arguments.only):
            made = attempt(lambda: ceilings(batches[0]), self.clock)
            bounds = {} if isinstance(made, Failure) else made
        calls |= {name: functools.partial(_ignore_turn, call) for name, (call, _) in bounds.items()}
        results = interleave(
            calls,
            self.clock,
            repetitions=self.repetitions,
            min_repetitions=self.min_repetitions,
            seconds=seconds,
            favoured=frozenset(name for name, method in working.items() if method.ours),
            warm_ups=1 if self.on_gpu else 0,
            starting=lambda name: self.starting(f"{name} ({shape.name}, {mode})"),
        )
        for name, result in results.items():
            row = rows.setdefault(
                name, {"name": name, "status": "ok", "modes": {}, "ceiling": True, "ours": False, "note": ""}
            )
            if isinstance(result, Failure):
                row["modes"][mode] = {"failed": result.reason}
                if name in bounds:
                    row |= {"status": "failed", "reason": result.reason}
                continue
            thv = bounds[name][1] if name in bounds else working[name].thv(mode, batches[0])
            row["modes"][mode] = rates(result, shape, thv, COMMON_THV[mode] if name not in bounds else thv)
            if name == "ceiling: copy":
                moved = 2 * shape.tokens * shape.vocab_size * batches[0].hidden.element_size()
                row["modes"][mode]["gb_per_second"] = moved / result.median_ms / 1e6


def _same(method: Method) -> Method:
    return method


def _excluded() -> Method:
    raise UnavailableError("excluded from this run")


def _ignore_turn(call: Callable[[], object], turn: int) -> None:
    call()


def rates(timing: Timing, shape: Shape, own_thv: float, common_thv: float) -> dict[str, Any]:
    """Return a timing with its rates: TFLOP/s by operations the method performs, and by those the task needs."""
    per_second = 1e-9 / timing.median_ms  # TFLOP/s per operation in this time
    return {
        **timing.to_json(),
        "own_thv": own_thv,
        "own_tflops": shape.operations(own_thv) * per_second,
        "common_thv": common_thv,
        "common_tflops": shape.operations(common_thv) * per_second,
    }


def measure(case: str, arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure every cell, print its table, and return all; `path` always holds the finished cells."""
    started = time.perf_counter()
    run = Measurement(case, arguments)
    cells = plan(arguments, run.device)
    old = environment.read_json(path) if arguments.resume else {}
    dtype = str(run.dtype).removeprefix("torch.")
    done = {(cell["name"], cell["inputs"], cell["dtype"]): cell for cell in old.get("cells", []) if not cell["partial"]}
    result: dict[str, Any] = {
        "settings": asdict(arguments),
        "device": environment.device(run.device),
        "cells": list(done.values()),
        "not_reached": [],
        "lost": old.get("lost", []),
    }
    for index, (shape, kind) in enumerate(cells):
        if (shape.name, kind, dtype) in done:
            run.note_slow(done[shape.name, kind, dtype])
            continue
        if arguments.seconds and time.perf_counter() - started > arguments.seconds:
            result["not_reached"].append(f"{shape.name} {kind}")
            continue

        def save(cell: dict[str, Any]) -> None:
            partial = {**result, "cells": [*result["cells"], cell]}
            environment.write_json(path, environment.headed(case, partial))

        try:
            cell = run.cell(shape, kind, index == 0, save)
        except DeviceLostError as error:
            result["lost"].append({"running": run.running, "reason": str(error)})
            environment.write_json(path, environment.headed(case, result))
            print(f"the GPU context is lost after {run.running}: {error}", flush=True)
            os._exit(DEVICE_LOST)  # memory can no longer be freed, and a normal exit may hang
        result["cells"].append(cell)
        run.note_slow(cell)
        environment.write_json(path, environment.headed(case, result))
        print(report.cell_text(case, cell), flush=True)
    if result["not_reached"]:
        print("not reached: " + ", ".join(result["not_reached"]))
    if arguments.sweep:
        names = [Shape.parse(text) for text in arguments.shapes] or gemm_sweep.default_shapes(run.device)
        swept = [gemm_sweep.sweep(run.device, shape, gemm_sweep.REPETITIONS, run.starting) for shape in names]
        print("\n".join(gemm_sweep.sweep_text(found) for found in swept))
        result["sweep"] = swept
    return result


def toy_arguments(**changes: Any) -> Arguments:
    """Return options for a run of a second or two on any machine, for tests."""
    settings = {"device": "cpu", "shapes": (TOY_SHAPE.name,), "inputs": ("peaked",), "repetitions": 2, "memory": False}
    return Arguments(**{**settings, **changes})

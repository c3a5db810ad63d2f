"""Our priority tree against other weighted samplers: times, memory, and errors of each.

    python -m benchmarks.run priority_tree
    python -m benchmarks.run priority_tree --quick

A cell is (N, B) with a row per peer; errors of a peer are examined once per N. Results are written after each
operation, so an interrupted run keeps them.

N = leaves, B = elements per call.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.loss.measure import DEVICE_LOST
from benchmarks.loss.methods import UnavailableError
from benchmarks.timing import DeviceLostError, Failure, GpuMonitor, attempt, failure_of
from benchmarks.tree import quality as tree_quality
from benchmarks.tree import report
from benchmarks.tree.peers import MODES, Maker, Peer, peer_makers
from benchmarks.tree.timing import WallClock, copy_rate, measure_calls
from paced_fast.errors import InputError

CAPACITIES = (1_000_000, 100_000, 10_000, 10_000_000)
BATCHES = (1024, 64, 8192, 65536)
# From here on most of a call goes through all leaves, whatever B is.
LARGE, LARGE_BATCHES = 10_000_000, (1024, 65536)
QUICK_CELLS = ((10_000, 64), (10_000, 1024), (100_000, 1024))
OPERATIONS = (
    "pair",
    "update random",
    "update duplicates",
    "update contiguous",
    *(f"sample {mode}" for mode in MODES),
    "distinct",
    "rebuild",
    "rebuild from values",
    "rebuild and draw",
    "schedule",
)
"""A pair is a random update and an iid draw; a rebuild and draw, new weights for every leaf and an iid draw. Writes
alone answer no question: a peer that stores weights as they come does the rest of its work in the draw behind them. A
schedule is one trainer step: new weights for every leaf from new estimates, then a draw of distinct leaves, a tenth of
them regardless of weight."""

SLOW = 300.0
LIMIT = 2**24


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the priority tree and its peers, and check their draws."""

    device: str = "auto"
    """cuda, cpu, or auto (cuda if available)."""
    quick: bool = False
    """Few small cells and few repetitions, to check that everything runs."""
    cells: tuple[str, ...] = ()
    """Cells such as N1000000-B1024; none means the grid."""
    operations: tuple[str, ...] = ()
    """Operations whose name contains one of these words; none means all."""
    only: tuple[str, ...] = ()
    """Keep the peers whose name contains one of these words; none means all."""
    exclude: tuple[str, ...] = ()
    """Exclude the peers with exactly these names."""
    repetitions: int = 0
    """Repetitions per call; 0 means 200 on a GPU, 20 on a CPU, 3 with --quick."""
    cell_seconds: float = 0.0
    """Seconds for the timed part of one cell; a slow peer gets fewer repetitions, at least 3. 0 means no limit on a GPU
    and 11 on a CPU."""
    seconds: float = 0.0
    """Seconds after which no further cell starts; the remaining cells are listed. 0 means no limit."""
    draws: int = 0
    """Examined draws per peer and mode; 0 means 2^20, or 2^14 with --quick."""
    updates: int = 0
    """Random updates, of at most 4096 elements, before the drift is measured; 0 means 200, or 5 with --quick."""
    repeats: int = 0
    """Runs whose results must be bit-identical; 0 means 10 on a GPU, 3 on a CPU, 2 with --quick."""
    quality: bool = True
    """Also check the draws of each peer."""
    resume: bool = False
    """Keep the cells in the result file and measure only the others."""
    progress: str = ""
    """File that names the peer being measured."""
    seed: int = 0
    """Seed of the inputs."""


def plan(arguments: Arguments) -> list[tuple[int, int]]:
    """Return the cells (N, B), most important first, with those of one N together."""
    if not arguments.cells:
        every = [(n, batch) for n in CAPACITIES for batch in (BATCHES if n < LARGE else LARGE_BATCHES)]
        return list(QUICK_CELLS) if arguments.quick else every
    found = []
    for text in arguments.cells:
        match = re.fullmatch(r"N([1-9]\d*)-B([1-9]\d*)", text)
        if match is None:
            raise InputError(f"--cells {text!r}: write a cell like N1000000-B1024")
        found.append((int(match[1]), int(match[2])))
    return sorted(found, key=lambda cell: [capacity for capacity, _ in found].index(cell[0]))


@dataclass(frozen=True)
class Inputs:
    """Inputs of one cell on one device, three of each, used in rotation."""

    weights: Tensor  # [3, N] f32
    values: Tensor  # [3, B] f32
    random: Tensor  # [3, B] i64
    duplicates: Tensor  # [3, B] i64, 16 of each leaf
    starts: Tensor  # [3] i64
    estimates: Tensor  # [3, N] f32


def make_inputs(capacity: int, num: int, device: torch.device, seed: int) -> Inputs:
    """Create weights (a third are 0, few are large) and indices (random, or each leaf 16 times)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    few = torch.randint(0, capacity, (3, max(1, num // 16)), generator=generator)
    made = (
        uniform(3, capacity) ** 4 * (uniform(3, capacity) > 1 / 3),
        uniform(3, num) ** 4,
        torch.randint(0, capacity, (3, num), generator=generator),
        few.gather(1, torch.randint(0, few.shape[1], (3, num), generator=generator)),
        torch.randint(0, capacity, (3,), generator=generator),
        uniform(3, capacity),
    )
    return Inputs(*(value.to(device) for value in made))


def call_of(operation: str, peer: Peer, inputs: Inputs, num: int) -> Callable[[int], object] | str:
    """Return the call of one operation as a function of the turn, or the reason why this peer has none."""
    kind, _, detail = operation.partition(" ")
    if kind == "sample" and detail not in peer.modes:
        return "has no such draw"
    is_distinct = operation in ("distinct", "schedule")
    if is_distinct and not peer.has_distinct:
        return "has no such draw"
    if is_distinct and 2 * num > peer.capacity:
        return "needs more leaves"
    if operation == "update contiguous" and num > peer.capacity:
        return "needs more leaves"

    def call(turn: int) -> object:
        at = turn % 3
        if operation == "rebuild":
            return peer.rebuild(inputs.weights[at])
        if operation == "rebuild from values":
            return peer.rebuild_from_values(inputs.estimates[at])
        if operation == "schedule":
            return peer.schedule(inputs.estimates[at], num)
        if operation == "rebuild and draw":
            peer.rebuild(inputs.weights[at])
            return peer.sample(num, "iid")
        if operation == "update contiguous":
            return peer.write_range(inputs.starts[at], inputs.values[at])
        if kind in ("update", "pair"):
            idx = inputs.duplicates if detail == "duplicates" else inputs.random
            peer.update(idx[at], inputs.values[at])
        if operation == "pair":
            return peer.sample(num, "iid")
        if kind == "sample":
            return peer.sample(num, detail)
        return peer.sample_distinct(num) if operation == "distinct" else None

    return call


class Measurement:
    """Run of the benchmark: resolved options, peers created once per N, cells measured one by one."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.device = environment.choose_device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        quick = arguments.quick
        self.repetitions = arguments.repetitions or (3 if quick else 200 if self.on_gpu else 20)
        self.settings = {
            "num_draws": arguments.draws or (2**14 if quick else 2**20),
            "num_updates": arguments.updates or (5 if quick else 200),
            "repeats": arguments.repeats or (2 if quick else 10 if self.on_gpu else 3),
        }
        words = arguments.operations
        self.operations = [name for name in OPERATIONS if not words or any(word in name for word in words)]
        self.cell_seconds = arguments.cell_seconds or (0.0 if self.on_gpu else 11.0)
        self.clock = WallClock(self.device)
        self.copy_rate = copy_rate(self.device) if self.on_gpu else None
        self.running = ""
        self.too_slow: dict[tuple[str, str], str] = {}
        self._peers: tuple[int, dict[str, dict[str, Any]], dict[str, Peer]] | None = None

    def makers(self) -> dict[str, Maker]:
        """Return the chosen peers by name, ours first."""
        every, only = peer_makers(self.device), self.arguments.only
        return {name: make for name, make in every.items() if not only or any(word in name for word in only)}

    def starting(self, name: str, where: str) -> None:
        """Record what runs now, for a report after a crash."""
        self.running = f"{name} ({where})"
        if self.arguments.progress:
            Path(self.arguments.progress).write_text(self.running)

    def peers(self, capacity: int) -> tuple[dict[str, dict[str, Any]], dict[str, Peer]]:
        """Return the row heads, and the peers that could be created, for one N."""
        if self._peers is not None and self._peers[0] == capacity:
            return self._peers[1], self._peers[2]
        self._peers = None  # free the peers of the previous N
        rows: dict[str, dict[str, Any]] = {}
        made: dict[str, Peer] = {}
        for name, make in self.makers().items():
            rows[name] = {"name": name, "ours": name.startswith("ours"), "status": "ok", "reason": ""}
            self.starting(name, f"N{capacity}, set-up")
            if name in self.arguments.exclude:
                rows[name] |= {"status": "skipped", "reason": "excluded from this run"}
                continue
            try:
                made[name] = make(capacity, self.device, self.arguments.seed)
            except UnavailableError as error:
                rows[name] |= {"status": "skipped", "reason": str(error)}
            except Exception as error:  # other projects' set-up may fail in any way; the row records how
                rows[name] |= {"status": "failed", "reason": failure_of(error).reason}
            else:
                rows[name]["state_bytes"] = made[name].state_bytes()
        self._peers = (capacity, rows, made)
        return rows, made

    def cell(self, capacity: int, num: int, with_rebuild: bool, save: Callable[[dict[str, Any]], None]) -> dict:
        """Measure every row of one (N, B); `save` gets the unfinished cell after each operation."""
        started = time.perf_counter()
        heads, peers = self.peers(capacity)
        rows = {name: {**head, "operations": {}} for name, head in heads.items()}
        name = f"N{capacity}-B{num}"
        inputs = {
            face: make_inputs(capacity, num, face, self.arguments.seed) for face in {p.faces for p in peers.values()}
        }
        for peer_name, peer in peers.items():
            self.starting(peer_name, f"{name}, first weights")
            first = attempt(functools.partial(peer.rebuild, inputs[peer.faces].weights[0]), self.clock)
            if isinstance(first, Failure):
                rows[peer_name] |= {"status": "failed", "reason": first.reason}
        cell = {"name": name, "capacity": capacity, "batch": num, "partial": True}
        operations = [op for op in self.operations if not op.startswith("rebuild") or with_rebuild]
        with GpuMonitor(self.device) as monitor:
            for operation in operations:
                self._time(operation, num, name, rows, peers, inputs, len(operations))
                save({**cell, "rows": list(rows.values())})
            cell["gpu"] = monitor.read()
        cell |= {"partial": False, "seconds": time.perf_counter() - started}
        return {**cell, "rows": list(rows.values())}

    def _time(
        self,
        operation: str,
        num: int,
        cell: str,
        rows: dict[str, dict[str, Any]],
        peers: dict[str, Peer],
        inputs: dict[torch.device, Inputs],
        num_operations: int,
    ) -> None:
        calls = {}
        for name, peer in peers.items():
            if rows[name]["status"] != "ok":
                continue
            call = self.too_slow.get((name, operation)) or call_of(operation, peer, inputs[peer.faces], num)
            if isinstance(call, str):
                rows[name]["operations"][operation] = {"skipped": call}
            else:
                calls[name] = call
        found = measure_calls(
            calls,
            frozenset(name for name in calls if self.on_gpu and peers[name].home.type == "cuda"),
            self.device,
            repetitions=self.repetitions,
            seconds=self.cell_seconds / num_operations,
            starting=lambda name: self.starting(name, f"{cell}, {operation}"),
        )
        own = report.median_us(next(iter(found.values()), {}), "wall")
        for name, entry in found.items():
            rows[name]["operations"][operation] = entry
            moved = peers[name].moved_bytes(operation, num)
            graph_us = report.median_us(entry, "graph")
            if moved and graph_us and self.copy_rate:
                entry["copy_share"] = moved / (1e-6 * graph_us) / self.copy_rate
            taken = report.median_us(entry, "wall")
            if own and taken and taken > SLOW * own and self.arguments.cell_seconds:
                self.too_slow[name, operation] = f"took {taken / own:.0f} x the time of the first row at {cell}"

    def quality(self, capacity: int) -> dict[str, Any]:
        """Check every peer for errors at one N."""
        rows = []
        for name in self.peers(capacity)[1]:
            self.starting(name, f"N{capacity}, draws")
            make = functools.partial(self.makers()[name], capacity, self.device, self.arguments.seed)
            found = attempt(functools.partial(tree_quality.examine, make, **self.settings), self.clock)
            rows.append({"name": name, **({"failed": found.reason} if isinstance(found, Failure) else found)})
        return {"capacity": capacity, "rows": rows}


def limits(device: torch.device) -> list[dict[str, Any]]:
    """Test torch.multinomial at its limit of categories: 2^24, and one more."""
    rows = []
    torch.manual_seed(0)
    weights = torch.ones(LIMIT, device=device)
    weights[LIMIT // 2 :] = 0.5
    for capacity, probabilities in ((LIMIT, weights), (LIMIT + 1, torch.ones(1, device=device).expand(LIMIT + 1))):
        for replacement in (True, False):
            row = {"name": "torch.multinomial", "capacity": capacity, "replacement": replacement}
            try:
                drawn = torch.multinomial(probabilities, 4096, replacement=replacement)
                row |= {"upper_half": (drawn >= LIMIT // 2).double().mean().item(), "expected": 1 / 3}
            except (RuntimeError, ValueError) as error:
                row["failed"] = failure_of(error).reason
            rows.append(row)
    return rows


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure every cell, print its table, and return all; `path` always holds the finished part."""
    started = time.perf_counter()
    cells = plan(arguments)
    run = Measurement(arguments)
    old = environment.read_json(path) if arguments.resume else {}
    done = {cell["name"]: cell for cell in old.get("cells", []) if not cell["partial"]}
    result: dict[str, Any] = {
        "settings": {**asdict(arguments), **run.settings, "repetitions": run.repetitions},
        "device": environment.device(run.device),
        "copy_bytes_per_second": run.copy_rate,
        "cells": list(done.values()),
        "quality": old.get("quality", []),
        "limits": old.get("limits", []),
        "not_reached": [],
        "lost": old.get("lost", []),
    }

    def save(cell: dict[str, Any] | None = None) -> None:
        kept = {**result, "cells": [*result["cells"], *([cell] if cell else [])]}
        environment.write_json(path, environment.headed("priority_tree", kept))

    try:
        _measure_cells(run, cells, result, save, started)
    except DeviceLostError as error:
        result["lost"].append({"running": run.running, "reason": str(error)})
        save()
        print(f"the GPU context is lost after {run.running}: {error}", flush=True)
        os._exit(DEVICE_LOST)  # memory can no longer be freed, and a normal exit may hang
    print(report.summary_text(result), flush=True)
    return result


def _measure_cells(
    run: Measurement,
    cells: list[tuple[int, int]],
    result: dict[str, Any],
    save: Callable[..., None],
    started: float,
) -> None:
    """Measure the cells, and after the last cell of each N the errors of its peers."""
    arguments = run.arguments
    rebuilt: set[int] = set()
    for index, (capacity, num) in enumerate(cells):
        is_late = bool(arguments.seconds) and time.perf_counter() - started > arguments.seconds
        is_done = any(cell["name"] == f"N{capacity}-B{num}" for cell in result["cells"])
        if is_late and not is_done:
            result["not_reached"].append(f"N{capacity}-B{num}")
        elif not is_done:
            cell = run.cell(capacity, num, capacity not in rebuilt, save)
            result["cells"].append(cell)
            save()
            print(report.cell_text(cell), flush=True)
        rebuilt.add(capacity)
        is_last = index + 1 == len(cells) or cells[index + 1][0] != capacity
        is_examined = any(entry["capacity"] == capacity for entry in result["quality"])
        if arguments.quality and is_last and not is_examined:
            if is_late:
                result["not_reached"].append(f"N{capacity} draws")
                continue
            result["quality"].append(run.quality(capacity))
            save()
            print(report.quality_text(result["quality"][-1]), flush=True)
    is_wanted = not arguments.only or any(word in "torch.multinomial" for word in arguments.only)
    if arguments.quality and is_wanted and not result["limits"] and "torch.multinomial" not in arguments.exclude:
        run.starting("torch.multinomial", "limits")
        result["limits"] = limits(run.device)
        save()

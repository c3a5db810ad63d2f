"""Predicted rates of the loss on an H100 by shape, from the compiler's instructions, beside what was measured.

    python -m benchmarks.run cycle_model

A tile of the projection is a loop over the inner dimension on tensor cores, then an epilogue in which they idle. An
epilogue takes the cycles of its busiest pipe, with counts from the table of the case `compile`, and a latency;
`predict` has the model of the rest. Constants come from documentation and from measurements of others: where a
row is off by more than a tenth, one of them is wrong.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.loss import report
from benchmarks.loss.problems import Shape
from paced_fast.errors import InputError

RESULTS = Path(__file__).parent.parent / "results"
CHUNK_ROWS = 8192
HIDDEN_SIZES = (896, 1536, 2048, 3584, 4096)
VOCABULARY = 151936


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Predict the speed of the loss on a GPU from the table of the case `compile`."""

    shapes: tuple[str, ...] = ()
    """Shapes such as T8192-H4096-V151936; none means one chunk at five hidden sizes."""
    compiled: str = ""
    """Result of the case `compile`, which has the instructions of a tile; empty means the committed one."""
    projections: str = ""
    """Result of the case `gemm_sweep`; empty means the one in the folder of results. It counts if it is of a GPU."""
    losses: str = ""
    """Result of the case `trajectory_balance`, likewise."""


@dataclass(frozen=True)
class Chip:
    """An H100 SXM under load. Rates and the bandwidth were measured on one; cycles follow from its documentation."""

    multiprocessors: int = 132
    schedulers: int = 4
    """On each multiprocessor; a warp belongs to one."""
    operations: int = 4096
    """bfloat16 floating-point operations of a multiprocessor's tensor cores in a cycle."""
    library_tflops: float = 798.0
    """A library's product of 8192^3 under the power limit; it stands for the clock: tensor cores without a pause."""
    copy_tb_s: float = 3.0
    alu_cycles: int = 2
    special_cycles: int = 8
    """Cycles in which a scheduler starts one warp's instruction on that pipe; on the others it is one."""

    @property
    def clock(self) -> float:
        """Hz."""
        return 1e12 * self.library_tflops / (self.multiprocessors * self.operations)


LOOP = 0.88
"""Share of the tensor rate in the loop: barriers take 4.5 %, and 8 % are allowed for L2 without multicast."""
LATENCY = 1200
"""Cycles of an epilogue in which no pipe is busy: barriers, shuffles, the store buffer."""
FILL = 1100
"""Cycles until the first operands of a tile have come, where loads begin with the tile."""
BACK_PROJECTION, WEIGHT_GRADIENT = 0.95, 0.90
"""Share of the library's rate that is left of products with few waves of tiles, and of sums into float32."""
FIXED_MS = 0.3
"""Row kernels, launches and elementwise passes over [T, H]."""


@dataclass(frozen=True)
class Kernel:
    """A projection kernel from the table of the case `compile`."""

    block_t: int
    block_v: int
    block_h: int
    is_flat: bool
    num_warps: int
    tile: dict[str, dict[str, Any]]

    def busy(self, part: str, chip: Chip) -> float:
        """Cycles of the busiest pipe of a scheduler."""
        counts = self.tile[part]
        cycles = (counts["instructions"], chip.alu_cycles * counts["alu"], chip.special_cycles * counts["special"])
        return self.num_warps / chip.schedulers * max(cycles)

    def cycles(self, shape: Shape, chip: Chip) -> float:
        """Cycles of a tile; targets are spread evenly over the vocabulary, which leaves the most tiles with masks."""
        loop = math.ceil(shape.hidden_size / self.block_h) * self.block_h
        loop *= 2 * self.block_t * self.block_v / chip.operations / LOOP
        pieces = 2 * math.ceil(shape.vocab_size / self.block_v)
        masked = min(1.0, 1 - (1 - 1 / pieces) ** self.block_t + 1 / pieces)
        epilogue = LATENCY + (1 - masked) * self.busy("epilogue", chip) + masked * self.busy("masked", chip)
        return loop + epilogue + (self.busy("begin", chip) if self.is_flat else FILL)

    def milliseconds(self, shape: Shape, chip: Chip) -> float:
        """Time for one chunk."""
        tiles = math.ceil(shape.tokens / self.block_t) * math.ceil(shape.vocab_size / self.block_v)
        return 1e3 * math.ceil(tiles / chip.multiprocessors) * self.cycles(shape, chip) / chip.clock


def kernels(rows: list[dict[str, Any]], kind: str) -> dict[str, Kernel]:
    """Return name -> kernel, from the rows of the case `compile`: those of sm_90 by TMA without options."""
    found = {}
    for row in rows:
        name, _, options = row["variant"].partition(": ")
        if row["kernel"] != "project_kernel" or options != kind or "TMA" not in name or "tile" not in row:
            continue
        blocks = [int(size) for size in name.split()[0].split("x")]
        found[name] = Kernel(blocks[0], blocks[1], blocks[2], "flat" in name, row["num_warps"], row["tile"])
    return found


def predict(shape: Shape, shipped: Kernel, chip: Chip) -> dict[str, float]:
    """Return ms of each part of the loss with all gradients, their total, and rates in TFLOP/s."""
    chunks = math.ceil(shape.tokens / CHUNK_ROWS)
    chunk = Shape(tokens=min(shape.tokens, CHUNK_ROWS), hidden_size=shape.hidden_size, vocab_size=shape.vocab_size)
    product_ms = 1e-9 * chunk.operations(2.0) / chip.library_tflops
    size = shape.vocab_size * shape.hidden_size
    # Each gradient is a product with few or with many output tiles of 128 x 256.
    parts = {
        "projection": shipped.milliseconds(chunk, chip),
        "dhidden": product_ms / (BACK_PROJECTION * filled(chunk.tokens, shape.hidden_size, chip)),
        "dweight": product_ms / (WEIGHT_GRADIENT * filled(shape.vocab_size, shape.hidden_size, chip)),
    }
    parts = {name: chunks * value for name, value in parts.items()}
    # The float32 sum is read and written with every further chunk, and turned into bfloat16 at the end.
    moved = (8 * (chunks - 1) + 6) * size
    parts["other"] = chunks * FIXED_MS + 1e-9 * moved / chip.copy_tb_s
    total = sum(parts.values())
    rates = {"projection_tflops": 1e-9 * shape.operations(2.0) / parts["projection"]}
    return {**parts, "total": total, **rates, "tflops": 1e-9 * shape.operations(6.0) / total}


def filled(rows: int, columns: int, chip: Chip) -> float:
    """Share of the multiprocessors' time that a product's tiles of 128 x 256 fill: the last wave, and the edge."""
    tiles = math.ceil(rows / 128) * math.ceil(columns / 256)
    waves = math.ceil(tiles / chip.multiprocessors)
    return rows / 128 * columns / 256 / (waves * chip.multiprocessors)


def measured(arguments: Arguments) -> dict[str, dict[str, float]]:
    """Return shape -> measured rates under the names that `predict` has, of what was measured on a GPU."""
    found: dict[str, dict[str, float]] = {}
    sweep = environment.read_json(Path(arguments.projections or RESULTS / "gemm_sweep.json"))
    for part in sweep.get("shapes", []) if sweep.get("device", {}).get("type") == "cuda" else []:
        rates = [entry["tflops"] for entry in part["entries"] if entry["stage"] == 2 and "tflops" in entry]
        if rates:
            found.setdefault(part["shape"], {})["projection_tflops"] = max(rates)
    losses = environment.read_json(Path(arguments.losses or RESULTS / "trajectory_balance.json"))
    for cell in losses.get("cells", []) if losses.get("device", {}).get("type") == "cuda" else []:
        row = report.find(cell, report.OURS)
        rate = row and row.get("modes", {}).get("full", {}).get("common_tflops")
        if rate and cell["inputs"] == "peaked":
            found.setdefault(cell["name"], {})["tflops"] = rate
    return found


def text(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a table."""
    lines: list[tuple[str, ...]] = [("shape", "ms: logits", "dX", "dW", "other", "total", "TF/s: logits", "6 THV")]
    lines[0] += ("measured: logits", "6 THV", "logits by the plain kernel")
    for row in rows:
        times = [f"{row['predicted'][key]:.1f}" for key in ("projection", "dhidden", "dweight", "other", "total")]
        keys = ("projection_tflops", "tflops")
        rates = [f"{row['predicted'][key]:.0f}" for key in keys]
        seen = [f"{row['measured'][key]:.0f}" if key in row["measured"] else "-" for key in keys]
        plain = "-" if row["plain_tflops"] is None else f"{row['plain_tflops']:.0f}"
        lines.append((row["shape"], *times, *rates, *seen, plain))
    return report.aligned(lines)


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Predict every shape, and each that was measured on a GPU, and print them side by side."""
    del path
    source = Path(arguments.compiled or RESULTS / "compile.json")
    compiled = environment.read_json(source)
    found = kernels(compiled.get("rows", []), "exponentials")
    if not found:
        message = "has no instructions of a tile on sm_90: write it with `python -m benchmarks.run compile`"
        raise InputError(f"{source} {message}")
    shipped, *others = found.values()
    seen, chip = measured(arguments), Chip()
    names = arguments.shapes or (
        *(f"T{CHUNK_ROWS}-H{size}-V{VOCABULARY}" for size in HIDDEN_SIZES),
        *(name for name in seen if not name.startswith(f"T{CHUNK_ROWS}-")),
    )
    rows = []
    for name in names:
        try:
            shape = Shape.parse(name)
        except ValueError as error:
            raise InputError(str(error)) from None
        plain = predict(shape, others[0], chip)["projection_tflops"] if others else None
        row = {"shape": shape.name, "predicted": predict(shape, shipped, chip), "measured": seen.get(shape.name, {})}
        rows.append({**row, "plain_tflops": plain})
    print(text(rows))
    return {"settings": asdict(arguments), "chip": asdict(chip), "kernels": list(found), "rows": rows}

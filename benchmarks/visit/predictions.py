"""What was predicted for one H100 before anything ran there, each number with its formula and where it is measured.

The numbers were written down beforehand and stay as they are; the formulas say where they come from, and a test holds
them together. Machine meant: 132 multiprocessors, cuBLAS at 798 TFLOP/s (bfloat16, 8192^3), copies at 3.0 TB/s.

T = packed tokens, H = hidden size, V = vocabulary; one THV is T H V operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loss import report
from benchmarks.loss.problems import Shape, toy_of

CUBLAS = 798.0  # TFLOP/s
COPY = 3.0  # TB/s
MULTIPROCESSORS = 132
SUSTAINED = 750.0  # TFLOP/s of the tensor cores at the clock that long products leave
MAIN_LOOP, PROLOGUE, EPILOGUE = 0.955, 1100, 5450  # share of the tensor rate; clocks of a tile of 128 x 256
VOCABULARY = 151936


def product_ms(shape: Shape, tflops: float) -> float:
    """Milliseconds of one product of 2 THV."""
    return 1e-9 * shape.operations(2.0) / tflops


def logits_tflops(shape: Shape) -> float:
    """750 x 16 H / (16 H / .955 + 1,100 + 5,450): clocks of a tile of 128 x 256, of its main loop and of the rest."""
    least = 16.0 * shape.hidden_size
    return SUSTAINED * least / (least / MAIN_LOOP + PROLOGUE + EPILOGUE)


def logits_ms(shape: Shape) -> float:
    """2 THV at the rate of logits and exp."""
    return product_ms(shape, logits_tflops(shape))


def hidden_ms(shape: Shape) -> float:
    """2 THV at 798 x .955 TFLOP/s, tiles of 128 x 256 in whole waves of 132."""
    tiles = shape.tokens / 128 * -(-shape.hidden_size // 256)
    waves = -(-tiles // MULTIPROCESSORS)
    share = shape.tokens / 128 * shape.hidden_size / 256 / (waves * MULTIPROCESSORS)
    return product_ms(shape, CUBLAS * MAIN_LOOP * share)


def weight_ms(shape: Shape) -> float:
    """dX and 2 V H bytes at 3.0 TB/s: half of the float32 result is written while nothing multiplies."""
    return hidden_ms(shape) + 2e-9 * shape.vocab_size * shape.hidden_size / COPY


def other_ms(shape: Shape) -> float:
    """.32 ms of row kernels and launches, and 6 V H bytes at 3.0 TB/s: the float32 gradient, read and rounded."""
    return 0.32 + 6e-9 * shape.vocab_size * shape.hidden_size / COPY


def step_ms(shape: Shape) -> float:
    """logits and exp + dX + dW + other, once for every 8192 rows."""
    chunks = -(-shape.tokens // 8192)
    part = Shape(tokens=shape.tokens // chunks, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size)
    return chunks * (logits_ms(part) + hidden_ms(part) + weight_ms(part) + other_ms(part))


def step_tflops(shape: Shape) -> float:
    """6 THV over the time of the step."""
    return 1e-9 * shape.operations(6.0) / step_ms(shape)


def three_ms(shape: Shape) -> float:
    """6 THV at 798 TFLOP/s."""
    return 3 * product_ms(shape, CUBLAS)


def naive_ms(shape: Shape) -> float:
    """6 THV at 798 TFLOP/s, and eleven passes over 4 T V bytes of float32 logits at 3.0 TB/s."""
    return three_ms(shape) + 11 * 4e-9 * shape.tokens * shape.vocab_size / COPY


@dataclass(frozen=True)
class Stated:
    """Predictions for T8192, V151936 at one hidden size; milliseconds, and TFLOP/s of logits and of the step."""

    logits: float
    logits_tflops: float
    hidden: float
    weight: float
    other: float
    total: float
    tflops: float
    three: float


STATED = {
    896: Stated(4.4, 510, 3.5, 3.6, 0.6, 12.0, 557, 8.4),
    1536: Stated(6.8, 565, 5.5, 5.6, 0.8, 18.6, 617, 14.4),
    2048: Stated(8.5, 600, 6.9, 7.1, 0.9, 23.4, 654, 19.2),
    3584: Stated(14.0, 635, 12.1, 12.4, 1.4, 39.9, 671, 33.5),
    4096: Stated(15.9, 640, 13.8, 14.2, 1.6, 45.5, 672, 38.3),
}
FASTER_EPILOGUE = {1536: 1.10, 896: 1.16, 4096: 1.04}
"""Gain of the projection from a flat tile loop with four stages and an epilogue without masks for most tiles."""
BIAS = {896: 0.8e-6, 2048: 1.9e-6, 4096: 3.8e-6}
"""Mean error of a log-prob in nats if the logit of the target came from exact sums: H / 16 truncations. Now both come
from the same instructions."""
THEIRS = {
    ("Liger's CuTe scaled CE", "T8192-H4096-V131072", "full"): (50.4, 39.2, 1.29),
    ("Liger's CuTe scaled CE", "T8192-H4096-V131072", "forward"): (12.25, 13.7, 0.89),
    ("quack's chunked CE (on an H200)", "T4096-H4096-V128256", "full"): (17.33, 19.9, 0.87),
    ("Liger's CuTe FLCE (on an H200)", "T4096-H4096-V128256", "full"): (18.06, 19.9, 0.91),
    ("Liger's Triton FLCE (on an H200)", "T4096-H4096-V128256", "full"): (141.0, 19.9, 7.1),
}
"""(project, shape, mode) -> its own published ms, ours as predicted, times as fast as it."""
NAIVE = {4096: (56.0, 1.23), 1536: (32.0, 1.7)}
"""Hidden size -> ms of plain PyTorch at T8192, V151936, and times as fast as it."""


class Results:
    """The result files of a visit; of a rehearsal, at the toy shapes that stand for those of a GPU."""

    def __init__(self, folder: Path, rehearsed: bool = False) -> None:
        self.folder, self.rehearsed = folder, rehearsed
        self._read: dict[str, dict[str, Any]] = {}

    def of(self, part: str) -> dict[str, Any]:
        """Result of a part, {} if there is none yet."""
        if part not in self._read:
            path = self.folder / f"{part}.json"
            try:
                self._read[part] = json.loads(path.read_text())
            except (OSError, ValueError):
                self._read[part] = {}
        return self._read[part]

    def here(self, shape: Shape) -> Shape:
        """The shape that was measured in the place of this one."""
        return toy_of(shape) if self.rehearsed else shape

    def smoke(self, table: str, shape: Shape, name: str, key: str, mode: str = "") -> float | None:
        """Column of a row of the smoke test; its rows keep the names of the shapes that they stand for."""
        for row in self.of("smoke").get(table, ()):
            if (row["shape"], row["name"], row["mode"]) == (shape.name, name, mode):
                return row.get(key)
        return None

    def cell(self, shape: Shape, method: str, key: str, mode: str = "full") -> float | None:
        """Column of the loss's table."""
        for cell in self.of("trajectory_balance").get("cells", ()):
            if cell["name"] == self.here(shape).name and cell["inputs"] == "peaked":
                row = report.find(cell, method)
                return None if row is None else row["modes"].get(mode, {}).get(key)
        return None

    def swept(self, shape: Shape) -> float | None:
        """Rate of the fastest configuration of the projection."""
        for found in self.of("sweep").get("shapes", ()):
            if found["shape"] == self.here(shape).name:
                rates = [e["tflops"] for e in found["entries"] if e["stage"] == 2 and e.get("tflops") is not None]
                return max(rates, default=None)
        return None

    def bias(self, size: int) -> float | None:
        """Mean error of a log-prob in the stage that the table names."""
        rows = [row for row in self.of("smoke").get("bias", ()) if row["hidden_size"] == size]
        return next((row["mean_nats"] for row in rows if row["stage"] == "table"), None)

    def load(self, key: str) -> float | None:
        """Column of the machine under load."""
        return (self.of("machine").get("load") or {}).get(key)


@dataclass(frozen=True)
class Prediction:
    """A number written down beforehand."""

    visit: str
    """Which visit measures it, a or b."""
    name: str
    value: float
    unit: str
    formula: str
    measured: Callable[[Results], float | None]
    computed: float | None = None
    """What the formula gives; None where the number is not one of ours."""


def _first(function: Callable[..., float]) -> str:
    return " ".join((function.__doc__ or "").split()).rstrip(".")


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _sizes() -> Iterable[Prediction]:
    """Section by hidden size: products, the rest, the step, and three bare products."""
    for size, stated in STATED.items():
        shape = Shape(tokens=8192, hidden_size=size, vocab_size=VOCABULARY)

        def row(
            name: str, value: float, function: Callable[[Shape], float], table: str, key: str, shape: Shape = shape
        ) -> Prediction:
            size = shape.hidden_size
            mode = "full" if table == "steps" else ""
            unit, title = ("ms", name) if key == "median_ms" else ("TFLOP/s", f"{name}, rate")
            title = title.replace("ours", "step")

            def found(results: Results) -> float | None:
                return results.smoke(table, shape, name, key, mode)

            return Prediction("a", f"H{size} {title}", value, unit, _first(function), found, function(shape))

        def rest(results: Results, shape: Shape = shape) -> float | None:
            whole = results.smoke("steps", shape, "ours", "median_ms", "full")
            parts = [results.smoke("products", shape, n, "median_ms") for n in ("logits and exp", "dX", "dW")]
            return None if whole is None or None in parts else whole - sum(part for part in parts if part is not None)

        yield row("logits and exp", stated.logits, logits_ms, "products", "median_ms")
        yield row("logits and exp", stated.logits_tflops, logits_tflops, "products", "tflops")
        yield row("dX", stated.hidden, hidden_ms, "products", "median_ms")
        yield row("dW", stated.weight, weight_ms, "products", "median_ms")
        yield Prediction("a", f"H{size} other", stated.other, "ms", _first(other_ms), rest, other_ms(shape))
        yield row("ours", stated.total, step_ms, "steps", "median_ms")
        yield row("ours", stated.tflops, step_tflops, "steps", "tflops")
        yield row("three GEMMs", stated.three, three_ms, "steps", "median_ms")


def _peers() -> Iterable[Prediction]:
    """Ours at the shapes of other projects' own numbers, and plain PyTorch beside ours."""
    seen: set[tuple[str, str]] = set()
    for (project, name, mode), (theirs, ours, ratio) in THEIRS.items():
        shape = Shape.parse(name)

        def own(results: Results, shape: Shape = shape, mode: str = mode) -> float | None:
            return results.smoke("steps", shape, "ours", "median_ms", mode)

        def times(results: Results, theirs: float = theirs, own: Callable[[Results], float | None] = own) -> Any:
            return _ratio(theirs, own(results))

        function = step_ms if mode == "full" else logits_ms
        if (name, mode) not in seen:
            yield Prediction("a", f"{name} {mode}", ours, "ms", _first(function), own, function(shape))
        seen.add((name, mode))
        yield Prediction("a", f"{name} {mode}, x {project}", ratio, "x", f"their own {theirs} ms / ours", times)
    for size, (naive, ratio) in NAIVE.items():
        shape = Shape(tokens=8192, hidden_size=size, vocab_size=VOCABULARY)

        def plain(results: Results, shape: Shape = shape) -> float | None:
            return results.smoke("steps", shape, "naive", "median_ms", "full")

        def faster(results: Results, shape: Shape = shape) -> float | None:
            return _ratio(
                results.smoke("steps", shape, "naive", "median_ms", "full"),
                results.smoke("steps", shape, "ours", "median_ms", "full"),
            )

        yield Prediction("a", f"H{size} naive PyTorch", naive, "ms", _first(naive_ms), plain, naive_ms(shape))
        yield Prediction("a", f"H{size} step, x naive PyTorch", ratio, "x", "naive / ours", faster)


def _others() -> Iterable[Prediction]:
    """The machine that is meant, what a faster epilogue should bring, and the bias before it was mended."""
    yield Prediction("a", "machine: cuBLAS 8192^3", CUBLAS, "TFLOP/s", "measured elsewhere", lambda r: r.load("tflops"))
    yield Prediction(
        "a", "machine: copies", COPY, "TB/s", "measured elsewhere", lambda r: r.load("copy_terabytes_per_second")
    )
    for size, gain in FASTER_EPILOGUE.items():
        shape = Shape(tokens=8192, hidden_size=size, vocab_size=VOCABULARY)
        formula = f"{STATED[size].logits_tflops:.0f} x {gain}: flat loop, four stages, no masks in most tiles"
        value = round(STATED[size].logits_tflops * gain)
        yield Prediction(
            "a", f"H{size} best of the sweep", value, "TFLOP/s", formula, lambda r, shape=shape: r.swept(shape)
        )
    for size in (896, 4096):
        formula = "H / 16 truncations, before the target's logit came from the same instructions; now at most that"
        yield Prediction(
            "a", f"H{size} bias of log-probs", BIAS[size], "nats", formula, lambda r, size=size: r.bias(size)
        )


def _tables() -> Iterable[Prediction]:
    """The loss's table of the second visit."""
    for tokens, size in ((8192, 1536), (16384, 4096), (8192, 2048), (8192, 896)):
        shape = Shape(tokens=tokens, hidden_size=size, vocab_size=VOCABULARY)

        def own(results: Results, shape: Shape = shape) -> float | None:
            return results.cell(shape, "ours", "median_ms")

        def bare(results: Results, shape: Shape = shape) -> float | None:
            return results.cell(shape, "ceiling: three GEMMs", "median_ms")

        chunks = tokens // 8192
        name = f"table T{tokens} H{size}"
        value, three = chunks * STATED[size].total, chunks * STATED[size].three
        yield Prediction("b", f"{name} step", value, "ms", _first(step_ms), own, step_ms(shape))
        yield Prediction("b", f"{name} three GEMMs", three, "ms", _first(three_ms), bare, three_ms(shape))
        if size in NAIVE:

            def faster(results: Results, shape: Shape = shape) -> float | None:
                return _ratio(results.cell(shape, "naive", "median_ms"), results.cell(shape, "ours", "median_ms"))

            yield Prediction("b", f"{name} step, x naive PyTorch", NAIVE[size][1], "x", "naive / ours", faster)


PREDICTIONS: tuple[Prediction, ...] = (*_sizes(), *_peers(), *_others(), *_tables())
"""The one table of what was predicted."""


def compared(folder: Path, visit: str, rehearsed: bool = False) -> list[dict[str, Any]]:
    """Return each prediction of a visit with what was measured, None where it was not."""
    results = Results(folder, rehearsed)
    found = []
    for made in (made for made in PREDICTIONS if made.visit == visit):
        measured = made.measured(results)
        entry = {"name": made.name, "predicted": made.value, "measured": measured, "unit": made.unit}
        found.append(entry | {"ratio": _ratio(measured, made.value), "formula": made.formula})
    return found


def text(rows: list[dict[str, Any]]) -> str:
    """Format as a table, each prediction beside its measurement, and below it the formulas."""
    lines = [("prediction", "predicted", "measured", "measured / predicted", "unit", "formula")]
    formulas = list(dict.fromkeys(row["formula"] for row in rows))
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        at = f"({formulas.index(row['formula']) + 1})"
        lines.append((row["name"], f"{row['predicted']:.3g}", measured, ratio, row["unit"], at))
    return "\n".join([report.aligned(lines), *(f"({i}) {formula}" for i, formula in enumerate(formulas, 1))])

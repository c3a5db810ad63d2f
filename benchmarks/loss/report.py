"""Text tables of the kernel benchmarks, including comparisons we lose, and the decision gates.

A cell is the result of `measure` for one shape and kind of inputs; this module measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

OURS = "ours"
MARGIN = 1.10
"""Gate G3: our loss takes at most 1 / 1.1 of any peer's time."""

SHOWN_MODES = ("full", "forward", "frozen")

Cell = dict[str, Any]
Row = dict[str, Any]


def median_ms(row: Row | None, mode: str) -> float | None:
    """Return the median of a mode, or None if it has none."""
    return None if row is None else row.get("modes", {}).get(mode, {}).get("median_ms")


def find(cell: Cell, name: str) -> Row | None:
    """Return the row of a method."""
    return next((row for row in cell["rows"] if row["name"] == name), None)


def peers(cell: Cell) -> list[Row]:
    """Return rows of other methods that do the task: no ceilings, skipped or failed ones."""
    return [row for row in cell["rows"] if row["status"] == "ok" and not row["ours"] and not row["ceiling"]]


def speedup(cell: Cell, mode: str) -> tuple[float, str] | None:
    """Return the fastest peer's time / ours, and its name; below 1 we lose. None if either time is missing."""
    own = median_ms(find(cell, OURS), mode)
    times = [(time, row["name"]) for row in peers(cell) if (time := median_ms(row, mode)) is not None]
    if own is None or not times:
        return None
    best, name = min(times)
    return best / own, name


def verdict(cell: Cell, mode: str) -> str:
    """Describe a mode in one line: our comparison with the fastest peer; a loss is called a loss."""
    found = speedup(cell, mode)
    where = f"{cell['name']} {cell['inputs']} {mode}"
    if found is None:
        return f"{where}: no comparison"
    ratio, name = found
    word = "win" if ratio > 1 else "LOSS"
    return f"{where}: {word}, {ratio:.2f} x the speed of {name}"


def format_error(value: float | None) -> str:
    """Format an error with two digits."""
    return "" if value is None else f"{value:.1e}"


def row_cells(row: Row) -> list[str]:
    """Return the cells of one row: time and rates of each mode, memory, errors."""
    texts = [text for mode in SHOWN_MODES for text in _mode_cells(row["modes"].get(mode))]
    if row["status"] == "failed" and not any(texts):
        texts[0] = f"failed: {row.get('reason', '')[:80]}"
    errors = row.get("accuracy", {})
    peak = row.get("peak_bytes")
    return [
        row["name"],
        *texts,
        "" if peak is None else f"{peak / 2**20:.0f}",
        *(format_error(errors.get(key)) for key in ERROR_KEYS),
    ]


def _mode_cells(timing: dict[str, Any] | None) -> tuple[str, str]:
    if timing is None:
        return "", ""
    if "failed" in timing:
        return f"failed: {timing['failed'][:80]}", ""
    time = f"{timing['median_ms']:.2f} ({timing['p10_ms']:.2f}-{timing['p90_ms']:.2f})"
    if "gb_per_second" in timing:
        return time, f"{timing['gb_per_second']:.0f} GB/s"
    return time, f"{timing['own_tflops']:.3g}, {timing['common_tflops']:.3g}"


ERROR_KEYS = ("sequence_max_nats", "sequence_rms_nats", "hidden_grad_relative", "weight_grad_relative")
HEADINGS = (
    "method",
    *(text for mode in SHOWN_MODES for text in (f"{mode} ms (p10-p90)", "TFLOP/s own, common")),
    "peak MiB",
    "s max nats",
    "s rms nats",
    "dH error",
    "dW error",
)


def ordered(cell: Cell) -> list[Row]:
    """Order rows: ours, then peers (fastest first), ceilings, failures; skipped methods have no row."""

    def key(row: Row) -> tuple[int, float]:
        if row["status"] != "ok":
            return 3, 0.0
        time = next((t for mode in SHOWN_MODES if (t := median_ms(row, mode)) is not None), 1e9)
        return (2 if row["ceiling"] else 0 if row["ours"] else 1), time

    return sorted((row for row in cell["rows"] if row["status"] != "skipped"), key=key)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Format rows as an aligned Markdown table; long failure reasons do not widen their column."""
    table = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in table if i == 0 or len(row[i]) <= 40) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cell_text(case: str, cell: Cell) -> str:
    """Format heading, table and verdicts of one cell."""
    gpu = cell.get("gpu")
    state = ""
    if gpu:
        state = f"; GPU at {gpu['clock_mhz']:.0f} MHz (lowest {gpu['lowest_clock_mhz']:.0f}), {gpu['power_w']:.0f} W"
    heading = (
        f"\n{case}, {cell['name']}, {cell['inputs']} inputs (mean log-prob {cell['mean_logprob']:.2f}), "
        f"{cell['dtype']}, {cell['sequences']} sequences up to {cell['longest_sequence']} tokens, "
        f"{cell['seconds']:.0f} s{state}"
    )
    table = aligned([HEADINGS, *(row_cells(row) for row in ordered(cell))])
    modes = [mode for mode in SHOWN_MODES if median_ms(find(cell, OURS), mode) is not None]
    notes = [f"{row['name']}: {row['note']}" for row in cell["rows"] if row.get("note") and row["status"] != "skipped"]
    skipped = [f"skipped {row['name']}: {row['reason']}" for row in cell["rows"] if row["status"] == "skipped"]
    return "\n".join([heading, table, *(verdict(cell, mode) for mode in modes), *notes, *skipped])


def gate(name: str, passed: bool | None, detail: str) -> dict[str, str]:
    """Return one decision: pass, lost, or not measured."""
    return {
        "gate": name,
        "status": "not measured" if passed is None else "pass" if passed else "lost",
        "detail": detail,
    }


def gates(cells: Sequence[Cell], first_gemm: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the decision gates, from the cells of the trajectory-balance case and the rates of the first GEMM.

    G1: the full step of stage 1 (or of the only stage) reaches 620 TFLOP/s on 6 THV at H 4096, T 16384.
    G2: the first GEMM with its epilogue reaches 600 TFLOP/s at every H of 2048 or more.
    G3: ours is faster than every peer by 10 % at every H of 2048 or more, with errors no larger than that peer's.
    G4: a frozen head makes the step at least 1.4 times as fast.
    """
    headline = next((cell for cell in cells if cell["name"] == "T16384-H4096-V151936" and _counts(cell)), None)
    return [_rate_gate(headline), _gemm_gate(first_gemm), _peer_gate(cells), _frozen_gate(cells)]


def _counts(cell: Cell) -> bool:
    return cell["inputs"] == "peaked" and median_ms(find(cell, OURS), "full") is not None


def _rate_gate(headline: Cell | None) -> dict[str, str]:
    name = "G1: full step >= 620 TFLOP/s on 6 THV at H4096, T16384"
    rows = [] if headline is None else [find(headline, name) for name in ("ours, stage 1", OURS)]
    rates = {row["name"]: row["modes"]["full"]["common_tflops"] for row in rows if median_ms(row, "full") is not None}
    if not rates:
        return gate(name, None, "the shape was not measured")
    detail = ", ".join(f"{method}: {rate:.0f} TFLOP/s" for method, rate in rates.items())
    return gate(name, next(iter(rates.values())) >= 620, detail)


def _gemm_gate(first_gemm: Sequence[dict[str, Any]]) -> dict[str, str]:
    name = "G2: first GEMM with its epilogue >= 600 TFLOP/s at H >= 2048"
    best: dict[int, float] = {}
    for entry in first_gemm:
        if entry["hidden_size"] >= 2048 and entry.get("tflops") is not None:
            best[entry["hidden_size"]] = max(entry["tflops"], best.get(entry["hidden_size"], 0.0))
    if not best:
        return gate(name, None, "no rate at H >= 2048")
    detail = ", ".join(f"H{size}: {rate:.0f}" for size, rate in sorted(best.items()))
    return gate(name, min(best.values()) >= 600, detail)


def _peer_gate(cells: Sequence[Cell]) -> dict[str, str]:
    name = "G3: faster than every peer by 10 % at H >= 2048, no less exact"
    lost, compared = [], 0
    for cell in (cell for cell in cells if cell["shape"]["hidden_size"] >= 2048 and _counts(cell)):
        own = find(cell, OURS)
        own_ms = median_ms(own, "full")
        assert own is not None
        assert own_ms is not None
        for row in peers(cell):
            peer_ms = median_ms(row, "full")
            if peer_ms is None:
                continue
            compared += 1
            where = f"{cell['name']} against {row['name']}"
            if peer_ms < MARGIN * own_ms:
                lost.append(f"{where}: {peer_ms / own_ms:.2f} x")
            lost += [f"{where}: {text}" for text in less_exact(own, row)]
    if not compared:
        return gate(name, None, "no peer at H >= 2048")
    return gate(name, not lost, "; ".join(lost) if lost else f"{compared} comparisons")


def less_exact(own: Row, other: Row) -> list[str]:
    """Return the errors in which our row is worse by more than 5 % (for sums, also by more than 1e-4 nats)."""
    worse = []
    for key in ERROR_KEYS:
        mine, theirs = own.get("accuracy", {}).get(key), other.get("accuracy", {}).get(key)
        if theirs is None:
            continue
        floor = 1e-4 if key.endswith("nats") else 0.0
        if mine is None or mine > max(1.05 * theirs, floor):
            worse.append(f"{key} {format_error(mine) or 'unknown'} against {format_error(theirs)}")
    return worse


def _frozen_gate(cells: Sequence[Cell]) -> dict[str, str]:
    name = "G4: a frozen head makes the step >= 1.4 x as fast"
    ratios = {}
    for cell in filter(_counts, cells):
        frozen, full = (median_ms(find(cell, OURS), mode) for mode in ("frozen", "full"))
        if frozen is not None and full is not None:
            ratios[cell["name"]] = full / frozen
    if not ratios:
        return gate(name, None, "no frozen step")
    detail = ", ".join(f"{cell}: {ratio:.2f} x" for cell, ratio in ratios.items())
    return gate(name, min(ratios.values()) >= 1.4, detail)

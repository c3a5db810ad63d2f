"""Text tables of the priority-tree benchmark, including comparisons we lose, and errors of each peer.

A cell is the result of `measure` for one (N, B); this module measures nothing.
"""

from __future__ import annotations

from typing import Any

from benchmarks.loss.report import aligned
from benchmarks.tree.peers import OUR_RESCAN, OURS

Cell = dict[str, Any]
Row = dict[str, Any]

HEADINGS = (
    "peer",
    "graph us (p10-p90)",
    "event us",
    "wall us (p10-p90)",
    "host us",
    "waits",
    "kernels",
    "of copy rate",
    "state MiB",
    "peak MiB",
)
QUALITY_HEADINGS = (
    "peer",
    "draws of weight 0",
    "max |freq / p - 1|",
    "drift of the sum",
    "sum when all are 0",
    "last write wins",
    "same bits",
)


def median_us(entry: dict[str, Any], measure: str) -> float | None:
    """Return the median of one measure in microseconds, or None if it has none."""
    median = entry.get(measure, {}).get("median_ms")
    return None if median is None else 1e3 * median


def _time(entry: dict[str, Any], measure: str, spread: bool) -> str:
    timing = entry.get(measure)
    if timing is None:
        return ""
    if "failed" in timing:
        return f"failed: {timing['failed'][:60]}"
    text = f"{1e3 * timing['median_ms']:.1f}"
    return f"{text} ({1e3 * timing['p10_ms']:.1f}-{1e3 * timing['p90_ms']:.1f})" if spread else text


def _mib(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.2f}"


def row_cells(row: Row, operation: str) -> list[str]:
    """Return the cells of one peer in the table of one operation; a failure replaces its time."""
    entry = row["operations"].get(operation, {})
    failed = row["reason"] if row["status"] == "failed" else entry.get("failed")
    if failed:
        return [row["name"], "", "", f"failed: {failed[:80]}", *[""] * (len(HEADINGS) - 4)]
    share = entry.get("copy_share")
    return [
        row["name"],
        _time(entry, "graph", True),
        _time(entry, "event", False),
        _time(entry, "wall", True),
        _time(entry, "host", False),
        *("" if entry.get(key) is None else str(entry[key]) for key in ("waits", "kernels")),
        "" if share is None else f"{100 * share:.0f} %",
        _mib(row.get("state_bytes")),
        _mib(entry.get("peak_bytes")),
    ]


def comparison(cell: Cell, operation: str, measure: str) -> tuple[float, str, str] | None:
    """Return the fastest peer's time / ours, its name, and ours; below 1 we lose. None if either time is missing.

    Ours is the kernels of the tree, or its reference where they do not run.
    """
    measured = {row["name"]: median_us(row["operations"].get(operation, {}), measure) for row in cell["rows"]}
    times = {name: time for name, time in measured.items() if time is not None}
    own = next((name for name in (OURS, OUR_RESCAN) if name in times), None)
    others = [(times[row["name"]], row["name"]) for row in cell["rows"] if not row["ours"] and row["name"] in times]
    if own is None or not others:
        return None
    best, name = min(others)
    return best / times[own], name, own


def verdict(cell: Cell, operation: str, measure: str) -> str:
    """Describe our comparison with the fastest peer in one line; a loss is called a loss."""
    found = comparison(cell, operation, measure)
    where = f"{cell['name']} {operation}, {measure}"
    if found is None:
        return f"{where}: no comparison"
    ratio, name, own = found
    return f"{where}: {'win' if ratio > 1 else 'LOSS'}, {own} {ratio:.2f} x the speed of {name}"


def _operations(cell: Cell) -> list[str]:
    return list(dict.fromkeys(name for row in cell["rows"] for name in row["operations"]))


def _compared(cell: Cell) -> list[tuple[str, str]]:
    pairs = [(operation, measure) for operation in _operations(cell) for measure in ("graph", "wall")]
    return [pair for pair in pairs if comparison(cell, *pair) is not None]


def cell_text(cell: Cell) -> str:
    """Format a table per operation, with verdicts and skipped peers."""
    lines = []
    for operation in _operations(cell):
        rows = [row for row in cell["rows"] if row["status"] != "skipped"]
        shown = [row for row in rows if "skipped" not in row["operations"].get(operation, {})]
        shown.sort(key=lambda row: (not row["ours"], median_us(row["operations"].get(operation, {}), "wall") or 1e12))
        lines.append(f"\npriority_tree, {cell['name']}, {operation}")
        lines.append(aligned([HEADINGS, *(row_cells(row, operation) for row in shown)]))
        lines += [verdict(cell, *pair) for pair in _compared(cell) if pair[0] == operation]
        lines += [
            f"skipped {row['name']}: {row['operations'][operation]['skipped']}"
            for row in rows
            if "skipped" in row["operations"].get(operation, {})
        ]
    lines += [f"skipped {row['name']}: {row['reason']}" for row in cell["rows"] if row["status"] == "skipped"]
    return "\n".join(lines)


def _relative(value: float | None) -> str:
    return "hidden" if value is None else f"{value:.1e}" if value else "0"


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one peer, for its worst mode; indices outside the tree are reported."""
    if "failed" in row:
        return [row["name"], f"failed: {row['failed'][:80]}", *[""] * (len(QUALITY_HEADINGS) - 2)]
    zero, outside = max(row["zero_draws"].values()), max(row["outside"].values())
    return [
        row["name"],
        f"{zero} of {row['draws']}" + (f", {outside} outside" if outside else ""),
        f"{max(row['frequency_error'].values()):.3f} (by chance {row['chance']:.3f})",
        _relative(row["drift"]),
        _relative(row["residue"]),
        "yes" if row["last_writer_wins"] else "NO",
        "yes" if row["distinct_results"] == 1 else f"NO, {row['distinct_results']} in {row['repeats']}",
    ]


def quality_text(quality: dict[str, Any]) -> str:
    """Format the errors of every peer at one N."""
    head = f"\npriority_tree, N{quality['capacity']}, errors (of the worst mode; of sums, relative, after many updates)"
    return f"{head}\n{aligned([QUALITY_HEADINGS, *(quality_cells(row) for row in quality['rows'])])}"


def limit_text(row: dict[str, Any]) -> str:
    """Describe torch.multinomial at its limit in one line."""
    where = f"{row['name']}, {row['capacity']} categories, {'with' if row['replacement'] else 'without'} replacement"
    if "failed" in row:
        return f"{where}: failed: {row['failed']}"
    return f"{where}: share of the upper half {row['upper_half']:.4f}, expected {row['expected']:.4f}"


def summary_text(result: dict[str, Any]) -> str:
    """Format the number of comparisons won, each one lost, and the cells not reached."""
    every = [(cell, *pair) for cell in result["cells"] for pair in _compared(cell)]
    lost = [entry for entry in every if comparison(*entry)[0] <= 1]  # type: ignore[index]
    lines = [f"\n{len(every) - len(lost)} of {len(every)} comparisons with the fastest peer won"]
    lines += [verdict(*entry) for entry in lost]
    lines += [limit_text(row) for row in result.get("limits", [])]
    if result["not_reached"]:
        lines.append(f"not reached: {', '.join(result['not_reached'])}")
    return "\n".join(lines)

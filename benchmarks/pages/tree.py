"""Section on the priority tree, as Markdown, from the result of its case."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.words import environment_line, wrapped
from benchmarks.tree import report

SHOWN = 1024
"""Elements of a call in the first table."""


def priority_tree(result: dict[str, Any]) -> str:
    """Format our time and our speed beside that of the fastest peer, lost cells in bold type, as Markdown."""
    cells = {(cell["capacity"], cell["batch"]): cell for cell in result["cells"] if not cell["partial"]}
    capacities, batches = sorted({n for n, _ in cells}), sorted({b for _, b in cells})
    operations = list(
        dict.fromkeys(name for cell in cells.values() for row in cell["rows"] for name in row["operations"])
    )
    measure = "graph" if result["device"]["type"] == "cuda" else "wall"
    lines = _table(
        f"B = {SHOWN}", capacities, operations, lambda n, operation: _timed(cells.get((n, SHOWN)), operation, measure)
    )
    others = [batch for batch in batches if batch != SHOWN]
    if others:
        whole = [name for name in operations if not name.startswith("rebuild")]  # the same for every batch
        lines += ["", f"Ratios for B = {', '.join(map(str, others))}:", ""]
        lines += _table(
            "", capacities, whole, lambda n, name: ", ".join(_ratio(cells.get((n, b)), name, measure) for b in others)
        )
    compared = [report.comparison(cell, name, measure) for cell in cells.values() for name in operations]
    ratios = [found[0] for found in compared if found is not None]
    device = result["device"]
    where = device.get("gpu") or f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    kind = "in a captured graph" if measure == "graph" else "until the result"
    note = f"""
        Microseconds {kind}, median (10th to 90th percentile) of interleaved calls, and how many times as fast as the
        fastest peer; **bold** where a peer is faster, which it is in {sum(ratio < 1 for ratio in ratios)} of
        {len(ratios)} cells. Peers: {", ".join(_peers(result))}. {where}. {environment_line(result)}."""
    return "\n".join([*lines, "", wrapped(note)])


def _table(corner: str, capacities: list[int], operations: list[str], text: Any) -> list[str]:
    head = [corner, *(f"{n:,} leaves" for n in capacities)]
    rows = [[name, *(text(n, name) for n in capacities)] for name in operations]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _ratio(cell: dict[str, Any] | None, operation: str, measure: str) -> str:
    """Return the speed beside the fastest peer's, bold if below 1; a dash where nothing was compared."""
    found = None if cell is None else report.comparison(cell, operation, measure)
    if found is None:
        return "-"
    text = f"{found[0]:.2f}" if found[0] < 10 else f"{found[0]:.0f}"
    return f"**{text}**" if found[0] < 1 else text


def _timed(cell: dict[str, Any] | None, operation: str, measure: str) -> str:
    found = None if cell is None else report.comparison(cell, operation, measure)
    if cell is None or found is None:
        return "-"
    own = next(row for row in cell["rows"] if row["name"] == found[2])["operations"][operation][measure]
    median, low, high = (1e3 * own[key] for key in ("median_ms", "p10_ms", "p90_ms"))
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f}), {_ratio(cell, operation, measure)}"


def _peers(result: dict[str, Any]) -> list[str]:
    rows = [row for cell in result["cells"] for row in cell["rows"]]
    return list(dict.fromkeys(row["name"] for row in rows if row["status"] == "ok" and not row["ours"]))

"""Section on types of models, as Markdown, from the result of its case."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.pages.words import environment_line, wrapped


def model_types(result: dict[str, Any]) -> str:
    """List exact and refused model types as Markdown."""
    rows = result["rows"]
    counts = Counter(row["outcome"] for row in rows)
    order = ("exact", "wrong", "refused", "not built")
    lines = ["; ".join(f"{counts[name]} {name}" for name in order if counts[name]) + f", of {len(rows)} types.", ""]
    lines += ["| type | outcome | layouts | sampling | largest error, nats |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (order.index(row["outcome"]), row["type"])):
        if row["outcome"] in ("exact", "wrong"):
            error = "-" if row["error"] is None else f"{row['error']:.0e}"
            cells = (row["type"], row["outcome"], row["layout"], row["sampling"], error)
        else:
            cells = (row["type"], f"{row['outcome']}: {row['why']}", "", "", "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", wrapped(f"{environment_line(result)}.")])

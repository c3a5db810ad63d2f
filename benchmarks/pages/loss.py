"""Sections on the loss and its kernels, as Markdown, from the results of their cases."""

from __future__ import annotations

from typing import Any

from benchmarks.loss import compile_kernels, peaked, report
from benchmarks.pages.words import environment_line, wrapped

KERNEL_COLUMNS = (
    "method",
    "full step",
    "no gradient",
    "frozen head",
    "peak memory",
    "error of a sequence's log-prob",
    "error of dhidden",
    "error of dweight",
)


def kernels(result: dict[str, Any]) -> str:
    """Format a comparison with peers, of the trajectory-balance loss or of log-probs, as Markdown: the first cell of
    every dtype."""
    firsts: dict[str, dict[str, Any]] = {}
    for cell in result["cells"]:
        firsts.setdefault(cell["dtype"], cell)
    parts = [_comparison(result, cell) for cell in firsts.values()]
    return "\n\n".join([*parts, wrapped(f"{environment_line(result)}.")])


def _comparison(result: dict[str, Any], cell: dict[str, Any]) -> str:
    lines = [f"| {' | '.join(KERNEL_COLUMNS)} |", "|" + "---|" * len(KERNEL_COLUMNS)]
    lines += [f"| {' | '.join(_kernel_cells(row))} |" for row in report.ordered(cell) if not row["ceiling"]]
    verdicts = [report.speedup(cell, mode) for mode in report.SHOWN_MODES]
    words = ("The full step", "Without a gradient ours", "With a frozen head ours")
    against = [
        f"{word} runs at {found[0]:.2f} x the speed of the fastest other method ({found[1]})"
        for word, found in zip(words, verdicts, strict=True)
        if found is not None
    ]
    shape, device = cell["shape"], result["device"]
    where = device.get("gpu") or f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    skipped = sorted(f"{row['name']} ({row['reason']})" for row in cell["rows"] if row["status"] == "skipped")
    left_out = f"Not measured: {'; '.join(skipped)}." if skipped else ""
    what = "Log-probs" if result["case"] == "logprobs" else "Trajectory-balance loss"
    note = f"""
        {what} of {shape["tokens"]} tokens, hidden size {shape["hidden_size"]}, vocabulary
        {shape["vocab_size"]}, {cell["dtype"]}, {where}. Times: median (10th to 90th percentile) of interleaved runs;
        memory: in addition to the inputs; errors: against {cell["oracle"]}. {". ".join(against)}. {left_out}
        {_other_commit(result, cell)}"""
    return "\n".join(["\n".join(lines), "", wrapped(note)])


def _other_commit(result: dict[str, Any], cell: dict[str, Any]) -> str:
    """Name the commit of a cell that a resumed run kept from an earlier one."""
    commit = cell.get("commit")
    return f"Measured at commit {commit}." if commit and commit != result["environment"]["commit"] else ""


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one method; a failure is shown in place of its time."""
    times = []
    for mode in report.SHOWN_MODES:
        timing = row["modes"].get(mode, {})
        if "median_ms" in timing:
            unit, scale, digits = ("s", 1e-3, 2) if timing["median_ms"] >= 1000 else ("ms", 1.0, 1)
            median, low, high = (scale * timing[key] for key in ("median_ms", "p10_ms", "p90_ms"))
            times.append(f"{median:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})")
        else:
            times.append("failed" if "failed" in timing or row["status"] == "failed" else "")
    peak, errors = row.get("peak_bytes"), row.get("accuracy", {})
    keys = ("sequence_max_nats", "hidden_grad_relative", "weight_grad_relative")
    return [
        row["name"],
        *times,
        "" if peak is None else f"{peak / 2**20:,.0f} MiB",
        *(report.format_error(errors.get(key)) for key in keys),
    ]


def peaked_policies(result: dict[str, Any]) -> str:
    """Format what leaving out columns of E' saves as Markdown."""
    lines = [f"| {' | '.join(peaked.HEADINGS)} |", "|" + "---|" * len(peaked.HEADINGS)]
    notes = []
    for cell in result["cells"]:
        lines += [f"| {' | '.join(row)} |" for row in peaked.table_rows(cell)]
        first, shape = cell["rows"][0], cell["shape"]
        rounding = first["rounding"]
        notes.append(
            f"at temperature {cell['temperature']:g} {shape['tokens']} tokens of mean log-prob "
            f"{cell['mean_logprob']:.2f}, the forward pass alone is {_share_of_forward(first):.0%} of the step without "
            f"it, and rounding E' to bfloat16 gives errors of {rounding['hidden_grad_relative']:.1e} and "
            f"{rounding['weight_grad_relative']:.1e}"
        )
    shape = result["cells"][0]["shape"]
    note = f"""
        Trajectory-balance loss, hidden size {shape["hidden_size"]}, vocabulary {shape["vocab_size"]}, float32, one
        thread; completions are sampled at the temperature of the loss: {"; ".join(notes)}. Columns and blocks: share
        of the elements of E' that the products take, on a CPU and on a GPU. Times: median (10th to 90th percentile) of
        interleaved steps; errors: against float64. {environment_line(result)}."""
    return "\n".join([*lines, "", wrapped(note)])


def _share_of_forward(row: dict[str, Any]) -> float:
    return row["forward"]["cpu"]["median_ms"] / row["cpu"]["median_ms"]


def compiled(result: dict[str, Any]) -> str:
    """Format the compiler's figures of every kernel as Markdown."""
    where = result["environment"]
    note = f"Compiled without a GPU, {where['date']}, commit {where['commit']}, triton {where['versions']['triton']}."
    lines = [*compile_kernels.table(result["rows"]), ""]
    if any("tile" in row for row in result["rows"]):
        words = "Instructions of one warp for a tile, and those of them that take the half-rate ALU pipe:"
        lines += [words, "", *compile_kernels.tile_table(result["rows"]), ""]
    return "\n".join([*lines, note])

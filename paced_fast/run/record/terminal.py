"""Terminal output: log lines, and tables before and after a run; `progress` has the live line.

It takes plain records and depends on nothing outside this folder.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from paced_fast.run.record.breakable import Breakable, setting_in_words

logger = logging.getLogger(__name__)

__all__ = [
    "announce",
    "config_table",
    "configure_logging",
    "evaluation_tables",
    "final_table",
    "memory_plan_table",
    "settings_table",
]


def configure_logging(*, rank: int = 0, console: Console | None = None) -> Console:
    """Sends the package's log lines to `console` (standard output by default) and returns it for `Progress` and tables.

    Ranks above 0 report warnings only. Calling again replaces the handler instead of doubling the lines.
    """
    console = console or Console()
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("paced_fast")
    package.handlers = [handler]
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False
    return console


def announce(what: str) -> None:
    """Log what begins, if PyTorch is still to be imported: that takes seconds, in which nothing else can be told."""
    if "torch" not in sys.modules:
        logger.info("%s: loading PyTorch and transformers", what)


def config_table(flat: Mapping[str, object], *, title: str = "configuration") -> Table:
    """The resolved configuration, dotted field name -> value."""
    return _two_columns(title, {name: setting_in_words(value) for name, value in flat.items()})


def settings_table(changed: Mapping[str, tuple[object, object]], *, preset: str) -> Table:
    """Settings that differ from their preset, dotted name -> (preset's value, run's value)."""
    title = f"settings that differ from preset {preset}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title) + 2)
    for name in ("setting", "this run", "preset"):
        table.add_column(name, style="dim" if name == "preset" else "", no_wrap=name == "setting", overflow="fold")
    for name, (default, value) in changed.items():
        table.add_row(Text(name), *(Breakable(setting_in_words(one)) for one in (value, default)))
    if not changed:
        table.add_row("none", "", "")
    return table


def memory_plan_table(plan: Mapping[str, int], *, available_bytes: int | None = None) -> Table:
    """Bytes by purpose with their sum, in GiB, and the memory of the device when it is known."""
    rows = {name: f"{size / 2**30:.3f}" for name, size in plan.items()}
    rows["sum (not all held at once)"] = f"{sum(plan.values()) / 2**30:.3f}"
    if available_bytes is not None:
        rows["available"] = f"{available_bytes / 2**30:.3f}"
    return _two_columns("memory plan (GiB)", rows, justify_right=True)


def final_table(summary: Mapping[str, object], *, run_dir: str, held_out: str = "--eval-data FILE") -> Table:
    """Results of a finished run, from the keys of `summary.json`; what was not measured has no line.

    `held_out` is how held-out prompts are given, for a run that had none.
    """

    def shown(key: str, spec: str = ".3f", found: Mapping[str, object] = summary) -> str:
        value = _number(found, key)
        return "-" if value is None else format(value, spec)

    falls = summary.get("forgetting")
    fell = [
        f"{fall.get('slice')} {shown('before', found=fall)} -> {shown('after', found=fall)}"
        for fall in (falls if isinstance(falls, list) else [])
        if isinstance(fall, Mapping)
    ]
    rows = {
        "accuracy": f"{shown('accuracy_before')} -> {shown('accuracy_after')}",
        "pass@8": f"{shown('pass_at_8_before')} -> {shown('pass_at_8_after')}",
        "slices that fell": ", ".join(fell) or "-",
        "distinct correct answers": shown("distinct_correct_after", ".2f"),
        "value brier, ece": f"{shown('value_brier')}, {shown('value_ece')}",
        "value rank correlation": shown("value_rank_correlation", ".2f"),
        "mixed groups": shown("mixed_group_share", ".0%"),
        "steps, rollouts": f"{shown('steps', ',.0f')}, {shown('rollouts', ',.0f')}",
        "training seconds": shown("train_seconds", ",.1f"),
        "run folder": run_dir,
    }
    measured = {name: text for name, text in rows.items() if name == "run folder" or set(text) - set("->, ")}
    if "accuracy" not in measured:
        why = "no completion was scored" if summary.get("curve") else f"give held-out rows by {held_out}"
        measured = {"accuracy": f"not measured: {why}", **measured}
    return _two_columns(f"{summary.get('preset', 'run')}, {summary.get('algorithm', '-')}", measured)


def evaluation_tables(record: Mapping[str, object], *, max_columns: int = 8) -> list[Table]:
    """Results of an evaluation, from its record: a line per slice, then pass@k and maj@k with their intervals.

    Of more than `max_columns` numbers of samples k the first and the last are shown.
    """
    slices, headline = record.get("slices"), record.get("headline")
    first = "overall"
    if isinstance(headline, list | tuple) and headline:
        first = f"headline ({', '.join(sorted(map(str, headline), key=_natural))})"
    parts: Mapping[str, Mapping[str, object]] = slices if isinstance(slices, Mapping) else {}
    rows = {first: record} | {name: parts[name] for name in sorted(parts, key=_natural)}
    if len(parts) == 1:
        del rows[first]
    head = Table(title="held-out accuracy, 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD, min_width=40)
    for name in ("slice", "prompts", f"mean@{record.get('samples')}", "distinct", "cut", "tokens", "unscored"):
        head.add_column(name, justify="left" if name == "slice" else "right", overflow="fold", no_wrap=name != "slice")
    for name, row in rows.items():
        distinct, share, tokens = (_number(row, key) for key in ("distinct_correct", "truncated_share", "tokens_mean"))
        head.add_row(
            Text(name),
            str(row.get("prompts")),
            _with_interval(row.get("accuracy"), row.get("accuracy_interval")),
            "-" if distinct is None else f"{distinct:.2f}",
            "-" if share is None else f"{share:.1%}",
            "-" if tokens is None else f"{tokens:,.1f}",
            str(row.get("unscored")),
        )
    return [head, *(_curve_table(rows, key, title, max_columns) for key, title in _CURVES.items())]


_CURVES = {
    "pass_at_k": "pass@k: one of k samples is correct",
    "maj_at_k": "maj@k: the most common of k answers is correct",
}


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts k9 before k10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def _curve_table(rows: Mapping[str, Mapping[str, object]], key: str, title: str, max_columns: int) -> Table:
    curves = {name: curve for name, row in rows.items() if isinstance(curve := row.get(key), Mapping) and curve}
    ks = sorted({int(k) for curve in curves.values() for k in curve})
    ks = [k for k in ks if k & (k - 1) == 0 or k == ks[-1]]
    ks = ks if len(ks) <= max_columns else [*ks[: max_columns - 1], ks[-1]]
    # A table is as wide as its title at least, which would be broken in two above few columns.
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        min_width=len(title) + 2,
    )
    table.add_column("slice, k =", overflow="fold", min_width=10, max_width=18)
    for k in ks:
        table.add_column(str(k), justify="right", no_wrap=True)
    for name, curve in curves.items():
        intervals = rows[name].get(f"{key}_interval")
        limits = intervals if isinstance(intervals, Mapping) else {}
        table.add_row(Text(name), *(_interval_below(curve.get(str(k)), limits.get(str(k))) for k in ks))
    return table


def _with_interval(value: object, interval: object) -> str:
    """`0.456 (0.401-0.512)`, or `-` where there is no value."""
    if not isinstance(value, float):
        return "-"
    limits = f" ({interval[0]:.3f}-{interval[1]:.3f})" if isinstance(interval, list | tuple) else ""
    return f"{value:.3f}{limits}"


def _interval_below(value: object, interval: object) -> str:
    """`0.456` and in a second line `.40-.51`, narrow enough for eight columns."""
    if not isinstance(value, float):
        return "-"
    limits = [f"{limit:.2f}".removeprefix("0") for limit in interval] if isinstance(interval, list | tuple) else []
    return "\n".join([f"{value:.3f}", *(["-".join(limits)] if limits else [])])


def _two_columns(title: str, rows: Mapping[str, str], *, justify_right: bool = False) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right" if justify_right else "left", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Breakable(value))
    return table


def _number(record: Mapping[str, object], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and value == value else None

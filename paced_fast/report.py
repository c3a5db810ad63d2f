"""A run folder as one page a person can read: `python -m paced_fast.report RUN_DIR`.

Writes `plots/*.png` and `report.html`, which holds the same pictures and needs nothing beside it. Reads what the run
wrote so far, so it also works while the run goes on; needs no tensor library and no device.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from paced_fast.errors import InputError
from paced_fast.plots import PLOTS, Record

__all__ = ["main", "make_report"]

MAX_TEXT = 600
"""Characters of a prompt or completion that are shown."""


def make_report(run_dir: str | Path) -> Path:
    """Draws every figure the run has data for, writes `report.html`, and returns its path.

    Raises InputError when the folder or its `metrics.jsonl` is missing, empty, or broken before its last line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"no run folder at {run_dir}")
    records = _read_metrics(run_dir / "metrics.jsonl")
    summary = _read_json(run_dir / "summary.json")
    config = _flatten(_read_json(run_dir / "config.json"))
    (run_dir / "plots").mkdir(exist_ok=True)
    figures: list[str] = []
    for plot in PLOTS:
        figure = plot.draw(records)
        path = run_dir / "plots" / f"{plot.name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # one of an earlier report would contradict this page
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        path.write_bytes(buffer.getvalue())
        wide = " wide" if figure.get_figwidth() > 8 else ""
        figures.append(_figure(plot.name, buffer.getvalue(), plot.caption, wide))
    page = _page(
        title=f"{run_dir.resolve().name}",
        state="finished" if summary else f"not finished: step {records[-1].get('step')}",
        tiles=_tiles(records, summary),
        figures=figures,
        rollouts=_rollouts_table(_read_rollouts(run_dir / "rollouts.jsonl")),
        tables=[("Summary", _table(summary)), ("Configuration", _table(config))],
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: writes the report of a run folder and names it on standard output; exit status 2 on InputError."""
    parser = argparse.ArgumentParser(prog="python -m paced_fast.report", description="Draw the report of a run.")
    parser.add_argument("run_dir", help="folder with metrics.jsonl")
    try:
        path = make_report(parser.parse_args(arguments).run_dir)
    except InputError as error:
        parser.exit(2, f"report: {error}\n")
    sys.stdout.write(f"{path}\n")


# Reading


def _read_metrics(path: Path) -> list[Record]:
    if not path.exists():
        raise InputError(f"no {path.name} in {path.parent}: it is no run folder, or the run has not started")
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a running or killed writer leaves half a line
                break
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise InputError(f"{path}:{number} is not a metrics record: it has no step")
        records.append(record)
    if not records:
        raise InputError(f"{path} holds no record yet: come back after the first step")
    return records


def _read_json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return obj if isinstance(obj, dict) else {path.stem: obj}


def _read_rollouts(path: Path, *, of_each: int = 6) -> list[dict[str, object]]:
    """The newest rollouts, as many rewarded as unrewarded ones where there are."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        tail = deque(file, maxlen=1000)
    rows: list[dict[str, object]] = []
    for line in tail:
        try:
            rows.append(json.loads(line))
        except ValueError:  # only the last line can be torn, and a sample can do without it
            continue
    right = [row for row in rows if isinstance(reward := row.get("reward"), int | float) and reward > 0.5]
    wrong = [row for row in rows if row not in right]
    return right[-of_each:] + wrong[-of_each:]


def _flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# Writing


def _tiles(records: Sequence[Record], summary: Mapping[str, object]) -> list[tuple[str, str]]:
    evals = [e for r in records if isinstance(e := r.get("eval"), Mapping)]
    last = records[-1]

    def change(key: str, name: str) -> str:
        before = summary.get(f"{name}_before", evals[0].get(key) if evals else None)
        after = summary.get(f"{name}_after", evals[-1].get(key) if evals else None)
        return f"{_shown(before)} &rarr; {_shown(after)}"

    tiles = [
        ("held-out accuracy", change("accuracy", "accuracy")),
        ("pass@8", change("pass_at_8", "pass_at_8")),
        ("value rank correlation", _shown(summary.get("value_rank_correlation", last.get("value_rank_correlation")))),
        ("mixed groups", _shown(summary.get("mixed_group_share", last.get("mixed_group_share")))),
        ("rollouts", _shown(summary.get("rollouts", last.get("rollouts")))),
        ("training seconds", _shown(summary.get("train_seconds", last.get("train_seconds")))),
    ]
    return [(label, text) for label, text in tiles if set(text.split()) - {"-", "&rarr;"}]


def _shown(value: object) -> str:
    """A value as HTML; long numbers shortened to what a reader compares."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(value if isinstance(value, str) else json.dumps(value))


def _table(rows: Mapping[str, object]) -> str:
    cells = "".join(f"<tr><th>{html.escape(key)}</th><td>{_shown(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>" if rows else '<p class="none">not written yet</p>'


def _rollouts_table(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return '<p class="none">none recorded yet</p>'
    body = "".join(
        f"<tr><td>{_shown(row.get('step'))}</td><td>{_shown(row.get('slice'))}</td>"
        f"<td><pre>{_text(row.get('prompt'))}</pre></td><td><pre>{_text(row.get('completion'))}</pre></td>"
        f"<td>{_shown(row.get('reward'))}</td><td>{_shown(row.get('value'))}</td>"
        f"<td>{'yes' if row.get('replayed') else ''}</td></tr>"
        for row in rows
    )
    names = ("step", "slice", "prompt", "completion", "reward", "value", "replayed")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<table class="rollouts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _text(text: object) -> str:
    if isinstance(text, list):  # chat messages
        text = "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in text)
    shown = str(text)
    return html.escape(shown if len(shown) <= MAX_TEXT else shown[:MAX_TEXT] + " ...")


def _figure(name: str, png: bytes, caption: str, wide: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    alt = html.escape(name.replace("_", " "))
    image = f'<img src="{source}" alt="{alt}">'
    return f'<figure class="card{wide}">{image}<figcaption>{html.escape(caption)}</figcaption></figure>'


STYLE = """
body { margin: 0; background: #f5f7fa; color: #1f2933; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 36px 0 12px; font-size: 18px; }
.state, .none, figcaption { color: #616e7c; font-size: 13px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 14px 16px; margin: 0; }
.tiles .card { flex: 1 1 140px; } .tiles b { display: block; font-size: 19px; white-space: nowrap; }
.tiles span { color: #616e7c; font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 12px; }
.wide { grid-column: 1 / -1; } img { display: block; max-width: 100%; margin: 0 auto; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 4px 10px; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #e4e7eb; } th { color: #616e7c; font-weight: 500; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.45 ui-monospace, monospace; }
.scroll { overflow-x: auto; } summary { cursor: pointer; }
"""


def _page(
    *,
    title: str,
    state: str,
    tiles: Sequence[tuple[str, str]],
    figures: Sequence[str],
    rollouts: str,
    tables: Sequence[tuple[str, str]],
) -> str:
    head = "".join(f'<div class="card"><b>{text}</b><span>{label}</span></div>' for label, text in tiles)
    details = "".join(
        f'<h2>{name}</h2><details class="card scroll"><summary>show</summary>{table}</details>'
        for name, table in tables
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><div class="state">{html.escape(state)}</div><div class="tiles">{head}</div>'
        f'<div class="figures">{"".join(figures)}</div>'
        f'<h2>Sample of rollouts</h2><div class="card scroll">{rollouts}</div>{details}</main></body></html>\n'
    )


if __name__ == "__main__":
    main()

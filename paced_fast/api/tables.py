"""Tables that results return, which print the columns that matter whole in place of the two that pandas has room for.

A table is a pandas.DataFrame where pandas is installed (`frames.Frame`), else a list of dictionaries (`Rows`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import util
from typing import Any

from paced_fast.errors import counted

_MAX_ROWS, _SHOWN_ROWS = 60, 10
"""Of more rows than the first, the second number is shown: half from the start, half from the end."""
_MAX_CELL = 28
"""Characters of a cell; a longer text is cut."""


def table(rows: Sequence[Mapping[str, Any]], main: Sequence[str]) -> Any:
    """Return the rows as a pandas.DataFrame where pandas is installed, else as a list of dictionaries.

    Args:
        rows: one mapping per row; keys may be missing.
        main: names of the columns that are shown where not all have room, the most important first.
    """
    if util.find_spec("pandas") is None:
        return Rows([dict(row) for row in rows], main)
    from paced_fast.api.frames import frame

    return frame(rows, main)


class Rows(list[dict[str, Any]]):
    """A list of dictionaries that prints as a table."""

    def __init__(self, rows: Sequence[dict[str, Any]], main: Sequence[str]) -> None:
        """Hold the rows; `main` as in `table`."""
        super().__init__(rows)
        self._main = tuple(main)

    def __repr__(self) -> str:
        """The columns that have room, and where the others are."""
        names = list({name: None for row in self for name in row})
        rows = [[str(i), *(row.get(name) for name in names)] for i, row in shown_rows(self)]
        return as_text(names, rows, self._main, total=len(self), others="the keys of its rows")


def shown_rows(rows: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The rows that are printed with their numbers: all, or the first and the last few of many."""
    half = _SHOWN_ROWS // 2
    for i, row in enumerate(rows):
        if len(rows) <= _MAX_ROWS or i < half or i >= len(rows) - half:
            yield i, row


def chosen(names: Sequence[str], main: Sequence[str]) -> list[str]:
    """The columns of `main` that a table with the columns `names` has, in the order of `main`."""
    return [name for name in main if name in names]


def as_text(
    names: Sequence[str], rows: Sequence[Sequence[Any]], main: Sequence[str], *, total: int, others: str
) -> str:
    """A table as lines no wider than the terminal (80 characters in a file or a pipe).

    Args:
        names: columns of the table.
        rows: the shown rows, each its label and one value per column.
        main: as in `table`; a table whose columns have room is shown whole.
        total: number of rows of the table.
        others: expression that names all columns.
    """
    width = shutil.get_terminal_size().columns
    columns = {name: [name, *(_cell(row[i]) for row in rows)] for i, name in enumerate(names, start=1)}
    labels = ["", *(str(row[0]) for row in rows)]
    parts = [labels, *columns.values()]
    if _width(parts) > width:
        parts = [labels]
        for name in chosen(names, main) or names:
            if _width([*parts, columns[name]]) > width and len(parts) > 1:
                break
            parts.append(columns[name])
    padded = [[cell.rjust(max(map(len, part))) for cell in part] for part in parts]
    lines = ["  ".join(line) for line in zip(*padded, strict=True)]
    if total > len(rows):
        lines.insert(1 + (len(rows) + 1) // 2, "...")
    left = len(names) - len(parts) + 1
    if left:
        lines.append(f"{counted(total, 'row')}; {counted(left, 'more column')}: {others}")
    elif total > len(rows):
        lines.append(counted(total, "row"))
    return "\n".join(lines)


def _width(parts: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, part)) + 2 for part in parts) - 2


def _cell(value: Any) -> str:
    """A value in one line: four digits of a fraction, "-" where there is none, the beginning of a long text."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(_cell, value))}]"
    elif isinstance(value, float):
        text = f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
        if "e+" in text and abs(value) < 1e15:
            text = f"{value:.1f}"
    else:
        text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 3]}..."

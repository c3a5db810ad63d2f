"""Files that are read as a whole, because no line of them stands alone: a JSON list, comma-separated values."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paced_fast.data.sources.faults import BadRow
from paced_fast.errors import InputError

_LARGEST_FIELD = 1 << 26


def is_list(path: Path) -> bool:
    """Whether a file is JSON that begins with a list, as one with the ending .json may be."""
    if path.name.removesuffix(".gz").endswith(".json"):
        return _text(path).lstrip()[:1] == "["
    return False


class _Rows:
    """Rows in memory, each with what names it."""

    def __init__(self, rows: list[tuple[str, Any]]) -> None:
        self._rows = rows

    def count(self, stop: int | None) -> int:
        """The number of rows."""
        return min(len(self._rows), len(self._rows) if stop is None else stop)

    def stream(self, wanted: Sequence[int], field: str | None = None) -> Iterator[tuple[str, Any]]:
        """The rows of those numbers."""
        return (self._rows[row] for row in wanted)


class JsonList(_Rows):
    """One list of JSON objects."""

    def __init__(self, path: Path) -> None:
        try:
            found = json.loads(_text(path))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is not JSON ({error}): give one list of objects, or one object per line"
            ) from error
        super().__init__([(f"{path} row {i}", row) for i, row in enumerate(found)])

    def decode(self, where: str, raw: Any) -> dict[str, Any]:
        """The row itself."""
        if not isinstance(raw, dict):
            raise BadRow(f"{where} is a JSON {type(raw).__name__}: give a list of objects")
        return raw


class CsvRows(_Rows):
    """Comma-separated values, tab-separated where the name ends in .tsv; the first line names the columns."""

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(_LARGEST_FIELD)
        delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            self._names = next(reader, [])
            rows = [(f"{path}:{reader.line_num}", row) for row in reader if row]
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num} is not comma-separated ({error}): fix the file") from error
        twice = [name for i, name in enumerate(self._names) if name in self._names[:i]]
        if twice or not all(name.strip() for name in self._names):
            what = f"the column {twice[0]!r} twice" if twice else "a column without a name"
            raise InputError(f"{path} has {what} in its first line: give every column a name of its own")
        super().__init__(rows)

    def decode(self, where: str, raw: Any) -> dict[str, Any]:
        """The row by the names of the columns; every value is a text."""
        if len(raw) != len(self._names):
            raise BadRow(f"{where} has {len(raw)} values for {len(self._names)} columns: fix the row")
        return dict(zip(self._names, raw, strict=True))


def _text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}): give a complete file") from error

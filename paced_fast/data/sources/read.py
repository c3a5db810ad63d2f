"""Rows of files and data sets as streams; rows that are not selected are neither decoded nor kept."""

from __future__ import annotations

import bisect
import contextlib
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, cast

from paced_fast.data import hub
from paced_fast.data.sources.faults import BadRow
from paced_fast.data.sources.spec import Source, parse_source
from paced_fast.data.sources.whole_files import CsvRows, JsonList, is_list
from paced_fast.data.tasks import reasoning_gym_rows, signed_sums_demonstrations, signed_sums_rows
from paced_fast.errors import InputError, nearest, pip_install

Row = dict[str, Any]

FOLDERS_VARIABLE = "PACED_FAST_DATA"
"""Variable of the environment with further folders of data, put together like those of PATH."""
_MAX_ROW_BYTES = 1 << 26
_PARQUET_BATCH = 256
_BOM = b"\xef\xbb\xbf"


class Reader(Protocol):
    """The rows of one source, numbered from 0. Each call of `stream` begins at the first again."""

    def count(self, stop: int | None) -> int:
        """Number of rows, up to `stop`, without reading further."""
        ...

    def stream(self, wanted: Sequence[int], field: str | None = None) -> Iterator[tuple[str, Any]]:
        """The rows of those numbers (ascending): what names each, and what `decode` makes a row of.

        With `field`, other fields may be missing from the rows.
        """
        ...

    def decode(self, where: str, raw: Any) -> Row:
        """The row. Raises BadRow when there is none in `raw`."""
        ...


def open_source(source: Source, data_dir: str | None) -> Reader:
    """The reader of a source. Raises InputError when there is no such file, task or data set."""
    if source.kind in ("task", "rg"):
        return MadeRows(source)
    if source.kind == "hf":
        return HubRows(source, data_dir)
    path = _find(source, data_dir)
    if source.kind == "jsonl":
        return JsonList(path) if is_list(path) else JsonLines(path)
    return CsvRows(path) if source.kind == "csv" else ParquetRows(path)


class JsonLines:
    """One JSON object per line, blank lines aside; a name that ends in .gz is decompressed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self, stop: int | None) -> int:
        """Lines with a row, up to `stop`."""
        total = 0
        for _ in self._lines():
            total += 1
            if total == stop:
                break
        return total

    def stream(self, wanted: Sequence[int], field: str | None = None) -> Iterator[tuple[str, Any]]:
        """Lines as bytes; None stands for one that is too long."""
        targets = iter(wanted)
        target = next(targets, None)
        if target is None:
            return
        for row, (number, line) in enumerate(self._lines()):
            if row == target:
                yield f"{self.path}:{number}", line
                target = next(targets, None)
                if target is None:
                    return

    def decode(self, where: str, raw: Any) -> Row:
        """The object of a line, read strictly: UTF-8, no NaN, no field twice."""
        if raw is None:
            raise BadRow(f"{where} has more than {_MAX_ROW_BYTES >> 20} MiB: drop the row")
        first_line = where.endswith(":1")
        if raw.startswith(_BOM) and not first_line:
            raise BadRow(f"{where} begins with a byte order mark, but is not the first line: remove the mark")
        try:
            text = raw.removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            raise BadRow(f"{where} is not UTF-8 (byte {error.start} of the line): save the file as UTF-8") from error
        try:
            row = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_field_twice)
        except RecursionError as error:
            raise BadRow(f"{where} is nested too deeply: drop the row") from error
        except json.JSONDecodeError as error:  # whose own line number counts within this one line
            what = f"{error.msg}, at character {error.pos + 1} of the line"
            raise BadRow(f"{where} is not JSON ({what}): {_remedy(text, is_first=first_line)}") from error
        except ValueError as error:
            raise BadRow(f"{where} is not JSON ({error}): write one JSON object per line") from error
        if not isinstance(row, dict):
            raise BadRow(f"{where} is a JSON {type(row).__name__}: {_remedy(text, is_first=first_line)}")
        return row

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Lines that are not blank with their number from 1."""
        number = 0
        try:
            with self._open() as file:
                while line := file.readline(_MAX_ROW_BYTES + 1):
                    number += 1
                    if len(line) > _MAX_ROW_BYTES:
                        _skip_line(file, line)
                        yield number, None
                    elif line.strip():
                        yield number, line
        except (OSError, EOFError, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.path} cannot be read after line {number} ({reason}): give a complete file"
            ) from error

    def _open(self) -> IO[bytes]:
        return cast(IO[bytes], gzip.open(self.path)) if self.path.suffix == ".gz" else self.path.open("rb")


def _remedy(line: str, *, is_first: bool) -> str:
    """What to do about a line that is no object; a file that begins with a list may be one."""
    is_list = is_first and line.lstrip().startswith("[")
    return f"write one JSON object per line{', or name the file .json if it is one list' if is_list else ''}"


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(_MAX_ROW_BYTES)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a floating-point number")
    return number


def _no_field_twice(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return row


class ParquetRows:
    """Rows of a parquet file; of its row groups only those with a wanted row are read."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise InputError(f"reading {path} needs pyarrow: {pip_install('data')}") from error
        self.path = path
        self._failures = (pyarrow.ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._failures as error:
            raise InputError(f"{path} is not a parquet file: {' '.join(str(error).split())}") from error

    def count(self, stop: int | None) -> int:
        """The number of rows, from the file's footer."""
        total = self._file.metadata.num_rows
        return total if stop is None else min(total, stop)

    def stream(self, wanted: Sequence[int], field: str | None = None) -> Iterator[tuple[str, Any]]:
        """Slices of one row."""
        names = self._file.schema_arrow.names
        columns = [name for name in names if name == field or name == (field or "").split(".")[0]] or None
        first = 0
        for group in range(self._file.metadata.num_row_groups):
            end = first + self._file.metadata.row_group(group).num_rows
            if bisect.bisect_left(wanted, first) < bisect.bisect_left(wanted, end):
                yield from self._group(group, first, wanted, columns)
            first = end

    def _group(
        self, group: int, first: int, wanted: Sequence[int], columns: list[str] | None
    ) -> Iterator[tuple[str, Any]]:
        try:
            for batch in self._file.iter_batches(batch_size=_PARQUET_BATCH, row_groups=[group], columns=columns):
                end = first + batch.num_rows
                for row in wanted[bisect.bisect_left(wanted, first) : bisect.bisect_left(wanted, end)]:
                    yield f"{self.path} row {row}", batch.slice(row - first, 1)
                first = end
        except self._failures as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.path} cannot be read from row {first} on ({reason}): give a complete file"
            ) from error

    def decode(self, where: str, raw: Any) -> Row:
        """The row of a slice of one row."""
        if raw.nbytes > _MAX_ROW_BYTES:
            raise BadRow(f"{where} has more than {_MAX_ROW_BYTES >> 20} MiB: drop the row")
        try:
            (row,) = raw.to_pylist()
        except (UnicodeDecodeError, ValueError, *self._failures) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
            raise BadRow(f"{where} cannot be read ({reason}): fix the row") from error
        return row


_OF_SAVE_TO_DISK = ("state.json", "dataset_dict.json")


class HubRows:
    """Rows of a data set of the hub, or of a folder that datasets wrote; they lie on disk until they are asked for."""

    def __init__(self, source: Source, data_dir: str | None = None) -> None:
        self.name, split = source.title, source.split or "train"
        folder = next((place for place in _places(source.name, data_dir) if place.is_dir()), None)
        if folder is None and (source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
            raise InputError(
                f"source {source.title}: no such folder (looked for {looked_at(source, data_dir)}): correct the path, "
                "or give a file as jsonl:FILE, csv:FILE or parquet:FILE"
            )
        try:
            import datasets
        except ImportError as error:
            raise InputError(f"{source.title} needs datasets: {pip_install('data')}") from error
        is_saved = folder is not None and any((folder / name).is_file() for name in _OF_SAVE_TO_DISK)
        if folder is None:
            _ask_hub(source)
        try:
            if is_saved:
                self._rows: Any = _saved_rows(datasets.load_from_disk(str(folder)), source)
            else:
                place = source.name if folder is None else str(folder)
                self._rows = datasets.load_dataset(place, source.config, split=split)
        except InputError:
            raise
        except Exception as error:  # the hub client fails in many ways
            reason = " ".join(str(error).split())[:200]
            kind = type(error).__name__
            raise InputError(
                f"cannot load {source.title}, split {split!r}: {kind}: {reason}: check name, config and split, or "
                "give a downloaded file as jsonl:FILE or parquet:FILE"
            ) from error

    def count(self, stop: int | None) -> int:
        """The number of rows."""
        return min(len(self._rows), len(self._rows) if stop is None else stop)

    def stream(self, wanted: Sequence[int], field: str | None = None) -> Iterator[tuple[str, Any]]:
        """Row numbers: the data set looks a row up by its own."""
        return ((f"{self.name} row {row}", row) for row in wanted)

    def decode(self, where: str, raw: Any) -> Row:
        """The row of that number."""
        return dict(self._rows[raw])


def _saved_rows(found: Any, source: Source) -> Any:
    """The rows of what `save_to_disk` of datasets wrote: a table, or a table for each split."""
    if source.config is not None:
        raise InputError(f"{source.title} was written by save_to_disk and has no configurations: leave config= out")
    if not isinstance(found, dict):
        if source.split is not None:
            raise InputError(f"{source.title} was written by save_to_disk without splits: leave split= out")
        return found
    split = source.split or "train"
    if split not in found:
        raise InputError(f"{source.title} has no split {split!r}: the splits are {', '.join(found)}")
    return found[split]


def _ask_hub(source: Source) -> None:
    """Raises InputError when the hub is out of reach and nothing of the data set is cached."""
    from datasets import config

    if not Path(config.HF_DATASETS_CACHE, source.name.replace("/", "___")).exists():
        hub.place_of(source.name, source.title, "dataset")


class MadeRows:
    """Rows of a procedural task, all made at once."""

    def __init__(self, source: Source) -> None:
        self.name = source.title
        self._rows = _made_rows(source)
        self._where = source.spec

    def count(self, stop: int | None) -> int:
        """The number of rows."""
        return min(len(self._rows), len(self._rows) if stop is None else stop)

    def stream(self, wanted: Sequence[int], field: str | None = None) -> Iterator[tuple[str, Any]]:
        """The rows."""
        return ((f"{self._where} row {row}", self._rows[row]) for row in wanted)

    def decode(self, where: str, raw: Any) -> Row:
        """The row itself."""
        return raw


def _made_rows(source: Source) -> list[Row]:
    if source.kind == "rg":
        return reasoning_gym_rows(source.name, source.size or 500, source.seed or 0, **source.params)
    if source.name != "signed_sums":
        raise InputError(
            f"unknown task {source.name!r}{nearest(source.name, ['signed_sums'])}: the only task is signed_sums"
        )
    split, seed = source.split or "train", 42 if source.seed is None else source.seed
    if split == "demonstrations":
        return signed_sums_demonstrations(size=source.size or 4000, seed=seed, flip_probability=source.flip_probability)
    if split not in ("train", "eval"):
        raise InputError(f"task signed_sums has no split {split!r}: use train, eval or demonstrations")
    return signed_sums_rows(split, size=source.size, seed=seed)


def drop_missing(sources: Sequence[str], data_dir: str | None) -> tuple[tuple[str, ...], tuple[Source, ...]]:
    """The sources without the optional ones whose file is absent, and those."""
    parsed = [(spec, parse_source(spec)) for spec in sources]
    missing = [item for item in parsed if item[1].optional and find_file(item[1], data_dir) is None]
    return tuple(spec for spec, _ in parsed if spec not in dict(missing)), tuple(source for _, source in missing)


def find_file(source: Source, data_dir: str | None) -> Path | None:
    """The file that a jsonl or parquet source names, None when it is absent."""
    return next((place for place in _places(source.name, data_dir) if _is_file(place)), None)


def looked_at(source: Source, data_dir: str | None) -> str:
    """The places in which `find_file` looks, in words."""
    return " and ".join(str(place.absolute()) for place in _places(source.name, data_dir))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # for example a name that is too long for the file system
        return False


def _places(name: str, data_dir: str | None) -> list[Path]:
    """Places where a file is looked up, in this order."""
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # ~nobody: there is no such home
        path = path.expanduser()
    if path.is_absolute():
        return [path]
    if data_dir is not None:
        return [Path(data_dir).expanduser() / path, path]
    more = [folder for folder in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if folder]
    return [path, *(Path(folder, path) for folder in ("data", *more))]


def require_file(source: Source, data_dir: str | None) -> None:
    """Raises InputError when the file is absent that a source names and needs."""
    if source.kind in ("jsonl", "csv", "parquet") and not source.optional:
        _find(source, data_dir)


def _find(source: Source, data_dir: str | None) -> Path:
    found = find_file(source, data_dir)
    if found is not None:
        return found
    raise InputError(
        f"source {source.title}: no such file (looked for {looked_at(source, data_dir)}): correct the "
        "path, or give the folder that holds it (--data.dir in training, --data-dir in evaluation)"
    )

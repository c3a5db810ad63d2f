"""Atomic writing of JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


def write_json_atomic(path: str | Path, obj: object) -> None:
    """Replace the file at `path` with `obj` as indented JSON; a reader sees the old file or the new one, never a part.

    Non-finite floats become null. Raises TypeError on what JSON cannot hold.
    """
    replace(Path(path), json.dumps(plain(obj), indent=2, allow_nan=False) + "\n")


def replace(path: Path, text: str) -> None:
    """Replace the file at `path` with `text`; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(obj: object) -> object:
    """Convert to JSON's types; arrays and tensors become lists, non-finite floats null."""
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    to_list = getattr(obj, "tolist", None)
    if to_list is None:
        raise TypeError(f"{type(obj).__name__} cannot be written as JSON")
    return plain(to_list())

"""The folder of a checkpoint comes into being under its name at once, when everything is on disk; old ones go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paced_fast.errors import InputError
from paced_fast.run.checkpoint.folder import FORMAT, folders, format_of, manifest_text, names_in, step_folder, verify


def fresh(root: Path, step: int) -> Path:
    """Make a folder to write the checkpoint of `step` into; leftovers of failed saves are removed, or ignored."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in (*root.glob(".step_*.partial"), *root.glob(".step_*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)
    names = (root / f".step_{step:06d}.{number}.partial" for number in range(10**6))
    folder = next(path for path in names if not path.exists())
    folder.mkdir()
    for part in ("policy", "tensors", "random"):
        (folder / part).mkdir()
    return folder


def commit(partial: Path, step: int, files: Mapping[str, Any]) -> Path:
    """Write the manifest and, once everything is on disk, rename the folder; the other files are there already.

    Raises InputError when rank 0 does not see files that another rank wrote.
    """
    root = partial.parent
    present = set(names_in(partial))
    if unseen := files.keys() - present:
        raise InputError(
            f"{min(unseen)}, written by another rank, is not in {partial}: "
            "give a --run-dir on a file system that all machines share"
        )
    assert present == files.keys(), f"{min(present - files.keys())} was written by no rank"
    manifest = partial / "manifest.json"
    manifest.write_text(manifest_text({"format": FORMAT, "step": step, "files": dict(files)}))
    inside = (path for path in partial.rglob("*") if path.is_dir())
    for path in (manifest, *inside, partial):
        flush(path)
    folder = step_folder(root, step)
    if folder.exists():  # a damaged one: a valid one would have been resumed from
        folder.rename(_aside(folder))
    partial.rename(folder)
    flush(root)
    return folder


def retain(root: Path, folder: Path, keep: int, trusted: Iterable[Path]) -> None:
    """Remove all but `folder` and the `keep` newest valid ones, `folder` among them.

    `trusted` are known to be valid, the others are looked at: a damaged one must not push out one that is whole.
    """
    known = set(trusted)
    valid = [path for path in folders(root) if path in known or verify(path) is None]
    kept = {folder, *valid[-keep:]}
    for path in folders(root):
        if path not in kept and format_of(path) is None:
            _remove(path)
    for leftover in root.glob(".step_*.removed"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Take the name away first, so that a removal that dies leaves no half checkpoint under it."""
    aside = _aside(folder)
    folder.rename(aside)
    shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def flush(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

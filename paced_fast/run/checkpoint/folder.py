"""The folder of a checkpoint: its manifest, and validation against it.

    checkpoints/step_000100/
        policy/             a plain Hugging Face folder
        tensors/            what is spread over ranks, in files of every rank
        random/             the ambient generators of every rank
        state.safetensors   what all ranks hold alike: log Z, scheduler, replay
        state.json          counters, and what the run was made of
        manifest.json       size and sha256 of every other file, written last

A name that begins with a dot is something unfinished: `.step_000100.0.partial` is being written or was left by a save
that died, `.step_000050.removed` is being deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paced_fast.data.distributed import ALONE, World
from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever an older version could not read what this one writes, or would read it wrongly."""

_NAME = re.compile(r"step_(\d{6,})")
_ALWAYS = frozenset({"state.safetensors", "state.json"})


def step_folder(root: Path, step: int) -> Path:
    """Path of the checkpoint of `step`."""
    return root / f"step_{step:06d}"


def folders(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; some may be damaged."""
    found = ((_NAME.fullmatch(path.name), path) for path in root.glob("step_*") if path.is_dir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def newest(root: Path, world: World = ALONE) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged, the same on every rank.

    The log names the damaged ones passed over. Every rank calls this; they share the reading. Raises InputError, on
    every rank, when any is of another format: it is whole, and to go on from an older one would cost it.
    """
    names = world.gather_text("\n".join(path.name for path in folders(root)) if world.is_rank0 else "")[0]
    world.agree(_of_another_version(folders(root)) if world.is_rank0 else None)
    for name in reversed(names.split("\n") if names else []):
        problem = verify(root / name, world)
        if problem is None:
            return root / name
        if world.is_rank0:
            logger.warning("checkpoint %s is damaged (%s): trying the previous one", root / name, problem)
    return None


def _of_another_version(candidates: Iterable[Path]) -> InputError | None:
    for folder in candidates:
        if (found := format_of(folder)) is not None:
            return InputError(
                f"checkpoint {folder} has format {found}, but this version reads format {FORMAT}: "
                "use the version of paced_fast that wrote it, or another --run-dir"
            )
    return None


def format_of(folder: Path) -> int | None:
    """The format of a checkpoint that another version wrote; None for this one's, and for a damaged one."""
    try:
        return _other_format(json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError, RecursionError):
        return None


def verify(folder: Path, world: World = ALONE) -> str | None:
    """Problem with the checkpoint, or None. Every rank calls this and reads a part; the result is the same on all."""
    problem, files = _read_manifest(folder)
    if problem is None:
        largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        found = (_difference(folder, name, files[name]) for name in largest_first[world.rank :: world.size])
        problem = next((text for text in found if text is not None), None)
    world.wait()  # reading takes its time
    problems = world.gather_text(problem or "")
    return next((text for text in problems if text), None)


def policy_folder(run_dir: Path, step: int | None) -> Path:
    """The policy in a run folder: of the checkpoint of `step`, 0 being before training, or of the newest one.

    Raises InputError for a step that is not there, damaged, or of another format.
    """
    if step == 0:
        if not (run_dir / "initial").is_dir():
            raise InputError(f"{run_dir} has no policy from before training: {run_dir / 'initial'} does not exist")
        return run_dir / "initial"
    root = run_dir / "checkpoints"
    folder = newest(root) if step is None else step_folder(root, step)
    if folder is None or not folder.is_dir():
        wanted = "checkpoint yet" if step is None else f"checkpoint of step {step}"
        held = ", ".join(str(int(path.name[5:])) for path in folders(root))
        raise InputError(f"{run_dir} has no {wanted}: {root} has {f'those of step {held}' if held else 'none'}")
    if step is not None and (error := _of_another_version([folder])) is not None:
        raise error
    if step is not None and (problem := verify(folder)) is not None:
        raise InputError(f"checkpoint {folder} is damaged: {problem}")
    return folder / "policy"


def _read_manifest(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Problem with the manifest or the set of files, and the manifest's entry for each file."""
    try:
        if (folder / "manifest.json").is_symlink():
            return "manifest.json is not a regular file", {}
        text = (folder / "manifest.json").read_text()
        manifest = json.loads(text)
        present = {name for name in names_in(folder) if name != "manifest.json"}
        found = _other_format(manifest)
        is_ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT and text == manifest_text(manifest)
    except (OSError, ValueError, RecursionError) as error:
        return f"manifest.json cannot be read: {error}", {}
    if found is not None:
        return f"it has format {found}, but this version reads format {FORMAT}", {}
    step, files = (manifest.get("step"), manifest.get("files")) if is_ours else (None, None)
    if type(step) is not int or not isinstance(files, dict) or not all(map(_is_description, files.values())):
        return "manifest.json has changed", {}
    if folder.name != step_folder(folder, step).name:
        return f"it is the checkpoint of step {step} under another name", {}
    if missing := (_ALWAYS | files.keys()) - present:
        return f"{min(missing)} is missing", {}
    if extra := present - files.keys():
        return f"{min(extra)} is not in its manifest.json", {}
    return None, files


def _is_description(entry: Any) -> bool:
    """Whether it has the form of what `describe` returns."""
    is_mapping = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
    return is_mapping and type(entry["bytes"]) is int and isinstance(entry["sha256"], str)


def _other_format(manifest: Any) -> int | None:
    """The format of a manifest that another version wrote; None for this one's, and for a damaged one.

    Format 1 had the hash of each file by its name. Every later one has its number, and the hash of itself.
    """
    if not isinstance(manifest, dict):
        return None
    number = manifest.get("format")
    if number is None and manifest and all(isinstance(entry, str) for entry in manifest.values()):
        return 1
    own = hashlib.sha256(_body(manifest)).hexdigest()
    return number if type(number) is int and number != FORMAT and manifest.get("sha256") == own else None


def names_in(folder: Path) -> list[str]:
    """Everything below `folder` except folders; links included."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in paths]


def _difference(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            return f"{name} is not a regular file"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        return None if describe(path) == expected else f"{name} has changed"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def describe(path: Path) -> dict[str, Any]:
    """Manifest entry of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Manifest with a hash of itself, so that any change of it is detected."""
    own = hashlib.sha256(_body(manifest)).hexdigest()
    return json.dumps({**manifest, "sha256": own}, sort_keys=True, indent=1)


def _body(manifest: Mapping[str, Any]) -> bytes:
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return json.dumps(body, sort_keys=True).encode()

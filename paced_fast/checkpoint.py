"""Checkpoints: a fresh folder, hashed and renamed into place, so that a reader finds all of one or none of it.

    checkpoints/step_000100/
        policy/          a plain Hugging Face folder
        state.safetensors   optimiser, log Z head, scheduler, replay, random number states
        state.json          counters and the settings the run was made with
        manifest.json       sha256 of every other file, written last

Nothing is pickled: reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paced_fast.errors import InputError

logger = logging.getLogger(__name__)


def save(root: Path, step: int, *, save_policy: Any, tensors: Mapping[str, Tensor], state: Any, keep: int) -> Path:
    """Write `root/step_NNNNNN` and remove all but the `keep` newest; returns the folder.

    `save_policy(folder)` writes the policy. The files are flushed to the disk before the folder gets its name.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"step_{step:06d}"
    temporary = root / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed save left behind
    temporary.mkdir()
    save_policy(temporary / "policy")
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): _sha256(path) for path in files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    if folder.exists():
        shutil.rmtree(folder)  # a damaged one: a valid one would have been resumed from
    temporary.rename(folder)
    _fsync(root)
    folders = _folders(root)
    place = folders.index(folder)
    # Later ones are damaged, or the run would have continued from them; they must not push out what is whole.
    for other in (*folders[place + 1 :], *folders[: place + 1][:-keep]):
        shutil.rmtree(other)
    return folder


def newest(root: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; the log names the damaged ones passed over."""
    for folder in reversed(_folders(root)):
        problem = verify(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s): trying the one before", folder, problem)
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with the checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read: {error}"
    if not isinstance(manifest, dict) or not {"state.safetensors", "state.json"} <= manifest.keys():
        return "manifest.json does not list the files of a checkpoint"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} has changed"
    return None


def load(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and state of a checkpoint. Raises InputError when it is damaged."""
    problem = verify(folder)
    if problem is not None:
        raise InputError(f"checkpoint {folder} is damaged: {problem}")
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an AdamW as a flat dict `INDEX.NAME`, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned; settings such as the learning rate stay the optimiser's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with `prefix.` before every name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def random_state() -> dict[str, Any]:
    """The ambient generators of python, numpy and torch; only foreign code (a reward function, say) draws from them."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def seed_random_state(seed: int) -> None:
    """Start the ambient generators of a new run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Continue from `random_state()`."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _folders(root: Path) -> list[Path]:
    """Oldest first; a name of more digits is a later step."""
    folders = (path for path in root.glob("step_*") if path.is_dir())
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

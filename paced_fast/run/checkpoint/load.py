"""Load what `Saver` wrote, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paced_fast.data.distributed import ALONE, World
from paced_fast.errors import InputError
from paced_fast.run.checkpoint.tensors import read_tensors


def load(
    folder: Path, spread: Mapping[str, Tensor], world: World = ALONE
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """Fill the tensors `spread` in place; return the other tensors, the state, and this rank's ambient generators.

    The last is None where the checkpoint was written by fewer ranks. Hashes are not checked here; `newest` has checked
    them. Raises InputError, on every rank, for a folder that is not a readable checkpoint.
    """
    error: InputError | None = None
    found: tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None] = {}, {}, None
    try:
        read_tensors(folder / "tensors", spread)
        generators = folder / "random" / f"rank_{world.rank:05d}.json"
        random = json.loads(generators.read_text()) if generators.exists() else None
        found = load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text()), random
    except InputError as problem:
        error = problem
    except (OSError, ValueError, SafetensorError) as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        error = InputError(f"checkpoint {folder} cannot be read ({reason}): remove it to resume from the previous one")
    world.wait()  # reading takes its time
    world.agree(error, InputError)
    return found

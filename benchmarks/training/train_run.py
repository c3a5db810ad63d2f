"""One run of a preset as a user would start it, timed from start to end; the source of the README's numbers."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quick import quick
from paced_fast import train
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.policy.warm_start import cache_folder


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time one run of a preset."""

    seed: int = 0
    """Seed of the run."""
    fresh: bool = True
    """Recompute the warm start instead of using a cached one."""
    quick: bool = False
    """Toy sizes, to check that everything works."""


def measure(name: str, arguments: Arguments, path: Path) -> dict[str, Any]:
    """Train preset `name`; return its summary, wall-clock seconds, and whether the warm start came from the cache."""
    config = dataclasses.replace(quick(preset(name)) if arguments.quick else preset(name), seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        cached = cache_folder(resolve(config))
        if arguments.fresh and cached.is_dir():
            shutil.rmtree(cached)  # recomputed; unpacked pretrained weights are kept
        was_cached = cached.is_dir()
        started = time.perf_counter()
        summary = train.run(dataclasses.replace(config, run_dir=f"{folder}/run"), Console())
        wall = time.perf_counter() - started
    del summary["run_dir"]
    return {"summary": summary, "wall_seconds": wall, "warm_start_cached": was_cached}

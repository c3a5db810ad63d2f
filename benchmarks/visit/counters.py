"""Hardware counters of the large products, from Nsight Compute where it is installed.

    python -m benchmarks.run visit_counters

Counts one call of each product of a step: the projection with exponentials and masked rows, the projection with sums
only, and the two library products. The program that is counted is this module's `main`; its whole report is in the
result.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.loss import our_engines, report
from benchmarks.loss.problems import Shape, make_batch, make_weight, toy_of

SHAPES = ("T8192-H1536-V151936", "T8192-H4096-V151936")
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
)
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/NVIDIA-Nsight-Compute")
SHOWN = ("Duration", "SM Frequency", "Compute (SM) Throughput", "L2 Cache Throughput", "DRAM Throughput")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Count what the products do, with Nsight Compute."""

    device: str = "cuda"
    """cuda, or cpu (toy shapes)."""
    shapes: tuple[str, ...] = SHAPES
    """Shapes to count at, one chunk each."""
    seconds: float = 0.0
    """Seconds after which no further shape is begun, and after which one is ended; 0 means no limit."""
    progress: str = ""
    """File that names the current measurement."""


def tool() -> str | None:
    """Path of Nsight Compute's command, from PATH or where its packages put it."""
    found = shutil.which("ncu")
    if found is not None:
        return found
    places = [place for root in PLACES if Path(root).is_dir() for place in (Path(root), *sorted(Path(root).iterdir()))]
    return next((str(place / "ncu") for place in reversed(places) if os.access(place / "ncu", os.X_OK)), None)


def count(ncu: str, shape: str, device: str, limit_s: float) -> dict[str, Any]:
    """Return rows of counters by kernel at one shape, or why there are none."""
    words = [ncu, "--csv", "--page", "details", "--profile-from-start", "off", "--target-processes", "all"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    words += [sys.executable, "-m", "benchmarks.visit.counters", shape, device]
    child = subprocess.Popen(
        words,
        env=environment.child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        said = ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    rows = read(said)
    found: dict[str, Any] = {"shape": shape, "kernels": rows}
    if not rows:
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line or "Error" in line]
        found["failed"] = (errors or lines or [f"no answer within {limit_s:.0f} s"])[-1][:300]
    return found


def read(text: str) -> list[dict[str, Any]]:
    """Return {"kernel", "counters": {section: {name: "value unit"}}} of each launch in the tool's CSV."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if not row.get("Metric Name"):
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:160], "counters": {}})
        section = launch["counters"].setdefault(row["Section Name"], {})
        section[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def text_of(entry: dict[str, Any]) -> str:
    """Format the main counters of one shape."""
    if "failed" in entry:
        return f"counters, {entry['shape']}: {entry['failed']}"
    lines = [("counters, " + entry["shape"], *SHOWN)]
    for launch in entry["kernels"]:
        known = {name: value for section in launch["counters"].values() for name, value in section.items()}
        lines.append((launch["kernel"][:60], *(known.get(name, "") for name in SHOWN)))
    return report.aligned(lines)


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Count at every shape; `path` always holds the finished ones."""
    started = time.monotonic()
    result: dict[str, Any] = {"settings": asdict(arguments), "tool": tool(), "shapes": [], "not_reached": []}
    for shape in arguments.shapes:
        left = arguments.seconds - (time.monotonic() - started) if arguments.seconds else 600.0
        if result["tool"] is None or left < 1.0:
            result["not_reached"].append(shape)
            continue
        if arguments.progress:
            Path(arguments.progress).write_text(f"{shape} (counters)")
        found = count(result["tool"], shape, arguments.device, left)
        result["shapes"].append(found)
        environment.write_json(path, environment.headed("visit_counters", result))
        print(text_of(found), flush=True)
    if result["tool"] is None:
        print("counters: Nsight Compute (ncu) is not installed")
    return result


def main() -> None:
    """Run every product once, counted, after one call that is not; command line: SHAPE DEVICE."""
    shape, device = Shape.parse(sys.argv[1]), torch.device(sys.argv[2])
    on_gpu = device.type == "cuda"
    here, dtype = (shape, torch.bfloat16) if on_gpu else (toy_of(shape), torch.float32)
    batch = make_batch(here, make_weight(here, device, dtype, 0), "peaked", 1)
    calls = our_engines.product_calls(batch, our_engines.stages(batch)["table"][0])
    for call in calls.values():
        call(0)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in calls.values():
        call(1)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()

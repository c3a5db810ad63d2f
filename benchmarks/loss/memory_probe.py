"""Peak memory of one full step on a CPU, in a process of its own: `python -m benchmarks.loss.memory_probe ...`.

The kernel keeps the high-water mark of a process (VmHWM) and lets the process reset it. Inputs are made before the
reset, so what is reported is what a method needs above them, its results included.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

from benchmarks import environment

TIME_LIMIT_S = 600


@dataclass(frozen=True)
class Spec:
    """What to run: case, name of the method, name of the shape, dtype."""

    case: str
    method: str
    shape: str
    dtype: str


def in_subprocess(spec: Spec) -> int:
    """Bytes above the inputs, measured by a fresh process; RuntimeError with the end of its complaint if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loss.memory_probe", *astuple(spec)],
        env=environment.child_environment(),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the probe failed")
    return int(done.stdout.split()[-1])


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_high_water_mark() -> None:
    """Start VmHWM anew at the present size; where that is not allowed the mark includes making the inputs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        sys.stderr.write("cannot reset VmHWM\n")


def probe(spec: Spec) -> int:
    """Bytes that one full step needs above its inputs, in this process."""
    import torch

    from benchmarks.loss.methods import our_methods, run_step, torch_makers
    from benchmarks.loss.peers import peer_makers
    from benchmarks.loss.problems import TOY_SHAPE, Shape, make_batch, make_weight

    device, dtype = torch.device("cpu"), getattr(torch, spec.dtype)
    ours = {method.name: method for method in our_methods(spec.case, device, dtype)}
    make = (torch_makers() | peer_makers(device, dtype)).get(spec.method)
    method = make() if make is not None else ours[spec.method]
    # Libraries allocate buffers and compile at their first use: that is not the method's memory.
    toy = make_batch(TOY_SHAPE, make_weight(TOY_SHAPE, device, dtype, 0), "peaked", 1)
    run_step(spec.case, method, toy, "full")
    shape = Shape.parse(spec.shape)
    batch = make_batch(shape, make_weight(shape, device, dtype, 0), "peaked", 1)
    reset_high_water_mark()
    before = status_bytes("VmRSS")
    answer = run_step(spec.case, method, batch, "full")
    peak = status_bytes("VmHWM")
    del answer
    return peak - before


if __name__ == "__main__":
    print(probe(Spec(*sys.argv[1:])))

"""Peak memory of one full step on a CPU, in a separate process: `python -m benchmarks.loss.memory_probe ...`.

Linux keeps the peak memory of a process (VmHWM) and lets the process reset it. Inputs are created before the reset, so
the reported memory excludes them and includes the method's results.
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
    """Step to run: case, name of the method, name of the shape, dtype."""

    case: str
    method: str
    shape: str
    dtype: str


def in_subprocess(spec: Spec) -> int:
    """Return bytes above the inputs, measured in a fresh process; RuntimeError with the end of stderr if it fails."""
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
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_high_water_mark() -> None:
    """Reset VmHWM to the current size; if that is not permitted, the peak includes creating the inputs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        sys.stderr.write("cannot reset VmHWM\n")


def probe(spec: Spec) -> int:
    """Return the bytes that one full step needs above its inputs, in this process."""
    import torch

    from benchmarks.loss.methods import our_methods, run_step, torch_makers
    from benchmarks.loss.peers import peer_makers
    from benchmarks.loss.problems import TOY_SHAPE, Shape, make_batch, make_weight

    device, dtype = torch.device("cpu"), getattr(torch, spec.dtype)
    ours = {method.name: method for method in our_methods(spec.case, device, dtype)}
    make = (torch_makers() | peer_makers(device, dtype)).get(spec.method)
    method = make() if make is not None else ours[spec.method]
    # Warm up: libraries allocate buffers and compile on first use, which is not the method's memory.
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

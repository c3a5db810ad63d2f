"""Count failures of checkpoints: kills, damage, resumed runs, forgotten state, full disks, planted code.

    python -m benchmarks.faults.checkpoint [--kills 100]

Prints the counts as JSON; `measure` returns them. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults.resume import CUTS, measure_resume
from benchmarks.ranks import import_ahead, on_ranks, started
from paced_fast.data.distributed import World
from paced_fast.errors import InputError
from paced_fast.run import checkpoint
from paced_fast.run.checkpoint.folder import FORMAT, describe, manifest_text

_ELEMENTS = 200_000


def tensors_of(step: int) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of `step` must hold; their values encode the step."""
    return {f"optimizer.{i}.exp_avg": torch.full((_ELEMENTS,), float(step * 10 + i)) for i in range(4)}


def _write_policy(folder: Path, state: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(state["weight"].numpy().tobytes())


def train_and_tell(world: World, root: Path, keep: int, background: bool) -> None:
    """Continue from the newest checkpoint forever; log to a file which saves began and which were acknowledged."""
    logging.disable(logging.WARNING)
    newest = checkpoint.newest(root, world)
    step = 0 if newest is None else int(newest.name[5:])
    saver = checkpoint.Saver(root, keep=keep, write_policy=_write_policy, background=background, world=world)
    log = os.open(root / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(what: str) -> None:
        if world.is_rank0:
            os.write(log, f"{what} {step} {time.time()}\n".encode())

    while True:
        step += 1
        model = {"weight": torch.full((_ELEMENTS,), float(step))}
        tell("begin")
        saver.save(step, tensors=tensors_of(step) | {"scheduler.now": torch.tensor(step)}, model=model, state={})
        if saver.wait() is None:
            tell("done")


def _told(root: Path) -> list[tuple[str, int, float]]:
    path = root / "told"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(what, int(step), float(when)) for what, step, when in (line.split() for line in lines)]


def _begun(root: Path, before: int) -> int:
    return sum(what == "begin" for what, _, _ in _told(root)[before:])


def _wrong(folder: Path | None, acknowledged: int) -> str | None:
    """Return what is wrong with the checkpoint left by a kill; None if intact and no older than acknowledged."""
    if folder is None:
        return "no checkpoint is left" if acknowledged else None
    step = int(folder.name[5:])
    into = {name: torch.empty_like(tensor) for name, tensor in tensors_of(step).items()}
    found, _, _ = checkpoint.load(folder, into)
    if step < acknowledged:
        return f"step {acknowledged} was acknowledged, but the newest checkpoint is step {step}"
    right = all(torch.equal(into[name], tensor) for name, tensor in tensors_of(step).items())
    return None if right and int(found["scheduler.now"]) == step else f"the checkpoint of step {step} has wrong numbers"


def _kill_once(root: Path, ranks: int, keep: int, background: bool, draw: random.Random) -> dict[str, Any]:
    """Start the ranks, kill them at a random moment of a save, and check the checkpoint that is left."""
    before, goal = len(_told(root)), 1 + draw.randrange(4)
    with started(ranks, train_and_tell, root, keep, background) as (processes, _):
        limit = time.time() + 120
        while _begun(root, before) < goal and time.time() < limit:
            time.sleep(0.002)
        assert _begun(root, before) >= goal, "the saves did not begin within two minutes"
        told = _told(root)
        ends = [b[2] - a[2] for a, b in itertools.pairwise(told) if (a[0], b[0]) == ("begin", "done")]
        length = sorted(ends)[len(ends) // 2] if ends else 0.1
        time.sleep(draw.uniform(0, 1.5 * length))
        for process in draw.sample(processes, len(processes)):
            os.kill(process.pid or 0, signal.SIGKILL)
            time.sleep(draw.choice([0.0, 0.0, 0.02]))
    told = _told(root)
    acknowledged = max((step for what, step, _ in told if what == "done"), default=0)
    return {
        "inside": told[-1][0] == "begin",
        "wrong": _wrong(checkpoint.newest(root), acknowledged),
        "saves": sum(what == "done" for what, _, _ in told[before:]),
        "partial": any(root.glob(".step_*.partial")),
        "removal": any(root.glob(".step_*.removed")),
    }


def measure_kills(kills: int, seed: int = 0) -> dict[str, Any]:
    """SIGKILL one and two ranks at random moments of their saves; one or two checkpoints are kept."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(kills):
            ranks, keep, background = 1 + (number % 5 == 4), 1 + number % 2, number % 3 > 0
            root = Path(folder, f"{ranks}-{keep}")
            root.mkdir(exist_ok=True)
            found.append(_kill_once(root, ranks, keep, background, draw) | {"ranks": ranks, "keep": keep})
    return {
        "kills": len(found),
        "kills_inside_a_save": sum(each["inside"] for each in found),
        "kills_of_two_ranks": sum(each["ranks"] == 2 for each in found),
        "kills_with_one_kept": sum(each["keep"] == 1 for each in found),
        "kills_that_left_a_partial_folder": sum(each["partial"] for each in found),
        "kills_inside_a_removal": sum(each["removal"] for each in found),
        "acknowledged": sum(each["saves"] for each in found),
        "acknowledged_lost": sum(each["wrong"] is not None for each in found),
        "wrong": [each["wrong"] for each in found if each["wrong"] is not None],
    }


def save_two(world: World, root: Path) -> None:
    """Save two small checkpoints from two ranks."""
    saver = checkpoint.Saver(root, keep=2, write_policy=_write_policy, background=False, world=world)
    for step in (1, 2):
        tensors = {f"optimizer.{i}": torch.full((100,), float(step * 10 + i)) for i in range(4)}
        control = {"scheduler.now": torch.tensor(step)}
        saver.save(step, tensors=tensors | control, model={"weight": torch.full((9,), float(step))}, state={"a": step})


def _flip(path: Path, draw: random.Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random, _: list[Path]) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _delete(path: Path, _: random.Random, __: list[Path]) -> None:
    path.unlink()


def _double(path: Path, draw: random.Random, _: list[Path]) -> None:
    shutil.copy(path, path.with_name(f"{draw.randrange(99)}-{path.name}"))


def _swap(path: Path, draw: random.Random, files: list[Path]) -> None:
    """Swap contents with another file, possibly of the other checkpoint."""
    other = draw.choice([f for f in files if f.read_bytes() != path.read_bytes()])
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    if other.parts[-2:] != path.parts[-2:]:  # the previous checkpoint has to stay intact
        return
    other.write_bytes(two if "step_000001" in str(other) else one)


def _append(path: Path, draw: random.Random, _: list[Path]) -> None:
    with path.open("ab") as file:
        file.write(draw.randbytes(1 + draw.randrange(16)))


DAMAGE: dict[str, Callable[[Path, random.Random, list[Path]], None]] = {
    "flip": _flip,
    "truncate": _cut,
    "delete": _delete,
    "double": _double,
    "swap": _swap,
    "append": _append,
}


def measure_damage(count: int, seed: int = 0) -> dict[str, Any]:
    """Damage the newer of two checkpoints, each file in each way in turn; it must be reported and skipped."""
    draw = random.Random(seed)
    silent: list[str] = []
    by_kind = dict.fromkeys(DAMAGE, 0)
    with tempfile.TemporaryDirectory() as folder:
        source, root = Path(folder, "source"), Path(folder, "root")
        on_ranks(2, save_two, source)
        names = sorted(p.relative_to(source) for p in (source / "step_000002").rglob("*") if p.is_file())
        work = [(kind, name) for kind in DAMAGE for name in names]
        for number in range(count):
            kind, name = work[number % len(work)]
            shutil.copytree(source, root)
            DAMAGE[kind](root / name, draw, [p for p in root.rglob("*") if p.is_file()])
            by_kind[kind] += 1
            problem = checkpoint.verify(root / "step_000002")
            newest = checkpoint.newest(root)
            if problem is None or newest is None or newest.name != "step_000001":
                silent.append(f"{kind} {name}: {problem}")
            shutil.rmtree(root)
    return {
        "damages": count,
        "files": len(names),
        "by_kind": by_kind,
        "damages_loaded_silently": len(silent),
        "wrong": silent,
    }


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def measure_planted_code() -> dict[str, Any]:
    """Replace a file by, or add, a pickle that runs code, one at a time, with a manifest forged to match."""
    beside = ("tensors/.metadata", "tensors/x.safetensors", "tensors/__0_0.distcp", "policy/pytorch_model.bin")
    slots = refused = ran = 0
    with tempfile.TemporaryDirectory() as folder:
        source, root, mark = Path(folder, "source"), Path(folder, "root"), Path(folder, "ran")
        on_ranks(2, save_two, source)
        place = source / "step_000002"
        names = [p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()]
        for name in (*names, *beside):
            shutil.copytree(source, root)
            bad = root / "step_000002"
            (bad / name).write_bytes(pickle.dumps(_Evil(mark)))
            files = [p for p in bad.rglob("*") if p.is_file() and p.name != "manifest.json"]
            listed = {p.relative_to(bad).as_posix(): describe(p) for p in files}
            if name != "manifest.json":
                manifest = {"format": FORMAT, "step": 2, "files": listed}
                (bad / "manifest.json").write_text(manifest_text(manifest))
            slots += 1
            newest = checkpoint.newest(root)
            try:
                assert newest is not None
                checkpoint.load(newest, {f"optimizer.{i}": torch.empty(100) for i in range(4)})
            except InputError:
                refused += 1
            ran += mark.exists()
            shutil.rmtree(root)
    return {"slots": slots, "refused": refused, "code_ran": ran}


@contextlib.contextmanager
def _quiet() -> Any:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def measure(
    kills: int = 100, damages: int = 200, cuts: tuple[int, ...] = CUTS, pieces: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return all counts; those named lost, silent, undetected, different or ran should be 0."""
    figures: dict[str, Any] = {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "kill": lambda: measure_kills(kills),
        "damage": lambda: measure_damage(damages),
        "planted_code": measure_planted_code,
        "resume": lambda: measure_resume(cuts, pieces),
    }
    import_ahead("benchmarks.faults.checkpoint")
    with _quiet():
        for name, part in parts.items():
            began = time.perf_counter()
            figures[name] = part()
            figures[name]["seconds"] = round(time.perf_counter() - began, 1)
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=200)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.kills, arguments.damages), indent=1))


if __name__ == "__main__":
    main()

"""Compare killed and resumed runs bit for bit with an uninterrupted run, and resume with a piece of state omitted."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.ranks import on_ranks, started
from paced_fast import train
from paced_fast.config import Config
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.data.distributed import World
from paced_fast.policy import quiet
from paced_fast.run import checkpoint
from paced_fast.run.start import build
from paced_fast.run.step import Stepper

STEPS = 10
CUTS = (1, 3, 4, 6, 9)
"""Steps after which a run is killed; the warm-ups of learning rate and scheduler end within them."""

_ABLATED_AT, _ABLATED_STEPS = 6, 3

_REWARDS = """
import random
import numpy
import torch

def noisy(prompts, completions, **columns):
    rewards = [float(sum(map(ord, p + c)) % 3 == 0) for p, c in zip(prompts, completions)]
    flips = [random.random() < 0.05 or numpy.random.rand() < 0.05 or float(torch.rand(())) < 0.05 for _ in rewards]
    return [float((reward > 0) != flip) for reward, flip in zip(rewards, flips)]
"""
"""Reward that a random completion gets with probability 1/3, with noise from the ambient random generators."""

IDLE = {
    "scheduler.tree": "rebuilt from the statistics before every draw; its step is set by the draw",
    "guards.said": "empty in a run that has warned of nothing; a test of the guards drops it from one that has",
}
"""State whose omission does not change a resumed run, with the reason why it is kept."""


def settings(folder: Path) -> Config:
    """Return settings with four prompts of four completions per step and every stateful feature enabled."""
    rewards = folder / "rewards.py"
    rewards.write_text(_REWARDS)
    task = f"task:signed_sums?reward={rewards}:noisy&split="
    base = preset("tiny")
    changed: dict[str, dict[str, Any]] = {
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2},
        "data": {"train": (f"{task}train&size=40",), "eval": (f"{task}eval&size=6",), "headline": ()},
        "generation": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 5},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "log_z": {"hidden_size": 8, "scored_per_step": 7},
        "scheduler": {"warmup_steps": 3, "max_visits": 1},
        "replay": {"mode": "on", "capacity": 24, "insert_per_step": 5, "draw_per_step": 4},
        "reward": {"shaping": ("0.1*length",)},
        # A gap in every step, and fewer steps than patience: counted, never said.
        "guard": {"max_value_gap": 0.0, "patience": 2 * STEPS},
        "evaluation": {"every": 3, "samples": 1, "final_samples": 1},
        "run": {"checkpoint_every": 1, "keep_checkpoints": 99, "threads": 1, "report": False},
    }
    parts = {name: dataclasses.replace(getattr(base, name), **values) for name, values in changed.items()}
    none = {"sources": ("task:signed_sums?split=demonstrations&size=50",), "steps": 0}
    warm = dataclasses.replace(
        base.warm_start,
        first=dataclasses.replace(base.warm_start.first, **none),
        second=dataclasses.replace(base.warm_start.second, steps=0),
        cache_dir=str(folder / "cache"),
    )
    return dataclasses.replace(base, steps=STEPS, warm_start=warm, run_dir=str(folder / "run"), **parts)


def _console() -> Console:
    return Console(file=io.StringIO())


def run(world: World, config: Config) -> None:
    """Run the training from the start, or the rest of it."""
    logging.disable(logging.WARNING)
    quiet()
    train.run(config, _console())


_TIMES = ("seconds", "train_seconds", "tokens_per_second", "memory", "parity")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in _TIMES}
    return value


def _content(path: Path) -> bytes:
    """Return a file's bytes; for tensor files names and values, because their headers have no fixed order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors = sorted(load_file(path).items())
    return b"".join(
        name.encode() + str(tensor.dtype).encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors
    )


def digests(run_dir: Path) -> dict[str, str]:
    """Hash a run's results: each file of the last checkpoint, and metrics and rollouts without times."""
    last = checkpoint.newest(run_dir / "checkpoints")
    assert last is not None
    files = [path for path in last.rglob("*") if path.is_file() and path.name not in ("manifest.json", "state.json")]
    found = {str(path.relative_to(last)): _content(path) for path in files}
    found["state.json"] = json.dumps(_timeless(json.loads((last / "state.json").read_text()))).encode()
    for name in ("metrics", "rollouts"):
        lines = (run_dir / f"{name}.jsonl").read_text().splitlines()
        found[name] = json.dumps([_timeless(json.loads(line)) for line in lines]).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def _killed_at(config: Config, cut: int) -> None:
    """Run until the checkpoint of step `cut` exists, then kill the process."""
    root = Path(config.run_dir or "", "checkpoints")
    with started(1, run, config) as ([process], _):
        limit = time.time() + 240
        while not checkpoint.step_folder(root, cut).exists() and time.time() < limit:
            time.sleep(0.001)
        os.kill(process.pid or 0, signal.SIGKILL)
    for path in checkpoint.folders(root):
        if int(path.name[5:]) > cut:  # written before the kill arrived
            shutil.rmtree(path)
    assert checkpoint.step_folder(root, cut).exists(), f"no checkpoint of step {cut} within four minutes"


def measure_cuts(cuts: tuple[int, ...] = CUTS) -> dict[str, Any]:
    """Kill a run after each of these steps, resume it, and compare its results with an uninterrupted run."""
    different: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder))
        on_ranks(1, run, config, seconds=300)
        whole = digests(Path(config.run_dir or ""))
        for cut in cuts:
            each = dataclasses.replace(config, run_dir=str(Path(folder, f"cut-{cut}")))
            _killed_at(each, cut)
            on_ranks(1, run, dataclasses.replace(each, resume="auto"), seconds=300)
            found = digests(Path(each.run_dir or ""))
            different += [f"{cut}: {name}" for name in whole if found.get(name) != whole[name]]
    return {"cut_points": len(cuts), "things_compared": len(whole), "different": len(different), "wrong": different}


def piece_of(name: str) -> str:
    """Return the piece of state a tensor belongs to; parameters of one kind form one piece."""
    owner, *rest = name.split(".")
    if owner == "optimizer":
        return f"optimizer.{rest[-1]}"
    if owner == "log_z":
        return f"log_z.{rest[0]}.{rest[-1] if rest[0] == 'optimizer' else rest[1]}"
    return "policy" if owner == "policy" else f"{owner}.{rest[0]}"


def _digest(stepper: Stepper) -> str:
    """Digest the state a run would save, and the next random numbers of its process."""
    hashed = hashlib.sha256()
    tensors = stepper.state_tensors() | checkpoint.prefixed("model", stepper.trainer.policy.model.state_dict())
    for name in sorted(tensors):
        hashed.update(name.encode() + tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    counters = dataclasses.asdict(stepper.counters)
    hashed.update(json.dumps([counters, checkpoint.random_state()]).encode())
    return hashed.hexdigest()


def _resumed(config: Config, forgotten: str) -> str:
    """Resume without one piece of state (it keeps its initial value), take some steps, return the digest."""
    load, put = checkpoint.load, Stepper.load_state_tensors
    owner, _, key = forgotten.partition(" ")
    seconds: list[float] = []

    def loading(folder: Path, spread: dict[str, Tensor], world: World) -> Any:
        fresh = {name: tensor.clone() for name, tensor in spread.items() if piece_of(name) == forgotten}
        found, state, generators = load(folder, spread, world)
        for name, tensor in fresh.items():
            spread[name].copy_(tensor)
        seconds.append(state["counters"]["train_seconds"])
        state["counters"] |= {"skipped_steps": 3, "consecutive_skips": 1}  # a finite run has no skips to omit
        if owner == "counter":
            del state["counters"][key]
        if owner == "generator":
            generators[key] = checkpoint.random_state()[key]
        return found, state, generators

    def putting(stepper: Stepper, tensors: dict[str, Tensor]) -> None:
        fresh = {
            name: tensor.clone() for name, tensor in stepper.state_tensors().items() if piece_of(name) == forgotten
        }
        put(stepper, tensors | {name: tensor for name, tensor in fresh.items() if name in tensors})

    checkpoint.load, Stepper.load_state_tensors = loading, putting
    try:
        stepper = build.build(resolve(config), _console()).stepper
    finally:
        checkpoint.load, Stepper.load_state_tensors = load, put
    if forgotten == "policy":
        initial = load_file(Path(config.run_dir or "", "initial", "model.safetensors"))
        stepper.trainer.policy.model.load_state_dict(initial)
    begun = dataclasses.asdict(stepper.counters)  # a good step resets consecutive skips to 0
    for _ in range(_ABLATED_STEPS):
        stepper.step()
    stepper.counters.train_seconds = float(stepper.counters.train_seconds > seconds[0])
    return f"{begun['consecutive_skips']} {_digest(stepper)}"


def ablate(world: World, config: Config, only: tuple[str, ...] = ()) -> dict[str, str]:
    """Return piece of state -> digest of the run resumed without it; "" is the run with all pieces.

    `only` restricts the pieces to those whose name contains one of its words.
    """
    logging.disable(logging.WARNING)
    quiet()
    place = checkpoint.step_folder(Path(config.run_dir or "", "checkpoints"), _ABLATED_AT)
    names = [*load_file(place / "state.safetensors"), *checkpoint.tensor_shapes(place / "tensors")]
    counters = json.loads((place / "state.json").read_text())["counters"]
    pieces = [
        *sorted({piece_of(name) for name in names}),
        *(f"counter {name}" for name in counters),
        *(f"generator {name}" for name in checkpoint.random_state()),
    ]
    wanted = [piece for piece in pieces if not only or any(word in piece for word in only)]
    return {piece: _resumed(config, piece) for piece in ("", "", *wanted)}


def measure_ablation(only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Omit each piece of state in turn on resume; the run must then differ."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder))
        on_ranks(1, run, dataclasses.replace(config, steps=_ABLATED_AT), seconds=300)
        resumed = dataclasses.replace(config, resume="auto")
        [found] = on_ranks(1, ablate, resumed, only, seconds=600)
    whole = found.pop("")
    undetected = [piece for piece, digest in found.items() if digest == whole and piece not in IDLE]
    return {"pieces": len(found), "idle": IDLE, "undetected": len(undetected), "wrong": undetected}


def measure_resume(cuts: tuple[int, ...] = CUTS, pieces: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run `measure_cuts` and `measure_ablation`."""
    return {"cuts": measure_cuts(cuts), "ablation": measure_ablation(pieces)}

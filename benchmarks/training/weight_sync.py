"""Bytes, seconds and memory of methods to update a vLLM engine with the trainer's weights, one process each.

    python -m benchmarks.run weight_sync [--model FOLDER] [--updates 5]

`shared`: trainer and engine share the memory of the parameters. `push`: one reload through vLLM's loader.
`load_weights`: the loader is called for each parameter in turn, as TRL does in one process. After the updates both
sides score the same tokens, which reveals a method that loses a weight. `--runs 20` also trains the preset `tiny` for
20 steps with each generator.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.loss.memory_probe import reset_high_water_mark, status_bytes
from paced_fast.config import ModelConfig, WeightSyncConfig
from paced_fast.generation import VLLMGenerator, weight_sync
from paced_fast.generation.vllm_engine import EngineSettings, require_vllm
from paced_fast.policy import load_model, smollm2_folder

MODES = ("shared", "push", "load_weights")
TIME_LIMIT_S = 900


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare methods to keep an engine's weights up to date."""

    model: str = "smollm2"
    """`smollm2`, or the folder of a model."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    updates: int = 5
    """Number of timed updates; the median is reported."""
    runs: int = 0
    """Steps of a run of `tiny` per generator (width 128: the engine has a kernel for these heads); 0 = no run."""
    seeds: int = 1
    """Number of seeds of those runs, counted from 0."""
    modes: tuple[str, ...] = MODES
    """Methods to compare; `shared` is always included."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Run one child process per mode, then the training runs one after another."""
    del path
    require_vllm("cpu")
    folder = str(smollm2_folder(Path("~/.cache/paced_fast").expanduser())) if arguments.model == "smollm2" else None
    folder = folder or arguments.model
    wanted = [mode for mode in MODES if mode == "shared" or mode in arguments.modes]
    modes = {mode: _child("probe", mode, folder, arguments.dtype, str(arguments.updates)) for mode in wanted}
    print(table(modes))
    result: dict[str, Any] = {"model": arguments.model, "dtype": arguments.dtype, "modes": modes}
    if arguments.runs:
        result["runs"] = _runs(arguments)
        print(run_table(result["runs"]))
    return result


def table(modes: dict[str, dict[str, float]]) -> str:
    """Format the modes as rows of a table."""
    lines = [f"{'mode':<14}{'MB copied':>11}{'seconds':>10}{'resident MB':>13}{'peak MB':>10}{'largest |dlogp|':>17}"]
    lines += [
        f"{mode:<14}{row['bytes'] / 1e6:>11.1f}{row['median_seconds']:>10.4f}{row['resident_bytes'] / 1e6:>13.1f}"
        f"{row['peak_bytes'] / 1e6:>10.1f}{row['largest_difference']:>17.1e}"
        for mode, row in modes.items()
    ]
    weights = next(iter(modes.values()))["weights_bytes"]
    lines += [f"one copy of the weights: {weights / 1e6:.1f} MB; resident: anonymous memory minus an idle process's"]
    return "\n".join(lines)


def run_table(runs: list[dict[str, Any]]) -> str:
    """Format the generators as rows of a table, seeds in the given order."""
    head = f"{'run':<14}{'seed':>5}{'generate s':>12}{'train s':>9}{'sync s':>9}"
    lines = [f"{head}{'reward, last 5':>16}{'accuracy after':>16}"]
    lines += [
        f"{row['name']:<14}{row['seed']:>5}{row['generate']:>12.3f}{row['train']:>9.3f}{row['sync']:>9.4f}"
        f"{row['reward']:>16.3f}{row['accuracy_after']:>16.3f}"
        for row in runs
    ]
    return "\n".join(lines)


def probe(mode: str, folder: str, dtype: Any, updates: int) -> dict[str, float]:
    """Start both sides, update `updates` times, compare them, and return the figures of this process."""
    import vllm  # noqa: F401  # its code is no part of what the weights take

    idle = _anonymous_bytes()
    model = load_model(ModelConfig(name=folder, dtype=dtype), folder)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = VLLMGenerator(
        EngineSettings(
            path=folder,
            dtype=dtype,
            device="cpu",
            max_tokens=256,
            max_sequences=8,
            kv_cache_bytes=1 << 26,
        ),
        stop_ids=[0],
    )
    trainer = dict(model.named_parameters())
    sync: Any = (
        _ParameterByParameter(generator, trainer)
        if mode == "load_weights"
        else weight_sync.connect(generator, model, WeightSyncConfig(mode="shared" if mode == "shared" else "push"))
    )
    generator.attach(sync)
    _scale(trainer, 1.0)  # writing turns file-backed weights into anonymous memory
    gc.collect()
    resident = _anonymous_bytes() - idle
    reset_high_water_mark()
    before = status_bytes("VmRSS")
    seconds, copied = [], 0.0
    for update in range(updates):
        _scale(trainer, 1.0 + 1e-3 * (update + 1))
        started = time.perf_counter()
        copied = generator.after_update()["bytes"]
        seconds.append(time.perf_counter() - started)
    peak = status_bytes("VmHWM") - before
    ids = tuple(
        torch.randint(
            2, min(1000, model.config.vocab_size), (200,), generator=torch.Generator().manual_seed(0)
        ).tolist()
    )
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    difference = (torch.tensor(generator.score([ids])[0]) - wanted).abs().max()
    return {
        "bytes": copied,
        "median_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "largest_seconds": max(seconds),
        "weights_bytes": weights,
        "resident_bytes": resident,
        "peak_bytes": resident + peak,
        "largest_difference": float(difference),
    }


def _scale(parameters: dict[str, torch.nn.Parameter], factor: float) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(factor)


class _ParameterByParameter:
    """Synchronisation that calls the loader once per parameter."""

    mode = "load_weights"

    def __init__(self, engine: VLLMGenerator, trainer: dict[str, torch.nn.Parameter]) -> None:
        self.engine, self.trainer = engine, trainer

    def after_update(self) -> dict[str, float]:
        def load(model: Any) -> None:
            for name, parameter in self.trainer.items():
                model.load_weights(self._one(name, parameter.detach()))

        self.engine.engine.apply_model(load)
        return {"bytes": float(sum(p.numel() * p.element_size() for p in self.trainer.values())), "seconds": 0.0}

    @staticmethod
    def _one(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, tensor


def _runs(arguments: Arguments) -> list[dict[str, Any]]:
    options = ("transformers", "auto"), ("vllm", "push"), ("vllm", "shared")
    return [
        {"name": generator if generator == "transformers" else mode, "seed": seed}
        | _child("train", generator, mode, str(arguments.runs), str(seed))
        for seed in range(arguments.seeds)
        for generator, mode in options
    ]


def train_once(generator: Any, mode: Any, steps: int, seed: int) -> dict[str, float]:
    """Train `tiny` briefly; return median step seconds by part, reward of the last five steps, held-out accuracy."""
    import tempfile

    from paced_fast import train
    from paced_fast.config.presets import preset
    from paced_fast.run.record.terminal import configure_logging

    config = preset("tiny")
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(
            config,
            steps=steps,
            seed=seed,
            generator=generator,
            run_dir=f"{folder}/run",
            model=dataclasses.replace(config.model, hidden_size=128),
            weight_sync=WeightSyncConfig(mode=mode),
            evaluation=dataclasses.replace(config.evaluation, every=0, final_samples=8),
            run=dataclasses.replace(config.run, report=False),
        )
        summary = train.run(run, configure_logging())
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] > 0]

    def median(*names: str) -> float:
        return statistics.median(sum(record["seconds"].get(name, 0.0) for name in names) for record in records[2:])

    return {
        "generate": median("generate"),
        "train": median("old_logprobs", "update", "head"),
        "sync": median("sync"),
        "reward": statistics.mean(record["reward_mean"] for record in records[-5:]),
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "mismatch_max": max(record["generator_mismatch_max"] for record in records),
    }


def _child(*words: str) -> dict[str, Any]:
    """Run this module in a fresh process and return its result, the last line of output."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.weight_sync", *words],
        env=environment.child_environment(),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the probe failed")
    return json.loads(done.stdout.splitlines()[-1])


def _anonymous_bytes() -> int:
    """Return resident anonymous memory; this excludes unmodified weights that are mapped from a file."""
    return status_bytes("RssAnon")


if __name__ == "__main__":
    job, *rest = sys.argv[1:]
    found = probe(*rest[:3], int(rest[3])) if job == "probe" else train_once(*rest[:2], int(rest[2]), int(rest[3]))
    print(json.dumps(found))

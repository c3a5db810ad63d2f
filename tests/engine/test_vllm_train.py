"""Whole runs with vLLM as a user starts them: metrics, resume to the same completions, failures."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_sides import child_environment

OPTIONS = [
    "tiny",
    "--generator",
    "vllm",
    "--weight-sync.mode",
    "shared",
    "--weight-sync.check-every",
    "2",
    "--model.hidden-size",
    "128",
    "--steps",
    "4",
    "--warm-start.first.steps",
    "6",
    "--warm-start.first.batch-size",
    "32",
    "--warm-start.second.steps",
    "0",
    "--optimizer.learning-rate",
    "1e-3",
    "--generation.prompts-per-step",
    "4",
    "--generation.group-size",
    "4",
    "--run.checkpoint-every",
    "2",
    "--scheduler.warmup-steps",
    "1",
    "--evaluation.every",
    "0",
    "--evaluation.final-samples",
    "1",
    "--run.no-report",
]

FAILING = """
import sys
from paced_fast import train
from paced_fast.generation import VLLMGenerator

plain, calls = VLLMGenerator._run, []

def run(self, more):
    calls.append(1)

    def failing(in_flight):
        requests = more(in_flight)
        if len(requests) == 16 and len(calls) > 8:  # the groups of a step, some steps into the run
            raise RuntimeError("lost a worker")
        return requests

    return plain(self, failing)

VLLMGenerator._run = run
train.main(sys.argv[1:])
"""


class Server:
    """Runs in copies of one process that has vLLM loaded."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_runs.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )

    def run(self, folder: Path, cache: Path, *more: str, code: str = "", ranks: int = 1) -> tuple[int, str]:
        """The largest exit status of the ranks, and what they wrote."""
        port = str(free_port())
        jobs = []
        for rank in range(ranks):
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            job = {"words": words(folder, cache, *more), "log": f"{folder}.{rank}.log", "code": code}
            jobs.append({**job, "env": places | {k: str(v) for k, v in numbers.items()} if ranks > 1 else {}})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        return max(map(abs, statuses)), "".join(Path(job["log"]).read_text(errors="replace") for job in jobs)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def words(folder: Path, cache: Path, *more: str) -> list[str]:
    return [*OPTIONS, "--run-dir", str(folder), "--warm-start.cache-dir", str(cache), *more]


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of four steps as a user starts it, and the folder of warm starts."""
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "paced_fast.train", *words(root / "whole", root / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "whole", root / "cache"


def test_every_step_is_synchronised_and_checked_when_due(finished: tuple[Path, Path]) -> None:
    found = records(finished[0])
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in found if "parity" in record] == [0, 2, 4]
    for record in found[1:]:
        assert record["weight_sync"]["bytes"] == 0
        assert {"generate", "update", "sync"} <= record["seconds"].keys()
        assert record["generator_mismatch_max"] < 1e-3
        assert record["grad_norm"] > 0
    for record in found[::2]:
        assert 0 < record["parity"]["sampled_mean"] < 1e-4
        assert 0 < record["parity"]["scored_mean"] < 1e-4


def test_a_resumed_run_samples_the_same_completions(
    finished: tuple[Path, Path], server: Server, tmp_path: Path
) -> None:
    whole, cache = finished
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    status, log = server.run(folder, cache, "--resume", "auto")
    assert status == 0, log[-2000:]
    assert "resumed after step 2" in log
    assert records(folder, "rollouts.jsonl") == records(whole, "rollouts.jsonl")
    for one, other in zip(records(folder), records(whole), strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "entropy", "parity"):
            assert one.get(name) == other.get(name), (one["step"], name)
    state = (whole / "checkpoints" / "step_000004").rglob("*")
    assert not [path for path in state if "engine" in path.name or "vllm" in path.name]


def test_pushed_weights_take_the_same_steps_as_shared_ones(
    finished: tuple[Path, Path], server: Server, tmp_path: Path
) -> None:
    whole, cache = finished
    status, log = server.run(tmp_path / "pushed", cache, "--weight-sync.mode", "push")
    assert status == 0, log[-2000:]
    assert records(tmp_path / "pushed", "rollouts.jsonl") == records(whole, "rollouts.jsonl")
    for one, other in zip(records(tmp_path / "pushed"), records(whole), strict=True):
        if one["step"]:
            for name in ("loss", "grad_norm", "reward_mean", "entropy"):  # other addresses may round differently
                assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
            assert one["weight_sync"]["bytes"] > 0 == other["weight_sync"]["bytes"]


def test_a_failure_while_sampling_ends_the_run_with_its_checkpoint(
    finished: tuple[Path, Path], server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "failed"
    status, log = server.run(folder, finished[1], code=FAILING)
    assert status == 3
    lines = [line for line in log.splitlines() if line.startswith("stopped: ")]
    assert len(lines) == 1
    assert lines[0].startswith("stopped: vllm failed while sampling (lost a worker): this step is discarded")
    assert "Traceback" not in log
    steps = [record["step"] for record in records(folder)]
    assert steps == list(range(len(steps)))
    assert 2 in steps
    assert 4 not in steps
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000002"]


@pytest.mark.parametrize(
    "options", [pytest.param(("shared",), marks=pytest.mark.exhaustive), ("push", "--weight-sync.tensor-parallel", "2")]
)
def test_two_ranks_take_the_steps_of_one(
    finished: tuple[Path, Path], server: Server, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Each with an engine of its own, or both with the halves of one."""
    whole, cache = finished
    status, log = server.run(tmp_path / "two", cache, "--weight-sync.mode", *options, ranks=2)
    assert status == 0, log[-4000:]
    shown = zip(records(tmp_path / "two", "rollouts.jsonl"), records(whole, "rollouts.jsonl"), strict=True)
    for one, other in shown:  # the same tokens; sums in another order may turn the last of the four digits written
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=2e-4), one
        assert one.pop("value") == pytest.approx(other.pop("value"), abs=1e-4), one
        assert one == other
    for one, other in zip(records(tmp_path / "two"), records(whole), strict=True):
        if one["step"]:
            for name in ("loss", "grad_norm", "reward_mean", "entropy"):
                assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
        assert one.get("parity", {"sampled_mean": 0.0})["sampled_mean"] < 1e-4

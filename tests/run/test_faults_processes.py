"""Processes that fail, and signals: a run under torchrun on two ranks ends as one without a fault does, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from steady import LIMIT_SECONDS

from benchmarks.faults import processes
from benchmarks.faults.processes import (
    ROOT,
    Arguments,
    Cell,
    Launcher,
    launch_words,
    left_behind,
    measure,
    processes_in,
    prompts_of,
    run_cell,
    state_of,
    takes_of,
    train_words,
)
from paced_fast.run.start.signals import SAME_REQUEST_SECONDS

ARGUMENTS = Arguments(timeout_seconds=60.0, limit_seconds=600.0)
LATE = f"limit of time met: no end after {ARGUMENTS.limit_seconds:g} s (10 s on a free machine)"


@dataclass
class Bench:
    """A launcher, a folder, and the run without a fault that the others are compared with."""

    launcher: Launcher
    root: Path

    def folder(self, cell: Cell) -> Path:
        return self.root / cell.name.replace("/", "-")

    def assert_as_the_whole(self, cell: Cell) -> None:
        found, expected = state_of(self.folder(cell)), state_of(self.root / "whole")
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert prompts_of(self.folder(cell)) == prompts_of(self.root / "whole")

    def log(self, cell: Cell) -> str:
        return (self.folder(cell) / "log.txt").read_text(errors="replace")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("faults").resolve()
    (root / "rewards.py").write_text(processes._REWARD)
    launcher = Launcher()
    try:
        whole = run_cell(launcher, None, root, ARGUMENTS)
        assert whole.status == 0, (root / "whole" / "log.txt").read_text(errors="replace")[-4000:]
        assert whole.left == []
        yield Bench(launcher, root)
    finally:
        launcher.close()


@pytest.mark.slow
def test_the_run_without_a_fault_is_what_the_others_are_compared_with(bench: Bench) -> None:
    state = state_of(bench.root / "whole")
    assert {"metrics.jsonl", "rollouts.jsonl", "state.json"} < state.keys()
    ledger = prompts_of(bench.root / "whole")
    # 16 completions of each of 5 steps, four of a prompt.
    assert [step for step, _ in ledger] == [step for step in range(1, 6) for _ in range(16)]


def _some(cell: Cell, *values: int, often: bool = False) -> Any:
    """A case of `make faults`, or where it is `often`, of every `make test`."""
    return pytest.param(cell, *values, id=cell.name, marks=pytest.mark.slow if often else pytest.mark.faults)


@pytest.mark.parametrize(
    "cell",
    [
        _some(Cell("kill", "reward", 1), often=True),
        _some(Cell("raise", "update", 0)),
        _some(Cell("exit", "save", 1)),
    ],
)
def test_torchrun_restarts_a_failed_rank_and_the_run_goes_on(bench: Bench, cell: Cell) -> None:
    outcome = run_cell(bench.launcher, cell, bench.root, ARGUMENTS)
    assert outcome.status is not None, LATE
    assert outcome.status == 0, bench.log(cell)[-4000:]
    assert outcome.struck
    assert outcome.attempts == 2  # one restart: no attempt is lost to a stale address
    assert outcome.left == []
    bench.assert_as_the_whole(cell)


@pytest.mark.slow
def test_a_rank_that_dies_with_a_prompt_in_hand_costs_no_prompt_and_none_is_taken_twice(bench: Bench) -> None:
    """torchrun keeps the store through its restart, with what was taken from the queues of the attempt that failed."""
    cell = Cell("kill", "take", 1)
    outcome = run_cell(bench.launcher, cell, bench.root, ARGUMENTS)
    assert outcome.status is not None, LATE
    assert outcome.status == 0, bench.log(cell)[-4000:]
    assert (outcome.struck, outcome.attempts, outcome.left) == (True, 2, [])
    found = takes_of(bench.folder(cell))
    cut = max(int(queue) for attempt, queue in found if attempt == 0)
    for (attempt, queue), lines in found.items():
        taken = sorted(item for line in lines for item in line["taken"])
        assert len(set(taken)) == len(taken), lines
        if (attempt, queue) != (0, str(cut)):
            assert taken == list(range(lines[0]["count"])), lines
    # What the rank that died had taken of step 3 was taken again, with the rest, from a queue of the same number.
    assert {line["step"] for line in found[0, str(cut)]} == {3}
    assert any(line["rank"] == 1 for line in found[0, str(cut)])
    assert {line["step"] for (attempt, _), lines in found.items() if attempt == 1 for line in lines} >= {3, 4, 5}
    assert any(attempt == 1 and queue in {q for a, q in found if a == 0} for attempt, queue in found)
    bench.assert_as_the_whole(cell)


@pytest.mark.parametrize(
    ("cell", "step"),
    [
        _some(Cell("SIGTERM", "generate", 1), 3, often=True),
        _some(Cell("SIGTERM", "build", 1), 0),
        _some(Cell("SIGUSR1", "reward", 1), 3),
        _some(Cell("SIGUSR1", "update", 0), 3),
        _some(Cell("SIGTERM", "evaluate", 0), 3),
        _some(Cell("SIGUSR1", "save", 0), 4),
        _some(Cell("SIGTERM", "save", 1), 4),
    ],
)
def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(bench: Bench, cell: Cell, step: int) -> None:
    outcome = run_cell(bench.launcher, cell, bench.root, ARGUMENTS)
    assert outcome.status is not None, LATE
    folder = bench.folder(cell)
    assert outcome.status == 0, bench.log(cell)[-4000:]
    assert outcome.attempts == 1  # a clean stop is none of torchrun's restarts
    assert outcome.left == []
    assert not (folder / "run" / "summary.json").exists()
    checkpoints = sorted(path.name for path in (folder / "run").glob("checkpoints/step_*"))
    assert checkpoints[-1:] == ([f"step_{step:06d}"] if step else [])
    assert "stopped" in bench.log(cell)
    # Started again, it goes on as if nothing had been.
    words = [*launch_words(), *train_words(folder, ARGUMENTS.timeout_seconds)]
    env = {"TMPDIR": str(folder / "tmp"), "GLOO_SOCKET_IFNAME": "lo"}
    assert bench.launcher.run(folder, words, env, ARGUMENTS.limit_seconds) == 0, bench.log(cell)[-4000:]
    bench.assert_as_the_whole(cell)


@pytest.mark.slow
def test_a_hung_rank_is_named_and_torchrun_itself_passes_a_signal_on(tmp_path: Path) -> None:
    # The command line a user types, with nothing forked.
    folder = tmp_path / "run"
    (folder / "tmp").mkdir(parents=True)
    (tmp_path / "rewards.py").write_text(processes._REWARD)
    fault = {"kind": "hang", "rank": 1, "phase": "reward", "step": 3, "once": str(folder / "struck")}
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),
        "GLOO_SOCKET_IFNAME": "lo",
        "PACED_FAULT": json.dumps(fault),
    }
    words = [sys.executable, "-m", "torch.distributed.run", *launch_words(0), *train_words(folder, 600.0)]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=env, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        end = time.monotonic() + ARGUMENTS.limit_seconds
        # Who is behind, and the stack of the rank that hangs.
        expected = ("rank 1 is behind, in phase reward of step 3; rank 0 is waiting in", "in strike")
        while not all(words in log.read_text(errors="replace") for words in expected):
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end, LATE + log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(SAME_REQUEST_SECONDS + 0.5)
        for path in processes_in(folder):  # the hung rank, which would be killed after 30 s
            os.kill(int(path.name), signal.SIGTERM)
        process.wait(LIMIT_SECONDS)
    finally:
        for path in processes_in(folder):
            os.kill(int(path.name), signal.SIGKILL)
        process.wait(LIMIT_SECONDS)
    assert left_behind(folder) == []


@pytest.mark.faults
def test_the_whole_matrix() -> None:
    result = measure(Arguments())
    assert result["cells"] == 48
    assert result["recovered_equal_and_clean"] == 48, [o for o in result["outcomes"] if not o["passed"]]
    assert result["shared_memory_left"] == []

"""Runs of the comparison on toy sizes: their files, who makes them, and the checks that notice what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import environment, run
from benchmarks.training import sample_efficiency
from benchmarks.training.efficiency import arms, curves, files, oracle, runs, schedule, suites, value, warm
from benchmarks.training.efficiency.files import Job
from benchmarks.training.efficiency.schedule import Plan
from paced_fast.data import tasks
from paced_fast.data.records import Completion, PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.rewards import Scorer
from paced_fast.run.start.build import PreparedRun, build
from paced_kernels import Bell

QUICK = suites.find("tiny-quick")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Initial policies of toy sizes."""
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm starts of this file alone, and no pictures, which have a test of their own."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(curves, "draw", lambda runs, path: None)


def job(arm: str, seed: int = 0) -> Job:
    return Job(suite="tiny-quick", arm=arm, rate=2e-4, seed=seed)


def command(folder: Path, cache: Path, words: str) -> None:
    fixed = f"sample_efficiency --quick --workers 0 --json {folder}/summary.json --cache {cache}"
    run.main([*fixed.split(), *words.split()])


# Initial policies


@pytest.mark.process
def test_the_initial_policy_is_made_once_and_equals_the_trainers_own(cache: Path, tmp_path: Path) -> None:
    folder = warm.initial_policy(QUICK, 0, cache)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm.initial_policy(QUICK, 0, cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert warm.folder_of(QUICK, 1, cache) != folder
    config = arms.arm_config(QUICK, "paced", rate=1e-4, seed=0)
    digests, losses = [], []
    for number, one in enumerate((config, warm.from_folder(config, folder))):
        built = build(dataclasses.replace(one, run_dir=str(tmp_path / str(number))), Console(quiet=True))
        digests.append(warm.policy_digest(built.trainer.policy.model))
        losses.append([built.stepper.step().record.loss for _ in range(2)])
    assert digests[0] == digests[1]
    assert losses[0] == losses[1]
    with torch.no_grad():
        next(built.trainer.policy.model.parameters()).view(-1)[0] += 1e-3
    assert warm.policy_digest(built.trainer.policy.model) != digests[0]


# Files


@pytest.mark.process
def test_a_run_has_a_file_with_everything_that_it_takes_to_judge_it(cache: Path, tmp_path: Path) -> None:
    base, mine = job("grpo"), job("paced")
    plan = Plan(jobs=(base, mine), root=tmp_path, cache=cache, base=(base,))
    schedule.run_all(plan, 0)
    found, first = mine.read(tmp_path), base.read(tmp_path)
    assert {"suite": "tiny-quick", "arm": "paced", "rate": 2e-4, "seed": 0}.items() <= found.items()
    assert found["code"] == files.code_digest()
    assert found["environment"] == environment.describe()
    assert found["policy"] == first["policy"]
    assert found["held_out"] == first["held_out"] == "c530a89218939c14 of 224 rows"
    assert found["time_budget"] == {"seconds": first["at_budget"]["train_seconds"], "on_this_processor": True}
    assert first["settings"]["algorithm"] == "grpo"
    assert found["settings"] == {"replay.mode": "on"}
    assert [point["rollouts"] for point in first["curve"]] == [0, 8, 16]
    assert all(point["rollouts"] % 8 == 0 for point in found["curve"])
    assert found["curve"][-1]["train_seconds"] >= first["at_budget"]["train_seconds"], "both budgets are used up"
    assert found["at_seconds"]["train_seconds"] >= first["at_budget"]["train_seconds"]
    assert 0 < found["curve"][1]["tokens"] <= 8 * 13
    assert set(found["curve"][0]["slices"]) == {"trivial", "k3", "k4", "k5", "k6", "hard"}
    assert found["curve"][0] == first["curve"][0] | {"train_seconds": 0.0}, "the same draws before training"
    assert set(found["value"]["held_out"]) == {"start", "middle", "end"}
    assert found["value"]["table"]["end"]["whole"]["prompts"] == 8
    assert first["value"] == {"held_out": {}, "table": {}}
    assert mine.path(tmp_path).stat().st_size < 8000


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are run, in their order; the runs themselves are left out. A rate of 2e-4 is best for PCL, 5e-5 for
    GRPO."""
    made: list[Job] = []

    def train(one: Job, **_: object) -> dict[str, Any]:
        made.append(one)
        best = {"grpo": 5e-5, "pcl": 2e-4}[one.arm]
        point = {"rollouts": 16, "tokens": 99, "train_seconds": 1.0, "samples": 8, "pass_at_8": 0.5}
        point |= {"accuracy": 0.4 if one.rate == best else 0.2, "distinct_correct": 1.0, "slices": {"trivial": 0.9}}
        figures = {"curve": [point | {"rollouts": 0, "train_seconds": 0.0}, point], "at_budget": point}
        figures |= {"at_seconds": point, "value": {"held_out": {}, "table": {}}, "mixed_group_share": 0.2}
        return {"policy": one.seed, "held_out": "x", "table": "y", "settings": {}, "warnings": [], **figures}

    monkeypatch.setattr(runs, "train", train)
    return made


def test_a_command_run_again_does_only_what_is_missing(
    trained: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(tmp_path, tmp_path, "--seeds 1 --arms pcl --no-sweep")
    before = {path.parent.name: path.read_bytes() for path in tmp_path.rglob("lr-*.json")}
    assert set(before) == {"grpo", "pcl"}
    trained.clear()
    (tmp_path / "tiny-quick/pcl/lr-0.0002_seed-0.json").unlink()
    command(tmp_path, tmp_path, "--seeds 2 --arms pcl --no-sweep")
    assert [(one.arm, one.seed) for one in trained] == [("pcl", 0), ("grpo", 1), ("pcl", 1)]
    assert (tmp_path / "tiny-quick/grpo/lr-0.0002_seed-0.json").read_bytes() == before["grpo"]
    trained.clear()
    capsys.readouterr()
    command(tmp_path, tmp_path, "--seeds 2 --arms pcl --no-sweep")
    first = capsys.readouterr().out
    command(tmp_path, tmp_path, "--seeds 2 --arms pcl --no-sweep")
    assert capsys.readouterr().out == first, "the same table of the same files"
    assert trained == []


@pytest.mark.slow
@pytest.mark.process
def test_a_run_that_is_cut_leaves_no_file_and_is_made_by_the_next_command(cache: Path, tmp_path: Path) -> None:
    """The process dies inside the second run: its claim ends with it."""
    words = f"--quick --seeds 1 --arms paced --no-sweep --workers 0 --json {tmp_path}/summary.json --cache {cache}"
    program = (
        "import os, sys\n"
        "from benchmarks import run\n"
        "from benchmarks.training.efficiency import runs\n"
        "Course, count = runs.Course.figures, []\n"
        "def cut(self):\n"
        "    count.append(1)\n"
        "    return Course(self) if len(count) == 1 else os._exit(9)\n"
        "runs.Course.figures = cut\n"
        f"run.main(['sample_efficiency', *{words.split()!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment.child_environment(), capture_output=True, check=False
    )
    assert done.returncode == 9, done.stderr.decode()[-2000:]
    assert [path.parent.name for path in tmp_path.rglob("lr-*.json")] == ["grpo"]
    command(tmp_path, cache, "--seeds 1 --arms paced --no-sweep")
    assert {path.parent.name for path in tmp_path.rglob("lr-*.json")} == {"grpo", "paced"}


def hold(path: str, one: Job, held: Any, done: Any) -> None:
    with files.claimed(one, Path(path)) as is_mine:
        assert is_mine
        held.set()
        done.wait(60)


@pytest.mark.process
def test_a_run_that_another_process_has_claimed_is_left_to_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), job("grpo"), held, done))
    other.start()
    assert held.wait(60)
    plan = Plan(jobs=(job("grpo"),), root=tmp_path, cache=tmp_path)
    assert schedule.run_job(job("grpo"), plan) is False
    with files.claimed(job("grpo", seed=1), tmp_path) as is_mine:
        assert is_mine, "another run is free"
    other.kill()
    other.join()
    with files.claimed(job("grpo"), tmp_path) as is_mine:
        assert is_mine, "a claim ends with its process"


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_share_the_runs_and_repeat_none(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    warm.initial_policy(QUICK, 0, cache)
    jobs = tuple(schedule.comparison_jobs(QUICK, dict.fromkeys(("grpo", "pcl", "paced"), 1e-4), [0]))
    schedule.run_all(Plan(jobs=jobs, root=tmp_path, cache=cache, base=jobs[:1]), 2)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("tiny-quick")]
    assert sorted(line.split()[1].rstrip(",") for line in lines) == ["grpo", "paced", "pcl"]
    assert lines[0].startswith("tiny-quick grpo"), "the others wait for the time budget"


_KILLED = """
import os, signal
from benchmarks.training.efficiency import schedule
if __name__ == "__main__":
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    schedule.run_processes(1).submit(exec, code)
    signal.pause()
"""


@pytest.mark.process
def test_a_run_ends_with_the_process_that_started_it() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        run = int(starter.stdout.readline())
        starter.kill()
        try:
            starter.communicate(timeout=60)  # until the run too has let go of the pipe
        except subprocess.TimeoutExpired:
            os.kill(run, signal.SIGKILL)
            raise


def test_jobs_of_a_seed_follow_each_other_with_the_base_first() -> None:
    jobs = schedule.comparison_jobs(QUICK, {"grpo": 1e-4, "paced": 2e-4}, [3, 4])
    assert [(one.arm, one.seed) for one in jobs] == [("grpo", 3), ("paced", 3), ("grpo", 4), ("paced", 4)]


# Refusals


def test_a_comparison_without_a_sweep_is_refused_and_a_sweep_gives_it_its_rates(
    trained: list[Job], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(tmp_path, cache, "--seeds 1 --arms pcl")
    assert "not finished for grpo, pcl: run it by --sweep" in capsys.readouterr().err
    command(tmp_path, cache, "--sweep --arms pcl")
    assert len(trained) == 2 * 3 * 2
    trained.clear()
    command(tmp_path, cache, "--seeds 1 --arms pcl")
    assert trained == [
        Job(suite="tiny-quick", arm="grpo", rate=5e-5, seed=0),
        Job(suite="tiny-quick", arm="pcl", rate=2e-4, seed=0),
    ]
    trained.clear()
    command(tmp_path, cache, "--seeds 1 --arms pcl --rate 3e-4")
    assert [one.rate for one in trained] == [3e-4, 3e-4]


def test_files_of_other_code_are_used_only_when_the_user_says_so(tmp_path: Path) -> None:
    one = {"suite": "tiny-quick", "arm": "grpo", "rate": 1e-4, "seed": 0, "policy": "p", "held_out": "h", "table": "t"}
    files.write(job("grpo"), tmp_path, one | {"code": files.code_digest(), "environment": {"commit": "abc"}})
    sample_efficiency.check_code(tmp_path, QUICK, allowed=False)
    files.write(job("pcl"), tmp_path, one | {"arm": "pcl", "code": "other", "environment": {"commit": "0ld"}})
    with pytest.raises(InputError, match=r"runs of other code \(commit 0ld\): --continue"):
        sample_efficiency.check_code(tmp_path, QUICK, allowed=False)
    sample_efficiency.check_code(tmp_path, QUICK, allowed=True)


def test_unknown_suites_and_arms_are_refused() -> None:
    with pytest.raises(InputError, match="unknown suite 'large': the suites are tiny"):
        suites.find("large")
    with pytest.raises(InputError, match="unknown arm 'gpro': the arms are grpo"):
        arms.chosen(("gpro",))
    assert arms.chosen(("paced", "dynamic")) == ["grpo", "dynamic", "paced"]


# Checks, with planted difficulties: a completion is right with a chance that its prompt's text fixes, and has one token


def difficulty(row: PromptRow) -> float:
    return int(hashlib.sha256(str(row.prompt).encode()).hexdigest()[:8], 16) / 2**32


@pytest.fixture
def planted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., runs.Course]:
    initial = warm.initial_policy(QUICK, 0, cache)
    end = Completion(token_ids=[tasks.SIGNED_SUMS_ALPHABET.index(tasks.SIGNED_SUMS_STOP)], logprobs=[0.0], stopped=True)
    source = random.Random(0)

    def score(self: Scorer, rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float | None]:
        return [float(source.random() < difficulty(row)) for row in rows]

    def generate(self: object, prompts: Sequence[object], sampling: Sampling, *, first: int = 0) -> list[Completion]:
        return [end] * (len(prompts) * sampling.samples)

    monkeypatch.setattr(Scorer, "score", score)
    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    suite = dataclasses.replace(
        QUICK, steps=44, eval_every=22, table_prompts=100, table_samples=16, oracle_every=100, oracle_samples=16
    )

    def course(prepare: Callable[[PreparedRun], PreparedRun] = lambda built: built) -> runs.Course:
        config = warm.from_folder(arms.arm_config(suite, "oracle", rate=1e-5, seed=0), initial)
        built = build(dataclasses.replace(config, run_dir=str(tmp_path / "run")), Console(quiet=True))
        made = runs.Course(prepare(built), suite, by_oracle=True)
        made.train(0.0)
        return made

    return course


@pytest.mark.process
def test_a_sound_run_has_no_warning(planted: Callable[..., runs.Course]) -> None:
    figures = planted().figures()
    assert figures["warnings"] == []
    assert figures["value"]["table"]["end"]["whole"]["rank"] > 0.8
    assert abs(figures["drawn_accuracy"] - 0.5) < 0.1


@pytest.mark.process
def test_values_shuffled_between_prompts_are_noticed(
    planted: Callable[..., runs.Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(oracle.MeasuredValues, "score", lambda self: self.values[order])
    warnings = planted().figures()["warnings"]
    assert len(warnings) == 1
    assert "do not rank the training prompts" in warnings[0]


@pytest.mark.process
def test_a_schedule_that_aims_elsewhere_is_noticed(planted: Callable[..., runs.Course]) -> None:
    def moved(built: PreparedRun) -> PreparedRun:
        built.trainer.scheduler.bell = Bell(0.9, 0.1)
        return built

    (warning,) = planted(moved).figures()["warnings"]
    assert "the mean accuracy of the drawn prompts is 0." in warning
    assert "tau is 0.5" in warning


@pytest.mark.process
def test_held_out_prompts_in_the_training_table_are_noticed(planted: Callable[..., runs.Course]) -> None:
    def shared(built: PreparedRun) -> PreparedRun:
        rows = built.collector.table.rows
        (one, *_) = (row for row in rows if row.slice == "k4")
        return dataclasses.replace(built, eval_table=PromptTable(rows=(one, *built.eval_table.rows[1:])))

    assert planted(shared).figures()["warnings"] == ["held-out prompts of k4 are in the training table"]


@pytest.mark.process
@pytest.mark.parametrize("place", ["scheduler.visits", "scheduler.last_accuracy", "log_z.outcomes.correct"])
def test_outcomes_of_evaluations_in_the_statistics_of_prompts_are_noticed(
    planted: Callable[..., runs.Course], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    sampled = value.sampled

    def leaking(built: PreparedRun, table: PromptTable, *more: Any) -> Any:
        attrgetter(place)(built.trainer)[:5] += 1
        return sampled(built, table, *more)

    monkeypatch.setattr(value, "sampled", leaking)
    assert planted().figures()["warnings"] == ["an evaluation changed the state of schedule, log Z or replay"]


# What is measured


@pytest.mark.process
def test_dropped_groups_of_dynamic_sampling_count_as_rollouts(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every reward is 0: each step draws ten rounds of 2 prompts x 4 completions, of which the batch keeps one."""
    monkeypatch.setattr(Scorer, "score", lambda self, rows, completions: [0.0] * len(rows))
    found = runs.train(job("dynamic"), cache=cache, seconds=0.0)
    assert [point["rollouts"] for point in found["curve"]] == [0, 80]
    assert found["steps"] == 1
    assert found["mixed_group_share"] is None, "the schedule's warm-up is not counted"


@pytest.mark.process
def test_a_run_goes_on_until_the_training_time_is_used_up(cache: Path) -> None:
    found = runs.train(job("grpo"), cache=cache, seconds=1.0)
    assert found["at_budget"]["rollouts"] == 16
    assert found["at_budget"] in found["curve"]
    assert found["at_seconds"]["train_seconds"] >= 1.0
    assert found["at_seconds"]["samples"] == 8


@pytest.mark.process
def test_a_run_of_the_sweep_is_measured_before_and_after_training_only(cache: Path) -> None:
    found = runs.train(job("paced", seed=files.SWEEP_SEEDS[0]), cache=cache, seconds=0.0)
    assert [point["rollouts"] for point in found["curve"]] == [0, 16]
    assert found["at_budget"] == found["curve"][-1]
    assert found["value"] == {"held_out": {}, "table": {}}


@pytest.mark.process
def test_training_time_on_a_cpu_is_that_of_the_processor(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for other work on the machine does not count, whatever the clock on the wall says."""
    monkeypatch.setattr(time, "process_time", iter(range(100)).__next__)
    found = runs.train(job("grpo"), cache=cache, seconds=0.0)
    assert found["clock"] == "processor"
    assert [point["train_seconds"] for point in found["curve"]] == [0.0, 1.0, 2.0]


def test_the_band_holds_prompts_that_are_neither_solved_nor_hopeless() -> None:
    accuracies = [0.0, 1 / 16, 0.5, 15 / 16, 1.0, None]
    found = value.errors([0.1, 0.2, 0.4, 0.3, 0.9, 0.7], accuracies)
    assert (found["whole"]["prompts"], found["band"]["prompts"]) == (5, 3)
    assert found["band"]["rank"] == pytest.approx(0.5)  # 1, 3, 2 against 1, 2, 3
    # Brier of .2 against 1/16: 1/16 .64 + 15/16 .04, and so on.
    brier = [a * (1 - v) ** 2 + (1 - a) * v**2 for v, a in ((0.2, 1 / 16), (0.4, 0.5), (0.3, 15 / 16))]
    assert found["band"]["brier"] == pytest.approx(sum(brier) / 3)


def test_the_sample_of_the_table_is_the_same_in_every_run() -> None:
    index = value.sample_of_table(4000, 1000)
    assert index == value.sample_of_table(4000, 1000)
    assert len(set(index)) == 1000
    assert 1800 < sum(index) / 1000 < 2200
    assert value.sample_of_table(5, 1000) == [0, 1, 2, 3, 4]

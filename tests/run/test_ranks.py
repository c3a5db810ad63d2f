"""Whole runs on one, two and four ranks: the same prompts, the same rewards, the same policy; errors that all share.

Ranks have the environment that torchrun would give them, and a run joins their group.
"""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from benchmarks.ranks import import_ahead, on_ranks
from paced_fast import train
from paced_fast.config import Config
from paced_fast.data import distributed, packing
from paced_fast.data.distributed import ALONE, World
from paced_fast.data.records import Completion
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation.over_ranks import gather_completions
from paced_fast.policy import micro_batches
from paced_fast.rewards.over_ranks import gather_scores, shared_judge, summed_counts
from paced_fast.train import loop

import_ahead("pytest", "paced_fast.train.loop", "tiny_run")

SECONDS = 600.0


def trained(world: World, config: Config) -> str:
    train.run(config, tiny_run.quiet())
    return "done"


def settings(tmp_path: Path, name: str, algorithm: str, **changes: Any) -> Config:
    rewards = tiny_run.write_rewards(tmp_path)
    return tiny_run.config(
        rewards, algorithm, run_dir=str(tmp_path / name), run__rollouts_per_step=16, steps=5, **changes
    )


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["paced", pytest.param("grpo", marks=pytest.mark.exhaustive)])
def test_schedule_and_policy_do_not_depend_on_the_number_of_ranks(tmp_path: Path, algorithm: str) -> None:
    """Rollouts are drawn by seed and place, so even the tokens agree; gradients differ by the order of sums."""
    for size in (1, 2, 4):
        config = settings(tmp_path, f"of{size}", algorithm)
        assert on_ranks(size, trained, config, seconds=SECONDS) == ["done"] * size
    one = lines(tmp_path / "of1", "rollouts.jsonl")
    assert len({rollout["prompt"] for rollout in one}) > 8
    assert algorithm != "paced" or any(rollout["replayed"] for rollout in one)
    policy = load_file(tmp_path / "of1" / "checkpoints" / "step_000005" / "policy" / "model.safetensors")
    start = load_file(tmp_path / "of1" / "initial" / "model.safetensors")
    moved = max(float((policy[name] - start[name]).abs().max()) for name in policy)
    assert moved > 1e-2
    for size in (2, 4):
        folder = tmp_path / f"of{size}"
        several = lines(folder, "rollouts.jsonl")
        for key in ("step", "prompt", "completion", "reward", "replayed"):
            assert [rollout[key] for rollout in several] == [rollout[key] for rollout in one], key
        found = load_file(folder / "checkpoints" / "step_000005" / "policy" / "model.safetensors")
        for name, tensor in policy.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-3 * moved, rtol=0)
        for record, other in zip(lines(tmp_path / "of1", "metrics.jsonl"), lines(folder, "metrics.jsonl"), strict=True):
            for key in ("loss", "grad_norm", "kl", "head_loss", "value_mean", "reward_mean"):
                assert other.get(key) == (None if record.get(key) is None else pytest.approx(record[key], abs=1e-4))


@pytest.mark.slow
def test_sharded_ranks_draw_and_learn_as_one(tmp_path: Path) -> None:
    alone = settings(tmp_path, "of1", "paced", optimizer__decay="none")
    sharded = settings(tmp_path, "of2", "paced", distributed__mode="sharded", optimizer__decay="none")
    assert on_ranks(1, trained, alone, seconds=SECONDS) == ["done"]
    # Stopped and taken up again, by as many ranks and then by another number of them.
    assert on_ranks(2, trained, dataclasses.replace(sharded, steps=2), seconds=SECONDS) == ["done"] * 2
    assert on_ranks(2, trained, dataclasses.replace(sharded, steps=4, resume="auto"), seconds=SECONDS) == ["done"] * 2
    assert on_ranks(1, trained, dataclasses.replace(sharded, resume="auto"), seconds=SECONDS) == ["done"]
    policies = [
        load_file(tmp_path / name / "checkpoints" / "step_000005" / "policy" / "model.safetensors")
        for name in ("of1", "of2")
    ]
    for name, tensor in policies[0].items():
        torch.testing.assert_close(policies[1][name], tensor, atol=1e-4, rtol=0)
    one, two = (lines(tmp_path / name, "rollouts.jsonl") for name in ("of1", "of2"))
    for key in ("step", "prompt", "completion", "reward", "replayed"):
        assert [rollout[key] for rollout in two] == [rollout[key] for rollout in one], key
    for record, other in zip(*(lines(tmp_path / name, "metrics.jsonl") for name in ("of1", "of2")), strict=True):
        for key in ("loss", "grad_norm", "kl", "head_loss", "value_mean", "reward_mean"):
            assert other.get(key) == (None if record.get(key) is None else pytest.approx(record[key], abs=1e-4))


FAILS_ON_ONE = """
import os

calls = 0

def own(prompts, completions, **columns):
    global calls
    calls += len(completions) > 2  # fewer are what the start tries out
    if os.environ["RANK"] == "1" and calls == 4:
        raise KeyError("gone")
    return [float(sum(map(ord, p + c)) % 3 == 0) for p, c in zip(prompts, completions)]
"""
"""A third of what a model says that knows nothing is right; in the fourth step of a process, rank 1 has no answer."""


def command(world: World, config: Config) -> tuple[object, str]:
    """Exit status of the training command with these settings, and what it writes to standard error."""
    train.run = lambda *_, **__: loop.run(config, tiny_run.quiet())  # this process ends with the test
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            train.main(["tiny"])
    except SystemExit as ended:
        return ended.code, told.getvalue()
    return 0, told.getvalue()


@pytest.mark.slow
def test_a_reward_that_raises_on_one_rank_ends_both_with_a_checkpoint(tmp_path: Path) -> None:
    own, run = tmp_path / "own.py", tmp_path / "run"
    own.write_text(FAILS_ON_ONE)
    small = {"steps": 6, "data__eval": (), "evaluation__every": 0, "run__checkpoint_every": 0}
    config = tiny_run.config(own, reward="own", run_dir=str(run), **small)
    (status, told), (other, quiet) = on_ranks(2, command, config, seconds=SECONDS)
    assert (status, other) == (3, 3)
    line = told.splitlines()[-1]
    assert line.startswith(f"stopped: step 4: rank 1: the reward function '{own}:own' failed: KeyError: 'gone' ")
    assert line.endswith(
        f"; stopped after step 3, which is saved: mend this, then continue with --resume {run}, which stands for all "
        "other options"
    )
    assert "stopped:" not in quiet, "once is enough"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000003"]
    own.write_text(FAILS_ON_ONE.replace("calls == 4", "False"))
    resumed = dataclasses.replace(config, resume="auto")
    assert [status for status, _ in on_ranks(2, command, resumed, seconds=SECONDS)] == [0, 0]
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_ranks_with_split_gradients_learn_as_one(tmp_path: Path, size: int) -> None:
    """In micro-batches so small that ranks have several, and not equally many."""
    few = {"optimizer__micro_batch_tokens": 32, "distributed__gradients": "split"}
    for name, ranks in (("of1", 1), ("split", size)):
        config = dataclasses.replace(settings(tmp_path, name, "paced", **few), steps=3)
        assert on_ranks(ranks, trained, config, seconds=SECONDS) == ["done"] * ranks
    policies = [
        load_file(tmp_path / name / "checkpoints" / "step_000003" / "policy" / "model.safetensors")
        for name in ("of1", "split")
    ]
    for name, tensor in policies[0].items():
        torch.testing.assert_close(policies[1][name], tensor, atol=1e-4, rtol=0)
    one, several = (lines(tmp_path / name, "rollouts.jsonl") for name in ("of1", "split"))
    for key in ("step", "prompt", "completion", "reward", "replayed"):
        assert [rollout[key] for rollout in several] == [rollout[key] for rollout in one], key


def fails_on_one(world: World, kind: type[Exception]) -> tuple[str, str, list[str]]:
    try:
        with world.agreement():
            if world.rank == 1:
                raise kind("out of paper")
    except (InputError, TrainingError) as error:
        return type(error).__name__, str(error), list(error.__notes__)
    return "", "", []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [InputError, TrainingError])
def test_an_error_on_one_rank_is_raised_on_all(kind: type[Exception]) -> None:
    expected = (kind.__name__, "rank 1: out of paper", [distributed.EVERYWHERE])
    assert on_ranks(2, fails_on_one, kind) == [expected, expected]


def exchanged(world: World) -> dict[str, Any]:
    rank = world.rank
    own = [Completion(token_ids=[rank, 7], logprobs=[-0.1, -0.2 * rank], stopped=rank == 1)] * rank  # none on rank 0
    judged: list[int] = []

    def judge(rows: Any, texts: Any) -> list[float | None]:
        judged.append(len(texts))
        return [None if text == "?" else float(text) for text in texts]

    found = {
        "share": list(world.share(7)),
        "completions": [(c.token_ids, c.logprobs, c.stopped) for c in gather_completions(world, own)],
        "scores": gather_scores(world, [None, 0.25 * rank]),
        "judged": shared_judge(world, judge)([0, 1, 2], ["0.5", "?", "1"]),
        "count": judged,
        "counts": summed_counts(world, {"math": {"right": rank}} if rank else {}),
        "texts": world.gather_text("r" * rank),
        "any": (world.any(False), world.any(rank == 1)),
    }
    return found


@pytest.mark.slow
def test_what_ranks_tell_each_other_arrives_in_order_of_rank() -> None:
    zero, one = on_ranks(2, exchanged)
    assert zero["share"] + one["share"] == list(range(7))
    assert zero["count"] == [1]
    assert one["count"] == [2]
    for found in (zero, one):
        assert found["completions"] == [([1, 7], [-0.1, -0.2], True)]
        assert found["scores"] == [None, 0.0, None, 0.25]
        assert found["judged"] == [0.5, None, 1.0]
        assert found["counts"] == {"math": {"right": 1}}
        assert found["texts"] == ["", "r"]
        assert found["any"] == (False, True)


def test_one_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.start("cpu", 1.0) is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK must be a number: start several processes with torchrun"):
        distributed.start("cpu", 1.0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_sequence_is_dealt_to_one_rank_and_the_tokens_are_even(ranks: int) -> None:
    lengths = [3, 9, 4, 4, 7, 1, 8, 2, 5, 6, 6, 3]
    prompts = [(1, 2, 3)] * 6 + [(4, 5)] * 6
    completions = [Completion(token_ids=[9] * n, logprobs=[-1.0] * n, stopped=True) for n in lengths]
    rollouts = packing.pack(completions, prompts, [0] * 6 + [1] * 6, [1.0] * 12, 0, torch.device("cpu"))
    dealt = micro_batches.deal(rollouts, range(12), ranks, 100)
    assert sorted(i for part in dealt for i in part) == list(range(12))
    tokens = [sum(lengths[i] for i in part) for part in dealt]
    assert max(tokens) <= 1.3 * sum(lengths) / ranks + max(lengths)
    assert all(dealt)


def test_shares_are_contiguous_and_even() -> None:
    for count in (0, 1, 5, 8, 64):
        shares = [World(rank, 4, rank, 4).share(count) for rank in range(4)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

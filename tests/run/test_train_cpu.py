"""Whole runs on a CPU: what they leave behind, that they continue bit for bit, and how they fail."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from tiny_run import build, config, quiet, write_rewards
from torch import Tensor

from paced_fast import train
from paced_fast.config import Config
from paced_fast.config.presets import preset
from paced_fast.errors import InputError, TrainingError
from paced_fast.evaluate import EvaluateArguments, evaluate_target
from paced_fast.paced.scheduler import PromptScheduler
from paced_fast.paced.trainer import Trainer
from paced_fast.policy import Policy
from paced_fast.run import checkpoint
from paced_fast.run.checkpoint.state import spread_tensors


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    return write_rewards(tmp_path)


def go(settings: Config, folder: Path, **changes: Any) -> dict[str, Any]:
    return train.run(dataclasses.replace(settings, run_dir=str(folder), **changes), quiet())


def records(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    times = ("seconds", "train_seconds", "tokens_per_second", "memory")
    kept = {k: v for k, v in record.items() if k not in times}
    return kept | ({"eval": timeless(kept["eval"])} if kept.get("eval") else {})


def everything(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: the policy, and what the trainer keeps."""
    place = folder / "checkpoints" / f"step_{step:06d}"
    assert checkpoint.verify(place) is None
    spread = [load_file(path) for path in (place / "tensors").iterdir()]
    parts = (load_file(place / "state.safetensors"), *spread)
    return {name: tensor for part in parts for name, tensor in part.items()} | checkpoint.prefixed(
        "model", load_file(place / "policy" / "model.safetensors")
    )


def assert_same_run(one: Path, two: Path, step: int) -> None:
    first, second = everything(one, step), everything(two, step)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    states = [json.loads((f / "checkpoints" / f"step_{step:06d}" / "state.json").read_text()) for f in (one, two)]
    for state in states:
        del state["counters"]["train_seconds"]
    assert states[0] == states[1]
    generators = [f / "checkpoints" / f"step_{step:06d}" / "random" / "rank_00000.json" for f in (one, two)]
    assert generators[0].read_text() == generators[1].read_text()
    assert [timeless(r) for r in records(one)] == [timeless(r) for r in records(two)]
    assert records(one, "rollouts") == records(two, "rollouts")


SUMMARY_KEYS = {
    *("preset", "algorithm", "steps", "rollouts", "train_seconds", "accuracy_before", "accuracy_after"),
    *("pass_at_8_before", "pass_at_8_after", "distinct_correct_after", "value_brier", "value_ece"),
    *("value_rank_correlation", "mixed_group_share", "skipped_steps"),
}


@pytest.mark.process
def test_a_run_leaves_a_complete_folder(rewards: Path, tmp_path: Path) -> None:
    settings = config(
        rewards,
        steps=5,
        warm_start__first__steps=3,
        warm_start__first__batch_size=8,
        evaluation__final_samples=8,
        run__report=True,
        run__checkpoint_every=2,
    )
    folder = tmp_path / "run"
    summary = go(settings, folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "rollouts.jsonl", "report.html"}
    assert list(folder.rglob("*.png"))
    assert [path for path in folder.rglob("*") if "partial" in path.name or "tmp" in path.name] == []
    assert summary.keys() >= SUMMARY_KEYS
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["rollouts"] == 5 * 16
    assert summary["steps"] == 5
    lines = records(folder)
    assert [r["step"] for r in lines] == [0, 1, 2, 3, 4, 5]
    assert [r["step"] for r in lines if "eval" in r] == [0, 2, 4, 5]
    assert summary["accuracy_before"] == lines[0]["eval"]["accuracy"]
    assert summary["accuracy_after"] == lines[-1]["eval"]["accuracy"]
    assert 0 < summary["accuracy_after"] < 1
    assert summary["pass_at_8_after"] >= summary["accuracy_after"]
    assert summary["mixed_group_share"] == pytest.approx(sum(r["mixed_group_share"] for r in lines[3:]) / 3)
    assert summary["train_seconds"] == pytest.approx(sum(sum(r["seconds"].values()) for r in lines[1:]))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    assert len(records(folder, "rollouts")) >= 5 * 4
    assert all(r["generator_mismatch_max"] < 1e-4 for r in lines[1:])
    # The warm start was kept and fits a second run.
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    again = go(tiny_policy.replaced(settings, run__report=False), tmp_path / "again")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [kept[0].name]
    assert again["accuracy_after"] == summary["accuracy_after"]
    assert_same_run(folder, tmp_path / "again", 5)
    result = evaluate_target(EvaluateArguments(run_or_model=str(folder), samples=3))
    assert result["samples"] == 3
    assert 0 <= result["accuracy"] <= 1


VARIANTS: dict[str, dict[str, Any]] = {
    "paced": {"algorithm": "paced"},
    "group mean, tree": {
        "algorithm": "paced",
        "loss__intercept": "group_mean",
        "scheduler__rule": "tree",
        "log_z__loss": "bce",
    },
    "windows, epochs": {
        "algorithm": "paced",
        "log_z__scored_per_step": 11,
        "scheduler__max_visits": 2,
        "scheduler__exploration": 0.3,
    },
    "grpo": {"algorithm": "grpo"},
    "grpo by history": {"algorithm": "grpo", "scheduler__rule": "history"},
    "flowrl": {"algorithm": "flowrl"},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_half_a_run_and_its_continuation_are_the_whole_run(rewards: Path, tmp_path: Path, variant: str) -> None:
    # A rate that falls until the last step depends on which step that is.
    settings = config(rewards, reward="odd_with_noise", optimizer__decay="none", **VARIANTS[variant])
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    go(settings, whole)
    random.seed(98)
    go(settings, halves, steps=4)
    random.seed(99)
    go(settings, halves, resume="auto")
    # The fourth step was a last one in one run only.
    lines = records(halves)
    lines[4].pop("eval_value", None)
    (halves / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_run(whole, halves, 8)
    assert json.loads((halves / "config.json").read_text())["steps"] == 8


def test_a_checkpoint_that_was_saved_with_the_steps_of_last_visits_is_read(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions kept `last_visit` among the tensors of the scheduler."""
    settings = config(rewards, reward="odd_with_noise", steps=2, data__eval=(), run__report=False)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    go(settings, whole)
    state_dict = PromptScheduler.state_dict
    with monkeypatch.context() as patch:
        before = {"last_visit": torch.arange(40)}
        patch.setattr(PromptScheduler, "state_dict", lambda self: {**state_dict(self), **before})
        go(settings, halves, steps=1)
    assert "scheduler.last_visit" in everything(halves, 1)
    go(settings, halves, resume="auto")
    assert_same_run(whole, halves, 2)


@pytest.mark.parametrize("variant", ["paced", "grpo"])
def test_a_killed_run_continues_from_its_last_checkpoint(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    settings = config(rewards, reward="odd_with_noise", **VARIANTS[variant])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go(settings, whole)
    step = Trainer.step

    def dies(self: Trainer, number: int, *rest: Any) -> Any:
        if number == 7:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            go(settings, killed)
    assert records(killed)[-1]["step"] == 6
    assert [p.name for p in (killed / "checkpoints").iterdir()] == ["step_000004"]
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rollou')  # the write that the kill tore
    go(settings, killed, resume="auto")
    assert_same_run(whole, killed, 8)


def test_every_piece_of_state_matters_or_is_refused(rewards: Path, tmp_path: Path) -> None:
    """Leaving out any one group of tensors fails loudly or changes the run: nothing saved is decoration."""
    settings = config(rewards, steps=6)
    build_and_run = build(settings, tmp_path / "run")
    for _ in range(4):
        build_and_run.stepper.step()
    tensors = {name: value.clone() for name, value in build_and_run.stepper.state_tensors().items()}
    groups = {name.split(".")[0] + "." + name.split(".")[1] for name in tensors}
    assert {"log_z.head", "log_z.optimizer", "scheduler.tree", "scheduler.last_accuracy", "replay.tree"} <= groups
    assert {"replay.token_ids", "replay.inserted", "replay.policy_version", "replay.accuracy"} <= groups
    other = build(dataclasses.replace(settings, seed=1), tmp_path / "other").stepper
    for _ in range(2):
        other.step()
    other.load_state_tensors(tensors)
    for name, tensor in spread_tensors(other.trainer).items():
        tensor.copy_(tensors[name])
    again = other.state_tensors()
    assert again.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []
    for name in ("scheduler.last_accuracy", "replay.token_ids", "replay.tree.weights", "log_z.head.mlp.0.weight"):
        with pytest.raises((KeyError, RuntimeError, ValueError)):
            other.load_state_tensors({k: v for k, v in tensors.items() if k != name})


def test_evaluation_does_not_touch_training(rewards: Path, tmp_path: Path) -> None:
    go(config(rewards, evaluation__every=1, evaluation__final_samples=4), tmp_path / "often")
    go(config(rewards, evaluation__every=0), tmp_path / "never")
    first, second = everything(tmp_path / "often", 8), everything(tmp_path / "never", 8)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    states = [
        (tmp_path / name / "checkpoints" / "step_000008" / "random" / "rank_00000.json").read_text()
        for name in ("often", "never")
    ]
    assert states[0] == states[1], "it draws nothing from the ambient generators"


def test_the_seed_decides_the_run(rewards: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        go(config(rewards, reward="odd_with_noise", steps=3, seed=seed), tmp_path / name)
    assert_same_run(tmp_path / "one", tmp_path / "two", 3)
    assert records(tmp_path / "one", "rollouts") != records(tmp_path / "other", "rollouts")


def counted_generation(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    generate = trainer.collector.generator.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        completions = generate(*args, **kwargs)
        counts.append(len(completions))
        return completions

    monkeypatch.setattr(trainer.collector.generator, "generate", counting)
    return counts


def test_dynamic_sampling_counts_what_it_drops_and_trains_on_mixed_groups(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(rewards, "grpo", scheduler__rule="dynamic", generation__group_size=2)
    stepper = build(settings, tmp_path / "run").stepper
    trainer = stepper.trainer
    counts = counted_generation(trainer, monkeypatch)
    for step in range(1, 5):
        record, _, result = stepper.step()
        fresh = result.fresh
        assert record.step == step
        assert record.rollouts == sum(counts)
        assert record.trained_sequences == fresh.rollouts.num_sequences == 8
        assert fresh.accuracy.tolist() == [0.5] * 4
        sampled_accuracy = [group.accuracy for group in (*fresh.groups, *fresh.dropped)]
        assert len(sampled_accuracy) == fresh.num_sampled // 2
        mixed = sum(0 < accuracy < 1 for accuracy in sampled_accuracy)
        assert mixed >= 4
        assert record.mixed_group_share == pytest.approx(mixed / len(sampled_accuracy))
        assert record.reward_mean == 0.5
    assert sum(counts) > 4 * 8, "some groups were dropped"


def test_dynamic_sampling_gives_up_after_its_rounds_and_takes_what_there_is(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(rewards, "grpo", reward="always", scheduler__rule="dynamic", scheduler__max_resamples=3)
    stepper = build(settings, tmp_path / "run").stepper
    trainer = stepper.trainer
    counts = counted_generation(trainer, monkeypatch)
    record = stepper.step().record
    assert counts == [16, 16, 16]
    assert record.rollouts == 48
    assert record.trained_sequences == 16
    assert record.mixed_group_share == 0.0
    assert record.reward_mean == 1.0


def test_other_rules_sample_one_round(rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = build(config(rewards, reward="always"), tmp_path / "run").stepper
    trainer = stepper.trainer
    counts = counted_generation(trainer, monkeypatch)
    stepper.step()
    assert counts == [16]


def test_the_head_learns_from_fresh_groups_only(rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = build(config(rewards, log_z__loss="bce"), tmp_path / "run").stepper
    trainer = stepper.trainer
    assert trainer.log_z is not None
    fitted: list[tuple[Tensor, Tensor]] = []
    fit = trainer.log_z.fit

    def recording(index: Tensor, target: Tensor, weight: Tensor | None = None, *, groups: int) -> tuple[Tensor, Tensor]:
        fitted.append((index.clone(), target.clone()))
        return fit(index, target, weight, groups=groups)

    monkeypatch.setattr(trainer.log_z, "fit", recording)
    replayed = 0
    for step in range(1, 6):
        record, shown, _ = stepper.step()
        index, target = fitted[-1]
        assert len(index) == len(target) == 16
        assert float(target.mean()) == pytest.approx(record.reward_mean)
        assert index.view(4, 4).eq(index.view(4, 4)[:, :1]).all()
        assert len(fitted) == step
        replayed += record.trained_sequences - 16
        assert any(row["replayed"] for row in shown) == (record.trained_sequences > 16)
    assert replayed >= 8, "there was replay to keep away from it"


@pytest.mark.parametrize("mode", ["off", "sequence_truncate"])
def test_fresh_sequences_are_weighed_against_the_generators_error_and_replayed_ones_are_not(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    stepper = build(config(rewards, mismatch__mode=mode, mismatch__cap=1.5), tmp_path / "run").stepper
    trainer = stepper.trainer
    generate = trainer.collector.generator.generate

    def too_sure(*args: Any, **options: Any) -> Any:
        """The first token's log-prob is off by 0.2 nats, up and down in turns."""
        return [
            dataclasses.replace(c, logprobs=[c.logprobs[0] + (0.2 if i % 2 else -0.2), *c.logprobs[1:]])
            for i, c in enumerate(generate(*args, **options))
        ]

    monkeypatch.setattr(trainer.collector.generator, "generate", too_sure)
    for _ in range(3):
        record, _, result = stepper.step()
    weights = result.targets.weights
    assert len(weights) == record.trained_sequences > 16
    wanted = [1.0] * 16 if mode == "off" else [math.exp(0.2), math.exp(-0.2)] * 8
    assert weights[:16].tolist() == pytest.approx(wanted, rel=1e-3)
    assert weights[16:].tolist() == [1.0] * (len(weights) - 16)
    assert record.generator_mismatch_max == pytest.approx(0.2, rel=1e-2)
    assert record.generator_mismatch_sequence_ratio == pytest.approx(math.cosh(0.2), rel=1e-3)
    assert record.generator_mismatch_outside_share == 0.0


def test_the_head_regresses_on_the_reward_less_the_drift(rewards: Path, tmp_path: Path) -> None:
    """`tb`: the residual's own minimum; FlowRL: the log Z that makes its residual vanish on average."""
    for algorithm in ("tb", "flowrl"):
        settings = config(rewards, algorithm, log_z__loss="tb", optimizer__minibatches=1, optimizer__epochs=2)
        run = build(settings, tmp_path / algorithm)
        trainer = run.trainer
        assert trainer.log_z is not None
        seen: dict[str, Any] = {}

        def fit(
            index: Tensor, target: Tensor, weight: Tensor | None = None, *, groups: int, into: Any = seen
        ) -> tuple[Tensor, Tensor]:
            assert groups == len(index.unique_consecutive())
            into.update(target=target.clone(), weight=weight)
            return torch.zeros(()), torch.zeros(())

        trainer.log_z.fit = fit  # type: ignore[method-assign]
        run.stepper.step()
        result = run.stepper.step().result
        rollouts, targets = result.rollouts, result.targets
        # Two epochs of one minibatch: the second saw the policy after one of the two updates, not the last one.
        assert seen["target"].shape == rollouts.rewards.shape
        if algorithm == "tb":
            drift = (rollouts.rewards - seen["target"]) / 0.05
            assert 0 < float(drift.abs().max()) < 3
            continue
        log_ratio = seen["weight"].log()
        old, ref = (
            torch.stack([part.sum() for part in tokens.split(rollouts.lengths)])
            for tokens in (targets.old_logprobs, targets.ref_logprobs)
        )
        wanted = targets.signal + (ref - (old + log_ratio)) / torch.tensor(rollouts.lengths)
        torch.testing.assert_close(seen["target"], wanted, rtol=1e-3, atol=1e-3)


def test_group_means_stand_for_the_value_on_fresh_sequences_only(rewards: Path, tmp_path: Path) -> None:
    stepper = build(config(rewards, loss__intercept="group_mean", scheduler__rule="uniform"), tmp_path / "run").stepper
    trainer = stepper.trainer
    assert trainer.log_z is not None
    score, kept = trainer.log_z.score, [torch.empty(0)]
    trainer.log_z.score = lambda: kept.append(score().clone()) or kept[-1]  # type: ignore[method-assign]
    for _ in range(4):
        result = stepper.step().result
    rollouts, targets, values = result.rollouts, result.targets, kept[-1]
    assert rollouts.num_sequences > 16
    means = rollouts.rewards[:16].view(4, 4).mean(1).repeat_interleave(4)
    assert torch.equal(targets.intercept[:16], means)
    assert torch.equal(targets.intercept[16:], values[rollouts.prompt_index[16:]])
    assert torch.equal(rollouts.rewards[16:], torch.ones(rollouts.num_sequences - 16))
    assert torch.equal(targets.old_logprobs, targets.ref_logprobs)


def test_the_values_on_record_are_those_before_the_update(rewards: Path, tmp_path: Path) -> None:
    stepper = build(config(rewards), tmp_path / "run").stepper
    trainer = stepper.trainer
    assert trainer.log_z is not None
    for _ in range(3):
        values = trainer.log_z.all_values()
        record = stepper.step().record
        assert set(record.value_fresh) <= set(values.tolist())
        assert record.value_mean == pytest.approx(float(values.mean()))
        assert not torch.equal(values, trainer.log_z.all_values())


def test_replay_ages_count_from_the_step_that_sampled(rewards: Path, tmp_path: Path) -> None:
    stepper = build(config(rewards, replay__max_age=1, replay__draw_per_step=99), tmp_path / "run").stepper
    trainer = stepper.trainer
    assert trainer.replay is not None
    entered = 0
    for step in range(1, 6):
        record = stepper.step().record
        assert record.trained_sequences == 16 + entered, "all of the step before and nothing older"
        entered = int((trainer.replay.policy_version == step).sum())
    assert entered > 0


@pytest.mark.parametrize("algorithm", ["paced", "tb", "tb_group", "flowrl", "grpo"])
@pytest.mark.parametrize("rule", ["auto", "tree", "greedy", "mopps", "history", "uniform", "dynamic"])
def test_every_algorithm_takes_steps_with_every_rule(rewards: Path, tmp_path: Path, algorithm: str, rule: str) -> None:
    settings = config(
        rewards, algorithm, steps=2, scheduler__rule=rule, scheduler__warmup_steps=0, data__eval=(), optimizer__epochs=2
    )
    if algorithm == "flowrl" and rule in ("tree", "greedy"):
        with pytest.raises(InputError):
            go(settings, tmp_path / "run")
        return
    stepper = build(settings, tmp_path / "run").stepper
    trainer = stepper.trainer
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
    for step in (1, 2):
        record, shown, _ = stepper.step()
        assert record.step == step
        assert record.skipped_steps == 0
        numbers = [value for value in record.line().values() if isinstance(value, float)]
        assert all(math.isfinite(number) for number in numbers)
        assert len(shown) >= 4
    after = trainer.policy.parameters()
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.policy.model.get_input_embeddings().weight.fill_(math.nan)


@pytest.mark.parametrize("algorithm", ["paced", "grpo", "flowrl"])
def test_steps_that_stay_non_finite_stop_the_run(rewards: Path, tmp_path: Path, algorithm: str) -> None:
    stepper = build(config(rewards, algorithm, data__eval=()), tmp_path / "run").stepper
    trainer = stepper.trainer
    stepper.step()
    kept = {name: value.clone() for name, value in stepper.state_tensors().items() if name.startswith("optimizer")}
    spoil(trainer)
    for number in (1, 2):
        record = stepper.step().record
        assert record.skipped_steps == 2 * number
        assert stepper.counters.consecutive_skips == number
    with pytest.raises(
        TrainingError, match=r"3 consecutive steps, up to step 4 .*lower --optimizer.learning-rate"
    ) as stop:
        stepper.step()
    assert "\n" not in str(stop.value)
    assert stepper.counters.num_updates == 2
    now = stepper.state_tensors()
    assert [name for name, value in kept.items() if not torch.equal(now[name], value)] == []
    if trainer.log_z is not None:
        assert bool(trainer.log_z.all_values().isfinite().all())


def test_a_run_that_stops_itself_ends_with_status_three(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: Any, **__: Any) -> None:
        raise TrainingError("non-finite loss in 3 steps in a row")

    monkeypatch.setattr(train, "run", stops)
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny"])
    assert stop.value.code == 3
    assert capsys.readouterr().err == "stopped: non-finite loss in 3 steps in a row\n"


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


FAILURES: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "missing file": (lambda _, tmp: {"data__train": (f"jsonl:{tmp}/absent.jsonl?reward=exact",)}, "no such file"),
    "row without answer": (
        lambda _, tmp: {
            "data__train": (
                jsonl(tmp / "a.jsonl", {"prompt": "1=1:", "answer": "1"}, {"prompt": "1=1:"}) + "?reward=exact",
            )
        },
        "a.jsonl:2 has no field 'answer'",
    ),
    "rows without answers": (
        lambda _, tmp: {"data__train": (jsonl(tmp / "c.jsonl", {"prompt": "1=1:"}) + "?reward=exact",)},
        "no known format",
    ),
    "no rows": (lambda _, tmp: {"data__train": (jsonl(tmp / "b.jsonl") + "?reward=exact",)}, "has no rows"),
    "too long": (
        lambda *_: {"data__max_prompt_tokens": 11},
        "the prompt has 12 tokens, above --data.max-prompt-tokens 11",
    ),
    "unknown reward": (lambda *_: {"data__train": ("task:signed_sums?size=9&reward=exat",)}, "did you mean 'exact'"),
    "unknown slice": (lambda *_: {"data__headline": ("k9",)}, "--data.headline names 'k9'"),
    "reward not a number": (
        lambda rewards, _: {"data__train": (f"task:signed_sums?size=9&reward={rewards}:not_a_number",)},
        "returned nan for completion",
    ),
    "reward too short": (
        lambda rewards, _: {"data__eval": (f"task:signed_sums?split=eval&reward={rewards}:too_few",)},
        "returned 1 rewards for 2 completions",
    ),
    "reward crashes": (
        lambda rewards, _: {"data__train": (f"task:signed_sums?size=9&reward={rewards}:crashes",)},
        "failed: IndexError",
    ),
    "no GPU": (lambda *_: {"model__device": "cuda"}, "torch finds none"),
    "no demonstrations": (
        lambda *_: {"warm_start__first__steps": 1, "warm_start__first__sources": ("task:signed_sums?size=9",)},
        "9 of 9 rows have no demonstration",
    ),
    "model absent": (lambda _, tmp: {"model__name": f"{tmp}/no/model"}, "no such folder"),
}


@pytest.mark.parametrize("failure", sorted(FAILURES))
def test_wrong_input_is_one_line_and_no_run_folder(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    if failure == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change, words = FAILURES[failure]
    settings = config(rewards, **change(rewards, tmp_path))
    with pytest.raises(InputError) as raised:
        go(settings, tmp_path / "deep" / "run")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "deep").exists()


FAILS_LATER = """from pathlib import Path

def late(completions, **columns):
    run = Path(__file__).parent / "run"
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().count("\\n") if metrics.is_file() else 0
    if (run / "config.json").is_file() and lines == AFTER:
        return [float(columns["gone"][0])]
    return [float(len(text) % 2) for text in completions]
"""


@pytest.mark.parametrize(
    ("lines", "step", "changes"), [(2, 3, {"data__eval": ()}), (0, 0, {})], ids=["step", "held-out"]
)
def test_a_reward_that_fails_later_is_told_with_its_step_and_the_run_goes_on_once_it_is_mended(
    tmp_path: Path, lines: int, step: int, changes: dict[str, Any]
) -> None:
    own, folder = tmp_path / "own.py", tmp_path / "run"
    own.write_text(FAILS_LATER.replace("AFTER", str(lines)))
    settings = config(own, reward="late", steps=4, run__checkpoint_every=2, run__report=False, **changes)
    with pytest.raises(TrainingError if step else InputError) as raised:
        go(settings, folder)
    kept = "stopped after step 2, which is saved: mend this, " if step else ""
    assert str(raised.value) == (
        f"step {step}: the reward function '{own}:late' failed: KeyError: 'gone' (at {own}:8 in late): correct it, or "
        f"let it return None for what it cannot judge; {kept}then "
        f"continue with --resume {folder}, which stands for all other options"
    )
    own.write_text(FAILS_LATER.replace("AFTER", "99"))
    go(settings, folder, resume="auto")
    assert [record["step"] for record in records(folder) if record["step"]] == [1, 2, 3, 4]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_in_use_is_left_alone(rewards: Path, tmp_path: Path) -> None:
    settings = config(rewards, steps=1, data__eval=())
    foreign = tmp_path / "model"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "checkpoints" / "mine.txt").write_text("precious")
    named = tmp_path / "named"
    named.mkdir()
    (named / "config.json").write_text('{"model_type": "llama"}')
    done = tmp_path / "done"
    go(settings, done)
    for folder in (foreign, named, done):
        before = contents(folder)
        with pytest.raises(
            InputError, match=r"already holds a run \(it has .*\): --resume .* continues it, --run.overwrite"
        ):
            go(settings, folder)
        assert contents(folder) == before
    for folder in (foreign, named):
        before = contents(folder)
        with pytest.raises(InputError):
            go(settings, folder, resume="auto")
        assert contents(folder) == before
    go(tiny_policy.replaced(settings, run__overwrite=True, seed=1), done)
    assert [r["step"] for r in records(done)] == [1]
    assert json.loads((done / "config.json").read_text())["seed"] == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be created"):
        go(settings, tmp_path / "file")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "output.txt").write_text("a log of the shell may be there already")
    go(settings, tmp_path / "logs")


def test_a_continuation_with_other_settings_is_refused(rewards: Path, tmp_path: Path) -> None:
    settings, folder = config(rewards, steps=2, data__eval=()), tmp_path / "run"
    go(settings, folder)
    before = contents(folder)
    other = tiny_policy.replaced(settings, loss__beta=0.1)
    with pytest.raises(InputError, match=r"--loss.beta was 0.05 in .* and is 0.1 now") as raised:
        go(other, folder, resume="auto")
    assert "\n" not in str(raised.value)
    assert contents(folder) == before


def test_resume_uses_the_previous_checkpoint_and_never_starts_over_a_damaged_run(rewards: Path, tmp_path: Path) -> None:
    settings, folder, whole = config(rewards), tmp_path / "run", tmp_path / "whole"
    go(settings, whole)
    go(settings, folder)
    last, first = (folder / "checkpoints" / f"step_{step:06d}" / "state.safetensors" for step in (8, 4))
    last.write_bytes(last.read_bytes()[:-1])
    go(settings, folder, resume="auto")
    assert_same_run(whole, folder, 8)
    for path in (last, first):
        path.unlink()
    before = contents(folder)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged \(step_000008: .*is missing"):
        go(settings, folder, resume="auto")
    assert contents(folder) == before


def test_a_continuation_with_other_data_is_refused(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are the same, so only what was read tells."""
    settings, folder = config(rewards, steps=1, data__eval=()), tmp_path / "run"
    go(settings, folder)
    before, own = contents(folder), checkpoint.identity
    monkeypatch.setattr(checkpoint, "identity", lambda *a: own(*a) | {"training prompts": "0123 of 3 rows"})
    with pytest.raises(InputError, match=r"the training prompts changed since .*step_000001 was written"):
        go(settings, folder, resume="auto", steps=2)
    assert contents(folder) == before


def test_what_a_message_advises_may_change_on_resume_and_older_folders_lack_settings(
    rewards: Path, tmp_path: Path
) -> None:
    settings = config(rewards, steps=4)
    go(settings, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    old = json.loads(path.read_text())
    for name in ("generator", "weight_sync", "mismatch"):
        del old[name]
    path.write_text(json.dumps(old))
    advised = {
        "generation__max_batch_sequences": 64,
        "weight_sync__mode": "push",
        "weight_sync__kv_cache_gib": 0.5,
        "weight_sync__max_mean_difference": 0.1,
    }
    go(tiny_policy.replaced(settings, **advised), tmp_path / "run", resume="auto", steps=6)
    assert records(tmp_path / "run")[-1]["step"] == 6


def test_several_processes_must_be_torchrun_s(rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK must be a number: start several processes with torchrun"):
        go(config(rewards), tmp_path / "run")


def test_a_draw_that_comes_up_short_stops_the_run(rewards: Path, tmp_path: Path) -> None:
    stepper = build(config(rewards, scheduler__warmup_steps=0), tmp_path / "run").stepper
    trainer = stepper.trainer
    assert trainer.log_z is not None
    with torch.no_grad():
        trainer.log_z.mlp[-1].bias.fill_(math.nan)  # type: ignore[operator, union-attr]
        trainer.log_z.inputs[:3] = 0.0
    trainer.log_z.values.fill_(math.nan)
    trainer.log_z.values[:3] = 0.5
    trainer.log_z.score = lambda: trainer.log_z.values  # type: ignore[method-assign, union-attr]
    with pytest.raises(TrainingError, match="step 1 has too few prompts to draw from"):
        stepper.step()
    assert stepper.counters.step == 0


def test_a_limit_of_visits_needs_more_prompts_than_a_step_draws(rewards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--scheduler.max-visits: each step draws 50 prompts from 40, so some would repeat"
    ):
        build(config(rewards, generation__prompts_per_step=50, scheduler__max_visits=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_that_it_is_and_how_to_go_on(
    rewards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, folder = config(rewards, steps=2), tmp_path / "run"
    go(settings, folder)
    with caplog.at_level(logging.INFO, logger="paced_fast"):
        go(settings, folder, resume="auto")
        assert f"is finished after step 2: --resume {folder} --steps 4 goes on" in caplog.text
        caplog.clear()
        go(settings, folder, resume="auto", steps=3)
    assert "is finished" not in caplog.text


def test_resume_without_a_checkpoint_starts_anew(rewards: Path, tmp_path: Path) -> None:
    settings = config(rewards, steps=2)
    go(settings, tmp_path / "whole")
    run = build(settings, tmp_path / "run")
    run.stepper.step()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    go(settings, tmp_path / "run", resume="auto")
    go(settings, tmp_path / "fresh", resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "fresh", 2)


def test_a_finished_run_continues_to_nothing(rewards: Path, tmp_path: Path) -> None:
    settings = config(rewards, steps=2)
    summary = go(settings, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert go(settings, tmp_path / "run", resume="auto") == summary
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


@pytest.mark.process
def test_no_steps_are_an_evaluation(rewards: Path, tmp_path: Path) -> None:
    summary = go(config(rewards, steps=0, run__report=True), tmp_path / "run")
    assert summary["accuracy_before"] == summary["accuracy_after"]
    assert summary["steps"] == summary["rollouts"] == 0


@pytest.mark.process
def test_no_steps_and_nothing_to_evaluate_warn_of_nothing(
    rewards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is a record without figures, so that summary and report are made as of any run."""
    with caplog.at_level(logging.WARNING, logger="paced_fast"):
        summary = go(config(rewards, steps=0, run__report=True, data__eval=()), tmp_path / "run")
    assert caplog.text == ""
    assert (summary["steps"], summary["accuracy_after"]) == (0, None)
    assert [record["step"] for record in records(tmp_path / "run")] == [0]
    assert (tmp_path / "run" / "report.html").is_file()


def test_automatic_run_folders_get_a_number(rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(rewards, "grpo", steps=1, data__eval=())
    folders = [train.run(settings, quiet())["run_dir"] for _ in range(3)]
    assert folders == ["runs/tiny-grpo-0", "runs/tiny-grpo-0-2", "runs/tiny-grpo-0-3"]


def test_a_warm_start_that_diverges_is_not_kept(rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(rewards, warm_start__first__steps=3, warm_start__first__batch_size=4)
    original = Policy.token_logprobs
    monkeypatch.setattr(Policy, "token_logprobs", lambda *args: original(*args) * math.nan)
    with pytest.raises(TrainingError, match="warm start: the loss of phase 1 is nan at step 1"):
        go(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_warm_start_of_a_bfloat16_policy_is_made_in_float32(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(
        rewards, steps=1, model__dtype="bfloat16", warm_start__first__steps=3, warm_start__first__batch_size=4
    )
    seen: list[torch.dtype] = []
    original = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        seen.extend({value.dtype for group in optimizer.param_groups for value in group["params"]})
        return original(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = build(settings, tmp_path / "run")
    assert seen == [torch.float32] * 3
    parameters = list(run.trainer.policy.model.parameters())
    assert {value.dtype for value in parameters} == {torch.bfloat16}
    assert all(value.grad is None for value in parameters)
    run.stepper.step()
    again = build(settings, tmp_path / "again")  # from the cache
    assert all(value.dtype == torch.bfloat16 for value in again.trainer.policy.model.parameters())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_selection_doubles_the_share_of_mixed_groups(tmp_path: Path) -> None:
    """The preset `tiny`: eight in ten of its prompts teach nothing, and the head finds out which.

    Its warm start takes minutes on one core and stays in the user's cache for the next time.
    """
    shares = {}
    for algorithm, rule in (("tb_group", "uniform"), ("paced", "greedy")):
        settings = tiny_policy.replaced(
            preset("tiny"),
            algorithm=algorithm,
            steps=40,
            scheduler__rule=rule,
            log_z__loss="bce",
            data__eval=(),
            data__headline=(),
            run__threads=1,
            run__report=False,
        )
        go(settings, tmp_path / algorithm)
        late = [r["mixed_group_share"] for r in records(tmp_path / algorithm) if r["step"] > 10]
        shares[algorithm] = sum(late) / len(late)
    assert shares["paced"] > 2 * shares["tb_group"], shares


@pytest.mark.parametrize("algorithm", ["flowrl", "grpo"])
def test_the_reference_is_the_policy_before_training_where_it_is_kept(
    algorithm: str, rewards: Path, tmp_path: Path
) -> None:
    run = build(config(rewards, algorithm), tmp_path / "run")
    trainer = run.trainer
    assert (trainer.initial is not None) == run.config.traits.keeps_initial_policy == (algorithm == "flowrl")
    before = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    run.stepper.step()
    second = run.stepper.step().result
    after = trainer.policy.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    kept = None if trainer.initial is None else trainer.initial.model.state_dict()
    assert kept is None or all(torch.equal(before[name], kept[name]) for name in before)
    # In the second step the policy before it is not the one before training any more.
    is_old = torch.equal(second.targets.ref_logprobs, second.targets.old_logprobs)
    assert is_old == (kept is None)

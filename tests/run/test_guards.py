"""The guards on a step's figures: each fault raises its own warning, and clean runs raise none."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import tiny_run

from paced_fast import train
from paced_fast.config import GuardConfig, WarningName
from paced_fast.data.step_record import ABSENT, StepRecord
from paced_fast.errors import TrainingError
from paced_fast.run.record.guards import Guards

NAMES = typing.get_args(WarningName)
NO_GUARD_READS: dict[str, Any] = {
    **dict.fromkeys(("learning_rate", "unscored_share", "prompts_visited_share"), math.nan),
    **dict.fromkeys(("entropy", "mean_length", "tokens_per_second"), math.nan),
    **{f"generator_mismatch_{name}": math.nan for name in ("mean", "max", "sequence_ratio", "outside_share")},
    "unknown_ids": 0,
    "trained_sequences": 0,
    "skipped_steps": 0,
    "verdicts": {},
    "seconds": {},
    "memory": {},
}
"""Fields that have no part in a warning."""


Fault = Callable[[StepRecord, int], StepRecord]


def clean_record(
    step: int, rng: random.Random, *, accuracy: float = 0.4, value: float = 0.45, **figures: Any
) -> StepRecord:
    """Figures as a run of the tiny preset has them: ranges hold those of 400 of its steps and reach further."""
    accuracies = [min(1.0, max(0.0, rng.gauss(accuracy, 0.2))) for _ in range(16)]
    found = StepRecord(
        step=step,
        loss=rng.uniform(0.5, 3.0),
        grad_norm=rng.lognormvariate(1.5, 0.7),
        reward_mean=sum(accuracies) / 16,
        mixed_group_share=0.5,
        truncated_share=rng.choice([0.0, 0.0, rng.uniform(0.0, 0.6)]),
        kl=rng.lognormvariate(-6.0, 1.2),
        log_ratio_mean=rng.gauss(0.0, 0.03),
        effective_sample_share=rng.uniform(0.9, 1.0),
        generator_mismatch_token_ratio=rng.uniform(1.0, 1.03),
        head_loss=rng.uniform(0.1, 0.3),
        head_grad_norm=rng.uniform(0.2, 2.0),
        value_mean=value,
        value_fresh=[min(0.999, max(0.001, rng.gauss(value, 0.1))) for _ in range(16)],
        accuracy_fresh=accuracies,
        **NO_GUARD_READS,
    )
    return dataclasses.replace(found, **figures)


def warnings_of(fault: Fault, steps: int = 40, config: GuardConfig | None = None) -> Any:
    """The warnings that held in each step of a clean run that goes wrong from step 21 on."""
    rng = random.Random(1)
    guards = Guards(config or GuardConfig())
    found = []
    for step in range(1, steps + 1):
        record = clean_record(step, rng)
        if step > 20:
            record = fault(record, step)
        found.append(guards.check(record))
        guards.stop(step)
    return found


def _change(**figures: Any) -> Fault:
    return lambda record, step: dataclasses.replace(record, **figures)


def _worse_and_worse(record: StepRecord, step: int) -> StepRecord:
    assert record.head_loss is not ABSENT
    return dataclasses.replace(record, head_loss=record.head_loss * 2.0 ** (step - 20))


FAULTS: dict[str, tuple[str, Fault, int]] = {
    "ratios explode in divergence": ("kl", _change(kl=3.0), 21),
    "divergence overflows": ("kl", _change(kl=math.inf), 21),
    "policy runs up": ("log_ratio", _change(log_ratio_mean=2.5), 21),
    "policy runs down": ("log_ratio", _change(log_ratio_mean=-40.0), 21),
    "few completions carry the step": ("sample_share", _change(effective_sample_share=0.05), 21),
    "generator renormalises": ("generator_mismatch", _change(generator_mismatch_token_ratio=1.06), 21),
    "generator gives no numbers": ("generator_mismatch", _change(generator_mismatch_token_ratio=math.nan), 21),
    "nothing ends": ("truncated", _change(truncated_share=1.0), 21),
    # The first step whose last five are all zero.
    "rewards fall to nothing": ("reward_collapse", _change(reward_mean=0.0, accuracy_fresh=[0.0] * 16), 25),
    "value far above": ("value_gap", _change(value_fresh=[0.985] * 16, accuracy_fresh=[0.4] * 16), 25),
    "value is no number": ("value_gap", _change(value_fresh=[math.nan] * 16), 25),
    "value stuck at zero": ("value_stuck", _change(value_fresh=[0.001] * 16), 25),
    "head diverges": ("head_loss", _worse_and_worse, 24),
    "head is no number": ("head_loss", _change(head_loss=math.nan), 21),
    "loss is no number": (
        "non_finite",
        _change(loss=math.nan, kl=math.nan, log_ratio_mean=math.nan, effective_sample_share=math.nan),
        21,
    ),
    "every reward is the same": ("no_signal", _change(mixed_group_share=0.0), 25),
    "gradient overflows": ("non_finite", _change(grad_norm=math.inf), 21),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_raises_its_own_warning_and_no_other(fault: str) -> None:
    name, inject, first = FAULTS[fault]
    found = warnings_of(inject)
    held = [step for step, names in enumerate(found, start=1) if names]
    assert {n for names in found for n in names} == {name}
    # A loss that doubles has passed 1 after two to four steps, whatever it began with.
    assert held[0] == first if fault != "head diverges" else held[0] in (22, 23, 24)
    assert len(held) > 4


def test_value_stuck_at_one() -> None:
    found = warnings_of(_change(value_fresh=[0.999] * 16, accuracy_fresh=[0.4] * 16))
    assert found[24] == ["value_gap", "value_stuck"]  # six tenths above an accuracy of four


def test_every_warning_has_a_fault_in_the_table() -> None:
    assert {name for name, _, _ in FAULTS.values()} == set(NAMES)


@pytest.mark.parametrize(
    ("accuracy", "value"),
    [(0.4, 0.45), (0.03, 0.45), (0.97, 0.55), (0.02, 0.02), (0.99, 0.97)],
    ids=["usual", "hard, head new", "easy, head new", "hard", "easy"],
)
def test_clean_runs_raise_nothing(accuracy: float, value: float) -> None:
    # Five kinds of run, ten runs of each of 20 steps: 1,000 records.
    for seed in range(10):
        rng, guards = random.Random(seed), Guards(GuardConfig())
        for step in range(1, 21):
            assert guards.check(clean_record(step, rng, accuracy=accuracy, value=value)) == []


def test_a_record_without_a_head_is_checked_too() -> None:
    guards, rng = Guards(GuardConfig()), random.Random(0)
    headless = dict.fromkeys(("head_loss", "value_fresh", "accuracy_fresh", "value_mean"), ABSENT)
    assert guards.check(clean_record(1, rng, kl=2.0, **headless)) == ["kl"]


def test_rewards_that_were_never_good_do_not_collapse() -> None:
    rng, guards = random.Random(0), Guards(GuardConfig())
    for step in range(1, 30):
        rewards = 0.0 if step > 10 else 0.05
        assert guards.check(clean_record(step, rng, accuracy=0.0, reward_mean=rewards)) == []


def test_one_lucky_step_is_no_height_to_fall_from() -> None:
    rng, guards = random.Random(0), Guards(GuardConfig())
    for step in range(1, 12):
        assert guards.check(clean_record(step, rng, accuracy=0.0, reward_mean=0.3 if step == 1 else 0.0)) == []


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split(",")[0] for record in caplog.records]


def test_a_warning_is_said_once_and_again_when_it_holds_n_steps_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paced_fast"), "propagate", True)
    rng, guards = random.Random(0), Guards(GuardConfig(repeat_every=10))
    held = {*range(3, 26), *range(30, 33), *range(50, 53)}
    with caplog.at_level(logging.WARNING):
        for step in range(1, 60):
            record = clean_record(step, rng, **({"kl": 2.5} if step in held else {}))
            assert guards.check(record) == (["kl"] if step in held else [])
    assert _said(caplog) == ["step 3", "step 13", "step 23", "step 50"]
    assert caplog.records[0].getMessage() == (
        "step 3, kl: kl is 2.5, above 1; the policy moves too far per step: lower --optimizer.learning-rate or "
        "--optimizer.max-grad-norm"
    )


@pytest.mark.parametrize("cut", [None, 8, 13, 14])
def test_a_figure_about_its_bound_is_said_as_seldom_as_one_beyond_it(
    cut: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paced_fast"), "propagate", True)
    rng, guards = random.Random(0), Guards(GuardConfig())
    with caplog.at_level(logging.WARNING):
        for step in range(1, 101):
            # Above .9 in steps 4, 6, 8 ...; every step is counted.
            record = clean_record(step, rng, truncated_share=0.95 if step >= 4 and step % 2 == 0 else 0.85)
            assert guards.check(record) == (["truncated"] if step >= 4 and step % 2 == 0 else [])
            if step == cut:
                state, guards = guards.state_dict(), Guards(GuardConfig())
                guards.load_state_dict(state)
    assert _said(caplog) == ["step 4", "step 54"]


@pytest.mark.parametrize("clears", [False, True])
def test_a_run_stops_on_a_warning_that_was_said_before(clears: bool) -> None:
    rng, guards = random.Random(0), Guards(GuardConfig())
    assert guards.check(clean_record(1, rng, truncated_share=0.95)) == ["truncated"]
    guards.stop(1)  # it is not among those that stop the run
    state, told = guards.state_dict(), GuardConfig(stop_on=("truncated",))
    guards = Guards(told)
    guards.load_state_dict(state)
    if clears:
        assert guards.check(clean_record(2, rng, truncated_share=0.85)) == []
        guards.stop(2)
    assert guards.check(clean_record(3, rng, truncated_share=0.95)) == ["truncated"]
    with pytest.raises(TrainingError, match=r"^step 3, truncated: truncated_share is 0.95, above 0.9; "):
        guards.stop(3)


def test_only_the_lead_speaks(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("paced_fast"), "propagate", True)
    guards = Guards(GuardConfig(), speaks=False)
    assert guards.check(clean_record(1, random.Random(0), kl=2.5)) == ["kl"]
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
def test_stop_on_makes_an_error_of_its_warning_alone(name: str) -> None:
    fault = next(fault for fault, (own, _, _) in FAULTS.items() if own == name)
    with pytest.raises(TrainingError, match=rf"^step \d+, {name}: .* \(--guard.stop-on\)$"):
        warnings_of(FAULTS[fault][1], config=GuardConfig(stop_on=(typing.cast(Any, name),)))
    others = tuple(other for other in NAMES if other != name)
    assert warnings_of(FAULTS[fault][1], config=GuardConfig(stop_on=typing.cast(Any, others)))


@pytest.mark.parametrize("cut", [3, 21, 23, 27, 38])
def test_a_resumed_run_warns_as_the_whole_one(cut: int, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("paced_fast").propagate = True
    for _, inject, _ in FAULTS.values():
        lines = []
        for cuts in ((), (cut,)):
            rng, guards = random.Random(1), Guards(GuardConfig(repeat_every=7))
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                for step in range(1, 41):
                    record = clean_record(step, rng)
                    if step > 20:
                        record = inject(record, step)
                    guards.check(record)
                    if step in cuts:
                        state = guards.state_dict()
                        guards = Guards(GuardConfig(repeat_every=7))
                        guards.load_state_dict(state)
            lines.append([record.getMessage() for record in caplog.records])
        assert lines[0] == lines[1]
        assert lines[0]


def test_a_checkpoint_older_than_the_guards_starts_them_anew() -> None:
    guards = Guards(GuardConfig())
    guards.load_state_dict({})
    assert guards.check(clean_record(1, random.Random(0))) == []


def test_groups_without_a_signal_are_counted_across_checkpoints_and_old_ones_are_read() -> None:
    rng = random.Random(0)
    guards = Guards(GuardConfig())
    for step in (1, 2, 3):
        assert guards.check(clean_record(step, rng, mixed_group_share=0.0)) == []
    state = guards.state_dict()
    old = state | {"scalars": state["scalars"][:3]}
    found = {}
    for name, tensors in (("own", state), ("old", old)):
        resumed = Guards(GuardConfig())
        resumed.load_state_dict(tensors)
        resumed_rng = random.Random(1)
        found[name] = [resumed.check(clean_record(s, resumed_rng, mixed_group_share=0.0)) for s in range(4, 9)]
    assert found["own"] == [[], *[["no_signal"]] * 4]
    assert found["old"] == [*[[]] * 4, ["no_signal"]]


def test_a_mixed_group_or_groups_of_one_are_no_lack_of_signal() -> None:
    rng = random.Random(0)
    guards, single = Guards(GuardConfig()), Guards(GuardConfig(), has_groups=False)
    for step in range(1, 30):
        assert guards.check(clean_record(step, rng, mixed_group_share=0.25 if step % 5 == 0 else 0.0)) == []
        assert single.check(clean_record(step, rng, mixed_group_share=0.0)) == []


def test_a_run_whose_reward_is_always_0_says_where_to_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paced_fast"), "propagate", True)
    rewards = tiny_run.write_rewards(tmp_path)
    rewards.write_text(rewards.read_text() + "\ndef never(completions, **_):\n    return [0.0] * len(completions)\n")
    small = {"steps": 3, "guard__patience": 2, "data__eval": (), "evaluation__every": 0, "run__checkpoint_every": 0}
    settings = tiny_run.config(rewards, reward="never", **small)
    with caplog.at_level(logging.WARNING):
        summary = train.train(tiny_run.build(settings, tmp_path / "run"), tiny_run.quiet())
    assert summary["warnings"]["no_signal"] == 2
    told = [record.getMessage() for record in caplog.records if "no_signal" in record.getMessage()]
    assert told == [
        "step 2, no_signal: no group has been mixed in 2 consecutive steps, and the mean reward is 0; there is nothing "
        "to learn from: check the reward on sample rollouts, or take easier data; docs/troubleshooting.md#rewards has "
        "the usual causes"
    ]


def test_a_run_records_its_warnings_and_stops_on_those_it_is_told_to(tmp_path: Path) -> None:
    settings = tiny_run.config(tiny_run.write_rewards(tmp_path), steps=3, evaluation__every=0, run__checkpoint_every=0)
    loud = tiny_policy.replaced(settings, guard__max_kl=0.0)  # any update moves the policy
    folder = tmp_path / "loud"
    summary = train.train(tiny_run.build(loud, folder), tiny_run.quiet())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["warnings"].count("kl") for line in lines[1:]] == [1, 1, 1]
    assert summary["warnings"]["kl"] == 3
    fatal = tiny_policy.replaced(loud, guard__stop_on=("kl",))
    folder = tmp_path / "fatal"
    with pytest.raises(TrainingError, match="step 1, kl: "):
        train.train(tiny_run.build(fatal, folder), tiny_run.quiet())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]  # the step that stopped it is on record

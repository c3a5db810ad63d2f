"""Token ids that no tokenizer knows: the completion is left out and counted before anything looks them up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from paced_fast.data.records import Completion, PromptRow
from paced_fast.generation.interface import without_unknown_ids
from paced_fast.rewards.scorer import score_sampled
from paced_fast.run import evaluate_policy

VOCABULARY = 10


def completion(*ids: int) -> Completion:
    return Completion(token_ids=list(ids), logprobs=[-1.0] * len(ids), stopped=False)


@pytest.mark.parametrize(
    ("ids", "is_known"),
    [((0, 9), True), ((9,), True), ((10,), False), ((3, -1, 4), False), ((2**31,), False), ((0, 12, 0), False)],
)
def test_a_completion_with_an_unknown_id_loses_its_tokens(ids: tuple[int, ...], is_known: bool) -> None:
    (found,) = without_unknown_ids([completion(*ids)], VOCABULARY)
    if is_known:
        assert found == completion(*ids)
    else:
        assert found == Completion(token_ids=[], logprobs=[], stopped=True)


def test_what_was_left_out_is_not_shown_to_the_reward_and_has_no_verdict() -> None:
    shown: list[str] = []

    def score(rows: Any, texts: Any) -> list[float | None]:
        shown.extend(texts)
        return [1.0, None]

    row = PromptRow(prompt="p", token_ids=(1,), reward="r", slice="s", columns={})
    given = without_unknown_ids([completion(10), completion(1), completion(-1), completion(2)], VOCABULARY)
    assert score_sampled(score, [row] * 4, ["", "one", "", "two"], given) == [None, 1.0, None, None]
    assert shown == ["one", "two"]
    assert score_sampled(lambda rows, texts: [], [row], [""], [completion()]) == [None]


class Poisoned:
    """A generator whose completions of these places carry an id that nobody knows."""

    def __init__(self, own: Any, places: dict[int, int]) -> None:
        self.own, self.places = own, places

    def generate(self, *arguments: Any, **options: Any) -> list[Completion]:
        found = self.own.generate(*arguments, **options)
        for place, unknown in self.places.items():
            found[place] = dataclasses.replace(found[place], token_ids=[unknown, *found[place].token_ids[1:]])
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


@pytest.mark.slow
def test_a_step_and_an_evaluation_go_on_without_them(tmp_path: Path) -> None:
    config = tiny_run.config(tiny_run.write_rewards(tmp_path), optimizer__minibatches=1)
    run = tiny_run.build(config, tmp_path / "run")
    vocabulary = run.trainer.collector.vocabulary
    bad = {0: -1, 5: vocabulary, 6: 2**31}
    run.trainer.collector.generator = Poisoned(run.collector.generator, bad)
    record = run.stepper.step().record
    assert record.unknown_ids == 3
    assert record.unscored_share == pytest.approx(3 / 16)
    assert record.skipped_steps == 0
    assert record.loss == record.loss
    # Trained as if they had not been sampled: the parameters are those of a step that has no verdict on them.
    other = tiny_run.build(config, tmp_path / "other")
    judge = other.collector.judge

    def without(rows: Any, completions: Any) -> Any:
        rewards, shaping = judge(rows, completions)
        return [None if i in bad else reward for i, reward in enumerate(rewards)], shaping

    other.collector.judge = without  # type: ignore[method-assign]
    other.stepper.step()
    pairs = zip(run.trainer.policy.parameters(), other.trainer.policy.parameters(), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    whole = evaluate_policy.evaluate_now(other, 2)
    run.collector.generator = Poisoned(run.collector.generator.own, {1: vocabulary})
    poisoned = evaluate_policy.evaluate_now(run, 2)
    assert whole is not None
    assert poisoned is not None
    assert (whole.overall.unscored, poisoned.overall.unscored) == (0, 1)

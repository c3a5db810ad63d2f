"""Slices that became worse are told from those that merely vary."""

from __future__ import annotations

import random

import pytest

from paced_fast.evaluation.forgetting import fallen_slices


def records(before: dict[str, list[float | None]], after: dict[str, list[float | None]]) -> tuple[dict, dict]:
    slices = [name for name, found in before.items() for _ in found]
    first = {"prompt_slices": slices, "prompt_accuracy": [a for found in before.values() for a in found]}
    return first, {"prompt_accuracy": [a for found in after.values() for a in found]}


def test_a_slice_that_fell_is_named_with_its_interval() -> None:
    old = [1.0, 0.95, 1.0, 1.0, 0.95] * 8
    new = [0.8, 0.75, 0.9, 0.7, 0.8] * 8
    (fall,) = fallen_slices(
        *records({"trivial": old, "hard": [0.1, 0.2] * 9}, {"trivial": new, "hard": [0.3, 0.2] * 9})
    )
    assert fall.slice == "trivial"
    assert (fall.before, fall.after) == pytest.approx((0.98, 0.79))
    assert fall.low < fall.change == pytest.approx(-0.19)
    assert fall.change < fall.high < 0
    # By hand: changes of -.2, -.2, -.1, -.3, -.15 eight times, deviation 0.0672, z of 97.5 + 1.25 % = 2.2414.
    assert fall.high == pytest.approx(-0.19 + 2.2414 * 0.0672 / 40**0.5, abs=2e-4)
    assert str(fall) == "slice trivial fell from 98.0% to 79.0% (-21.4 to -16.6 points)"


def test_the_largest_fall_comes_first() -> None:
    first, last = records({"a": [1.0] * 6, "b": [1.0] * 6}, {"a": [0.9] * 6, "b": [0.2] * 6})
    assert [fall.slice for fall in fallen_slices(first, last)] == ["b", "a"]


def test_noise_is_no_fall() -> None:
    source = random.Random(0)

    def sampled(accuracy: float) -> list[float | None]:
        return [sum(source.random() < accuracy for _ in range(16)) / 16 for _ in range(40)]

    told = 0
    for _ in range(200):
        slices = {name: 0.3 for name in "abcd"}
        first, last = ({name: sampled(accuracy) for name, accuracy in slices.items()} for _ in range(2))
        told += bool(fallen_slices(*records(first, last)))
    assert told <= 15, "one side of an interval of 95 % for all slices together: 2.5 % of 200"


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({}, {}),
        ({"prompt_slices": ["a"] * 9, "prompt_accuracy": [1.0] * 9}, {"prompt_accuracy": [0.0] * 8}),
        ({"prompt_slices": ["a"] * 9, "prompt_accuracy": [None] * 9}, {"prompt_accuracy": [0.0] * 9}),
        ({"prompt_slices": ["a"] * 4, "prompt_accuracy": [1.0] * 4}, {"prompt_accuracy": [0.0] * 4}),
        ({"prompt_slices": "a", "prompt_accuracy": 3}, {"prompt_accuracy": {}}),
    ],
    ids=["nothing", "other prompts", "unscored", "too few", "damaged"],
)
def test_what_cannot_be_compared_says_nothing(first: dict, last: dict) -> None:
    assert fallen_slices(first, last) == []

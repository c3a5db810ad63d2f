"""What reward functions of users return or raise: numbers of every library, or one line that names the function."""

from __future__ import annotations

import pytest

from paced_fast.config import RewardConfig
from paced_fast.data.records import PromptRow
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer

OWN = """
import asyncio, decimal, functools
import numpy as np
import torch

class Evil:
    def tolist(self): raise RuntimeError("evil")
class EvilLength(list):
    def __len__(self): raise RuntimeError("evil")
class EvilText:
    def __repr__(self): raise RuntimeError("evil")
class NoText(Exception):
    def __str__(self): raise ValueError
class Judge:
    async def __call__(self, completions, **columns): return [1.0] * len(completions)

judge_async = Judge()

def returns(make):
    return lambda completions, **columns: make(len(completions))

tensors = returns(lambda count: [torch.tensor(0.5)] * count)
arrays = returns(lambda count: [np.array(0.5)] * count)
decimals = returns(lambda count: [decimal.Decimal("0.5")] * count)
bools = returns(lambda count: [np.True_, True][:count])
large = returns(lambda count: [10**400] * count)
nans = returns(lambda count: [float("nan")] * count)
infinite = returns(lambda count: [torch.tensor(float("inf"))] * count)
texts = returns(lambda count: ["x" * 100_000] * count)
columns = returns(lambda count: torch.ones(count, 1))
evil = returns(lambda count: Evil())
evil_length = returns(lambda count: EvilLength([1.0] * count))
evil_text = returns(lambda count: [EvilText()] * count)

def no_text(completions, **columns): raise NoText
def long_text(completions, **columns): raise ValueError("x" * 100_000)
async def cancels(completions, **columns): raise asyncio.CancelledError

async def waits(completions, **columns): return [1.0] * len(completions)
@functools.wraps(waits)
def decorated(*given, **columns): return waits(*given, **columns)

def supplies(function):
    @functools.wraps(function)
    def supplied(completions, **columns): return function(completions, extra=1)
    return supplied
@supplies
def needs_extra(completions, extra): return [1.0] * len(completions)

def scored(solution_str, ground_truth): return torch.tensor(1.0) if solution_str == ground_truth else {"score": 0.0}
async def scored_async(solution_str, ground_truth): return {"score": float(solution_str == ground_truth)}
def no_score(solution_str, ground_truth): return {1: 2, "a": 3}
def fails(solution_str, ground_truth): return {}["key"]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


def score(name: str) -> list[float | None]:
    scorer = Scorer(settings=RewardConfig(function_seconds=30.0, async_seconds=30.0))
    row = PromptRow(prompt="p", token_ids=(0,), reward=name, slice="s", columns={"answer": "a"})
    try:
        assert scorer.problem(name, row.columns) is None
        return scorer.score([row] * 2, ["a", "b"])
    finally:
        scorer.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tensors", [0.5, 0.5]), ("arrays", [0.5, 0.5]), ("decimals", [0.5, 0.5]), ("bools", [1.0, 1.0]),
        ("needs_extra", [1.0, 1.0]), ("judge_async", [1.0, 1.0]),
    ],
)  # fmt: skip
def test_numbers_of_every_library_are_numbers(own, name, expected):
    assert score(f"{own}:{name}") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("verl:{}:scored", [1.0, 0.0]), ("verl:{}:scored_async", [1.0, 0.0]), ("trl:{}:judge_async", [1.0, 1.0])],
)
def test_functions_of_other_trainers_may_be_async_and_return_tensors(own, name, expected):
    assert score(name.format(own)) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("large", r"returned 10{400} for completion 0: return a number in \[0, 1\], or None"),
        ("nans", r"returned nan for completion 0: return a number in \[0, 1\], or None"),
        ("infinite", r"returned tensor\(inf\) for completion 0"),
        ("columns", r"returned \[1\.0\] for completion 0: return a number in \[0, 1\], or None"),
        ("texts", r"returned 'x{499}\.\.\. for completion 0"),
        ("evil", r"failed: RuntimeError: evil \(at .*own\.py:7 in tolist\): correct it, or let"),
        ("evil_length", r"failed: RuntimeError: evil \(at .*own\.py:9 in __len__\): correct it, or let"),
        ("evil_text", r"failed: RuntimeError: evil \(at .*own\.py:11 in __repr__\): correct it, or let"),
        (
            "no_text",
            r"failed: NoText: \(its message cannot be read\) \(at .*own\.py:\d+ in no_text\): correct it, or let",
        ),
        ("long_text", r"failed: ValueError: x{488}\.\.\. \(at .*own\.py:\d+ in long_text\): correct it, or let"),
        ("cancels", r"failed: CancelledError: \(at .*own\.py:\d+ in cancels\): correct it, or let"),
        (
            "decorated",
            r"returned a coroutine instead of 2 numbers: define it, or the function that decorates it, by `async def`$",
        ),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_other_values_and_failures_are_named_in_one_line(own, name, said):
    with pytest.raises(InputError, match=said) as caught:
        score(f"{own}:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_score", r"returned a dict without 'score': \['1', 'a'\]$"),
        ("fails", r"failed: KeyError: 'key' \(at .*own\.py:\d+ in fails\): correct it, or let"),
    ],
)
def test_failures_in_a_function_of_verl_are_named_with_its_own_line(own, name, said):
    with pytest.raises(InputError, match=said):
        score(f"verl:{own}:{name}")

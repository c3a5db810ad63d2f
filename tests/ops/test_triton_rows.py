"""Both stages of the Triton row engine against float64 autograd: every mode, option and dtype, in the interpreter.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    INTERPRETED,
    LEAVES,
    STAGES,
    Case,
    assert_accurate,
    assert_equal,
    default_rows,
    forced,
    make_case,
    oracle,
    recorded_modes,
    run,
    unread_offsets,
    workspace,
)
from torch import Tensor

from paced_kernels import linear_logprobs

pytestmark = INTERPRETED

LENGTHS = [12, 0, 15, 1, 20, 5]
HIDDEN, VOCAB = 70, 257  # neither a multiple of a block, nor of 8 elements

stages = pytest.mark.parametrize("stage", STAGES)


def check(case: Case, stage: str, **options: Any) -> list[str]:
    """Compare with the oracle; the modes the groups ran in."""
    with forced(STAGES[stage]), recorded_modes() as modes:
        assert_accurate(run(case, **options), oracle(case, **options), case)
    return modes


OPTIONS = {
    "plain": {},
    "mean, sharp": {"reduction": "mean", "temperature": 0.7},
    "flat, capped": {"temperature": 1.5, "importance": True, "importance_cap": 1.1},
    "mean, uncapped": {"reduction": "mean", "importance": True},
    "entropy bonus": {"entropy_bonus": 5.0, "temperature": 0.7},
    "denominator": {"denominator": torch.tensor(2.5), "entropy_bonus": -1.0},
    "grad_output 3": {"grad_scale": 3.0},
}


WAYS = {"flat": (True, True), "flat, plain": (True, False), "nested": (False, True)}
"""Whether one loop runs over the steps of all tiles, and whether pieces that need no masks are spared them."""


@pytest.mark.parametrize("way", WAYS)
def test_every_loop_and_epilogue_gives_the_same_bits(way: str) -> None:
    is_flat, is_split = WAYS[way]
    halves = STAGES["halves"]
    assert halves is not None
    plain = dataclasses.replace(halves, is_flat=False, is_split=False)
    # Three row tiles and three vocabulary tiles of two pieces on two programs. In the first row tile only the second
    # piece has targets, in the second all pieces, in the third none but the one at the edge.
    case = make_case([20, 12, 5, 27, 9], 130, 330)
    case["token_ids"][:32] = 64 + case["token_ids"][:32] % 64
    case["token_ids"][64:] = 329
    with forced(plain):
        wanted = run(case, temperature=0.7, entropy_bonus=0.3)
        logprobs = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], backend="triton").detach()
    assert_accurate(wanted, oracle(case, temperature=0.7, entropy_bonus=0.3), case)
    with forced(dataclasses.replace(plain, is_flat=is_flat, is_split=is_split)):
        assert_equal(run(case, temperature=0.7, entropy_bonus=0.3), wanted)
        found = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], backend="triton").detach()
    assert torch.equal(found, logprobs)


@stages
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_one_chunk(stage: str, name: str) -> None:
    case = make_case(LENGTHS, HIDDEN, VOCAB)
    if name == "mean, uncapped":
        case["behavior_logprobs"] = oracle(case, reduction="mean").seq_logprobs.float() + 0.3  # one per sequence
    assert check(case, stage, **OPTIONS[name]) == ["_one_pass"]


@stages
def test_constants_a_sequence_and_int32_ids(stage: str) -> None:
    case = make_case(LENGTHS, HIDDEN, VOCAB)
    case["ref_logprobs"] = torch.tensor([-70.0, 0.0, -90.0, -6.0, -110.0, -30.0])
    case["token_ids"], case["cu_seqlens"] = case["token_ids"].int(), case["cu_seqlens"].int()
    check(case, stage)


@stages
def test_without_bias_weights_and_references(stage: str) -> None:
    case = make_case(LENGTHS, HIDDEN, VOCAB)
    check({**case, "bias": None, "weights": None, "ref_logprobs": None}, stage)


@stages
@pytest.mark.parametrize("frozen", ["head_weight", "hidden", "bias", "head_weight and bias"])
def test_frozen_inputs(stage: str, frozen: str) -> None:
    case = make_case(LENGTHS, HIDDEN, VOCAB)
    case |= {name: case[name].detach() for name in frozen.split(" and ")}
    check(case, stage, workspace_bytes=workspace(STAGES[stage], case, 21))


@stages
def test_a_zero_gradient_and_no_gradient(stage: str) -> None:
    case = make_case(LENGTHS, HIDDEN, VOCAB)
    with forced(STAGES[stage]):
        found = run(case, grad_scale=0.0)
        assert all((value == 0).all() for value in found.gradients.values())
        with torch.no_grad(), recorded_modes() as modes:
            scored = run(case)
    assert (modes, scored.gradients) == ([], {})
    exact = oracle(case)
    exact.gradients = {}
    assert_accurate(scored, exact, case)


@stages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_and_steep_logits(stage: str, dtype: torch.dtype) -> None:
    for factor in (0.02, 15.0):  # nearly uniform; logits up to 100, most targets below a log-prob of -44
        case = make_case([9, 0, 17, 20], 32, 200, dtype)
        with torch.no_grad():
            case["hidden"].mul_(factor)
        for bonus in (0.0, 2.0):
            check(case, stage, entropy_bonus=bonus)


# Rows of a chunk, whether they come from a budget, and the way each group goes.
MODES = {
    "groups": (20, True, ["_one_pass"] * 4),
    "two passes": (12, True, ["_one_pass", "_two_passes", "_one_pass", "_two_passes", "_one_pass"]),
    "streamed": (12, False, ["_one_pass", "_stream", "_one_pass", "_stream", "_one_pass"]),
}


@stages
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(stage: str, mode: str) -> None:
    rows, is_budget, expected = MODES[mode]
    case = make_case([12, 0, 13, 1, 20, 11], HIDDEN, VOCAB)
    case["weights"][2] = 0.9
    budget = workspace(STAGES[stage], case, rows) if is_budget else None
    with default_rows(rows):
        assert check(case, stage, workspace_bytes=budget) == expected


def test_a_budget_is_streamed_from_128_rows_on() -> None:
    case = make_case([160, 20], 33, VOCAB)
    row_bytes, accumulator_bytes = workspace(STAGES["whole"], case, 1), VOCAB * 33 * 4
    for rows, expected in ((128, "_stream"), (127, "_two_passes")):
        budget = rows * row_bytes + accumulator_bytes
        assert check(case, "whole", workspace_bytes=budget) == [expected, "_one_pass"]


@stages
@pytest.mark.parametrize("bonus", [0.0, 2.0])
def test_offsets_that_the_host_does_not_read(stage: str, bonus: float) -> None:
    case = make_case(LENGTHS, HIDDEN, VOCAB)
    with unread_offsets():
        budget = workspace(STAGES[stage], case, 21)
        assert check(case, stage, workspace_bytes=budget, entropy_bonus=bonus) == ["_two_passes"]


DTYPES = {"bfloat16": (torch.bfloat16, list(STAGES)), "float16": (torch.float16, ["logits"])}


@pytest.mark.parametrize(("dtype", "stage"), [(name, stage) for name, (_, kept) in DTYPES.items() for stage in kept])
@pytest.mark.parametrize("rows", [10**6, 60])
def test_low_precision_is_as_good_as_dense(dtype: str, stage: str, rows: int) -> None:
    case = make_case([50, 30, 15, 33], 64, 515, DTYPES[dtype][0])
    options = {"entropy_bonus": 1.0} if rows == 60 else {}
    check(case, stage, workspace_bytes=workspace(STAGES[stage], case, rows), **options)


def linear(case: Case, backend: str = "triton", **options: Any) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and gradients of a sum over both in which row 3 counts nothing."""
    names = [name for name in LEAVES[:3] if case[name].requires_grad]
    logprobs, entropy = linear_logprobs(
        case["hidden"],
        case["head_weight"],
        case["token_ids"],
        bias=case["bias"],
        return_entropy=True,
        backend=backend,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(2, logprobs.shape[0], generator=generator)
    factors[:, 3] = 0.0
    total = (factors[0] * logprobs).sum() + (factors[1] * entropy).sum()
    found = torch.autograd.grad(total, [case[name] for name in names])
    return logprobs.detach(), entropy.detach(), *found


@stages
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_linear_logprobs(stage: str, temperature: float) -> None:
    case = make_case([50], HIDDEN, VOCAB)
    exact = {name: value.detach().double() if value.is_floating_point() else value for name, value in case.items()}
    exact |= {name: exact[name].requires_grad_() for name in LEAVES}
    wanted = linear_of_full_logits(exact, temperature)
    for rows in (16, 1000):
        with forced(STAGES[stage]):
            budget = workspace(STAGES[stage], case, rows)
            found = linear(case, temperature=temperature, workspace_bytes=budget)
            with torch.no_grad():
                scored = linear_logprobs(
                    case["hidden"],
                    case["head_weight"],
                    case["token_ids"],
                    bias=case["bias"],
                    temperature=temperature,
                    backend="triton",
                )
        assert (found[0].double() - wanted[0]).abs().max() <= tolerances.LOGPROB_NATS
        assert (scored.double() - wanted[0]).abs().max() <= tolerances.LOGPROB_NATS
        assert tolerances.relative_error(found[1], wanted[1]) <= tolerances.SCALAR_RELATIVE
        assert (found[2][3] == 0).all()
        for value, expected in zip(found[2:], wanted[2:], strict=True):
            assert tolerances.relative_error(value, expected) <= tolerances.GRADIENT_RELATIVE[torch.float32]


def linear_of_full_logits(exact: Case, temperature: float) -> tuple[Tensor, ...]:
    """The same by plain autograd."""
    logits = exact["hidden"] @ exact["head_weight"].T / temperature + exact["bias"]
    all_logprobs = logits.log_softmax(-1)
    logprobs = all_logprobs.gather(1, exact["token_ids"][:, None])[:, 0]
    entropy = torch.special.entr(all_logprobs.exp()).sum(-1)
    factors = torch.randn(2, logprobs.shape[0], generator=torch.Generator().manual_seed(1)).double()
    factors[:, 3] = 0.0
    total = (factors[0] * logprobs).sum() + (factors[1] * entropy).sum()
    found = torch.autograd.grad(total, [exact[name] for name in LEAVES[:3]])
    return logprobs.detach(), entropy.detach(), *found


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 16, 33]), max_size=4),
    hidden_size=st.integers(1, 80),
    vocab_size=st.integers(1, 300),
    rows=st.integers(1, 64),
    reduction=st.sampled_from(["sum", "mean"]),
    bonus=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_any_shape(
    lengths: list[int], hidden_size: int, vocab_size: int, rows: int, reduction: str, bonus: float, seed: int
) -> None:
    case = make_case(lengths, hidden_size, vocab_size, seed=seed)
    options = {"reduction": reduction, "entropy_bonus": bonus, "temperature": 0.9}
    exact = oracle(case, **options)
    for config in STAGES.values():
        with forced(config), default_rows(rows):
            assert_accurate(run(case, **options), exact, case)


@pytest.mark.slow
@stages
def test_the_modes_and_the_size_of_a_chunk_change_only_rounding(stage: str) -> None:
    case = make_case(LENGTHS, 33, 131)
    exact = oracle(case)
    for rows in (5, 17, 53):
        for group in (nullcontext, unread_offsets):
            with forced(STAGES[stage]), default_rows(rows), group():
                assert_accurate(run(case), exact, case)


@stages
def test_packing_in_another_order_changes_only_rounding(stage: str) -> None:
    case = make_case(LENGTHS, 33, 131)
    order = [4, 1, 0, 5, 3, 2]
    offsets = case["cu_seqlens"].tolist()
    rows = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in order])
    moved = {**case, "cu_seqlens": torch.tensor([0, *(LENGTHS[i] for i in order)]).cumsum(0)}
    moved |= {name: case[name].detach()[rows] for name in ("hidden", "token_ids", "ref_logprobs")}
    moved |= {name: case[name].detach()[order] for name in ("log_z", "rewards", "weights")}
    for name in ("hidden", "log_z"):
        moved[name].requires_grad_()
    with forced(STAGES[stage]), default_rows(21):
        found, wanted = run(moved), run(case)
    for name, index in (("hidden", rows), ("log_z", order)):
        wanted.gradients[name] = wanted.gradients[name][index]
    for name, value in found.gradients.items():
        assert tolerances.relative_error(value, wanted.gradients[name]) < 1e-6, name
    for name in ("residual", "seq_logprobs"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name)[order], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entropy, wanted.entropy[rows], rtol=1e-6, atol=1e-6)

"""Leaving out what is below rounding: within the bound of kernels/README.md against float64, and really left out.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import Case, oracle, run
from skipped_cases import SHARE, VOCAB, bounds, gradient_of_logits, peaked_case
from torch import Tensor

from paced_kernels import linear_logprobs
from paced_kernels._loss import skipping, torch_rows
from paced_kernels._loss.head import Head
from paced_kernels._loss.skipping import choose_columns, gradient_masses


def check_bounds(case: Case, share: float = SHARE, *, floor: float = 1e-11, **options: Any) -> dict[str, float]:
    """Values as without skipping, gradients within the bounds; return the errors as parts of their bounds."""
    found = run(case, backend="reference", skipped_share=share, **options)
    plain = run(case, backend="reference", **options)
    exact = oracle(case, **options)
    for name in ("loss", "residual", "seq_logprobs", "entropy"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    for name in ("bias", "log_z"):
        assert torch.equal(found.gradients[name], plain.gradients[name]), name
    parts = {}
    for name, bound in bounds(case, share, **options).items():
        error = (found.gradients[name].double() - exact.gradients[name]).norm().item()
        assert error <= bound + floor * exact.gradients[name].norm().item(), (name, error, bound)
        parts[name] = error / bound
    return parts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "mean", "temperature": 0.7},
        {"temperature": 1.5, "importance": True, "importance_cap": 1.1},
        {"denominator": 3.0, "grad_scale": 1.0},
    ],
    ids=str,
)
def test_errors_are_within_the_bound_and_not_nothing(options: dict[str, Any]) -> None:
    parts = check_bounds(peaked_case([40, 0, 13, 1, 30, 22]), **options)
    assert all(part > 1e-4 for part in parts.values()), parts


@pytest.mark.parametrize("rows_of_tile", [7, 50])
@pytest.mark.parametrize("rows", [9, 25, 200])
def test_every_mode_and_tile(rows_of_tile: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed sequences, two passes and one pass, with tiles that end inside sequences."""
    monkeypatch.setattr(torch_rows, "TILE_ROWS", rows_of_tile)
    case = peaked_case([40, 0, 13, 1, 30, 22])
    parts = check_bounds(case, workspace_bytes=rows * VOCAB * 8)
    assert all(part > 1e-4 for part in parts.values()), parts


def kept_columns(case: Case, share: float) -> Tensor | None:
    """What one tile of all rows keeps, with c = 1."""
    logits = case["hidden"].detach() @ case["head_weight"].detach().T + case["bias"].detach()
    token_ids = case["token_ids"]
    matrix = logits.softmax(-1)
    logprobs = matrix.gather(1, token_ids[:, None])[:, 0].log()
    matrix.scatter_(1, token_ids[:, None], torch.expm1(logprobs)[:, None])
    one = torch.ones_like(logprobs)
    masses = gradient_masses(-one, one, logprobs)
    return choose_columns(matrix, -one, masses, token_ids, torch.ones_like(token_ids, dtype=torch.bool), share)[0]


def test_more_is_left_out_of_peaked_rows_and_with_a_larger_share() -> None:
    kept = [kept_columns(peaked_case([60], steepness=steepness), SHARE) for steepness in (1.0, 4.0, 9.0)]
    counts = [VOCAB if columns is None else len(columns) for columns in kept]
    assert counts[0] == VOCAB
    assert counts[0] > counts[1] > counts[2] > 0
    assert counts[2] < VOCAB / 5
    finer = kept_columns(peaked_case([60], steepness=9.0), SHARE / 64)
    assert finer is None or len(finer) > counts[2]


def test_many_entries_below_any_threshold_count_as_their_sum() -> None:
    """All other tokens are alike: each entry is far below the share, all together are 1 - p of the row."""
    case = peaked_case([30])
    with torch.no_grad():
        case["hidden"].zero_()[:, 0] = 1.0
        case["head_weight"][:, 0] = 1.0
        case["bias"].zero_()
        case["token_ids"].fill_(3)
        case["bias"][3] = math.log(VOCAB)  # p of the token is one half
    parts = check_bounds(case)
    assert max(parts.values()) < 1e-6
    assert kept_columns(case, SHARE) is None  # a quarter at least would have to go, and only a share of 1/32 may


def test_one_flat_row_among_peaked_ones_keeps_its_gradient() -> None:
    """The sum over all rows would let a row be lost whose gradient is a part of the share: the squares do not."""
    case = peaked_case([100], steepness=9.0)
    with torch.no_grad():
        case["bias"].zero_()
        case["hidden"][50] = 0.0
    share = 0.02
    gradient = gradient_of_logits(case)
    masses = gradient.gather(1, case["token_ids"][:, None]).abs()[:, 0]
    assert masses[50] < 2 * share * masses.sum()
    check_bounds(case, share)
    found = run(case, backend="reference", skipped_share=share).gradients["hidden"]
    exact = oracle(case).gradients["hidden"]
    largest = case["head_weight"].detach().norm(dim=1).max()
    assert (found - exact)[50].norm() <= 2 * share * largest * masses.norm()


@pytest.mark.parametrize("spread", [1e-12, 1e-3, 1e3, 1e12])
def test_row_weights_that_differ_by_orders_of_magnitude(spread: float) -> None:
    """The bound follows the gradients and not the probabilities: what the heavy sequence needs is kept."""
    case = peaked_case([20, 20, 20, 20, 20, 20], weights=torch.tensor([1.0, spread, 1.0, -spread, 0.0, 1.0]))
    check_bounds(case)


def test_coefficients_of_tokens_and_tiny_ones() -> None:
    """`linear_logprobs` has a coefficient of its own for each token; with 1e-30 squares would vanish in float32."""
    case = peaked_case([60])
    leaves = [case[name].detach().float().requires_grad_() for name in ("hidden", "head_weight", "bias")]
    coefficient = torch.randn(60).exp() * torch.tensor([1.0, -1.0, 0.0]).repeat(20)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = exact[0] @ exact[1].T + exact[2]
    wanted = (logits.log_softmax(-1).gather(1, case["token_ids"][:, None])[:, 0] * coefficient.double()).sum()
    wanted = torch.autograd.grad(wanted, exact)
    probability = logits.detach().softmax(-1).gather(1, case["token_ids"][:, None])[:, 0]
    masses = coefficient.double().abs() * (1 - probability)
    limits = [2 * exact[1].norm(dim=1).max() * masses.norm(), exact[0].norm(dim=1).max() * masses.sum()]
    for scale in (1.0, 1e-30):
        logprobs = linear_logprobs(*leaves[:2], case["token_ids"], bias=leaves[2], skipped_share=SHARE)
        found = torch.autograd.grad((logprobs * coefficient).sum() * scale, leaves)
        for value, expected, limit in zip(found[:2], wanted[:2], limits, strict=True):
            error = (value.double() / scale - expected).norm()
            assert 1e-5 * SHARE * limit < error <= SHARE * limit + 1e-5 * expected.norm()
        torch.testing.assert_close(found[2].double() / scale, wanted[2], rtol=1e-4, atol=1e-5)


def test_the_gradient_through_entropies_leaves_nothing_out() -> None:
    case = peaked_case([40, 13, 30])
    found = run(case, backend="reference", skipped_share=0.5, entropy_bonus=0.3)
    plain = run(case, backend="reference", entropy_bonus=0.3)
    for name, value in plain.gradients.items():
        assert torch.equal(found.gradients[name], value), name


def test_no_share_is_the_same_bits_and_half_a_share_is_not() -> None:
    case = peaked_case([40, 13, 30])
    plain, none = run(case, backend="reference"), run(case, backend="reference", skipped_share=0.0)
    half = run(case, backend="reference", skipped_share=0.5)
    for name in ("hidden", "head_weight"):
        assert torch.equal(none.gradients[name], plain.gradients[name])
        assert not torch.equal(half.gradients[name], plain.gradients[name])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_left_out(value: float) -> None:
    case = peaked_case([20, 20, 20])
    with torch.no_grad():
        case["hidden"][25, 0] = value
    case["weights"] = torch.ones(3)
    found = run(case, backend="reference", skipped_share=0.5).gradients
    plain = run(case, backend="reference").gradients
    for name in ("hidden", "head_weight"):
        assert torch.equal(found[name].isnan(), plain[name].isnan()), name
        assert found[name].isnan().any(), name


def test_rows_that_do_not_count_may_hold_anything_and_cost_nothing() -> None:
    """A sequence of weight 0 without a finite state: the others leave out what they do without it."""
    case = peaked_case([20, 20, 20], weights=torch.tensor([1.0, 0.0, 1.0]))
    wanted = run(case, backend="reference", skipped_share=SHARE).gradients
    plain = run(case, backend="reference").gradients
    with torch.no_grad():
        case["hidden"][20:40] = math.nan
    found = run(case, backend="reference", skipped_share=SHARE).gradients
    for name in ("hidden", "head_weight"):
        assert torch.equal(found[name], wanted[name]), name
        assert not torch.equal(found[name], plain[name]), name


def test_what_two_ranks_leave_out_is_together_within_the_bound() -> None:
    """Each has half of the columns and half of the share, and no rank knows what the other leaves out."""
    case = peaked_case([60], steepness=9.0)
    logits = (case["hidden"] @ case["head_weight"].T + case["bias"]).detach()
    token_ids, half = case["token_ids"], VOCAB // 2
    matrix = logits.softmax(-1)
    logprobs = matrix.gather(1, token_ids[:, None])[:, 0].log()
    matrix.scatter_(1, token_ids[:, None], torch.expm1(logprobs)[:, None])
    scale = torch.randn(60, dtype=torch.float64)
    masses = gradient_masses(scale, torch.ones_like(scale), logprobs)
    torch.testing.assert_close(masses, scale.abs() * -torch.expm1(logprobs))
    left_out = torch.zeros(60, dtype=torch.float64)
    for start in (0, half):
        own = matrix[:, start : start + half].contiguous()
        is_owned = (token_ids >= start) & (token_ids < start + half)
        target = torch.where(is_owned, token_ids - start, 0)
        columns, _, _ = choose_columns(own, scale, masses, target, is_owned, SHARE / 2)
        assert columns is not None
        rest = torch.ones(half, dtype=torch.float64).index_fill_(0, columns, 0.0)
        assert rest.sum() > 0
        left_out += (own * scale[:, None]).abs() @ rest
    assert left_out.sum() <= SHARE * masses.sum()
    assert left_out.norm() <= SHARE * masses.norm()


def test_ranks_share_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def noted(*arguments: Any) -> Any:
        given.append(arguments[-1])
        return choose_columns(*arguments)

    monkeypatch.setattr(torch_rows, "choose_columns", noted)
    monkeypatch.setattr(Head, "num_ranks", 4)
    run(peaked_case([40, 13, 30]), backend="reference", skipped_share=SHARE)
    assert given == [SHARE / 4]


def test_nothing_to_learn_and_nothing_to_keep() -> None:
    """All coefficients are 0: the choice keeps no column, and gradients are exactly 0."""
    case = peaked_case([20, 20], weights=torch.zeros(2))
    found = run(case, backend="reference", skipped_share=SHARE).gradients
    assert found["hidden"].abs().max() == 0
    assert found["head_weight"].abs().max() == 0


def test_low_precision_is_rounded_and_left_out_of_alike() -> None:
    """bfloat16 inputs: the error beside rounding of the results stays within the bound."""
    case = peaked_case([40, 13, 30])
    case |= {name: case[name].detach().bfloat16().requires_grad_() for name in ("hidden", "head_weight", "bias")}
    check_bounds(case, floor=4e-3)


def test_two_runs_are_bit_equal_and_frozen_inputs_need_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = peaked_case([40, 13, 30])
    first, second = (run(case, backend="reference", skipped_share=SHARE) for _ in range(2))
    for name, value in first.gradients.items():
        assert torch.equal(value, second.gradients[name])
    for frozen in ("hidden", "head_weight"):
        part = {**case, frozen: case[frozen].detach()}
        found = run(part, backend="reference", skipped_share=SHARE).gradients
        assert frozen not in found
        for name, value in found.items():
            assert torch.equal(value, first.gradients[name])
    monkeypatch.setattr(torch_rows, "choose_columns", None)
    alone = {**case, **{name: case[name].detach() for name in ("hidden", "head_weight")}}
    assert set(run(alone, backend="reference", skipped_share=SHARE).gradients) == {"bias", "log_z"}


def test_a_choice_is_made_in_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second attempt the case of the flat row would keep everything."""
    case = peaked_case([100], steepness=9.0)
    with torch.no_grad():
        case["hidden"][50] = 0.0
    kept = kept_columns(case, 0.02)
    assert kept is not None
    monkeypatch.setattr(skipping, "ATTEMPTS", 1)
    assert kept_columns(case, 0.02) is None


@pytest.mark.parametrize("coefficients", ["equal", "one heavy", "one light of few", "spread"])
@pytest.mark.parametrize("steepness", [2.0, 4.0, 9.0])
def test_both_sums_over_what_is_left_out_are_within_the_share(steepness: float, coefficients: str) -> None:
    """Counted entry by entry. One heavy row among many light ones makes the first sum the narrower, equal rows neither,
    and a flat row the second."""
    rows = 100
    case = peaked_case([rows], steepness=steepness)
    with torch.no_grad():
        case["hidden"][50] = 0.0
    logits = (case["hidden"] @ case["head_weight"].T + case["bias"]).detach()
    token_ids = case["token_ids"]
    matrix = logits.softmax(-1)
    logprobs = matrix.gather(1, token_ids[:, None])[:, 0].log()
    matrix.scatter_(1, token_ids[:, None], torch.expm1(logprobs)[:, None])
    scale = {
        "equal": torch.ones(rows),
        "one heavy": torch.full((rows,), 0.05).index_fill_(0, torch.tensor([7]), 1.0),
        "one light of few": torch.zeros(rows)
        .index_fill_(0, torch.arange(40, 52), 1.0)
        .index_fill_(0, torch.tensor([50]), 0.3),
        "spread": (3 * torch.randn(rows, generator=torch.Generator().manual_seed(3))).exp(),
    }[coefficients].double() * torch.where(torch.arange(rows) % 3 == 0, -1.0, 1.0)
    masses = gradient_masses(scale, torch.ones_like(scale), logprobs)
    owned = torch.ones(rows, dtype=torch.bool)
    chosen = 0
    for share in (0.3, 0.05, 0.01):
        columns = choose_columns(matrix, scale, masses, token_ids, owned, share)[0]
        if columns is None:
            continue
        chosen += 1
        is_out = torch.ones(matrix.shape[1], dtype=torch.bool).index_fill_(0, columns, False)
        left_out = ((scale[:, None] * matrix).abs() * is_out).sum(1)
        assert 0 < left_out.sum() <= share * masses.sum() * (1 + 1e-9)
        assert left_out.norm() <= share * masses.norm() * (1 + 1e-9)
    assert chosen

"""The Triton row engines at the edges: sizes around a block, rows near and far from certainty, and values not finite.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from kernel_cases import (
    INTERPRETED,
    STAGES,
    Case,
    Result,
    assert_accurate,
    assert_equal,
    forced,
    logprobs_of_logits,
    make_case,
    oracle,
    run,
)
from torch import Tensor

from paced_kernels import linear_logprobs

pytestmark = INTERPRETED

stages = pytest.mark.parametrize("stage", STAGES)

NUM_COLUMNS = 150  # more than a tile of 128


def check(case: Case, stage: str, **options: object) -> Result:
    with forced(STAGES[stage]):
        found = run(case, **options)
    assert_accurate(found, oracle(case, **options), case)
    return found


# T, H, V: tiles have 128 rows or 32, 128 columns or two times 64, and step by 64 or 32 through H.
SIZES = {
    "one of everything": (1, 1, 1),
    "vocabulary of one": (5, 64, 1),
    "vocabulary of two": (33, 64, 2),
    "one column less than a tile": (31, 64, 127),
    "a tile": (32, 64, 128),
    "one row and one column more": (33, 65, 129),
    "one row less": (127, 8, 65),
    "128 rows": (128, 8, 63),
    "one row more": (129, 8, 64),
}


@stages
@pytest.mark.parametrize("name", SIZES)
def test_sizes_around_a_block(stage: str, name: str) -> None:
    num_rows, hidden_size, vocab_size = SIZES[name]
    check(make_case([num_rows], hidden_size, vocab_size), stage, temperature=0.9)


@pytest.mark.parametrize("stage", ["logits", "wide"])
def test_a_vocabulary_of_real_size(stage: str) -> None:
    case = make_case([3, 0, 2], 40, 32000)
    with forced(STAGES["logits"]) if stage == "logits" else pytest.MonkeyPatch.context():
        found = run(case, entropy_bonus=0.1)  # the configuration the interpreter takes by itself
    assert_accurate(found, oracle(case, entropy_bonus=0.1), case)


SEQUENCES = {
    "no sequence": [],
    "all empty": [0, 0, 0],
    "empty ones at the ends": [0, 0, 5, 0],
    "many tiny": [1, 2, 0, 1, 1, 3, 1, 0, 2, 1],
    "at the borders of tiles": [31, 1, 32, 33, 1],
}


@stages
@pytest.mark.parametrize("name", SEQUENCES)
def test_lengths_of_sequences(stage: str, name: str) -> None:
    found = check(make_case(SEQUENCES[name], 16, 70), stage, reduction="mean")
    assert found.gradients["head_weight"].shape == (70, 16)
    if not sum(SEQUENCES[name]):
        assert not found.gradients["head_weight"].any()


@stages
def test_targets_at_the_ends_of_the_vocabulary(stage: str) -> None:
    case = make_case([40], 16, 131)
    case["token_ids"] = torch.tensor([0, 130, 127, 128, 129, 63, 64, 1]).repeat(5)
    check(case, stage)


def certain_row(logprob: float, target: int) -> Tensor:
    """Float64 logits [V] in which the target has this log-prob, against column 3; others are exp(-35) of the top."""
    margin = -logprob if logprob < -30 else math.log(math.expm1(-logprob))  # of column 3 over the target
    row = torch.full((NUM_COLUMNS,), -35.0, dtype=torch.float64)
    row[3], row[target] = min(margin, 0.0), min(-margin, 0.0)
    return row


LOGPROBS = [-1e-7, -1e-3, -0.5, -10.0, -40.0, -43.9, -44.1, -85.0, -89.0, -104.0, -1000.0]


def rows_of(logprobs: list[float], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    targets = torch.tensor([(17 * i + 5) % NUM_COLUMNS for i in range(len(logprobs))])
    rows = [certain_row(logprob, int(target)) for logprob, target in zip(logprobs, targets, strict=True)]
    return torch.stack(rows).to(dtype), targets


@stages
def test_logprobs_of_any_size_and_their_gradients(stage: str) -> None:
    logits, targets = rows_of(LOGPROBS)
    with forced(STAGES[stage]):
        logprobs, entropy, gradient = logprobs_of_logits(logits, targets)
    exact = logits.double().requires_grad_()
    all_logprobs = exact.log_softmax(-1)
    chosen = all_logprobs.gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(chosen.sum(), exact)[0]
    # Relative accuracy, in the gradient too: 1 - p is never formed by subtraction.
    assert ((logprobs.double() - chosen).abs() <= 2e-6 * chosen.abs()).all()
    assert ((gradient.double() - expected).norm(dim=1) <= 5e-6 * expected.norm(dim=1)).all()
    wanted = torch.special.entr(all_logprobs.exp()).sum(-1)
    assert ((entropy.double() - wanted).abs() <= 1e-5 * wanted + 1e-7).all()


@stages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_improbable_tokens(stage: str, dtype: torch.dtype) -> None:
    # One sequence per row: with exponentials relative to the target, the rows below -44 would leave bfloat16.
    logits, targets = rows_of(LOGPROBS, dtype)
    case = make_case([1] * len(LOGPROBS), NUM_COLUMNS, NUM_COLUMNS, dtype)
    case |= {"hidden": logits.requires_grad_(), "head_weight": torch.eye(NUM_COLUMNS, dtype=dtype).requires_grad_()}
    case |= {"token_ids": targets, "bias": None, "ref_logprobs": None, "weights": None}
    with forced(STAGES[stage]):
        found = run(case)
    exact = oracle(case)
    bound = tolerances.GRADIENT_RELATIVE[dtype]
    rows = exact.gradients["hidden"].norm(dim=1).clamp(min=1e-30)
    assert ((found.gradients["hidden"].double() - exact.gradients["hidden"]).norm(dim=1) / rows <= bound).all()
    weight = exact.gradients["head_weight"]
    assert tolerances.relative_error(found.gradients["head_weight"], weight) <= bound
    assert tolerances.relative_error(found.loss, exact.loss) <= tolerances.SCALAR_RELATIVE


@pytest.mark.parametrize("stage", ["halves", "whole"])
def test_a_recomputed_row_leaves_its_neighbours_alone(stage: str) -> None:
    logprobs = [-0.5, -40.0, -2.0, -43.9, -1e-7] * 7
    results = []
    for flagged in ((), (2,), (0, 5, 34), tuple(range(0, 35, 2))):
        mixed = [-90.0 - i if i in flagged else value for i, value in enumerate(logprobs)]
        logits, targets = rows_of(mixed)
        with forced(STAGES[stage]):
            found = run(case_of_logits(logits, targets), beta=1.0)
        results.append((set(flagged), found))
        # The flagged ones are right, too.
        exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.seq_logprobs.double(), exact, rtol=2e-6, atol=0)
    plain = results[0][1]
    for flagged, found in results[1:]:
        same = [i for i in range(35) if i not in flagged]
        for name in ("seq_logprobs", "entropy", "residual"):
            assert torch.equal(getattr(found, name)[same], getattr(plain, name)[same]), name
        assert torch.equal(found.gradients["hidden"][same], plain.gradients["hidden"][same])


def case_of_logits(logits: Tensor, targets: Tensor) -> Case:
    """One sequence per row, whose head is the identity."""
    case = make_case([1] * logits.shape[0], logits.shape[1], logits.shape[1])
    head_weight = torch.eye(logits.shape[1], requires_grad=True)
    case |= {"hidden": logits.clone().requires_grad_(), "head_weight": head_weight, "token_ids": targets}
    return {**case, "bias": None, "ref_logprobs": None, "weights": None}


@stages
def test_equal_and_huge_logits(stage: str) -> None:
    equal = torch.full((3, NUM_COLUMNS), 7.0)
    targets = torch.tensor([0, 100, NUM_COLUMNS - 1])
    with forced(STAGES[stage]):
        logprobs, entropy, gradient = logprobs_of_logits(equal, targets)
        torch.testing.assert_close(logprobs, torch.full((3,), -math.log(NUM_COLUMNS)), rtol=1e-6, atol=0)
        torch.testing.assert_close(entropy, torch.full((3,), math.log(NUM_COLUMNS)), rtol=1e-6, atol=0)
        expected = torch.nn.functional.one_hot(targets, NUM_COLUMNS) - 1 / NUM_COLUMNS
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
        huge = torch.zeros(4, NUM_COLUMNS)
        huge[:, 0], huge[:, 140] = 1e4, -1e4
        huge[3] = -1e4
        logprobs, entropy, gradient = logprobs_of_logits(huge, torch.tensor([0, 140, 9, 9]))
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -2e4, -1e4, -math.log(NUM_COLUMNS)]), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.0, 0.0, math.log(NUM_COLUMNS)]), rtol=1e-6, atol=0)
    assert not gradient[0].any()
    assert gradient[1].nonzero()[:, 0].tolist() == [0, 140]
    assert gradient[1:3].sum(1).tolist() == [0.0, 0.0]


@stages
@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_a_masked_vocabulary(stage: str, bonus: float) -> None:
    # -inf biases over a whole tile, over parts of others, and all but the target of row 0.
    case = make_case([9, 4], 16, 300)
    case["token_ids"] = case["token_ids"] % 20
    case["weights"] = torch.tensor([1.0, -0.5])
    masked = case["bias"].detach().clone()
    masked[20:280] = -math.inf
    for bias in (masked, torch.where(torch.arange(300) == case["token_ids"][0], masked, -math.inf)):
        kept = bias.isfinite()
        if kept.sum() == 1:
            case["token_ids"] = torch.full_like(case["token_ids"], int(kept.nonzero()[0, 0]))
        with forced(STAGES[stage]):
            found = run({**case, "bias": bias.clone().requires_grad_()}, entropy_bonus=bonus)
        index = kept.cumsum(0) - 1
        small = {**case, "head_weight": case["head_weight"].detach()[kept].requires_grad_(), "bias": bias[kept]}
        small["bias"].requires_grad_()
        exact = oracle({**small, "token_ids": index[case["token_ids"]]}, entropy_bonus=bonus)
        assert not found.gradients["head_weight"][~kept].any()
        assert not found.gradients["bias"][~kept].any()
        for name in ("head_weight", "bias"):
            found.gradients[name] = found.gradients[name][kept]
        assert_accurate(found, exact, case)


@stages
def test_a_masked_target_has_logprob_minus_infinity(stage: str) -> None:
    case = make_case([4], 16, 150)
    bias = case["bias"].detach().clone()
    bias[case["token_ids"][1]] = -math.inf
    names = ("hidden", "head_weight", "token_ids")
    with forced(STAGES[stage]):
        logprobs = linear_logprobs(*(case[name] for name in names), bias=bias, backend="triton")
    assert logprobs.isfinite().tolist() == [True, False, True, True]
    assert logprobs[1] == -math.inf


@stages
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sequence(stage: str, value: float) -> None:
    case = make_case([3, 5, 4], 16, 150)
    case["weights"] = torch.tensor([0.5, 0.9, 1.1])
    with forced(STAGES[stage]):
        clean = run(case)
        with torch.no_grad():
            case["hidden"][5, 2] = value
        found = run(case)
    assert not found.loss.isfinite()
    assert found.residual.isfinite().tolist() == [True, False, True]
    assert found.entropy.isnan().nonzero()[:, 0].tolist() == [5]
    bad = found.gradients["hidden"].isfinite().all(1)
    assert bad.tolist() == [True] * 3 + [False] * 5 + [True] * 4
    live = [0, 1, 2, 8, 9, 10, 11]
    assert torch.equal(found.gradients["hidden"][live], clean.gradients["hidden"][live])
    assert torch.equal(found.seq_logprobs[[0, 2]], clean.seq_logprobs[[0, 2]])
    assert found.gradients["head_weight"].isnan().any()


@stages
@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_weight_zero_removes_a_sequence_whatever_it_holds(stage: str, bonus: float) -> None:
    case = make_case([3, 5, 4], 16, 150)
    case["weights"] = torch.tensor([0.5, 0.0, 1.1])
    case["hidden"] = case["hidden"].detach()
    with forced(STAGES[stage]):
        clean = run({**case, "hidden": case["hidden"].clone().requires_grad_()}, entropy_bonus=bonus)
        for value in (math.nan, math.inf):
            case["hidden"][4:7] = value
            case["rewards"][1] = value
            found = run({**case, "hidden": case["hidden"].clone().requires_grad_()}, entropy_bonus=bonus)
            assert torch.equal(found.loss, clean.loss)
            assert (found.gradients["hidden"][3:8] == 0).all()
            for name, wanted in clean.gradients.items():
                assert torch.equal(found.gradients[name], wanted), name


@stages
def test_nothing_to_learn_gives_exactly_nothing(stage: str) -> None:
    case = make_case([1, 1], 16, 150)
    with forced(STAGES[stage]):
        # Residuals of exactly 0: the reference is the policy; of one token, or the sum would be rounded to float32.
        sums = run(case).seq_logprobs
        case |= {"rewards": torch.zeros(2), "ref_logprobs": sums, "log_z": torch.zeros(2, requires_grad=True)}
        for found in (run(case), run({**case, "weights": torch.zeros(2), "ref_logprobs": 2 * sums})):
            assert found.loss == 0
            assert not any(value.any() for value in found.gradients.values())


@stages
def test_huge_rewards(stage: str) -> None:
    case = make_case([3, 5], 16, 150)
    case["rewards"] = torch.tensor([1e12, -1e15])
    with forced(STAGES[stage]):
        found = run(case)
    exact = oracle(case)
    for name in found.gradients:
        assert tolerances.relative_error(found.gradients[name], exact.gradients[name]) < 1e-5, name
    assert tolerances.relative_error(found.loss, exact.loss) < 1e-6
    assert_equal(found, found)

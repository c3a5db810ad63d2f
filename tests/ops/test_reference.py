"""The reference operations against naive autograd on full logits, in float64 unless the test says otherwise.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paced_kernels import (
    TBOutput,
    linear_logprobs,
    segment_sum,
    trajectory_balance_from_logprobs,
    trajectory_balance_loss,
)
from paced_kernels.reference import segment_mean


def make_case(
    lengths: list[int], hidden_size: int = 5, vocab_size: int = 11, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random inputs of both operations; leaves require grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_rows, num_sequences = sum(lengths), len(lengths)
    case = {
        "hidden": normal(num_rows, hidden_size),
        "head_weight": normal(vocab_size, hidden_size),
        "bias": normal(vocab_size),
        "log_z": normal(num_sequences).to(torch.float64 if dtype == torch.float64 else torch.float32),
    }
    for value in case.values():
        value.requires_grad_()
    case["token_ids"] = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    case["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    case["rewards"] = torch.rand(num_sequences, generator=generator, dtype=torch.float64)
    case["weights"] = torch.rand(num_sequences, generator=generator, dtype=torch.float64) + 0.5
    case["ref_logprobs"] = -3.0 + 0.3 * normal(num_rows).double()
    case["behavior_logprobs"] = -3.0 + 0.3 * normal(num_rows).double()
    return case


def naive_logits(hidden: Tensor, head_weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = hidden @ head_weight.T / temperature
    return logits if bias is None else logits + bias


def naive_logprobs(
    hidden: Tensor, head_weight: Tensor, token_ids: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    all_logprobs = naive_logits(hidden, head_weight, bias, temperature).log_softmax(-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(1, token_ids[:, None])[:, 0], entropy


def naive_loss(
    case: dict[str, Tensor], *, temperature: float, reduction: str, cap: float | None, beta: float
) -> Tensor:
    """A Python loop over sequences; `cap` 0 means no importance weights."""
    logprobs, _ = naive_logprobs(case["hidden"], case["head_weight"], case["token_ids"], case["bias"], temperature)
    offsets = case["cu_seqlens"].tolist()
    # Every input takes part even when there is no sequence.
    total = sum(0.0 * case[name].sum() for name in ("hidden", "head_weight", "bias", "log_z"))
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        scale = 1.0 / max(stop - start, 1) if reduction == "mean" else 1.0
        s = logprobs[start:stop].sum() * scale
        residual = case["log_z"][i] + s - case["ref_logprobs"][start:stop].sum() * scale - case["rewards"][i] / beta
        weight = case["weights"][i]
        if cap != 0:
            ratio = (s.detach() - case["behavior_logprobs"][start:stop].sum() * scale).exp()
            weight = weight * (ratio if cap is None else ratio.clamp(max=cap))
        total = total + weight * (beta * residual) ** 2 / (2 * beta)
    return total / max(len(offsets) - 1, 1)


def fused_loss(case: dict[str, Tensor], *, cap: float | None = 0, beta: float = 0.3, **options: object) -> TBOutput:
    importance = {} if cap == 0 else {"behavior_logprobs": case["behavior_logprobs"], "importance_cap": cap}
    return trajectory_balance_loss(
        case["hidden"],
        case["head_weight"],
        case["token_ids"],
        case["cu_seqlens"],
        rewards=case["rewards"],
        log_z=case["log_z"],
        beta=beta,
        ref_logprobs=case["ref_logprobs"],
        weights=case["weights"],
        bias=case["bias"],
        **importance,
        **options,
    )


def gradients(loss: Tensor, case: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [case[name] for name in ("hidden", "head_weight", "bias", "log_z")]))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_gradcheck_linear_logprobs_and_entropy(rows: int) -> None:
    case = make_case([4, 3])

    def function(hidden: Tensor, head_weight: Tensor, bias: Tensor) -> object:
        return linear_logprobs(
            hidden,
            head_weight,
            case["token_ids"],
            bias=bias,
            temperature=0.7,
            return_entropy=True,
            workspace_bytes=rows * 11 * 8 * 2,
        )

    assert torch.autograd.gradcheck(function, (case["hidden"], case["head_weight"], case["bias"]))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [2, 5, 100])
def test_gradcheck_trajectory_balance(rows: int, reduction: str) -> None:
    case = make_case([4, 0, 3])

    def function(hidden: Tensor, head_weight: Tensor, bias: Tensor, log_z: Tensor) -> Tensor:
        leaves = {"hidden": hidden, "head_weight": head_weight, "bias": bias, "log_z": log_z}
        options = {"temperature": 1.3, "reduction": reduction, "workspace_bytes": rows * 11 * 8}
        return fused_loss({**case, **leaves}, **options).loss

    assert torch.autograd.gradcheck(function, (case["hidden"], case["head_weight"], case["bias"], case["log_z"]))


@pytest.mark.parametrize("cap", [0, None, 0.8, 50.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_loss_equals_naive_autograd(temperature: float, reduction: str, cap: float | None) -> None:
    case = make_case([3, 1, 0, 6, 2])
    expected = naive_loss(case, temperature=temperature, reduction=reduction, cap=cap, beta=0.3)
    expected_gradients = gradients(expected, case)
    for rows in (1, 2, 4, 7, 12):
        out = fused_loss(case, temperature=temperature, reduction=reduction, cap=cap, workspace_bytes=rows * 11 * 8)
        torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
        for value, wanted in zip(gradients(out.loss, case), expected_gradients, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    hidden_size=st.integers(1, 8),
    vocab_size=st.integers(1, 40),
    rows=st.integers(1, 32),
    reduction=st.sampled_from(["sum", "mean"]),
    with_bias=st.booleans(),
    with_entropy=st.booleans(),
    seed=st.integers(0, 1000),
)
# An empty group first, and then one that is scored before its gradients.
@example(
    lengths=[0, 2], hidden_size=1, vocab_size=1, rows=1, reduction="sum", with_bias=False, with_entropy=False, seed=0
)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_naive_autograd(
    lengths: list[int],
    hidden_size: int,
    vocab_size: int,
    rows: int,
    reduction: str,
    with_bias: bool,
    with_entropy: bool,
    seed: int,
) -> None:
    case = make_case(lengths, hidden_size, vocab_size, seed)
    if not with_bias:
        case["bias"] = torch.zeros(vocab_size, dtype=torch.float64, requires_grad=True)
    expected = naive_loss(case, temperature=0.9, reduction=reduction, cap=3.0, beta=0.5)
    _, expected_entropy = naive_logprobs(
        case["hidden"], case["head_weight"], case["token_ids"], case["bias"], temperature=0.9
    )
    out = fused_loss(
        case,
        temperature=0.9,
        reduction=reduction,
        cap=3.0,
        beta=0.5,
        return_entropy=with_entropy,
        workspace_bytes=rows * vocab_size * 8,
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=1e-12)
    for value, wanted in zip(gradients(out.loss, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)
    if with_entropy:
        torch.testing.assert_close(out.entropy, expected_entropy.detach(), rtol=1e-9, atol=1e-12)


def test_outputs_besides_the_loss() -> None:
    case = make_case([3, 0, 2])
    logprobs, entropy = naive_logprobs(case["hidden"], case["head_weight"], case["token_ids"], case["bias"])
    out = fused_loss(case, reduction="mean", return_entropy=True)
    sums = torch.stack([logprobs[:3].mean(), logprobs.new_zeros(()), logprobs[3:].mean()]).detach()
    reference = torch.stack([case["ref_logprobs"][:3].mean(), torch.tensor(0.0), case["ref_logprobs"][3:].mean()])
    torch.testing.assert_close(out.seq_logprobs, sums)
    torch.testing.assert_close(out.residual, case["log_z"].detach() + sums - reference - case["rewards"] / 0.3)
    torch.testing.assert_close(out.entropy, entropy.detach())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:] if value is not None)


def test_per_sequence_constants_equal_per_token_ones() -> None:
    case = make_case([3, 0, 4])
    per_token = fused_loss(case, cap=2.0)
    case["ref_logprobs"] = segment_sum(case["ref_logprobs"], case["cu_seqlens"])
    case["behavior_logprobs"] = segment_sum(case["behavior_logprobs"], case["cu_seqlens"])
    torch.testing.assert_close(fused_loss(case, cap=2.0).loss, per_token.loss, rtol=1e-13, atol=0)


def test_chunk_size_changes_only_rounding_in_float32() -> None:
    case = make_case([7, 30, 1, 12], hidden_size=16, vocab_size=61, dtype=torch.float32)
    whole = fused_loss(case, return_entropy=True)
    whole_gradients = gradients(whole.loss, case)
    for rows in (1, 8, 13, 49):
        out = fused_loss(case, return_entropy=True, workspace_bytes=rows * 61 * 4 * 2)
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.entropy, whole.entropy, rtol=1e-5, atol=1e-6)
        for value, wanted in zip(gradients(out.loss, case), whole_gradients, strict=True):
            assert relative_error(value, wanted) < 1e-5


def test_two_runs_are_bit_equal() -> None:
    case = make_case([7, 30, 1, 12], hidden_size=16, vocab_size=61, dtype=torch.float32)
    first, second = (fused_loss(case, workspace_bytes=13 * 61 * 4) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(map(torch.equal, gradients(first.loss, case), gradients(second.loss, case)))


def test_weight_zero_removes_a_sequence_whatever_it_holds() -> None:
    case = make_case([3, 2, 4])
    kept = make_case([3, 2, 4])
    kept["weights"] = torch.tensor([0.7, 0.0, 1.1], dtype=torch.float64)
    expected = fused_loss(kept, cap=2.0)
    expected_gradients = gradients(expected.loss, kept)
    for reward in (math.inf, -math.inf, math.nan):
        case["weights"] = kept["weights"]
        case["rewards"] = kept["rewards"].clone()
        case["rewards"][1] = reward
        with torch.no_grad():
            case["hidden"][3:5] = math.nan
        for rows in (1, 4, 9):
            out = fused_loss(case, cap=2.0, workspace_bytes=rows * 11 * 8)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-13, atol=0)
            found = gradients(out.loss, case)
            assert torch.equal(found[0][3:5], torch.zeros(2, 5, dtype=torch.float64))
            assert found[3][1] == 0
            for value, wanted in zip(found, expected_gradients, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-13)


def test_nan_in_a_live_sequence_reaches_loss_and_gradients() -> None:
    case = make_case([3, 2])
    with torch.no_grad():
        case["hidden"][1, 0] = math.nan
    out = fused_loss(case)
    assert out.loss.isnan()
    assert out.residual.isnan().tolist() == [True, False]
    found = gradients(out.loss, case)
    assert found[1].isnan().all()
    assert found[0].isnan().any(1).tolist() == [True, True, True, False, False]


def test_no_sequences_and_only_empty_sequences() -> None:
    none = make_case([])
    out = fused_loss(none, return_entropy=True)
    assert out.loss == 0
    assert [tuple(value.shape) for value in out[1:] if value is not None] == [(0,), (0,), (0,)]
    assert all((value == 0).all() for value in gradients(out.loss, none))
    empty = make_case([0, 0, 0])
    out = fused_loss(empty, beta=0.5)
    expected = (empty["weights"] * (0.5 * empty["log_z"] - empty["rewards"]) ** 2).sum() / (2 * 0.5) / 3
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(out.loss, empty)[3], torch.autograd.grad(expected, empty["log_z"])[0])
    logprobs, entropy = linear_logprobs(empty["hidden"], empty["head_weight"], empty["token_ids"], return_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    assert (torch.autograd.grad(logprobs.sum() + entropy.sum(), empty["head_weight"])[0] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_grad_output_scales_every_gradient(scale: float) -> None:
    case = make_case([3, 2])
    plain = gradients(fused_loss(case).loss, case)
    for value, wanted in zip(gradients(scale * fused_loss(case).loss, case), plain, strict=True):
        torch.testing.assert_close(value, scale * wanted, rtol=1e-13, atol=0)


def test_denominator_is_a_number_or_a_tensor_and_defaults_to_b() -> None:
    case = make_case([3, 2, 1])
    default = fused_loss(case).loss
    torch.testing.assert_close(fused_loss(case, denominator=12.0).loss * 4, default)
    out = fused_loss(case, denominator=torch.tensor(6.0))
    torch.testing.assert_close(out.loss * 2, default)
    torch.testing.assert_close(2 * gradients(out.loss, case)[1], gradients(default, case)[1])


def test_coefficients_of_single_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    log_z = torch.tensor([0.25, 0.5], requires_grad=True)
    weights = torch.tensor([2.0, 3.0])
    for reduction, lengths in (("sum", (1.0, 1.0)), ("mean", (2.0, 1.0))):
        out = trajectory_balance_from_logprobs(
            logprobs,
            torch.tensor([0, 2, 3]),
            rewards=torch.tensor([1.0, 0.0]),
            log_z=log_z,
            beta=0.5,
            weights=weights,
            reduction=reduction,
            denominator=10.0,
        )
        residual = torch.tensor([0.25 - 3.0 / lengths[0] - 2.0, 0.5 - 0.5])
        torch.testing.assert_close(out.residual, residual)
        found, found_log_z = torch.autograd.grad(out.loss, (logprobs, log_z))
        c = 0.5 * weights * residual / 10.0  # beta is 0.5
        torch.testing.assert_close(found, torch.stack([c[0] / lengths[0], c[0] / lengths[0], c[1] / lengths[1]]))
        torch.testing.assert_close(found_log_z, c)


def test_from_logprobs_equals_the_fused_loss() -> None:
    case = make_case([3, 0, 5, 1])
    for reduction in ("sum", "mean"):
        fused = fused_loss(case, reduction=reduction, cap=1.5, denominator=3.0)
        logprobs = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], bias=case["bias"])
        names = ("rewards", "log_z", "ref_logprobs", "weights", "behavior_logprobs")
        split = trajectory_balance_from_logprobs(
            logprobs,
            case["cu_seqlens"],
            beta=0.3,
            reduction=reduction,
            denominator=3.0,
            importance_cap=1.5,
            **{name: case[name] for name in names},
        )
        torch.testing.assert_close(fused.loss, split.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(fused.residual, split.residual, rtol=1e-13, atol=1e-13)
        for value, wanted in zip(gradients(fused.loss, case), gradients(split.loss, case), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


def test_importance_weights_are_finite_for_any_gap_and_detached() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    arguments = {
        "rewards": torch.zeros(3),
        "log_z": torch.zeros(3),
        "beta": 1.0,
        "behavior_logprobs": torch.tensor([-1e4, 1e4, -2.0]),
        "denominator": 1.0,
    }
    out = trajectory_balance_from_logprobs(logprobs, torch.arange(4), importance_cap=2.0, **arguments)
    # Residuals are -1: weights are the cap, 0 and the cap (exp(1) > 2), and beta / 2 is a half.
    torch.testing.assert_close(out.loss, torch.tensor(2.0))
    torch.testing.assert_close(torch.autograd.grad(out.loss, logprobs)[0], torch.tensor([-2.0, 0.0, -2.0]))
    out = trajectory_balance_from_logprobs(logprobs, torch.arange(4), **arguments)
    assert out.loss.isfinite()
    torch.testing.assert_close(out.loss, torch.tensor((math.exp(80.0) + math.e) / 2))
    assert torch.autograd.grad(out.loss, logprobs)[0].isfinite().all()


def test_frozen_inputs_get_no_gradient_and_no_work() -> None:
    case = make_case([3, 2])
    full = gradients(fused_loss(case).loss, case)
    for frozen in ("hidden", "head_weight", "bias"):
        part = {**case, frozen: case[frozen].detach()}
        names = [name for name in ("hidden", "head_weight", "bias", "log_z") if name != frozen]
        found = torch.autograd.grad(fused_loss(part).loss, [part[name] for name in names])
        for value, wanted in zip(found, [g for g, n in zip(full, case, strict=False) if n != frozen], strict=True):
            torch.testing.assert_close(value, wanted)
    with torch.no_grad():
        assert not fused_loss(case).loss.requires_grad

    def count_products(part: dict[str, Tensor]) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            loss = fused_loss(part).loss
            if loss.requires_grad:
                loss.backward()
        return sum(event.name in ("aten::mm", "aten::addmm_", "aten::addmm") for event in profiler.events())

    case["bias"] = case["bias"].detach()
    for frozen, expected in (("", 3), ("head_weight", 2), ("hidden", 2)):
        part = {**case, **({frozen: case[frozen].detach()} if frozen else {})}
        assert count_products(part) == expected, frozen
    with torch.no_grad():
        assert count_products(case) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_buffer_exceeds_the_workspace(with_entropy: bool, dtype: torch.dtype) -> None:
    vocab_size, workspace_bytes = 4000, 40 * 4000 * 4
    case = make_case([30, 70, 10, 90], hidden_size=2, vocab_size=vocab_size, dtype=dtype)

    def logprobs() -> None:
        options = {"workspace_bytes": workspace_bytes}
        linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], **options).sum().backward()

    def loss() -> None:
        fused_loss(case, workspace_bytes=workspace_bytes, return_entropy=with_entropy).loss.backward()

    for function in (logprobs, loss):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        alive = peak = largest = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
                largest = max(largest, event.nbytes())
        # The buffer is used, too: at least two thirds of what one buffer may take.
        assert workspace_bytes // 3 < largest <= workspace_bytes
    # Everything alive at once: the workspace, and the gradients, inputs' copies and [R]-sized vectors beside it.
    small = 8 * (case["head_weight"].numel() + case["hidden"].numel() + vocab_size) * 4
    assert workspace_bytes // 2 < peak < workspace_bytes + small


def test_bfloat16_is_as_good_as_dense_bfloat16_with_float32_logits() -> None:
    case = make_case([100, 60, 96], hidden_size=64, vocab_size=1031, dtype=torch.bfloat16)
    del case["bias"]
    with torch.no_grad():
        case["hidden"].mul_(0.7)
    exact = {name: value.detach().double().requires_grad_() for name, value in case.items() if value.requires_grad}
    logprobs, _ = naive_logprobs(exact["hidden"], exact["head_weight"], case["token_ids"])
    arguments = {name: case[name] for name in ("rewards", "ref_logprobs", "weights")} | {"beta": 0.3}
    oracle = trajectory_balance_from_logprobs(logprobs, case["cu_seqlens"], log_z=exact["log_z"], **arguments)
    oracle_gradients = torch.autograd.grad(oracle.loss, (exact["hidden"], exact["head_weight"]))

    def run(workspace_bytes: int) -> TBOutput:
        names = ("hidden", "head_weight", "token_ids", "cu_seqlens")
        return trajectory_balance_loss(
            *(case[name] for name in names), log_z=case["log_z"], workspace_bytes=workspace_bytes, **arguments
        )

    # The yardstick: float32 logits, their gradient rounded to bfloat16, bfloat16 results of float32 sums.
    logits = case["hidden"].detach().float() @ case["head_weight"].detach().float().T
    logits.requires_grad_()
    chosen = logits.log_softmax(-1).gather(1, case["token_ids"][:, None])[:, 0]
    dense = trajectory_balance_from_logprobs(chosen, case["cu_seqlens"], log_z=case["log_z"].detach(), **arguments)
    grad_logits = torch.autograd.grad(dense.loss, logits)[0].bfloat16().float()
    yardstick = (
        (grad_logits @ case["head_weight"].detach().float()).bfloat16(),
        (grad_logits.T @ case["hidden"].detach().float()).bfloat16(),
    )
    for workspace_bytes in (2**26, 50 * 1031 * 4):
        out = run(workspace_bytes)
        found = torch.autograd.grad(out.loss, (case["hidden"], case["head_weight"]))
        assert [value.dtype for value in found] == [torch.bfloat16] * 2
        assert (out.seq_logprobs.double() - oracle.seq_logprobs).abs().max() < 1e-4
        assert relative_error(out.loss, oracle.loss) < 1e-5
        for value, dense_value, wanted in zip(found, yardstick, oracle_gradients, strict=True):
            assert relative_error(value, wanted) < min(4e-3, 1.5 * relative_error(dense_value, wanted))
    own = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"])
    assert (own.double() - logprobs).abs().max() < 2e-5


def test_float32_tolerances_of_the_readme() -> None:
    case = make_case([100, 60, 96], hidden_size=64, vocab_size=1031, dtype=torch.float32)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in case.items()}
    exact = {name: value.detach().requires_grad_(case[name].requires_grad) for name, value in exact.items()}
    out, oracle = fused_loss(case, return_entropy=True), fused_loss(exact, return_entropy=True)
    assert (out.seq_logprobs.double() - oracle.seq_logprobs).abs().max() < 1e-4
    assert relative_error(out.loss, oracle.loss) < 1e-5
    assert out.entropy is not None
    assert oracle.entropy is not None
    names = ("hidden", "head_weight", "token_ids")
    own, wanted = (linear_logprobs(*(inputs[name] for name in names)) for inputs in (case, exact))
    assert (own.double() - wanted).abs().max() < 2e-5
    assert relative_error(out.entropy, oracle.entropy) < 1e-5
    for value, wanted in zip(gradients(out.loss, case), gradients(oracle.loss, exact), strict=True):
        assert relative_error(value, wanted) < 1e-5


def test_peaked_logits_keep_relative_accuracy() -> None:
    # One row per margin between the target (token 0) and each of three equal others: log p = -log1p(3 exp(-margin)).
    margins = torch.tensor([0.0, 5.0, 18.0, 40.0, 80.0, -80.0, -300.0])
    hidden = margins[:, None].clone().requires_grad_()
    head_weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    logprobs = linear_logprobs(hidden, head_weight, torch.zeros(7, dtype=torch.int64))
    exact = -torch.log1p(3 * (-margins.double()).exp())
    exact[-1] = -300.0 - math.log(3.0)
    assert ((logprobs.double() - exact).abs() <= 1e-6 * exact.abs() + 1e-37).all()
    grad = torch.autograd.grad(logprobs.sum(), hidden)[0][:, 0].double()
    others = 3 * (-margins.double()).exp()
    expected = torch.where(others.isinf(), 1.0, others / (1 + others))
    assert ((grad - expected).abs() <= 1e-6 * expected + 1e-37).all()


def test_huge_and_equal_and_masked_logits() -> None:
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    logprobs, entropy = linear_logprobs(
        torch.ones(3, 1, requires_grad=True), weight, torch.tensor([0, 1, 2]), return_entropy=True
    )
    assert logprobs.tolist() == [0.0, -2e4, -1e4]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    equal = linear_logprobs(torch.zeros(1, 1), weight, torch.tensor([1]))
    torch.testing.assert_close(equal, torch.tensor([-math.log(3.0)]))
    # A bias of -inf removes a token: gradients and entropy stay finite.
    hidden = torch.zeros(1, 1, requires_grad=True)
    bias = torch.tensor([0.0, -math.inf, 0.0])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0]), bias=bias, return_entropy=True)
    torch.testing.assert_close(torch.cat([logprobs, entropy]), torch.tensor([-math.log(2.0), math.log(2.0)]))
    assert torch.autograd.grad(entropy.sum() + logprobs.sum(), hidden)[0].isfinite().all()


def test_segment_sums() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 5])
    values = torch.tensor([1.0, math.nan, 1e8, 1.0, -1e8], requires_grad=True)
    sums = segment_sum(values, cu_seqlens)
    assert sums[0].isnan()
    assert sums[1:].tolist() == [0.0, 1.0]
    assert sums.dtype == torch.float32
    grad = torch.autograd.grad((sums * torch.tensor([1.0, 2.0, 3.0])).sum(), values)[0]
    assert grad.tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]
    means = segment_mean(values[2:].double(), torch.tensor([0, 0, 3]))
    torch.testing.assert_close(means, torch.tensor([0.0, 1.0 / 3.0], dtype=torch.float64))
    long = segment_sum(torch.full((32_000,), -1.2345, dtype=torch.bfloat16), torch.tensor([0, 32_000]))
    assert long.item() == pytest.approx(-1.234375 * 32_000, rel=1e-7)


def test_autocast_does_not_round_the_logits() -> None:
    case = make_case([7, 3], hidden_size=32, vocab_size=101, dtype=torch.float32)
    outside, outside_gradients = fused_loss(case), gradients(fused_loss(case).loss, case)
    inputs = (case["hidden"], case["head_weight"], case["token_ids"])
    logprobs = linear_logprobs(*inputs)
    grad = torch.autograd.grad(logprobs.square().sum(), inputs[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_loss(case)
        inside_gradients = gradients(inside.loss, case)
        inside_logprobs = linear_logprobs(*inputs)
        inside_grad = torch.autograd.grad(inside_logprobs.square().sum(), inputs[:2])
    assert torch.equal(outside.loss, inside.loss)
    assert torch.equal(logprobs, inside_logprobs)
    assert all(map(torch.equal, (*outside_gradients, *grad), (*inside_gradients, *inside_grad)))


def test_gradients_reach_a_tied_weight_from_both_uses() -> None:
    case = make_case([4], hidden_size=5)
    weight = case["head_weight"]
    hidden = torch.tanh(weight[case["token_ids"].roll(1)])
    out = fused_loss({**case, "hidden": hidden})
    expected = naive_loss({**case, "hidden": hidden}, temperature=1.0, reduction="sum", cap=0, beta=0.3)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, weight, retain_graph=True)[0], torch.autograd.grad(expected, weight)[0]
    )

"""Exponentials kept between the passes of `linear_logprobs` on a CPU, and scores by tiles of columns."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from paced_kernels import linear_logprobs
from paced_kernels._loss import calls, column_scores, torch_rows

T, H, V = 37, 12, 301


def problem(dtype: torch.dtype = torch.float32, *, sharpness: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, weight and bias that make some targets nearly certain, and targets in every tile of columns."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=source)
    weight = sharpness * torch.randn(V, H, generator=source)
    bias = torch.randn(V, generator=source)
    token_ids = torch.randint(0, V, (T,), generator=source)
    token_ids[:9] = (hidden @ weight.T + bias)[:9].argmax(1)
    hidden[:3] *= 8
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), token_ids


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float) -> Tensor:
    logits = hidden.double() @ weight.double().T / temperature
    logits = logits if bias is None else logits + bias.double()
    target = logits.gather(1, token_ids[:, None])
    others = logits.scatter(1, token_ids[:, None], -math.inf).logsumexp(-1)
    return -torch.nn.functional.softplus(others - target[:, 0], threshold=500)  # -log(1 + others / target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tile", [(512, 1024), (8, 32), (5, 7), (1, 1)])
def test_scores_by_columns_are_log_probs(dtype: torch.dtype, has_bias: bool, tile: tuple[int, int]) -> None:
    hidden, weight, bias, token_ids = problem(dtype)
    shift = bias if has_bias else None
    with mock.patch.multiple(column_scores, TILE_ROWS=tile[0], TILE_COLUMNS=tile[1]):
        found, entropy = linear_logprobs(
            hidden, weight, token_ids, bias=shift, temperature=0.7, return_entropy=True, backend="reference"
        )
        alone = linear_logprobs(hidden, weight, token_ids, bias=shift, temperature=0.7, backend="reference")
    wanted = oracle(hidden, weight, shift, token_ids, 0.7)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert torch.equal(found, alone)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    near = wanted > -1e-3
    assert int(near.sum()) >= 2
    # A log-prob near 0 is right relative to itself, which 1 - p would not be; the logits' own rounding remains.
    relative = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found.double()[near], wanted[near], rtol=relative, atol=1e-44)  # float32's least number
    logits = hidden.double() @ weight.double().T / 0.7 + (0 if shift is None else shift.double())
    masses = torch.special.entr(logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy.double(), masses, rtol=1e-4, atol=tolerance)


def test_a_row_that_is_not_finite_and_columns_without_mass_stay_by_themselves() -> None:
    hidden, weight, bias, token_ids = problem()
    clean = linear_logprobs(hidden, weight, token_ids, bias=bias, backend="reference")
    hidden[4], hidden[6, 0] = math.nan, math.inf
    with mock.patch.multiple(column_scores, TILE_ROWS=8, TILE_COLUMNS=32):
        found = linear_logprobs(hidden, weight, token_ids, bias=bias, backend="reference")
        forbidden = torch.full((V,), -math.inf)
        forbidden[[3, 290]] = 0.0
        two = linear_logprobs(hidden[20:], weight, token_ids[20:] * 0 + 290, bias=forbidden, backend="reference")
        none = linear_logprobs(hidden[20:], weight, token_ids[20:] * 0 + 5, bias=forbidden, backend="reference")
    assert found[[4, 6]].isnan().all()
    rest = [i for i in range(T) if i not in (4, 6)]
    torch.testing.assert_close(found[rest], clean[rest], rtol=1e-5, atol=1e-5)
    logits = hidden[20:] @ weight[[3, 290]].T
    torch.testing.assert_close(two, logits.log_softmax(-1)[:, 1], rtol=1e-5, atol=1e-5)
    assert (none == -math.inf).all()


def grads(
    dtype: torch.dtype, *, limit: int, coefficient: Tensor, twice: bool = False, spoilt: bool = False, **options: float
) -> tuple[list[Tensor], int]:
    """Gradients of states, weight and bias, and how many times rows were turned into exponentials."""
    hidden, weight, bias, token_ids = problem(dtype, sharpness=1.0)
    if spoilt:
        hidden[4] = math.nan
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    real, made = torch_rows.TorchRows.exponentials, []
    with (
        mock.patch.object(calls, "KEPT_BYTES", limit),
        mock.patch.object(torch_rows.TorchRows, "exponentials", lambda *a, **k: made.append(1) or real(*a, **k)),
    ):
        found = linear_logprobs(hidden, weight, token_ids, bias=bias, backend="reference", temperature=0.7, **options)
        for again in (True, False) if twice else (False,):
            result = torch.autograd.grad(found, leaves, coefficient.to(found.dtype), retain_graph=again)
    return list(result), len(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.0, 2.0**-8])
def test_gradients_from_what_was_kept_are_those_of_logits_computed_again(dtype: torch.dtype, share: float) -> None:
    coefficient = torch.linspace(-1, 2, T)
    coefficient[7] = 0.0
    kept, once = grads(dtype, limit=2**30, coefficient=coefficient, twice=True, skipped_share=share)
    again, twice = grads(dtype, limit=0, coefficient=coefficient, skipped_share=share)
    assert (once, twice) == (1, 1), "kept: in the forward pass only; else in the backward pass, the first scores tiles"
    for a, b in zip(kept, again, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 8e-3}[dtype] * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    assert not kept[0][7].any()
    if not share:
        hidden, weight, bias, token_ids = (tensor.double() for tensor in problem(dtype, sharpness=1.0))
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
        wanted = torch.autograd.grad(oracle(*leaves, token_ids.long(), 0.7), leaves, coefficient.double())
        for a, b in zip(kept, wanted, strict=True):
            limit = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype] * float(b.abs().max())
            torch.testing.assert_close(a.double(), b, rtol=0, atol=limit)


def test_a_dead_row_without_numbers_adds_exactly_nothing() -> None:
    coefficient = torch.ones(T)
    coefficient[4] = 0.0
    found, made = grads(torch.float32, limit=2**30, coefficient=coefficient, spoilt=True)
    wanted, _ = grads(torch.float32, limit=2**30, coefficient=coefficient)
    assert made == 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    coefficient[4] = 1.0
    for gradient in grads(torch.float32, limit=2**30, coefficient=coefficient, spoilt=True)[0][:2]:
        assert gradient.isnan().any(), "a live row that is not finite is seen"


@pytest.mark.parametrize(("size", "is_kept"), [(4 * T * V, True), (4 * T * V - 1, False)])
def test_what_is_kept_fits_the_workspace(size: int, is_kept: bool) -> None:
    hidden, weight, _, token_ids = problem()
    found = linear_logprobs(hidden.requires_grad_(), weight, token_ids, backend="reference", workspace_bytes=size)
    saved = [tensor for tensor in found.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    assert any(tensor.shape == (T, V) for tensor in saved) == is_kept

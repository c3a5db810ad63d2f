"""Inputs, float64 oracles and forced variants of the Triton row engines, for the tests that run in the interpreter.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from paced_kernels import linear_logprobs, trajectory_balance_loss
from paced_kernels._loss import fused_pass, operators, tiles
from paced_kernels._loss.tiles import GemmConfig

pytest.importorskip("triton")

INTERPRETED = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter"),
    # numpy says so when exp overflows or infinities cancel, which some rows are made for.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

Case = dict[str, Tensor]

LEAVES = ("hidden", "head_weight", "bias", "log_z")

# Stage 1 is a library GEMM and row kernels. The others are stage 2 with small tiles in two pieces, and with one piece.
STAGES: dict[str, GemmConfig | None] = {
    "logits": None,
    "halves": GemmConfig(32, 128, 64, pieces=2, num_warps=4, num_stages=1, use_tma=False, group_v=2, is_flat=True),
    "whole": GemmConfig(128, 128, 32, pieces=1, num_warps=4, num_stages=1, use_tma=False),
}


@dataclass
class Result:
    """What one call computed."""

    loss: Tensor  # []
    residual: Tensor  # [B]
    seq_logprobs: Tensor  # [B]
    entropy: Tensor  # [T]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    yardstick: dict[str, Tensor] = field(default_factory=dict)  # of the best dense computation in the same dtype
    largest_logit: float = 0.0


@contextmanager
def forced(config: GemmConfig | None) -> Iterator[None]:
    """Every call runs this configuration; None is stage 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "choose_config", lambda *_: config)
        yield


@contextmanager
def unread_offsets() -> Iterator[None]:
    """cu_seqlens are planned for as if they were on another device, which the host does not read."""
    with pytest.MonkeyPatch.context() as patch:

        def one_group(cu_seqlens: Tensor, num_rows: int, _: int) -> list[fused_pass.SequenceGroup]:
            return [fused_pass.SequenceGroup(slice(0, cu_seqlens.shape[0] - 1), slice(0, num_rows))]

        patch.setattr(operators, "plan_groups", one_group)
        yield


@contextmanager
def recorded_modes() -> Iterator[list[str]]:
    """The way each group of sequences took."""
    taken: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_one_pass", "_two_passes", "_stream"):
            patch.setattr(fused_pass.FusedPass, name, _recording(name, getattr(fused_pass.FusedPass, name), taken))
        yield taken


def _recording(name: str, function: Callable[..., None], taken: list[str]) -> Callable[..., None]:
    def record(*arguments: Any) -> None:
        taken.append(name)
        function(*arguments)

    return record


@contextmanager
def default_rows(rows: int) -> Iterator[None]:
    """Chunks of so many rows where the caller sets no budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "DEFAULT_ROWS", rows)
        yield


def workspace(config: GemmConfig | None, case: Case, rows: int) -> int:
    """Bytes for chunks of so many rows."""
    weight = case["head_weight"]
    return rows * tiles.bytes_per_row(config, weight.shape[0], weight.dtype)


def make_case(
    lengths: list[int], hidden_size: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    """Random inputs with logits of standard deviation 2; every third sequence has weight 0, every fourth less."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_rows, num_sequences = sum(lengths), len(lengths)
    case = {
        "hidden": (normal(num_rows, hidden_size) * 2 / hidden_size**0.5).to(dtype),
        "head_weight": normal(vocab_size, hidden_size).to(dtype),
        "bias": normal(vocab_size).to(dtype),
        "log_z": normal(num_sequences).float(),
    }
    for value in case.values():
        value.requires_grad_()
    weights = torch.rand(num_sequences, generator=generator) + 0.5
    weights[2::3] = 0.0
    weights[3::4] *= -0.3
    return {
        **case,
        "token_ids": torch.randint(0, vocab_size, (num_rows,), generator=generator),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "rewards": torch.rand(num_sequences, generator=generator),
        "weights": weights,
        "ref_logprobs": (-6.0 + 0.1 * normal(num_rows)).float(),
        # A sampler close to the policy in most sequences, so that the cap holds some and lets others pass.
        "behavior_logprobs": (-6.0 + 0.1 * normal(num_rows)).float(),
    }


def run(
    case: Case, *, importance: bool = False, backend: str = "triton", grad_scale: float = 1.0, **options: Any
) -> Result:
    """The fused loss and its gradients; leaves that require none, and None, get none."""
    behavior = case["behavior_logprobs"] if importance else None
    options = {"beta": 0.25, "return_entropy": True, **options}
    out = trajectory_balance_loss(
        case["hidden"],
        case["head_weight"],
        case["token_ids"],
        case["cu_seqlens"],
        rewards=case["rewards"],
        log_z=case["log_z"],
        ref_logprobs=case["ref_logprobs"],
        weights=case["weights"],
        behavior_logprobs=behavior,
        bias=case["bias"],
        backend=backend,
        **options,
    )
    assert out.entropy is not None
    result = Result(out.loss.detach(), out.residual, out.seq_logprobs, out.entropy)
    names = trained(case)
    if out.loss.requires_grad:
        found = torch.autograd.grad(grad_scale * out.loss, [case[name] for name in names])
        result.gradients = dict(zip(names, found, strict=True))
    return result


def trained(case: Case) -> list[str]:
    """Names of the leaves that want a gradient."""
    return [name for name in LEAVES if case[name] is not None and case[name].requires_grad]


def oracle(
    case: Case,
    *,
    importance: bool = False,
    importance_cap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    denominator: float | Tensor | None = None,
    entropy_bonus: float = 0.0,
    grad_scale: float = 1.0,
    beta: float = 0.25,
    **_: Any,
) -> Result:
    """Float64 autograd through full logits and a Python loop over the sequences."""
    exact = {name: case[name].detach().double().requires_grad_() for name in LEAVES if case[name] is not None}
    logits = exact["hidden"] @ exact["head_weight"].T / temperature
    if "bias" in exact:
        logits = logits + exact["bias"]
    all_logprobs = logits.log_softmax(-1)
    logprobs = all_logprobs.gather(1, case["token_ids"].long()[:, None])[:, 0]
    entropy = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e5)).sum(-1)  # 0 log 0 is 0, with gradient 0
    offsets = case["cu_seqlens"].tolist()
    num_sequences, num_rows = len(offsets) - 1, offsets[-1]
    sums = torch.zeros(num_sequences, dtype=torch.float64)
    residuals = torch.zeros(num_sequences, dtype=torch.float64)
    loss = 0.0 * (logits.sum() + exact["log_z"].sum())
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        scale = 1.0 / max(stop - start, 1) if reduction == "mean" else 1.0
        s = logprobs[start:stop].sum() * scale
        residual = exact["log_z"][i] + s - case["rewards"][i].double() / beta
        if case["ref_logprobs"] is not None:
            residual = residual - per_sequence(case["ref_logprobs"], i, start, stop, scale, num_rows)
        sums[i], residuals[i] = s.detach(), residual.detach()
        weight = 1.0 if case["weights"] is None else case["weights"][i].double().item()
        if weight == 0:
            continue
        if importance:
            log_ratio = s.detach() - per_sequence(case["behavior_logprobs"], i, start, stop, scale, num_rows)
            weight *= min(log_ratio.exp().item(), math.inf if importance_cap is None else importance_cap)
        square = weight * (beta * residual) ** 2 / (2 * beta)
        loss = loss + square / float(num_sequences if denominator is None else denominator)
        loss = loss - entropy_bonus * entropy[start:stop].sum() / max(num_rows, 1)
    names = trained(case)
    found = torch.autograd.grad(grad_scale * loss, [*(exact[name] for name in names), logits])
    result = Result(loss.detach(), residuals, sums, entropy.detach(), dict(zip(names, found, strict=False)))
    result.yardstick = dense_gradients(case, found[-1], temperature)
    finite = logits.detach().nan_to_num(0.0, 0.0, 0.0).abs()
    result.largest_logit = finite.amax().item() if finite.numel() else 0.0
    return result


def per_sequence(values: Tensor, i: int, start: int, stop: int, scale: float, num_rows: int) -> Tensor:
    """Constant of sequence i, from one value per token or one per sequence."""
    values = values.double()
    return values[start:stop].sum() * scale if values.shape[0] == num_rows else values[i]


def dense_gradients(case: Case, logit_gradient: Tensor, temperature: float) -> Case:
    """The best dense computation: exact gradients of the logits, rounded to the dtype of the inputs once."""
    dtype = case["hidden"].dtype
    rounded = logit_gradient.to(dtype).double()
    dense = {
        "hidden": rounded @ case["head_weight"].detach().double() / temperature,
        "head_weight": rounded.T @ case["hidden"].detach().double() / temperature,
        "bias": rounded.sum(0),
    }
    return {name: value.to(dtype) for name, value in dense.items()}


def assert_accurate(found: Result, exact: Result, case: Case) -> None:
    """Every output and gradient within `tolerances`."""
    longest = max(case["cu_seqlens"].diff().tolist(), default=0)
    bound = tolerances.sequence_nats(longest, exact.largest_logit)
    assert_within(found.seq_logprobs, exact.seq_logprobs, bound)
    assert_within(found.residual, exact.residual, bound)
    for name in ("loss", "entropy"):
        error = tolerances.relative_error(getattr(found, name), getattr(exact, name))
        assert error <= tolerances.SCALAR_RELATIVE, (name, error)
    assert found.gradients.keys() == exact.gradients.keys()
    dtype = case["hidden"].dtype
    for name, value in found.gradients.items():
        error = tolerances.relative_error(value, exact.gradients[name])
        limit = tolerances.SCALAR_RELATIVE if name == "log_z" else tolerances.GRADIENT_RELATIVE[dtype]
        if name != "log_z" and dtype != torch.float32:
            dense = tolerances.relative_error(exact.yardstick[name], exact.gradients[name])
            assert error <= tolerances.YARDSTICK * dense, (name, error, dense)
        assert error <= limit, (name, error, limit)


def assert_within(found: Tensor, exact: Tensor, bound: float) -> None:
    """Absolute error; float32 results of more than a thousand nats hold seven digits."""
    error = (found.double() - exact.double()).abs()
    assert (error <= bound + 1e-7 * exact.double().abs()).all(), error.max()


def assert_equal(found: Result, wanted: Result) -> None:
    """Every output and gradient bit for bit; NaN equals NaN."""
    for name in ("loss", "residual", "seq_logprobs", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True)
    for name, value in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def logprobs_of_logits(logits: Tensor, token_ids: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and dlogprobs.sum()/dlogits of given logits [T, V]: the head is the identity."""
    hidden = logits.clone().requires_grad_()
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    logprobs, entropy = linear_logprobs(hidden, identity, token_ids, return_entropy=True, backend="triton", **options)
    gradient = torch.autograd.grad(logprobs.sum(), hidden)[0]
    return logprobs.detach(), entropy.detach(), gradient

"""The sum of products that is the weight's gradient: right whatever the memory held that it begins in."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED
from torch import Tensor

from paced_kernels._loss.engine import make_engine, make_head
from paced_kernels._loss.gradients import Gradients, RowEngine, Wanted, WeightSum

T, H, V = 5, 3, 7


def engine_of(backend: str, dtype: torch.dtype) -> RowEngine:
    head = make_head(torch.randn(V, H).to(dtype), None, 1.0, "", 0)
    token_ids = torch.zeros(T, dtype=torch.int64)
    return make_engine(head, torch.randn(T, H).to(dtype), token_ids, False, None, backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "bound"),
    [
        ("reference", torch.float64, 1e-12),
        pytest.param("triton", torch.float32, 1e-6, marks=INTERPRETED),
        pytest.param("triton", torch.float16, 2e-3, marks=INTERPRETED),
        pytest.param("triton", torch.bfloat16, 2e-2, marks=INTERPRETED),
    ],
    ids=str,
)
def test_a_sum_begins_with_its_first_term(backend: str, dtype: torch.dtype, bound: float) -> None:
    """torch.empty is filled with NaN in tests, so what is read before it is written shows."""
    engine = engine_of(backend, dtype)
    parts: list[tuple[Tensor, Tensor]] = [(torch.randn(T, V).to(dtype), torch.randn(T, H).to(dtype)) for _ in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = [(matrix.double().T @ rows.double()) for matrix, rows in parts]

    def is_close(found: Tensor, expected: Tensor) -> bool:
        return bool((found.double() - expected).abs().max() < bound * expected.abs().max())

    total, other = WeightSum(engine.head.weight, wide), WeightSum(engine.head.weight, wide)
    for matrix, rows in parts[:2]:
        other.add_outer(engine, matrix, rows.to(wide))
    assert is_close(other.value, exact[0] + exact[1])
    total.add_scaled(other, torch.tensor(0.5, dtype=wide))  # a streamed sequence comes first
    assert is_close(total.value, 0.5 * (exact[0] + exact[1]))
    total.add_outer(engine, *(parts[2][0], parts[2][1].to(wide)))
    total.add_scaled(other, torch.tensor(2.0, dtype=wide))
    assert is_close(total.value, 2.5 * (exact[0] + exact[1]) + exact[2])


def test_a_sum_of_nothing_is_zero() -> None:
    engine = engine_of("reference", torch.float32)
    assert Gradients(engine, Wanted(False, True, False)).weight.abs().max() == 0
    assert Gradients(engine, Wanted(True, False, True)).weight is None
    total = WeightSum(engine.head.weight, torch.float32)
    total.add_scaled(WeightSum(engine.head.weight, torch.float32), torch.tensor(2.0))
    assert torch.equal(total.value, torch.zeros(V, H))

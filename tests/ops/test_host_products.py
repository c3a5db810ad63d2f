"""Compiled products of bfloat16 on a CPU, against float64, and the operations that are built on them.

m, n = rows and columns of a product, k = summed dimension.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_accurate, assert_equal, make_case, oracle, recorded_modes, run
from torch import Tensor

from paced_kernels import _backend, linear_logprobs
from paced_kernels._host_products import HAS_UNITS, multiply

needs_units = pytest.mark.skipif(not HAS_UNITS, reason="needs a processor with AVX512_BF16 and a C compiler")

# Around the sizes of tiles, blocks and vectors in `host_code`.
SIDES = (1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 95, 96, 97, 130, 1023, 1025)
DEPTHS = (1, 2, 3, 31, 32, 33, 63, 65, 639, 640, 641, 1281)


def operand(rows: int, columns: int, dtype: torch.dtype, *, turned: bool, seed: int) -> Tensor:
    """Random numbers of either sign in one of the two orders, in the middle of NaN that nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    size = (columns, rows) if turned else (rows, columns)
    whole = torch.full((size[0] + 2, size[1] + 5), torch.nan, dtype=dtype)
    whole[1:-1, 2:-3] = torch.randn(size, generator=generator).to(dtype)
    inner = whole[1:-1, 2:-3]
    return inner.T if turned else inner


def product_of(
    left: Tensor, right: Tensor, *, start: float | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Product or sum in float32, the exact one, and the sum of the absolute products."""
    m, n = left.shape[0], right.shape[1]
    room = torch.full((m + 2, n + 3), 7.25)
    out = room[1:-1, 1:-2]
    out.fill_(torch.nan if start is None else start)
    multiply(left, right, out, scale=scale, begins=start is None)
    found = out.clone()
    out.fill_(7.25)
    assert (room == 7.25).all(), "wrote beside the product"
    left = left if scale is None else left * scale
    a, b = left.bfloat16().double(), right.bfloat16().double()
    return found, a @ b + (start or 0.0), a.abs() @ b.abs() + abs(start or 0.0)


def check_product(m: int, n: int, k: int, dtypes: Any, turned: Any, *, start: float | None, seed: int = 0) -> None:
    left = operand(m, k, dtypes[0], turned=turned[0], seed=seed)
    right = operand(k, n, dtypes[1], turned=turned[1], seed=seed + 1)
    scale = None
    if dtypes[0] == torch.float32 and seed % 2:
        scale = torch.randn(k, generator=torch.Generator().manual_seed(seed))
    found, exact, size = product_of(left, right, start=start, scale=scale)
    assert ((found - exact).abs() <= (k + 2) * 2.0**-24 * size).all(), (found - exact).abs().max()


@needs_units
@pytest.mark.parametrize("dtypes", list(itertools.product((torch.bfloat16, torch.float32), repeat=2)), ids=str)
@pytest.mark.parametrize("turned", list(itertools.product((False, True), repeat=2)), ids=str)
def test_products_of_every_layout_and_size(dtypes: Any, turned: Any) -> None:
    for i, k in enumerate(DEPTHS):
        for j in range(len(SIDES)):
            m, n = SIDES[j], SIDES[(5 * j + 7 * i) % len(SIDES)]
            check_product(m, n, k, dtypes, turned, start=(None, 0.0, 3.5)[(i + j) % 3], seed=i)


@needs_units
@settings(max_examples=60)
@given(
    st.integers(1, 220),
    st.integers(1, 1100),
    st.integers(1, 1400),
    st.tuples(*[st.sampled_from((torch.bfloat16, torch.float32))] * 2),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from((None, 0.0, -2.0)),
)
def test_products_of_any_size(m: int, n: int, k: int, dtypes: Any, turned: Any, start: float | None) -> None:
    check_product(m, n, k, dtypes, turned, start=start, seed=m)


@needs_units
@pytest.mark.process
def test_nothing_beside_the_operands_is_read() -> None:
    script = Path(__file__).parents[1] / "support" / "guarded_products.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@needs_units
def test_nothing_to_sum_is_zero_or_what_was_there() -> None:
    out = torch.full((3, 4), 2.0)
    multiply(torch.empty(3, 0), torch.empty(0, 4), out)
    assert (out == 2).all()
    multiply(torch.empty(3, 0), torch.empty(0, 4), out, begins=True)
    assert (out == 0).all()
    multiply(torch.empty(0, 5), torch.empty(5, 4), out[:0], begins=True)
    assert (out == 0).all()


@needs_units
@pytest.mark.parametrize("size", [(70, 900, 700), (900, 70, 700), (7, 2000, 100), (2000, 3, 300)], ids=str)
def test_bits_do_not_depend_on_threads_or_neighbours(size: tuple[int, int, int]) -> None:
    m, n, k = size
    left = operand(m, k, torch.bfloat16, turned=False, seed=1)
    right = operand(k, n, torch.bfloat16, turned=True, seed=2)
    whole = torch.empty(m, n)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        multiply(left, right, whole, begins=True)
        for threads in (2, 3, 7, 100):
            torch.set_num_threads(threads)
            found = torch.full((m, n), torch.nan)
            multiply(left, right, found, begins=True)
            assert torch.equal(found, whole), threads
    finally:
        torch.set_num_threads(before)
    rows, columns = slice(m // 3, m // 3 + m // 2), slice(n // 3, n // 3 + max(1, n // 2))
    part = torch.empty(whole[rows, columns].shape)
    multiply(left[rows], right[:, columns], part, begins=True)
    assert torch.equal(part, whole[rows, columns])


@needs_units
def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    left, right = torch.randn(20, 50).bfloat16(), torch.randn(50, 130).bfloat16()
    clean, found = torch.empty(20, 130), torch.empty(20, 130)
    multiply(left, right, clean, begins=True)
    left[7, 3], right[11, 70] = torch.nan, torch.inf
    multiply(left, right, found, begins=True)
    hit = torch.zeros(20, 130, dtype=torch.bool)
    hit[7], hit[:, 70] = True, True
    assert not found[hit].isfinite().any()
    assert torch.equal(found[~hit], clean[~hit])


@needs_units
@pytest.mark.parametrize("lengths", [[4, 0, 9, 7], [30], [40, 13, 30, 0, 57]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "reduction": "mean"},
        {"entropy_bonus": 0.3, "temperature": 1.3},
        {"importance": True, "importance_cap": 1.05},
        {"skipped_share": 2.0**-9},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 5, 1000])
def test_the_loss_is_accurate(lengths: list[int], options: dict[str, Any], rows: int) -> None:
    case = make_case(lengths, 72, 301, torch.bfloat16)
    if rows:
        options = {**options, "workspace_bytes": -(-rows * 301 * 4 * 4 // 3)}
    assert_accurate(run(case, backend="compiled", **options), oracle(case, **options), case)


@needs_units
@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(1, 65), (2, 2), (33, 1), (1, 1)])
def test_the_smallest_heads(hidden_size: int, vocab_size: int) -> None:
    case = make_case([40, 13, 30], hidden_size, vocab_size, torch.bfloat16)
    found, exact = run(case, backend="compiled"), oracle(case)
    torch.testing.assert_close(found.seq_logprobs.double(), exact.seq_logprobs, rtol=1e-5, atol=1e-4)
    for name, value in found.gradients.items():
        error = (value.double() - exact.gradients[name]).norm()
        assert error <= 4e-3 * exact.gradients[name].norm() + 1e-9, name


@needs_units
def test_a_long_sequence_is_streamed_and_frozen_leaves_have_no_gradient() -> None:
    case = make_case([700], 72, 301, torch.bfloat16)
    with recorded_modes() as taken:
        found = run(case, backend="compiled", workspace_bytes=400 * 301 * 4)
    assert taken == ["_stream"]
    assert_accurate(found, oracle(case), case)
    for name in ("hidden", "head_weight", "bias"):
        frozen: Case = {**case, name: case[name].detach()}
        assert_accurate(run(frozen, backend="compiled"), oracle(frozen), frozen)


@needs_units
def test_rows_of_weight_zero_count_nothing_whatever_is_in_them() -> None:
    case = make_case([5, 6, 7, 8], 72, 301, torch.bfloat16)  # the third has weight 0
    clean = run(case, backend="compiled")
    with torch.no_grad():
        case["hidden"][11:18] = torch.nan
    found = run(case, backend="compiled")
    for name in ("head_weight", "bias"):
        assert torch.equal(found.gradients[name], clean.gradients[name])
    assert (found.gradients["hidden"][11:18] == 0).all()
    assert torch.equal(found.gradients["hidden"][:11], clean.gradients["hidden"][:11])


@needs_units
@pytest.mark.parametrize("num_rows", [3, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_gradients_are_accurate_kept_or_not(num_rows: int, temperature: float) -> None:
    """With exponentials kept the gradient of the weight is one product, which is rounded block by block."""
    generator = torch.Generator().manual_seed(3)
    leaves = [
        (scale * torch.randn(size, generator=generator)).bfloat16()
        for scale, size in ((0.25, (num_rows, 72)), (1.0, (2500, 72)), (1.0, (2500,)))
    ]
    token_ids = torch.randint(0, 2500, (num_rows,), generator=generator)
    pull = torch.randn(num_rows, generator=generator)

    def gradients(call: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        logprobs = call(*own)
        return (logprobs.detach(), *torch.autograd.grad((logprobs * pull.to(logprobs.dtype)).sum(), own))

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = hidden @ weight.T / temperature + bias
        return logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0]

    wanted = gradients(exact, torch.float64)
    for workspace in (None, 2500 * 4 * 50):

        def fused(hidden: Tensor, weight: Tensor, bias: Tensor, limit: int | None = workspace) -> Tensor:
            options: dict[str, Any] = {"bias": bias, "temperature": temperature, "workspace_bytes": limit}
            return linear_logprobs(hidden, weight, token_ids, backend="compiled", **options)

        found = gradients(fused, torch.bfloat16)
        assert (found[0] - wanted[0]).abs().max() <= 2e-5
        with torch.no_grad():
            alone = fused(*leaves)
        assert (alone - wanted[0]).abs().max() <= 2e-5
        for value, right in zip(found[1:], wanted[1:], strict=True):
            assert value.dtype == torch.bfloat16
            assert (value.double() - right).norm() <= 4e-3 * right.norm()


@needs_units
def test_the_reference_has_the_same_values() -> None:
    case = make_case([9, 14, 3], 72, 301, torch.bfloat16)
    found, wanted = run(case, backend="compiled"), run(case, backend="reference")
    torch.testing.assert_close(found.seq_logprobs, wanted.seq_logprobs, rtol=1e-6, atol=2e-5)
    assert not torch.equal(found.gradients["hidden"], wanted.gradients["hidden"])  # it rounds one operand more
    assert_equal(run(case, backend="auto"), found)


def test_auto_takes_them_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = torch.zeros(1, 1, dtype=torch.bfloat16)
    monkeypatch.setattr(_backend, "HAS_UNITS", True)
    assert _backend.resolve_backend("auto", on_cpu) == "compiled"
    assert _backend.resolve_backend("compiled", on_cpu) == "compiled"
    assert _backend.resolve_backend("reference", on_cpu) == "reference"
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert _backend.resolve_backend("auto", on_cpu.to(dtype)) == "reference"
        with pytest.raises(ValueError, match=f'"compiled" needs torch.bfloat16 on a CPU, got {dtype} on cpu; use'):
            _backend.resolve_backend("compiled", on_cpu.to(dtype))
    assert _backend.resolve_backend("auto", on_cpu.to("meta")) == "reference"
    monkeypatch.setattr(_backend, "HAS_UNITS", False)
    assert _backend.resolve_backend("auto", on_cpu) == "reference"
    with pytest.raises(ValueError, match="AVX512_BF16 and an install that found a C compiler; use"):
        _backend.resolve_backend("compiled", on_cpu)

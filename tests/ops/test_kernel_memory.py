"""What the Triton kernels read and write: nothing beyond their tensors, at any offset, and the same bits every time.

The interpreter does not report an access out of bounds, so every tensor lies in the middle of a larger one of NaN.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary, R = rows of a chunk.
"""

from __future__ import annotations

import math
import mmap
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import (
    INTERPRETED,
    STAGES,
    Case,
    assert_equal,
    forced,
    make_case,
    run,
    unread_offsets,
    workspace,
)
from torch import Tensor

from paced_kernels import linear_logprobs
from paced_kernels._loss.head import Head

pytestmark = INTERPRETED

stages = pytest.mark.parametrize("stage", STAGES)

GUARD = 2**17
"""Bytes before and after each tensor: a whole tile of 128 rows."""


def guarded(value: Tensor) -> Tensor:
    """A copy in the middle of poison: NaN, or an index no tensor has."""
    poison = math.nan if value.is_floating_point() else 2**30
    margin = GUARD // value.element_size()
    whole = torch.full((value.numel() + 2 * margin,), poison, dtype=value.dtype)
    inner = whole[margin : margin + value.numel()].view(value.shape)
    return inner.copy_(value.detach()).requires_grad_(value.requires_grad)


def guarded_rows(value: Tensor, *, is_aligned: bool) -> Tensor:
    """A copy whose rows are apart, with poison between them."""
    num_rows, width = value.shape
    left, right = (16, 16 + -width % 16) if is_aligned else (3, 5)
    whole = torch.full((num_rows + 2, left + width + right), math.nan, dtype=value.dtype)
    inner = whole[1:-1, left : left + width]
    return inner.copy_(value.detach()).requires_grad_(value.requires_grad)


@contextmanager
def guarded_allocations() -> Iterator[list[Tensor]]:
    """Every tensor of torch.empty and torch.zeros lies between guards, which are checked at the end."""
    wholes: list[tuple[Tensor, int]] = []
    inners: list[Tensor] = []

    def guarded_by(allocate: Callable[..., Tensor], fill: float) -> Callable[..., Tensor]:
        def wrapper(*shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            inner = allocate(*shape, dtype=dtype)
            margin = GUARD // inner.element_size()
            num_bytes = inner.numel() * inner.element_size()
            bits = torch.full((2 * GUARD + num_bytes,), 0xA5, dtype=torch.uint8)
            wholes.append((bits, num_bytes))
            view = bits.view(inner.dtype)[margin : margin + inner.numel()].view(inner.shape)
            inners.append(view)
            return view.fill_(fill if view.is_floating_point() else 0)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded_by(torch.empty, math.nan))
        patch.setattr(torch, "zeros", guarded_by(torch.zeros, 0.0))
        yield inners
    for bits, size in wholes:
        assert (bits[:GUARD] == 0xA5).all()
        assert (bits[GUARD + size :] == 0xA5).all()


DTYPES = {"float32": (torch.float32, list(STAGES)), "bfloat16": (torch.bfloat16, ["logits", "halves"])}
VARIANTS = [(name, stage) for name, (_, kept) in DTYPES.items() for stage in kept]


@pytest.mark.parametrize(("dtype", "stage"), VARIANTS)
@pytest.mark.parametrize("rows", [14, 1000])
def test_nothing_beyond_inputs_and_outputs_is_touched(dtype: str, stage: str, rows: int) -> None:
    case = make_case([5, 0, 9, 2, 19], 33, 131, DTYPES[dtype][0])
    case["token_ids"] %= 64  # columns 64 to 127 are a piece without a target, which has stores of its own
    options: dict[str, Any] = {"workspace_bytes": workspace(STAGES[stage], case, rows)}
    if rows == 14:
        options["entropy_bonus"] = 0.3
    with forced(STAGES[stage]):
        moved = {name: guarded(value) for name, value in case.items() if name != "cu_seqlens"}
        # Stage 2 copies rows at unaligned addresses before use; stage 1 multiplies with a library.
        is_aligned = stage != "logits"
        moved |= {name: guarded_rows(case[name], is_aligned=is_aligned) for name in ("hidden", "head_weight")}
        moved["cu_seqlens"] = case["cu_seqlens"]
        with guarded_allocations() as allocated:
            found = run(moved, **options)
        # Poison that was read is seen here: a kernel that reads too far may find NaN beside plain tensors as well.
        assert all(value.isfinite().all() for value in (found.loss, found.seq_logprobs, *found.gradients.values()))
        assert_equal(found, run(case, **options))
    buffers = [value for value in allocated if value.ndim == 2 and value.shape[1] == 192]  # 131 columns, rows aligned
    assert buffers
    for buffer in buffers:
        if buffer.dtype == moved["hidden"].dtype:  # stage 1 may keep float32 logits behind the narrower result
            assert buffer[:, 131:].isnan().all()


def lazy(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only the pages that are touched exist."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.12
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags), dtype=dtype)


FAR = 2**30 + 2**20
"""Elements between rows, so that the third row lies beyond 2^31, but the stride itself does not."""


def far_rows(value: Tensor) -> Tensor:
    """A copy of three rows, so far apart that 32 bits cannot count the elements between them."""
    memory = lazy(2 * FAR + value.shape[1], value.dtype)
    return memory.as_strided(value.shape, (FAR, 1)).copy_(value)


@stages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(stage: str, dtype: torch.dtype) -> None:
    from paced_kernels._loss.triton_gemm import GemmRows
    from paced_kernels._loss.triton_logits import LogitRows

    case = {name: value.detach() for name, value in make_case([3], 40, 131, dtype).items()}
    head = Head(case["head_weight"], case["bias"], 0.9)
    live = torch.tensor([True, False, True])
    coefficient, bonus = torch.tensor([0.5, 0.0, -2.0]), torch.tensor([0.1, 0.0, 0.3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matrices, stats = [], []
    for is_far in (False, True):
        # Stage 1 reads its hidden states through a library, stage 2 also through the kernel.
        hidden = far_rows(case["hidden"]) if is_far and stage != "logits" else case["hidden"]
        config = STAGES[stage]
        arguments = (head, hidden, case["token_ids"], True, None)
        engine = LogitRows(*arguments) if config is None else GemmRows(*arguments, config)
        if is_far:
            # Stage 1 views its float32 logits in the dtype of the result, which is FAR elements apart then.
            wide, stride = (torch.float32, FAR * dtype.itemsize // 4) if config is None else (dtype, FAR)
            engine._buffer = lazy(2 * stride + 131, wide).as_strided((3, 131), (stride, 1))
        chunk = engine.exponentials(slice(0, 3), live)
        exponentials = chunk.matrix.clone()
        engine.entropy_gradient(chunk, slice(0, 3), coefficient, bonus)
        matrices.append(torch.stack([exponentials, chunk.matrix.clone()]))
        stats.append(torch.stack([chunk.stats.logprobs, chunk.stats.lse, chunk.factor]))
        assert chunk.matrix.stride(0) >= (FAR if is_far else 131)
    assert torch.equal(*matrices)
    assert torch.equal(*stats)
    assert (matrices[1][:, 1] == 0).all()
    assert (matrices[1][:, [0, 2]] != 0).any(2).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_the_largest_batch_of_a_real_vocabulary() -> None:
    from paced_kernels._loss import row_kernels as kernels

    num_rows, vocab_size = 14200, 151936  # 2.16e9 elements
    matrix = lazy(num_rows * vocab_size, torch.bfloat16).view(num_rows, vocab_size)
    live = torch.zeros(num_rows, dtype=torch.uint8)
    live[-2:] = 1
    kernels.patch_targets_kernel[(1,)](
        out_ptr=matrix,
        token_ptr=torch.full((num_rows,), vocab_size - 1),
        patch_ptr=torch.full((num_rows,), -0.75),
        live_ptr=live,
        num_rows=num_rows,
        vocab_size=vocab_size,
        vocab_start=0,
        stride_out=vocab_size,
        HAS_LIVE=True,
        BLOCK_T=16384,
    )
    assert matrix[-3:, -1].tolist() == [0.0, -0.75, -0.75]
    assert matrix[-1, :-1].count_nonzero() == 0


@stages
def test_two_runs_agree_bit_for_bit(stage: str) -> None:
    case = make_case([5, 0, 9, 2, 19], 33, 131)
    budget = workspace(STAGES[stage], case, 14)
    with forced(STAGES[stage]):
        first = run(case, workspace_bytes=budget)
        assert_equal(run(case, workspace_bytes=budget), first)
        with unread_offsets():
            first = run(case, workspace_bytes=budget)
            assert_equal(run(case, workspace_bytes=budget), first)


def scored(case: Case, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of some rows."""
    return linear_logprobs(
        case["hidden"].detach()[rows],
        case["head_weight"].detach(),
        case["token_ids"][rows],
        bias=case["bias"].detach(),
        return_entropy=True,
        backend="triton",
    )


@pytest.mark.parametrize("stage", ["halves", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(stage: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter multiplies tiles by numpy, whose BLAS on some processors rounds a row by its place in the tile.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    case = make_case([150], 33, 300, dtype)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    with forced(STAGES[stage]):
        whole = scored(case, slice(None))
        for rows in (slice(0, 1), slice(7, 60), slice(131, 150), order):
            for value, wanted in zip(scored(case, rows), whole, strict=True):
                assert torch.equal(value, wanted[rows])

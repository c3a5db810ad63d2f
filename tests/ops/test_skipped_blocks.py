"""Products that pass over blocks of E' in Triton: which blocks, and what is left, in the interpreter.

R = rows of a chunk, H = hidden size, V = vocabulary, P = blocks of columns, G = tiles of rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, LEAVES, STAGES, Case, forced, oracle, run
from skipped_cases import SHARE, bounds, peaked_case
from torch import Tensor

from paced_kernels import warm_up
from paced_kernels._loss import triton_skipping
from paced_kernels._loss.triton_skipping import KeptBlocks, add_kept_blocks, choose_blocks, multiply_kept_blocks

pytestmark = INTERPRETED

CONFIG = STAGES["halves"]  # tiles of 32 rows, blocks of 64 columns
assert CONFIG is not None


def case_in(dtype: torch.dtype, **options: Any) -> Case:
    """Tokens in the first columns, so that whole blocks are far below a share; sequences end inside tiles."""
    case = peaked_case([40, 0, 13, 1, 30, 22], **options)
    with torch.no_grad():
        case["bias"] -= 12.0 * (torch.arange(case["bias"].shape[0]) > 300)
        logits = case["hidden"] @ case["head_weight"].T + case["bias"]
        case["token_ids"] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return case | {name: case[name].detach().to(dtype).requires_grad_() for name in LEAVES if name != "log_z"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocab_size"), [(None, 1500), (60, 1500), (None, 1450)])
def test_errors_are_within_the_bound_and_not_nothing(dtype: torch.dtype, rows: int | None, vocab_size: int) -> None:
    """The last half of the last tile of a vocabulary of 1450 is empty."""
    case = case_in(dtype)
    case |= {name: case[name].detach()[:vocab_size].requires_grad_() for name in ("head_weight", "bias")}
    case["token_ids"].clamp_(max=vocab_size - 1)
    workspace = None if rows is None else rows * 4 * 1600
    options: dict[str, Any] = {"temperature": 0.8, "workspace_bytes": workspace}
    with forced(CONFIG):
        found = run(case, skipped_share=SHARE, **options)
        plain = run(case, **options)
    exact = oracle(case, **options)
    for name in ("loss", "seq_logprobs", "entropy"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert torch.equal(found.gradients["bias"], plain.gradients["bias"])
    floor = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    for name, bound in bounds(case, SHARE, temperature=0.8).items():
        error = (found.gradients[name].double() - exact.gradients[name]).norm()
        before = (plain.gradients[name].double() - exact.gradients[name]).norm()
        assert error <= bound + floor * exact.gradients[name].norm(), name
        assert not torch.equal(found.gradients[name], plain.gradients[name]), name
        assert dtype == torch.bfloat16 or error > 10 * before, name


def random_chunk(num_rows: int, vocab_size: int, tile_columns: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E' with rows of very different size, its scale, its targets, and sums of blocks of 64 without the target."""
    matrix = (
        torch.rand(num_rows, vocab_size)
        * (torch.randn(num_rows, -(-vocab_size // 64)) * 6).exp().repeat_interleave(64, dim=1)[:, :vocab_size]
    )
    target = torch.randint(0, vocab_size, (num_rows,))
    matrix.scatter_(1, target[:, None], 0.0)
    padded = torch.nn.functional.pad(matrix, (0, -vocab_size % tile_columns))
    sums = padded.unflatten(1, (-1, 64)).sum(-1).T.contiguous()
    matrix.scatter_(1, target[:, None], -matrix.sum(1, keepdim=True))
    return matrix, torch.randn(num_rows) * torch.randn(num_rows).exp(), target, sums


def is_kept(kept: KeptBlocks, vocab_size: int, num_rows: int) -> Tensor:
    """[R, V] bool, from the lists of blocks of each row tile."""
    mask = torch.zeros(num_rows, -(-vocab_size // 128) * 128, dtype=torch.bool)
    for tile, (blocks, count) in enumerate(zip(kept.blocks.tolist(), kept.num_blocks.tolist(), strict=True)):
        for block in blocks[:count]:
            mask[32 * tile : 32 * tile + 32, 64 * block : 64 * block + 64] = True
    return mask[:, :vocab_size]


@pytest.mark.parametrize("share", [0.3, 0.02])
def test_the_rule_holds_in_every_tile_and_no_further_block_could_go(share: float) -> None:
    num_rows, vocab_size = 75, 700
    matrix, scale, target, sums = random_chunk(num_rows, vocab_size)
    at_target = matrix.gather(1, target[:, None])[:, 0]
    owned = torch.ones(num_rows, dtype=torch.bool)
    kept = choose_blocks(sums, scale, at_target, target // 64, owned, share=share, tile_rows=32)
    mask = is_kept(kept, vocab_size, num_rows)
    sizes, masses = (matrix * scale[:, None]).abs().double(), (scale * at_target).abs().double()
    assert 0.05 < (~mask).float().mean() < 0.95
    for start in range(0, num_rows, 32):
        tile = slice(start, start + 32)

        def is_within(mask: Tensor, tile: slice = tile) -> bool:
            left_out = (sizes[tile] * ~mask[tile]).sum(1)
            total, norm = left_out.sum() / masses[tile].sum(), left_out.norm() / masses[tile].norm()
            return bool(total <= share * (1 + 1e-6)) and bool(norm <= share * (1 + 1e-6))

        assert is_within(mask)
        blocks = [mask[tile, 64 * b : 64 * b + 64].any() for b in range(11)]
        amounts = [
            (sizes[tile, 64 * b : 64 * b + 64].sum().item() if b_kept else torch.inf) for b, b_kept in enumerate(blocks)
        ]
        smallest = amounts.index(min(amounts))
        mask[tile, 64 * smallest : 64 * smallest + 64] = False
        assert not is_within(mask)
    # The other list says the same by columns, and what is left out is the signed sum.
    for block, count in enumerate(kept.num_tiles.tolist()):
        tiles = kept.tiles[:count, block].tolist()
        again = is_kept(kept, vocab_size, num_rows)
        assert tiles == [tile for tile in range(3) if again[32 * tile, 64 * block]]
        left_out = (matrix * ~again)[:, 64 * block : 64 * block + 64].sum(1)
        torch.testing.assert_close(kept.left_out[:, block], left_out, rtol=1e-5, atol=1e-5 * sums.max().item())


@pytest.mark.parametrize("begins", [True, False])
def test_products_of_kept_blocks(begins: bool) -> None:
    """Against a product with the mask; sizes that are no multiple of a block; a tile and a column that keep nothing."""
    num_rows, vocab_size, hidden_size = 75, 700, 150
    matrix, scale, target, sums = random_chunk(num_rows, vocab_size, CONFIG.block_v)  # the last block is empty
    assert sums.shape[0] == 12
    owned = torch.ones(num_rows, dtype=torch.bool)
    at_target = matrix.gather(1, target[:, None])[:, 0]
    scale[32:64] = 0.0
    kept = choose_blocks(sums, scale, at_target, target // 64, owned, share=0.2, tile_rows=32)
    assert kept.num_blocks.tolist()[1] == 0
    mask = is_kept(kept, vocab_size, num_rows)
    weight, rows = torch.randn(vocab_size, hidden_size), torch.randn(num_rows, hidden_size)
    masked = (matrix * mask).double()
    means = triton_skipping.block_means(weight, CONFIG)
    torch.testing.assert_close(means[10], weight[640:].mean(0))
    torch.testing.assert_close(means[3], weight[192:256].mean(0))
    found = multiply_kept_blocks(matrix, weight, kept, CONFIG, means)
    wanted = masked @ weight.double() + kept.left_out.double() @ means.double()
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    total = torch.full((vocab_size, hidden_size), torch.nan if begins else 2.0)
    add_kept_blocks(total, matrix, rows, kept, CONFIG, begins=begins)
    wanted = masked.T @ rows.double() + (0.0 if begins else 2.0)
    assert (total - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_left_out(value: float) -> None:
    matrix, scale, target, sums = random_chunk(64, 700)
    at_target = matrix.gather(1, target[:, None])[:, 0]
    sums[4, 40] = value
    scale[3] = torch.nan if value != value else scale[3]
    owned = torch.ones(64, dtype=torch.bool)
    kept = choose_blocks(sums, scale, at_target, target // 64, owned, share=0.9, tile_rows=32)
    assert 4 in kept.blocks[1, : kept.num_blocks[1]].tolist()
    if value != value:
        assert kept.num_blocks[0] == 11


def test_a_token_of_another_rank_counts_for_nothing_here() -> None:
    """Its column would hold the largest entry: where another rank has it, the block of the same number may go."""
    _, scale, target, sums = random_chunk(32, 700)
    target.fill_(130)
    sums.fill_(1.0)
    sums[2] = 1e-6
    at_target = torch.full((32,), -100.0)
    for is_owned in (True, False):
        owned = torch.full((32,), is_owned)
        kept = choose_blocks(sums, scale, at_target, target // 64, owned, share=1e-3, tile_rows=32)
        assert (2 in kept.blocks[0, : kept.num_blocks[0]].tolist()) == is_owned


@pytest.mark.parametrize("stage", STAGES)
def test_a_warm_up_runs_both_products_where_there_are_any(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = triton_skipping.launch
    monkeypatch.setattr(
        triton_skipping,
        "launch",
        lambda kernel, *rest, **more: launched.append(kernel.__name__) or real(kernel, *rest, **more),
    )
    with forced(STAGES[stage]):
        warm_up(torch.randn(70, 24), backend="triton", skipped_share=SHARE)
    expected = [] if STAGES[stage] is None else ["kept_rows_kernel", *["kept_columns_kernel"] * 3]
    assert launched == expected

"""The fused operations on a GPU, at real vocabularies: accuracy, memory, determinism, no host sync, graph capture.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import tensor_core_nats, tensor_core_sequence_nats
from torch import Tensor

from paced_kernels import linear_logprobs, trajectory_balance_loss
from paced_kernels._loss import tiles
from paced_kernels._loss.row_kernels import LOWEST_DIRECT_LOGPROB

DEVICE = torch.device("cuda")
SHAPES = [
    (1, 64, 257),
    (127, 70, 50257),  # rows that TMA cannot read
    (129, 896, 151936),
    (1000, 896, 152064),
    (513, 2048, 128256),
    (300, 4096, 129920),
    (64, 3584, 262145),
]
STAGES = ("table", "stage 1")


@pytest.fixture(autouse=True)
def _exact_oracle() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the table says, and stage 1 whatever it says."""
    if request.param == "stage 1":
        monkeypatch.setattr(tiles, "choose_config", lambda *_: None)
    return request.param


def make_case(
    num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, *, peak: float = 6.0, seed: int = 0
) -> dict[str, Any]:
    """Peaked logits, as a trained policy has them: the hidden state leans towards the row of its target."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    weight = normal(vocab_size, hidden_size) * hidden_size**-0.5
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=generator, device=DEVICE)
    token_ids[0], token_ids[-1] = 0, vocab_size - 1
    hidden = normal(num_rows, hidden_size) + peak * weight[token_ids]
    cuts = torch.tensor([num_rows // 3, num_rows // 3, num_rows // 2])
    num_sequences = len(cuts) + 1
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "head_weight": weight.to(dtype).requires_grad_(),
        "token_ids": token_ids,
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([num_rows])]),
        "rewards": torch.rand(num_sequences, device=DEVICE, generator=generator),
        "log_z": normal(num_sequences).requires_grad_(),
        "beta": 0.05,
    }


def loss_of(case: dict[str, Any], **options: Any) -> Any:
    return trajectory_balance_loss(**{**case, **options})


def oracle(case: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """float32 operands, 256 rows of logits at a time: log-probs [T], entropies [T], gradients of the three leaves."""
    hidden = case["hidden"].detach().float()
    weight = case["head_weight"].detach().float()
    rows = [slice(i, i + 256) for i in range(0, hidden.shape[0], 256)]
    logprobs, entropy = [], []
    for part in rows:
        all_logprobs = (hidden[part] @ weight.T).double().log_softmax(-1)
        logprobs.append(all_logprobs.gather(1, case["token_ids"][part, None])[:, 0])
        entropy.append(torch.special.entr(all_logprobs.exp()).sum(-1))
    logprobs = torch.cat(logprobs)
    offsets = case["cu_seqlens"].tolist()
    sums = torch.stack([logprobs[a:b].sum() for a, b in itertools.pairwise(offsets)])
    residual = case["log_z"].detach().double() + sums - case["rewards"].double() / case["beta"]
    coefficient = 2 * residual / len(residual)
    owner = torch.repeat_interleave(torch.arange(len(residual)), torch.tensor(offsets).diff()).to(DEVICE)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for part in rows:
        grad = (hidden[part] @ weight.T).softmax(-1).neg_()
        grad[torch.arange(len(grad), device=DEVICE), case["token_ids"][part]] = -torch.expm1(logprobs[part]).float()
        grad *= coefficient[owner[part], None].float()
        grad_hidden[part] = grad @ weight
        grad_weight += grad.T @ hidden[part]
    return logprobs, torch.cat(entropy), [grad_hidden, grad_weight, coefficient]


def largest_logits(case: dict[str, Any]) -> Tensor:
    """[T], by absolute value."""
    weight = case["head_weight"].detach().float()
    parts = [(part.float() @ weight.T).abs().amax(1) for part in case["hidden"].detach().split(256)]
    return torch.cat(parts)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize(("num_rows", "hidden_size", "vocab_size"), SHAPES)
def test_loss_and_gradients(
    stage: str, num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, bound: float
) -> None:
    case = make_case(num_rows, hidden_size, vocab_size, dtype)
    logprobs, entropy, expected = oracle(case)
    chunk = None if num_rows < 500 else 4 * 256 * (vocab_size + 64)  # several chunks, and a streamed sequence
    out = loss_of(case, return_entropy=True, workspace_bytes=chunk)
    found = torch.autograd.grad(out.loss, [case[name] for name in ("hidden", "head_weight", "log_z")])
    for value, reference in zip(found[:2], expected[:2], strict=True):
        assert relative_error(value, reference) < bound
    assert relative_error(found[2], expected[2]) < 1e-5
    offsets = case["cu_seqlens"].tolist()
    sums = torch.stack([logprobs[a:b].sum() for a, b in itertools.pairwise(offsets)])
    # Products of float32 are formed without tensor cores; those of the others are cut off and not rounded.
    largest = largest_logits(case).max().item()
    is_cut = dtype != torch.float32
    for length, error in zip(case["cu_seqlens"].diff().tolist(), (out.seq_logprobs - sums).abs().tolist(), strict=True):
        assert error < (tensor_core_sequence_nats(length, hidden_size, largest) if is_cut else 1e-4)
    assert relative_error(out.entropy, entropy) < 1e-5
    scored, scored_entropy = linear_logprobs(
        case["hidden"], case["head_weight"], case["token_ids"], return_entropy=True
    )
    assert (scored - logprobs).abs().max() < (tensor_core_nats(hidden_size, largest) if is_cut else 2e-5)
    assert relative_error(scored_entropy, entropy) < 1e-5


def test_no_worse_than_dense_bfloat16(stage: str) -> None:
    """float32 logits, bfloat16 gradient of them, bfloat16 products: the best dense code, and 1.5 times its error."""
    case = make_case(700, 1024, 32000, torch.bfloat16)
    logprobs, _, expected = oracle(case)
    found = torch.autograd.grad(loss_of(case).loss, [case["hidden"], case["head_weight"]])
    hidden, weight = case["hidden"].detach(), case["head_weight"].detach()
    grad = (hidden.float() @ weight.float().T).softmax(-1).neg_()
    grad[torch.arange(len(grad), device=DEVICE), case["token_ids"]] = -torch.expm1(logprobs).float()
    owner = torch.repeat_interleave(torch.arange(4), case["cu_seqlens"].diff()).to(DEVICE)
    grad = (grad * expected[2][owner, None].float()).bfloat16()
    for value, dense, reference in zip(found, (grad @ weight, grad.T @ hidden), expected[:2], strict=True):
        assert relative_error(value, reference) < 1.5 * relative_error(dense, reference)


def test_gradients_of_linear_logprobs_and_entropy(stage: str) -> None:
    case = make_case(300, 512, 50304, torch.float32)
    upstream = torch.randn(2, 300, device=DEVICE)
    upstream[:, ::7] = 0
    leaves = [case["hidden"], case["head_weight"]]

    def gradients(backend: str) -> list[Tensor]:
        pair = linear_logprobs(*leaves, case["token_ids"], return_entropy=True, backend=backend, temperature=0.7)
        return list(torch.autograd.grad(list(pair), leaves, list(upstream)))

    for found, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        assert relative_error(found, expected) < 2e-5


def test_float32_is_exact_whatever_the_process_allows_its_products() -> None:
    case = make_case(300, 512, 50304, torch.float32)
    logprobs, _, expected = oracle(case)
    torch.set_float32_matmul_precision("high")
    try:
        out = loss_of(case)
        found = torch.autograd.grad(out.loss, [case["hidden"], case["head_weight"]])
        scored = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (scored - logprobs).abs().max() < 2e-5
    for value, reference in zip(found, expected[:2], strict=True):
        assert relative_error(value, reference) < 1e-5


def test_a_batch_of_nothing_and_an_empty_sequence_alone(stage: str) -> None:
    case = make_case(40, 64, 32000, torch.bfloat16)
    per_row = tiles.bytes_per_row(tiles.plan(case["hidden"], case["head_weight"]), 32000, torch.bfloat16)
    case["cu_seqlens"] = torch.tensor([0, 20, 20, 40, 40])
    assert loss_of(case, workspace_bytes=20 * per_row).loss.isfinite()
    none = {"hidden": case["hidden"].detach()[:0].requires_grad_(), "token_ids": case["token_ids"][:0]}
    none["cu_seqlens"] = torch.tensor([0] * 5)
    out = loss_of({**case, **none})
    assert torch.autograd.grad(out.loss, case["head_weight"])[0].abs().max() == 0


def test_improbable_targets_are_exact(stage: str) -> None:
    """Rows far below and near the border where exponentials relative to the target end, beside ordinary ones."""
    case = make_case(256, 1024, 32000, torch.bfloat16)
    with torch.no_grad():
        away = -case["head_weight"][case["token_ids"]].float()
        for rows, scale in ((slice(5, 9), 40.0), (slice(100, 101), 500.0), (slice(200, 256), 90.0)):
            case["hidden"][rows] += (scale * away[rows]).bfloat16()
    logprobs, _, expected = oracle(case)
    assert logprobs.min() < 4 * LOWEST_DIRECT_LOGPROB.value
    out = loss_of(case)
    found = torch.autograd.grad(out.loss, [case["hidden"], case["head_weight"]])
    scored = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"])
    bounds = [tensor_core_nats(1024, largest) for largest in largest_logits(case).tolist()]
    assert ((scored - logprobs).abs() < torch.tensor(bounds, device=DEVICE)).all()
    for value, reference in zip(found, expected[:2], strict=True):
        assert relative_error(value, reference) < 4e-3


@pytest.mark.parametrize("is_frozen", [False, True])
def test_peak_memory_follows_the_formula(is_frozen: bool) -> None:
    """Exponentials, float32 and rounded gradient of the weight, gradient of the hidden states; nothing else grows."""
    num_rows, hidden_size, vocab_size, chunk_rows = 6000, 1024, 128256, 1024
    case = make_case(num_rows, hidden_size, vocab_size, torch.bfloat16)
    case["cu_seqlens"] = torch.arange(0, num_rows + 1, 500)
    case["rewards"], case["log_z"] = torch.ones(12, device=DEVICE), torch.zeros(12, device=DEVICE)
    case["head_weight"].requires_grad_(not is_frozen)
    config = tiles.plan(case["hidden"], case["head_weight"])
    workspace = chunk_rows * tiles.bytes_per_row(config, vocab_size, torch.bfloat16)
    loss_of(case).loss.backward()  # library workspaces and compiled kernels
    case["hidden"].grad = case["head_weight"].grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_of(case, workspace_bytes=workspace).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    weight_bytes = 0 if is_frozen else vocab_size * hidden_size * (4 + 2)
    rows_bytes = num_rows * hidden_size * 2 * 2  # the gradient, and its product with grad_output
    chunk_bytes = chunk_rows * hidden_size * (4 + 4 + 2)  # float32 product, scaled rows and their rounding
    assert peak < 1.02 * (workspace + weight_bytes + rows_bytes + chunk_bytes) + 32 * 2**20
    assert peak > workspace


def test_offsets_beyond_int32() -> None:
    """The last rows of a chunk of more than 2^31 exponentials are those of the same rows alone."""
    num_rows, vocab_size = 14400, 151936
    assert num_rows * vocab_size > 2**31
    case = make_case(num_rows, 64, vocab_size, torch.bfloat16)
    case["cu_seqlens"] = torch.tensor([0, num_rows - 32, num_rows])
    case["rewards"], case["log_z"] = case["rewards"][:2], case["log_z"].detach()[:2]
    enough = 2 * num_rows * (vocab_size + 4096) * 2
    whole = torch.autograd.grad(loss_of(case, workspace_bytes=enough, denominator=1.0).loss, case["hidden"])[0]
    tail = {name: case[name][-32:] for name in ("hidden", "token_ids")}
    tail |= {name: case[name][1:] for name in ("rewards", "log_z")}
    tail["hidden"] = tail["hidden"].detach().requires_grad_()
    tail["cu_seqlens"] = torch.tensor([0, 32])
    alone = torch.autograd.grad(loss_of({**case, **tail}, denominator=1.0).loss, tail["hidden"])[0]
    # The library may take another kernel for 32 rows than for 14400, so sums may round differently; another row's
    # gradient is far away.
    assert relative_error(whole[-32:], alone) < 4e-3
    assert relative_error(whole[-64:-32], alone) > 0.5


def test_two_runs_and_any_batch_are_bit_equal(stage: str) -> None:
    case = make_case(900, 896, 151936, torch.bfloat16)
    leaves = [case["hidden"], case["head_weight"]]
    first = torch.autograd.grad(loss_of(case).loss, leaves)
    second = torch.autograd.grad(loss_of(case).loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if stage == "table":  # a library GEMM may choose by the number of rows
        logprobs = linear_logprobs(*(value.detach() for value in leaves), case["token_ids"])
        part = linear_logprobs(leaves[0].detach()[300:433], leaves[1].detach(), case["token_ids"][300:433])
        assert torch.equal(logprobs[300:433], part)


def step_of(case: dict[str, Any], **options: Any) -> Callable[[], list[Tensor]]:
    """A step that keeps everything on the device."""

    def step() -> list[Tensor]:
        out = loss_of(case, **options)
        return [out.loss, *torch.autograd.grad(out.loss, [case["hidden"], case["head_weight"], case["log_z"]])]

    return step


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_host_never_waits(stage: str, where: str) -> None:
    case = make_case(600, 512, 32000, torch.bfloat16)
    case["cu_seqlens"] = case["cu_seqlens"].to(where)
    case["behavior_logprobs"] = torch.full((600,), -0.3, device=DEVICE)
    case["weights"] = torch.ones(4, device=DEVICE)
    step = step_of(case, workspace_bytes=250 * 4 * 33000, return_entropy=True)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_repeats_the_step(stage: str) -> None:
    case = make_case(600, 512, 32000, torch.bfloat16)
    case["cu_seqlens"] = case["cu_seqlens"].to(DEVICE)
    step = step_of(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        other = make_case(600, 512, 32000, torch.bfloat16, seed=seed)
        with torch.no_grad():
            for name in ("hidden", "token_ids", "rewards", "log_z"):
                case[name].copy_(other[name])
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)


def test_compiled_code_gives_the_same_step() -> None:
    case = make_case(200, 256, 32000, torch.bfloat16)

    def loss(hidden: Tensor, weight: Tensor, log_z: Tensor) -> Tensor:
        return loss_of({**case, "hidden": hidden * 2, "head_weight": weight, "log_z": log_z}).loss

    leaves = [case["hidden"], case["head_weight"], case["log_z"]]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < 1e-2


def test_weight_zero_and_nan_stay_apart(stage: str) -> None:
    case = make_case(300, 256, 32000, torch.bfloat16)
    start, stop = case["cu_seqlens"].tolist()[2:4]
    with torch.no_grad():
        case["hidden"][start:stop] = float("nan")
    leaves = [case["hidden"], case["head_weight"]]
    weights = torch.ones(4, device=DEVICE)
    assert loss_of(case, weights=weights).loss.isnan()
    weights[2] = 0
    out = loss_of(case, weights=weights)
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, leaves)
    assert out.loss.isfinite()
    assert grad_weight.isfinite().all()
    assert (grad_hidden[start:stop] == 0).all()
    assert grad_hidden.isfinite().all()

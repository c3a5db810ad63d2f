"""The custom operators as PyTorch sees them: registrations, torch.compile, autocast, checkpointing, graphs, errors.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

import itertools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paced_kernels
from paced_kernels import FusedLinearHead, VocabShard, linear_logprobs, trajectory_balance_loss
from paced_kernels._host_products import HAS_UNITS
from paced_kernels._loss import operators, tiles

T, H, V = 7, 5, 11
LEAVES = ("hidden", "head_weight", "bias", "log_z")


def make_case(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Arguments of the loss: sequences of 3, 0 and 4 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(T, H).requires_grad_(),
        "head_weight": normal(V, H).requires_grad_(),
        "bias": normal(V).requires_grad_(),
        "log_z": normal(3).to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(),
        "token_ids": torch.randint(0, V, (T,), generator=generator),
        "cu_seqlens": torch.tensor([0, 3, 3, 7]),
        "rewards": torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
        "ref_logprobs": normal(T).float() - 2.0,
        "weights": torch.tensor([1.0, 2.0, 0.7], dtype=torch.float64),
        "beta": 0.3,
    }


def naive_loss(case: dict[str, Any], entropy_bonus: float = 0.0) -> Tensor:
    logits = case["hidden"] @ case["head_weight"].T + case["bias"]
    table = logits.log_softmax(-1)
    logprobs = table.gather(1, case["token_ids"][:, None])[:, 0]
    parts = itertools.pairwise(case["cu_seqlens"])
    gaps = torch.stack([(logprobs - case["ref_logprobs"])[start:stop].sum() for start, stop in parts])
    residual = case["log_z"] + gaps - case["rewards"] / case["beta"]
    entropy = -(table.exp() * table).sum(-1)
    beta = case["beta"]
    return (case["weights"] * (beta * residual) ** 2).mean() / (2 * beta) - entropy_bonus * entropy.mean()


def gradients(loss: Tensor, case: dict[str, Any], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [case[name] for name in LEAVES], **options))


def opcheck(operator: Callable[..., object], *arguments: object) -> None:
    torch.library.opcheck(operator, arguments)


# The tensors are on the CPU, where only the interpreter can reach them; where there is a GPU it is off.
IN_TRITON = pytest.param("triton", marks=INTERPRETED)
BACKENDS = [
    ("reference", torch.float32),
    ("reference", torch.float64),
    pytest.param("compiled", torch.bfloat16, marks=pytest.mark.skipif(not HAS_UNITS, reason="needs AVX512_BF16")),
    pytest.param("triton", torch.float32, marks=INTERPRETED),
]


@pytest.mark.real_empty
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_opcheck_of_log_probs(backend: str, dtype: torch.dtype) -> None:
    case = make_case(dtype)
    hidden, weight, bias = (case[name] for name in LEAVES[:3])
    shard = "", 0, V, 2.0**-8
    ids, keeps = case["token_ids"], False
    opcheck(operators.linear_logprobs, hidden, weight, bias, ids, 0.7, True, None, backend, *shard, keeps)
    opcheck(operators.linear_logprobs, hidden, weight, None, ids, 1.0, False, 4 * 8 * V, backend, *shard, keeps)
    opcheck(operators.linear_logprobs, hidden.detach(), weight, None, ids, 1.0, True, None, backend, *shard, keeps)
    if backend != "triton":
        opcheck(operators.linear_logprobs, hidden, weight, bias, ids, 0.7, False, None, backend, *shard, True)
    inputs = hidden.detach(), weight.detach(), bias.detach(), ids
    logprobs, lse, entropy, *kept = operators.linear_logprobs(*inputs, 0.7, True, None, backend, *shard, keeps)
    grads = torch.ones_like(logprobs), torch.ones_like(entropy)
    rest = 0.7, None, backend, *shard, *kept
    opcheck(operators.linear_logprobs_backward, *grads, logprobs, lse, entropy, *inputs, *rest, [True, True, True])
    opcheck(
        operators.linear_logprobs_backward, None, grads[1], logprobs, lse, entropy, *inputs, *rest, [False, True, False]
    )
    opcheck(
        operators.linear_logprobs_backward, grads[0], None, logprobs, lse, entropy, *inputs, *rest, [True, False, False]
    )


@pytest.mark.real_empty
@pytest.mark.parametrize(
    "wanted",
    [
        (True, True, True),
        (False, True, False),
        pytest.param((True, False, False), marks=pytest.mark.exhaustive),
        pytest.param((False,) * 3, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_opcheck_of_the_loss(backend: str, dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    case = make_case(dtype)
    states = [case[name] if is_wanted else case[name].detach() for name, is_wanted in zip(LEAVES, wanted, strict=False)]
    packed = case["log_z"], case["token_ids"], case["cu_seqlens"], case["rewards"]
    full = case["ref_logprobs"], case["weights"], torch.ones(3), torch.tensor(2.0, dtype=torch.float64)
    tail = backend, "", 0, V, 2.0**-8, list(wanted)
    opcheck(operators.trajectory_balance, *states, *packed, *full, 0.3, 2.0, 1.1, "mean", 0.1, True, None, *tail)
    # Two rows of logits fit the workspace: more than one group, and a sequence longer than a chunk.
    small = 2 * V * dtype.itemsize
    states[2] = None
    opcheck(
        operators.trajectory_balance, *states, *packed, *[None] * 4, 0.3, None, 1.0, "sum", 0.0, False, small, *tail
    )


@pytest.mark.real_empty
def test_opcheck_of_scaling() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(operators.scale_gradient, torch.randn(3, 2), torch.tensor(2.0), dtype)


def test_a_bfloat16_gradient_is_rounded_once() -> None:
    gradient, scale = torch.randn(1000).bfloat16(), torch.tensor(1.0 / 3.0)
    expected = (gradient.double() * scale.double()).bfloat16()
    assert torch.equal(operators.scale_gradient(gradient, scale, torch.bfloat16), expected)
    assert not torch.equal(gradient * scale.bfloat16(), expected), "the case does not tell"


class Step(nn.Module):
    """One hidden layer and a head, in the ways a training step calls them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H, dtype=dtype)
        self.inner = nn.Linear(H, H, dtype=dtype)
        self.head = FusedLinearHead(H, V, dtype=dtype)

    def states(self, token_ids: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.embedding(token_ids.roll(1))))

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor, rewards: Tensor, log_z: Tensor, **options: Any) -> Tensor:
        hidden = self.states(token_ids)
        logprobs, entropy = self.head(hidden, token_ids, return_entropy=True, **options)
        out = self.head(
            hidden, token_ids, cu_seqlens, rewards=rewards, log_z=log_z, beta=0.3, ref_logprobs=logprobs, **options
        )
        return out.loss + 0.1 * (logprobs.square().mean() - entropy.mean()) + 0.0 * out.residual.sum()


def run_step(step: Callable[..., Tensor], model: nn.Module, lengths: list[int], **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    token_ids = torch.randint(0, V, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    log_z = torch.zeros(len(lengths), requires_grad=True)
    loss = step(token_ids, cu_seqlens, torch.ones(len(lengths)), log_z, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), log_z])]


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["reference", IN_TRITON])
def test_a_compiled_step_has_one_graph_and_the_results_of_eager(backend: str) -> None:
    torch._dynamo.reset()
    model = Step()
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=record, fullgraph=True, dynamic=True)
    compilations = []
    for lengths, temperature in (([4, 3, 2], 0.7), ([3, 0, 5], 0.7), ([1, 6, 2, 7], 0.7), ([4, 3, 2], 0.9)):
        options = {"backend": backend, "temperature": temperature}
        found, expected = run_step(compiled, model, lengths, **options), run_step(model, model, lengths, **options)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        compilations.append(len(graphs))
    assert compilations[0] > 0
    assert compilations[2] == compilations[0], "other lengths compile anew"


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.real_empty
def test_inductor_compiles_the_step() -> None:
    torch._dynamo.reset()
    model = Step()
    compiled = torch.compile(model, fullgraph=True)
    # A cache on disk knows the graph of the caller, not the backward of an operator that has changed since.
    with torch._inductor.config.patch(force_disable_caches=True):
        found = run_step(compiled, model, [4, 3])
    for value, expected in zip(found, run_step(model, model, [4, 3]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.real_empty
def test_values_are_checked_when_compiled_code_runs() -> None:
    torch._dynamo.reset()
    case = make_case()

    def loss(token_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return trajectory_balance_loss(**{**case, "token_ids": token_ids, "cu_seqlens": cu_seqlens}).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    good = case["token_ids"], case["cu_seqlens"]
    assert torch.equal(compiled(*good), loss(*good))
    for bad, message in (
        ((good[0].clone().fill_(V), good[1]), r"token_ids must lie in \[0, 11\), got values from 11 to 11"),
        ((good[0], torch.tensor([0, 3, 3, 6])), "cu_seqlens must end at T = 7"),
    ):
        for function in (loss, compiled):
            with pytest.raises(ValueError, match=message):
                function(*bad)


@INTERPRETED[0]
@pytest.mark.parametrize("stage", [1, 2])
def test_strided_arguments_give_what_their_copies_give(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Gradients of sums are expanded scalars, and slices of a [T, 2] batch of tokens have stride 2.
    if stage == 1:
        monkeypatch.setattr(tiles, "choose_config", lambda *_: None)
    case = make_case()
    hidden, weight = (torch.cat([case[name].detach()] * 2, 1)[:, H:].requires_grad_() for name in LEAVES[:2])
    token_ids = torch.stack([case["token_ids"], case["token_ids"] * 0], 1)
    bias = torch.stack([case["bias"].detach(), torch.zeros(V)], 1).requires_grad_()
    found = []
    for backend in ("reference", "triton"):
        logprobs, entropy = linear_logprobs(
            hidden, weight, token_ids[:, 0], bias=bias[:, 0], return_entropy=True, backend=backend
        )
        found.append(torch.autograd.grad(logprobs.sum() + 0.5 * entropy.sum(), (hidden, weight, bias)))
    table = (hidden @ weight.T + bias[:, 0]).log_softmax(-1)
    entropy = -(table.exp() * table).sum()
    chosen = table.gather(1, token_ids[:, :1]).sum()
    expected = torch.autograd.grad(chosen + 0.5 * entropy, (hidden, weight, bias))
    for values in found:
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_autocast_joins_two_dtypes_and_gradients_keep_those_of_the_leaves() -> None:
    case = make_case()
    case["hidden"] = case["hidden"].detach().bfloat16().requires_grad_()
    with pytest.raises(ValueError, match=r"hidden and head_weight have different dtypes: torch\.bfloat16 vs"):
        trajectory_balance_loss(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = trajectory_balance_loss(**case)
        logprobs = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], bias=case["bias"])
    rounded = {name: case[name].detach().bfloat16().requires_grad_() for name in LEAVES[:3]}
    expected = trajectory_balance_loss(**{**case, **rounded})
    assert torch.equal(out.loss, expected.loss)
    assert (out.loss.dtype, logprobs.dtype) == (torch.float32, torch.float32)
    found = gradients(out.loss, case)
    assert [value.dtype for value in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for value, wanted in zip(found, gradients(expected.loss, {**case, **rounded}), strict=True):
        assert torch.equal(value, wanted.to(value.dtype))
    # float64 never meets a narrower dtype unasked.
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="different dtypes"):
        trajectory_balance_loss(**{**case, "head_weight": case["head_weight"].double()})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["reference", IN_TRITON])
def test_no_gradient_modes_give_the_same_numbers(mode: Callable[[], Any], backend: str) -> None:
    case = make_case()
    arguments = {"bias": case["bias"], "return_entropy": True, "backend": backend}
    inputs = case["hidden"], case["head_weight"], case["token_ids"]
    with mode():
        inside = [*linear_logprobs(*inputs, **arguments), *trajectory_balance_loss(**case, backend=backend)[:3]]
    outside = [*linear_logprobs(*inputs, **arguments), *trajectory_balance_loss(**case, backend=backend)[:3]]
    for value, expected in zip(inside, outside, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(whole: bool) -> None:
    model = Step()

    def step(*arguments: Tensor) -> Tensor:
        if whole:
            return checkpoint(model, *arguments, use_reentrant=False)
        token_ids, cu_seqlens, rewards, log_z = arguments
        hidden = checkpoint(model.states, token_ids, use_reentrant=False)
        return model.head(hidden, token_ids, cu_seqlens, rewards=rewards, log_z=log_z, beta=0.3).loss

    def plain(token_ids: Tensor, cu_seqlens: Tensor, rewards: Tensor, log_z: Tensor) -> Tensor:
        if whole:
            return model(token_ids, cu_seqlens, rewards, log_z)
        hidden = model.states(token_ids)
        return model.head(hidden, token_ids, cu_seqlens, rewards=rewards, log_z=log_z, beta=0.3).loss

    for value, expected in zip(run_step(step, model, [4, 3]), run_step(plain, model, [4, 3]), strict=True):
        assert torch.equal(value, expected)


def test_a_tied_weight_collects_the_gradients_of_all_its_uses() -> None:
    model = Step(torch.float64)
    model.head = FusedLinearHead.from_linear(nn.Linear(H, V, dtype=torch.float64))
    model.head.weight = model.embedding.weight
    token_ids, cu_seqlens = torch.arange(T) % V, torch.tensor([0, 3, T])
    rest = {"rewards": torch.ones(2), "log_z": torch.zeros(2), "beta": 0.3}
    model.head(model.states(token_ids), token_ids, cu_seqlens, **rest).loss.backward()
    model.head(model.states(token_ids), token_ids).sum().backward()  # a second pass adds to the first
    found = model.embedding.weight.grad
    assert found is not None
    assert model.head.weight.grad is found
    table = model.head(model.states(token_ids)).log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    sums = torch.stack([table[:3].sum(), table[3:].sum()])
    loss = (0.3 * sums - 1).square().mean() / (2 * 0.3)
    expected = torch.autograd.grad(loss + table.sum(), model.embedding.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", IN_TRITON])
def test_a_second_derivative_is_refused(backend: str) -> None:
    case = make_case()
    first = gradients(trajectory_balance_loss(**case, backend=backend).loss, case, create_graph=True)
    logprobs = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], backend=backend)
    first.append(torch.autograd.grad(logprobs.square().sum(), case["hidden"], create_graph=True)[0])
    for gradient in first:
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            gradient.sum().backward(retain_graph=True)


def test_a_retained_graph_gives_the_same_gradients_twice() -> None:
    case = make_case()
    out = trajectory_balance_loss(**case)
    logprobs = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], bias=case["bias"])
    for loss in (out.loss, 3.0 * out.loss, (logprobs.square().sum() + case["log_z"].sum())):
        once, twice = (gradients(loss, case, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, once, twice))
    for value, expected in zip(gradients(-2.5 * out.loss, case), gradients(naive_loss(case), case), strict=True):
        torch.testing.assert_close(value, -2.5 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 5, 100])
def test_the_entropy_bonus_is_the_gradient_of_its_loss(rows: int) -> None:
    case = make_case(torch.float64)
    options = {"entropy_bonus": 0.4, "workspace_bytes": rows * V * 8}

    def loss(*leaves: Tensor) -> Tensor:
        return trajectory_balance_loss(**{**case, **dict(zip(LEAVES, leaves, strict=True))}, **options).loss

    leaves = tuple(case[name] for name in LEAVES)
    assert torch.autograd.gradcheck(loss, leaves)
    expected = naive_loss(case, entropy_bonus=0.4)
    torch.testing.assert_close(loss(*leaves), expected, rtol=1e-12, atol=0)
    for value, wanted in zip(gradients(loss(*leaves), case), gradients(expected, case), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


def test_shards_that_cannot_be_are_refused() -> None:
    case = make_case()
    group = types.SimpleNamespace(group_name="")
    for start, vocab_size in ((-1, 20), (10, 20), (0, V - 1)):
        message = f"shard and head_weight disagree: rows {start} to {start + V} of a vocabulary of {vocab_size}"
        shard = VocabShard(group, start, vocab_size)
        with pytest.raises(ValueError, match=message):
            trajectory_balance_loss(**case, shard=shard)
        with pytest.raises(ValueError, match=message):
            linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], shard=shard)
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 20\)"):
        linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"] + 20, shard=VocabShard(group, 9, 20))


@pytest.mark.process
def test_triton_without_a_gpu_or_interpreter_says_what_to_do() -> None:
    code = (
        "import torch\n"
        "from paced_kernels import linear_logprobs\n"
        "linear_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), backend='triton')\n"
    )
    folder = Path(paced_kernels.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    message = (
        'ValueError: backend="triton" needs hidden on a CUDA device, got cpu; use backend="auto", or set TRITON_INT'
    )
    assert message in done.stderr


@pytest.mark.process
def test_without_the_interpreter_nothing_here_gives_the_kernels_tensors_of_a_cpu() -> None:
    """As on a machine with a GPU: what needs the interpreter skips itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    chosen = ["-k", "triton and not without or strided"]
    done = subprocess.run(
        [*command, *chosen], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "runs kernels in Triton's interpreter" in done.stdout


@pytest.mark.parametrize("backend", ["reference", IN_TRITON])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_is_multiplied_in_float32_whatever_the_process_allows(
    backend: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 products would move log-probs by 1e-3; on this machine the settings tell, whose products they hold for."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    allowed = []

    def note(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(*arguments: Any, **options: Any) -> Tensor:
            allowed.extend(setting.fp32_precision for setting in products)
            return operation(*arguments, **options)

        return noting

    monkeypatch.setattr(torch, "mm", note(torch.mm))
    monkeypatch.setattr(Tensor, "addmm_", note(Tensor.addmm_))
    monkeypatch.setattr(tiles, "choose_config", lambda *_: None)
    case = make_case()
    torch.set_float32_matmul_precision(precision)
    try:
        before = [setting.fp32_precision for setting in products]
        logprobs = linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], backend=backend)
        gradients(logprobs.sum() + trajectory_balance_loss(**case, backend=backend).loss, case, allow_unused=True)
        assert [setting.fp32_precision for setting in products] == before != ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(allowed) >= 2 * 7  # logits, hidden states and weight in both, logits again for the gradient of the first
    assert set(allowed) == {"ieee"}


def test_the_head_is_a_linear_with_two_more_calls() -> None:
    linear = nn.Linear(H, V).eval()
    head = FusedLinearHead.from_linear(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert not head.training
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {"weight": (V, H), "bias": (V,)}
    case = make_case()
    states, token_ids = case["hidden"], case["token_ids"]
    assert torch.equal(head(states.expand(2, T, H)), linear(states.expand(2, T, H)))
    assert torch.equal(
        head(states, token_ids, temperature=0.5),
        linear_logprobs(states, linear.weight, token_ids, bias=linear.bias, temperature=0.5),
    )
    options = {name: case[name] for name in ("rewards", "log_z", "beta")}
    expected = trajectory_balance_loss(
        states, linear.weight, token_ids, case["cu_seqlens"], bias=linear.bias, **options
    )
    assert torch.equal(head(states, token_ids, case["cu_seqlens"], **options).loss, expected.loss)
    with pytest.raises(ValueError, match="token_ids must be given with cu_seqlens or options, got None"):
        head(states, beta=0.3)
    assert FusedLinearHead.from_linear(nn.Linear(H, V, bias=False)).bias is None
    with pytest.raises(ValueError, match=r"linear must be an nn\.Linear that does not override forward, got Bilinear"):
        FusedLinearHead.from_linear(nn.Bilinear(2, 2, 2))

    class Adapted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    with pytest.raises(ValueError, match="got Adapted"):
        FusedLinearHead.from_linear(Adapted(2, 2))

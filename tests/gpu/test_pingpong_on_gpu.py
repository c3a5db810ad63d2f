"""The ping-pong projection on a GPU of compute capability 9.0: stage 3 against stage 2 and float64.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import tensor_core_nats

from paced_kernels import linear_logprobs, trajectory_balance_loss
from paced_kernels._loss import tiles

pytest.importorskip("cutlass", reason="the package nvidia-cutlass-dsl is not installed")
DEVICE = torch.device("cuda")
SHAPES = [(1, 64, 257), (129, 896, 151936), (1000, 1536, 152064), (513, 2048, 128256)]


@pytest.fixture(autouse=True)
def _chip() -> None:
    if tiles.device_facts(0)[0] != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")


def make_case(num_rows: int, hidden_size: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states that lean towards the row of their target, as a trained policy's do."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=DEVICE) * hidden_size**-0.5
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=generator, device=DEVICE)
    noise = torch.randn(num_rows, hidden_size, generator=generator, device=DEVICE)
    return (noise + 6 * weight[token_ids]).bfloat16(), weight.bfloat16(), token_ids


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprobs_and_entropies(shape: tuple[int, int, int]) -> None:
    hidden, weight, token_ids = make_case(*shape)
    logits = hidden.double() @ weight.double().T
    expected = logits.log_softmax(-1)
    bound = 2e-5 + tensor_core_nats(shape[1], float(logits.abs().max()))
    with torch.no_grad():
        found, entropy = linear_logprobs(hidden, weight, token_ids, return_entropy=True, backend="pingpong")
    assert float((found - expected.gather(1, token_ids[:, None])[:, 0]).abs().max()) <= bound
    exact = -(expected.exp() * expected).sum(-1)
    assert torch.allclose(entropy.double(), exact, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_those_of_stage_2(shape: tuple[int, int, int]) -> None:
    results = []
    for backend in ("triton", "pingpong", "pingpong"):
        hidden, weight, token_ids = make_case(*shape)
        hidden.requires_grad_()
        weight.requires_grad_()
        log_z = torch.zeros(1, device=DEVICE, requires_grad=True)
        offsets = torch.tensor([0, shape[0]], device=DEVICE)
        terms = {"rewards": torch.ones(1, device=DEVICE), "ref_logprobs": torch.full((1,), -1.0, device=DEVICE)}
        out = trajectory_balance_loss(
            hidden, weight, token_ids, offsets, log_z=log_z, beta=0.5, backend=backend, **terms
        )
        out.loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results.append((out.loss.detach(), hidden.grad, weight.grad))
    for triton, pingpong, again in zip(*results, strict=True):
        assert torch.equal(pingpong, again)
        difference = (triton.double() - pingpong.double()).norm()
        assert float(difference) <= 4e-3 * float(triton.double().norm())


def test_a_row_far_below_the_range_is_computed_again() -> None:
    """Log-probs below -44 take the gated launches."""
    hidden, weight, token_ids = make_case(300, 896, 50304)
    hidden[130] = 80 * weight[(int(token_ids[130]) + 1) % 50304]
    expected = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    assert float(expected[130]) < -44
    hidden.requires_grad_()
    offsets = torch.tensor([0, 300], device=DEVICE)
    out = trajectory_balance_loss(
        hidden,
        weight,
        token_ids,
        offsets,
        rewards=torch.ones(1, device=DEVICE),
        log_z=torch.zeros(1, device=DEVICE),
        beta=0.5,
        ref_logprobs=torch.zeros(1, device=DEVICE),
        backend="pingpong",
    )
    out.loss.backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert float((out.seq_logprobs - expected.sum()).abs()) <= 1e-4 * float(expected.sum().abs())

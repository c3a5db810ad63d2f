"""Trajectory balance on a problem small enough to enumerate: every completion of a vocabulary of four tokens.

Token 0 ends a completion, and so does a length of three: 40 completions over 13 contexts. The policy is a table of
logits, written as one-hot hidden states times a head, so the fused loss is what trains it.
"""

import itertools

import pytest
import torch
from torch import Tensor

from paced_kernels import TBOutput, linear_logprobs, segment_sum, trajectory_balance_from_logprobs
from paced_kernels import trajectory_balance_loss as fused_loss

VOCAB_SIZE, MAX_LENGTH = 4, 3


def enumerate_completions() -> list[tuple[int, ...]]:
    completions = []
    for length in range(1, MAX_LENGTH + 1):
        for tokens in itertools.product(range(VOCAB_SIZE), repeat=length):
            is_open = 0 not in tokens[:-1]
            if is_open and (tokens[-1] == 0 or length == MAX_LENGTH):
                completions.append(tokens)
    return completions


class Toy:
    """Packed rows of every completion: hidden states are one-hot contexts."""

    def __init__(self, beta: float) -> None:
        completions = enumerate_completions()
        contexts = sorted({tokens[:i] for tokens in completions for i in range(len(tokens))})
        rows = [contexts.index(tokens[:i]) for tokens in completions for i in range(len(tokens))]
        self.beta = beta
        self.num_sequences = len(completions)
        self.hidden = torch.eye(len(contexts), dtype=torch.float64)[rows]  # [T, 13]
        self.token_ids = torch.tensor([token for tokens in completions for token in tokens])
        self.cu_seqlens = torch.tensor([0, *(len(tokens) for tokens in completions)]).cumsum(0)
        # A completion is correct when its tokens add up to an even number; a few are worth half.
        sums = torch.tensor([sum(tokens) for tokens in completions])
        self.rewards = (sums % 2 == 0).double() * torch.where(sums == 4, 0.5, 1.0)

    def logprobs(self, head_weight: Tensor) -> Tensor:
        out = linear_logprobs(self.hidden, head_weight, self.token_ids)
        assert isinstance(out, Tensor)
        return out

    def sequence_probs(self, head_weight: Tensor) -> Tensor:
        return segment_sum(self.logprobs(head_weight), self.cu_seqlens).exp()

    def tilted(self, reference_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The optimum pi_ref exp(r / beta) / Z, and log Z."""
        logits = reference_probs.log() + self.rewards / self.beta
        return logits.softmax(0), logits.logsumexp(0)

    def loss(self, head_weight: Tensor, log_z: Tensor, reference: Tensor, weights: Tensor) -> TBOutput:
        return fused_loss(
            self.hidden,
            head_weight,
            self.token_ids,
            self.cu_seqlens,
            rewards=self.rewards,
            log_z=log_z.expand(self.num_sequences),
            beta=self.beta,
            ref_logprobs=reference,
            weights=weights,
            denominator=1.0,
            workspace_bytes=16 * VOCAB_SIZE * 8,
        )


def random_head(toy: Toy, seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(VOCAB_SIZE, toy.hidden.shape[1], generator=generator, dtype=torch.float64)


def minimise(parameters: list[Tensor], closure: object, max_iterations: int = 300) -> None:
    optimizer = torch.optim.LBFGS(
        parameters,
        lr=1.0,
        max_iter=max_iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    optimizer.step(step)


def test_enumeration_is_complete() -> None:
    toy = Toy(beta=0.5)
    assert toy.num_sequences == 40
    assert toy.hidden.shape == (1 + 3 * 2 + 36 * 3, 13)
    torch.testing.assert_close(toy.sequence_probs(random_head(toy, 0, 1.0)).sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_frozen_reference_converges_to_the_tilted_distribution(beta: float) -> None:
    toy = Toy(beta)
    uniform_head = torch.zeros(VOCAB_SIZE, 13, dtype=torch.float64)
    reference = toy.logprobs(uniform_head)
    target, log_z_target = toy.tilted(toy.sequence_probs(uniform_head))
    head = random_head(toy, 1, 0.5).requires_grad_()
    log_z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weights = torch.full((toy.num_sequences,), 1.0 / toy.num_sequences)
    before = 0.5 * (toy.sequence_probs(head.detach()) - target).abs().sum()
    minimise([head, log_z], lambda: toy.loss(head, log_z, reference, weights).loss)
    after = 0.5 * (toy.sequence_probs(head.detach()) - target).abs().sum()
    assert before > 0.1
    assert after < 1e-4
    assert (log_z - log_z_target).abs() < 1e-4
    assert toy.loss(head, log_z, reference, weights).residual.abs().max() < 1e-3


def test_stochastic_gradient_descent_converges_too() -> None:
    toy = Toy(beta=0.5)
    reference = toy.logprobs(torch.zeros(VOCAB_SIZE, 13, dtype=torch.float64))
    target, log_z_target = toy.tilted(reference.new_tensor(1.0) * segment_sum(reference, toy.cu_seqlens).exp())
    head = torch.zeros(VOCAB_SIZE, 13, dtype=torch.float64, requires_grad=True)
    log_z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([head, log_z], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        # On-policy samples, counted: the weight of a completion is how often it was drawn.
        drawn = torch.multinomial(toy.sequence_probs(head.detach()), 64, replacement=True, generator=generator)
        weights = torch.bincount(drawn, minlength=toy.num_sequences).double() / 64
        optimizer.zero_grad()
        toy.loss(head, log_z, reference, weights).loss.backward()
        optimizer.step()
    assert 0.5 * (toy.sequence_probs(head.detach()) - target).abs().sum() < 1e-2
    assert (log_z - log_z_target).abs() < 1e-2


def test_value_is_the_accuracy_under_a_moving_reference() -> None:
    # beta * argmin over log_z = accuracy of the old policy when the reference is the old policy itself.
    toy = Toy(beta=0.05)
    head = random_head(toy, 2, 0.7).requires_grad_()
    log_z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    accuracies = []
    for _ in range(6):
        old_logprobs = toy.logprobs(head.detach())
        old_probs = toy.sequence_probs(head.detach())
        accuracy = (old_probs * toy.rewards).sum()
        minimise([log_z], lambda: toy.loss(head.detach(), log_z, old_logprobs, old_probs).loss)  # noqa: B023
        assert abs(toy.beta * log_z.item() - accuracy.item()) < 1e-6
        accuracies.append(accuracy.item())
        head.grad = None
        toy.loss(head, log_z.detach(), old_logprobs, old_probs).loss.backward()
        with torch.no_grad():
            head -= 2.0 * head.grad
    assert accuracies[-1] > accuracies[0] + 0.05
    # The tilt itself is far above: at beta = 0.05 its value says nothing about today's accuracy.
    assert toy.beta * toy.tilted(old_probs)[1] > accuracies[-1] + 0.05


def test_best_intercept_is_accuracy_plus_divergence_for_any_policy() -> None:
    # c* = p / beta + KL(q || pi), hence p = beta c* - beta KL(q || pi), for any policy and any beta.
    for beta in (0.05, 0.3, 2.0):
        toy = Toy(beta)
        old_head, head = random_head(toy, 3, 0.5), random_head(toy, 4, 0.5)
        old_probs, probs = toy.sequence_probs(old_head), toy.sequence_probs(head)
        accuracy = (old_probs * toy.rewards).sum()
        divergence = (old_probs * (old_probs / probs).log()).sum()
        best = (accuracy / beta + divergence).reshape(1).requires_grad_()
        out = toy.loss(head, best, toy.logprobs(old_head), old_probs)
        assert torch.autograd.grad(out.loss, best)[0].abs() < 1e-12
        shifted = (best.detach() + 0.1).requires_grad_()
        slope = torch.autograd.grad(toy.loss(head, shifted, toy.logprobs(old_head), old_probs).loss, shifted)[0]
        torch.testing.assert_close(slope, torch.tensor([0.1 * beta], dtype=torch.float64))


def test_every_token_receives_the_residual_of_its_sequence() -> None:
    # In reward units, L = mean w u^2 / (2 beta): dL / dlogprobs = mu u and dL / dvalue = E_mu[u] / beta.
    toy = Toy(beta=0.2)
    old_logprobs, head = toy.logprobs(random_head(toy, 5, 0.5)), random_head(toy, 6, 0.5)
    mu = toy.sequence_probs(head)
    value = torch.full((toy.num_sequences,), 0.4, dtype=torch.float64, requires_grad=True)
    logprobs = toy.logprobs(head).requires_grad_()
    out = trajectory_balance_from_logprobs(
        logprobs,
        toy.cu_seqlens,
        rewards=toy.rewards,
        log_z=value / toy.beta,
        beta=toy.beta,
        ref_logprobs=old_logprobs,
        weights=mu,
        denominator=1.0,
    )
    log_ratio = segment_sum(logprobs.detach() - old_logprobs, toy.cu_seqlens)
    u = 0.4 + toy.beta * log_ratio - toy.rewards
    torch.testing.assert_close(out.loss.detach(), (mu * u**2).sum() / (2 * toy.beta))
    found, found_value = torch.autograd.grad(out.loss, (logprobs, value))
    lengths = toy.cu_seqlens.diff()
    torch.testing.assert_close(found, (mu * u).repeat_interleave(lengths))
    torch.testing.assert_close(found_value.sum(), (mu * u).sum() / toy.beta)


def test_importance_weighted_gradient_is_that_of_the_divergence() -> None:
    # E_q[w u grad log pi] = beta grad KL(pi || pi*) with detached w = pi / q, for any log_z.
    toy = Toy(beta=0.4)
    old_head = random_head(toy, 7, 0.4)
    old_logprobs, old_probs = toy.logprobs(old_head), toy.sequence_probs(old_head)
    target, _ = toy.tilted(old_probs)
    head = random_head(toy, 8, 0.4).requires_grad_()
    probs = toy.sequence_probs(head)
    expected = torch.autograd.grad((probs * (probs / target).log()).sum(), head)[0]
    assert expected.abs().max() > 1e-2
    for log_z in (0.0, 3.0):
        out = fused_loss(
            toy.hidden,
            head,
            toy.token_ids,
            toy.cu_seqlens,
            rewards=toy.rewards,
            log_z=torch.full((toy.num_sequences,), log_z, dtype=torch.float64),
            beta=toy.beta,
            ref_logprobs=old_logprobs,
            behavior_logprobs=old_logprobs,
            weights=old_probs / toy.beta,
            denominator=1.0,
        )
        torch.testing.assert_close(torch.autograd.grad(out.loss, head)[0], expected, rtol=1e-10, atol=1e-12)


def test_first_step_is_reinforce_with_the_value_as_baseline() -> None:
    # At the old policy the gradient is E_q[(v - r) grad log pi], and a calibrated v is an optimal-variance baseline.
    toy = Toy(beta=0.05)
    head = random_head(toy, 9, 0.5).requires_grad_()
    old_logprobs, old_probs = toy.logprobs(head.detach()), toy.sequence_probs(head.detach())
    value = 0.35
    log_z = torch.full((1,), value / toy.beta, dtype=torch.float64)
    out = toy.loss(head, log_z, old_logprobs, old_probs)
    expected = torch.autograd.grad((old_probs * (value - toy.rewards) * toy.sequence_probs(head).log()).sum(), head)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, head)[0], expected, rtol=1e-10, atol=1e-12)
    accuracy = (old_probs * toy.rewards).sum()
    second_moment = (old_probs * (value - toy.rewards) ** 2).sum()
    variance = (old_probs * (toy.rewards - accuracy) ** 2).sum()
    torch.testing.assert_close(second_moment, variance + (value - accuracy) ** 2)

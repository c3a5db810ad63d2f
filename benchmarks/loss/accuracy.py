"""Accuracy of a method: sums of log-probs, and gradients, against an oracle in float64 (float32 if float64 is slow).

The oracle computes the whole loss. An error in a method's log-probs therefore also counts in its gradients, through
the residuals.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loss.problems import BETA, Batch, chunked_logprobs, row_chunks


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Results of a method or of the oracle."""

    logprobs: Tensor | None  # [T], None if only the sums are returned
    seq_logprobs: Tensor  # [B]
    loss: Tensor  # []
    hidden_grad: Tensor | None = None  # [T, H]
    weight_grad: Tensor | None = None  # [V, H]


def oracle_dtype(device: torch.device) -> torch.dtype:
    """Return float64 where it is fast (CPUs, data-centre GPUs), else float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in ((8, 0), (9, 0), (10, 0)):
        return torch.float32
    return torch.float64


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [B] float64 sums of [T] values over the sequences."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return torch.stack([part.double().sum() for part in values.split(lengths)])


def oracle(case: str, batch: Batch, dtype: torch.dtype) -> Answer:
    """Compute loss, log-probs and gradients from their formulas, a chunk of rows at a time; never with TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    shape = batch.shape
    logprobs = torch.cat([part for _, part in chunked_logprobs(batch, dtype)]).double()
    seq_logprobs = segment_sums(logprobs, batch.cu_seqlens)
    if case == "trajectory_balance":
        ref = segment_sums(batch.ref_logprobs, batch.cu_seqlens)
        residual = batch.log_z.double() + seq_logprobs - ref - batch.rewards.double() / BETA
        loss = (BETA * residual).square().mean() / (2 * BETA)
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).to(residual.device)
        token_grad = (BETA * residual / shape.num_sequences).repeat_interleave(lengths)
    else:
        token_grad = batch.token_weights.double()
        loss = (token_grad * logprobs).sum()
    weight = batch.head_weight.to(dtype)
    hidden_grad = torch.empty(shape.tokens, shape.hidden_size, dtype=torch.float32, device=weight.device)
    weight_grad = torch.zeros_like(weight)
    for rows in row_chunks(shape):
        hidden = batch.hidden[rows].to(dtype)
        gradient = (hidden @ weight.T).softmax(-1).neg_()
        gradient.scatter_add_(1, batch.token_ids[rows, None], torch.ones_like(gradient[:, :1]))
        gradient.mul_(token_grad[rows, None].to(dtype))
        hidden_grad[rows] = (gradient @ weight).float()
        weight_grad.addmm_(gradient.T, hidden)
    return Answer(
        logprobs=logprobs,
        seq_logprobs=seq_logprobs,
        loss=loss,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad.float(),
    )


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return ||value - exact|| / ||exact|| (Frobenius), both [N, H]; 8192 rows at a time in float64."""
    difference, norm = 0.0, 0.0
    for part, exact_part in zip(value.split(8192), exact.split(8192), strict=True):
        difference += float((part.double() - exact_part.double()).square().sum())
        norm += float(exact_part.double().square().sum())
    return math.sqrt(difference / norm) if norm > 0 else math.inf


def errors(answer: Answer, exact: Answer) -> dict[str, float]:
    """Return the accuracy columns, without quantities that the method does not return."""
    gap = answer.seq_logprobs.double() - exact.seq_logprobs
    found = {
        "sequence_max_nats": float(gap.abs().max()),
        "sequence_rms_nats": float(gap.square().mean().sqrt()),
        "loss_relative": float(((answer.loss.double() - exact.loss) / exact.loss).abs()),
    }
    if answer.logprobs is not None and exact.logprobs is not None:
        found["token_max_nats"] = float((answer.logprobs.double() - exact.logprobs).abs().max())
    if answer.hidden_grad is not None and exact.hidden_grad is not None:
        found["hidden_grad_relative"] = relative_error(answer.hidden_grad, exact.hidden_grad)
    if answer.weight_grad is not None and exact.weight_grad is not None:
        found["weight_grad_relative"] = relative_error(answer.weight_grad, exact.weight_grad)
    return found

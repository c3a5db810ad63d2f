"""Methods of the kernel benchmarks: our operations, plain PyTorch, and ceilings; other projects are in `peers`.

Every method takes (hidden [T, H], head_weight [V, H], token_ids [T]) of a batch. For a method that only
computes log-probs, the trajectory-balance loss follows by ordinary autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import paced_kernels
from benchmarks.loss import our_engines
from benchmarks.loss.accuracy import Answer, segment_sums
from benchmarks.loss.problems import BETA, Batch
from paced_kernels import TBOutput

MIB = 2**20


class UnavailableError(RuntimeError):
    """Raised if a method cannot run here; the message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Competitor in a benchmark."""

    name: str
    logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(hidden, head_weight, token_ids) -> [T] log-probs of the tokens, differentiable."""
    balance: Callable[[Batch, Tensor, Tensor, Tensor], TBOutput] | None = None
    """(batch, hidden, head_weight, log_z) -> the trajectory-balance loss in one operation."""
    plain_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(hidden, head_weight, token_ids) -> [] summed cross entropy; no per-token log-probs, so unusable for RL."""
    thv: Callable[[str, Batch], float]
    """(mode, batch) -> THV of operations that this method performs, including recomputation."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context in which every step runs."""
    ours: bool = False
    first_only: str = ""
    """Reason to measure this method at the first shape only; empty = at every shape."""
    note: str = ""

    @property
    def is_ceiling(self) -> bool:
        """Whether it cannot do the task and is shown only as a bound."""
        return self.logprobs is None and self.balance is None


def fixed_thv(forward: float, frozen: float, full: float) -> Callable[[str, Batch], float]:
    """Return a `thv` function that does not depend on the batch."""
    counts = {"forward": forward, "frozen": frozen, "full": full}
    return lambda mode, batch: counts[mode]


def logprobs_of_logits(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return [T] float32 log-probs from [T, V] logits of any dtype, as most trainers do."""
    return logits.float().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]


def naive_logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probs from full logits and log-softmax in float32."""
    return logprobs_of_logits(F.linear(hidden, head_weight), token_ids)


def balance_terms(batch: Batch, log_z: Tensor) -> dict[str, Any]:
    """Return the keyword arguments of the loss, equal for every method."""
    return {"rewards": batch.rewards, "log_z": log_z, "beta": BETA, "ref_logprobs": batch.ref_logprobs}


def our_balance(**options: Any) -> Callable[[Batch, Tensor, Tensor, Tensor], TBOutput]:
    """`trajectory_balance_loss` with options such as `workspace_bytes`."""

    def balance(batch: Batch, hidden: Tensor, head_weight: Tensor, log_z: Tensor) -> TBOutput:
        terms = balance_terms(batch, log_z)
        return paced_kernels.trajectory_balance_loss(
            hidden, head_weight, batch.token_ids, batch.cu_seqlens, **terms, **options
        )

    return balance


def our_logprobs(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`linear_logprobs` with options such as `workspace_bytes`."""
    return lambda hidden, head_weight, token_ids: paced_kernels.linear_logprobs(
        hidden, head_weight, token_ids, **options
    )


def our_methods(case: str, device: torch.device, dtype: torch.dtype) -> list[Method]:
    """Our operation with defaults, with other workspace sizes, and with every engine that runs here."""
    on_gpu = device.type == "cuda"
    budgets = (2**29, 2**31, 5 * 2**30) if on_gpu else (32 * MIB, 512 * MIB)
    variants: dict[str, dict[str, Any]] = {"ours": {}}
    variants |= {f"ours, workspace {budget // MIB} MiB": {"workspace_bytes": budget} for budget in budgets}
    if on_gpu:
        variants["ours, backend reference"] = {"backend": "reference"}
    methods = [_our_method(case, name, options) for name, options in variants.items()]
    if case == "trajectory_balance":
        thv = fixed_thv(2, 6, 8)
        methods.append(Method(name="ours, log-probs and autograd", logprobs=our_logprobs(), thv=thv, ours=True))
    methods[1:] = [replace(method, first_only="a variant of ours") for method in methods[1:]]
    if on_gpu:
        around = functools.partial(our_engines.planned, None)
        thv = fixed_thv(2, 4, 6) if case == "trajectory_balance" else methods[0].thv
        methods.insert(1, replace(methods[0], name="ours, stage 1", around=around, thv=thv))
    if our_engines.has_pingpong(device, dtype):  # at every shape, as its peer is
        methods.insert(1, _our_method(case, "ours, stage 3", {"backend": "pingpong"}))
    return methods


def _our_method(case: str, name: str, options: dict[str, Any]) -> Method:
    if case == "logprobs":
        return Method(name=name, logprobs=our_logprobs(**options), thv=fixed_thv(2, 6, 8), ours=True)

    def thv(mode: str, batch: Batch) -> float:
        return our_engines.planned_thv(mode, batch, options)

    return Method(name=name, balance=our_balance(**options), thv=thv, ours=True)


def torch_makers() -> dict[str, Callable[[], Method]]:
    """Plain PyTorch: the direct implementation, the same compiled, and its own chunked operation if available."""
    return {"naive": _naive, "torch.compile of naive": _compiled, "torch F.linear_cross_entropy": _torch_native}


def _naive() -> Method:
    return Method(name="naive", logprobs=naive_logprobs, thv=fixed_thv(2, 4, 6), note="F.linear, float, log_softmax")


def _compiled() -> Method:
    compiled: Callable[..., Tensor] | None = None

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        nonlocal compiled
        compiled = compiled or torch.compile(naive_logprobs, dynamic=False)
        return compiled(hidden, head_weight, token_ids)

    return Method(
        name="torch.compile of naive", logprobs=logprobs, thv=fixed_thv(2, 4, 6), first_only="compiles anew per shape"
    )


def _torch_native() -> Method:
    native = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if native is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        return -native(hidden, head_weight, token_ids, reduction="none", options=options())

    return Method(name="torch F.linear_cross_entropy", logprobs=logprobs, thv=fixed_thv(2, 6, 8))


def run_step(case: str, method: Method, batch: Batch, mode: str) -> Answer:
    """Run one step: the value and, except in mode "forward", the backward pass."""
    with method.around(), torch.set_grad_enabled(mode != "forward"):
        hidden = batch.hidden.detach().requires_grad_(mode != "forward")
        head_weight = batch.head_weight.detach().requires_grad_(mode == "full")
        log_z = batch.log_z.detach().requires_grad_(mode != "forward")
        logprobs = None
        if method.plain_loss is not None:
            loss = method.plain_loss(hidden, head_weight, batch.token_ids)
            sums = batch.log_z
        elif case == "logprobs" or method.balance is None:
            assert method.logprobs is not None
            logprobs = method.logprobs(hidden, head_weight, batch.token_ids)
            if case == "logprobs":
                loss, sums = (logprobs * batch.token_weights).sum(), None
            else:
                out = paced_kernels.trajectory_balance_from_logprobs(
                    logprobs, batch.cu_seqlens, **balance_terms(batch, log_z)
                )
                loss, sums = out.loss, out.seq_logprobs
        else:
            out = method.balance(batch, hidden, head_weight, log_z)
            loss, sums = out.loss, out.seq_logprobs
        if mode != "forward":
            loss.backward()
    if sums is None:
        assert logprobs is not None
        sums = logprobs  # `answer_of` sums them, outside the timed part
    kept = None if logprobs is None else logprobs.detach()
    return Answer(
        logprobs=kept,
        seq_logprobs=sums.detach(),
        loss=loss.detach(),
        hidden_grad=hidden.grad,
        weight_grad=head_weight.grad,
    )


def answer_of(case: str, method: Method, batch: Batch) -> Answer:
    """Return the results of one full step, for the accuracy columns."""
    answer = run_step(case, method, batch, "full")
    if answer.logprobs is None:
        return answer
    return Answer(
        logprobs=answer.logprobs,
        seq_logprobs=segment_sums(answer.logprobs, batch.cu_seqlens),
        loss=answer.loss,
        hidden_grad=answer.hidden_grad,
        weight_grad=answer.weight_grad,
    )


def ceilings(batch: Batch) -> dict[str, tuple[Callable[[], object], float]]:
    """Bounds for a shape, name -> (call, THV): three GEMMs, the first GEMM alone, a copy of the logits' size."""
    hidden, head_weight = batch.hidden, batch.head_weight
    logits = torch.empty(hidden.shape[0], head_weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    torch.mm(hidden, head_weight.T, out=logits)

    def three() -> None:
        torch.mm(hidden, head_weight.T, out=logits)
        torch.mm(logits, head_weight)
        torch.mm(logits.T, hidden)

    calls: dict[str, tuple[Callable[[], object], float]] = {"ceiling: three GEMMs": (three, 6.0)}
    if hidden.dtype == torch.float32:
        calls["ceiling: first GEMM"] = (lambda: torch.mm(hidden, head_weight.T, out=logits), 2.0)
    else:
        if hidden.device.type == "cuda":
            wide = functools.partial(torch.mm, hidden, head_weight.T, out_dtype=torch.float32)
            calls["ceiling: first GEMM, float32 out"] = (wide, 2.0)
        calls["ceiling: first GEMM, rounded out"] = (lambda: torch.mm(hidden, head_weight.T, out=logits), 2.0)
    calls["ceiling: copy"] = (lambda: logits.clone(), 0.0)
    return calls

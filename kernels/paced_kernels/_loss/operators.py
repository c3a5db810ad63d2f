"""Fused operations as PyTorch custom operators: opaque to torch.compile, with fake and autograd registrations.

All code that reads values on the host (planning chunks, checking token ids and offsets on a CPU) runs inside an
operator, so that a compiled caller has no graph break. `logprobs` and `trajectory_balance` hold the public functions.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary of this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._backend import is_torch
from . import tiles
from .engine import Guard, even_workspace, make_engine, make_head, make_torch_engine
from .fused_pass import FusedOptions, FusedPass, plan_groups
from .gradients import Gradients, Wanted, score_rows
from .sequences import make_terms
from .torch_rows import Exponentials, RowStats, TorchRows, kept_bytes, row_chunks


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


@torch.library.custom_op("paced_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    with_entropy: bool,
    workspace_bytes: int | None,
    backend: str,
    shard_group: str,
    shard_start: int,
    vocab_size: int,
    skipped_share: float,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs [T], log-sum-exps [T], entropies [T] (or [0]), and with `keeps` what the backward pass would
    compute again: E' [T, V] and its factor [T] (or [0]). The backward pass reads `skipped_share`."""
    del skipped_share
    _checks.check_token_values(token_ids, vocab_size)
    with Guard(hidden.device):
        head = make_head(weight, bias, temperature, shard_group, shard_start)
        nothing = hidden.new_empty(0, dtype=head.accumulate)
        if keeps:
            workspace = kept_bytes(hidden.shape[0], weight.shape[0], weight.dtype)
            all_rows = make_torch_engine(head, hidden, token_ids, with_entropy, workspace, backend)
            chunk = all_rows.exponentials(slice(0, hidden.shape[0]), None, keeps_numbers=True)
            return chunk.stats.logprobs, chunk.stats.lse, nothing, chunk.matrix, chunk.factor
        workspace_bytes = even_workspace(hidden, weight, workspace_bytes, backend, shard_group, vocab_size)
        engine = make_engine(head, hidden, token_ids, with_entropy, workspace_bytes, backend)
        stats = score_rows(engine, slice(0, hidden.shape[0]))
        entropy = nothing.clone() if stats.entropy is None else stats.entropy
        return stats.logprobs, stats.lse, entropy, nothing, nothing.clone()


@linear_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    with_entropy: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulate(weight)
    num_rows, keeps = hidden.shape[0], options[-1]
    matrix = (num_rows, weight.shape[0]) if keeps else (0,)
    sizes = (num_rows,), (num_rows,), (num_rows if with_entropy else 0,), matrix, (num_rows if keeps else 0,)
    a, b, c, d, e = (hidden.new_empty(size, dtype=dtype) for size in sizes)
    return a, b, c, d, e


@torch.library.custom_op("paced_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    workspace_bytes: int | None,
    backend: str,
    shard_group: str,
    shard_start: int,
    vocab_size: int,
    skipped_share: float,
    matrix: Tensor,
    factor: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of hidden, weight and bias ([0] if not wanted), from log-probs and entropies of the forward, and
    from its exponentials [T, V] and their factor [T] where it kept them."""
    with Guard(hidden.device):
        head = make_head(weight, bias, temperature, shard_group, shard_start)
        with_entropy = grad_entropy is not None
        workspace_bytes = even_workspace(hidden, weight, workspace_bytes, backend, shard_group, vocab_size)
        engine = make_engine(head, hidden, token_ids, with_entropy, workspace_bytes, backend)
        is_kept = factor.numel() > 0
        # Products over all rows at once are whole, unless they are put together from blocks.
        weight_dtype = None
        if is_kept and not skipped_share and isinstance(engine, TorchRows):
            weight_dtype = engine.products.whole_dtype
        gradients = Gradients(engine, Wanted(*wanted), skipped_share, weight_dtype)
        known = RowStats(logprobs, lse, entropy if with_entropy else None)
        # The gradient of a sum is one number with stride 0, but kernels need contiguous rows.
        coefficient = torch.zeros_like(logprobs)
        if grad_logprobs is not None:
            coefficient = grad_logprobs.to(logprobs.dtype).contiguous()
        live = coefficient != 0
        if grad_entropy is not None:
            grad_entropy = grad_entropy.to(logprobs.dtype).contiguous()
            live = live | (grad_entropy != 0)
        num_rows = hidden.shape[0] if is_kept else engine.rows_per_chunk
        for rows in row_chunks(0, hidden.shape[0], num_rows):
            if is_kept:
                chunk = Exponentials(known, matrix, factor)
            else:
                chunk = engine.exponentials(rows, live[rows], known.narrow(rows.start, rows.stop))
            entropy_rows = None if grad_entropy is None else grad_entropy[rows]
            gradients.add(engine, chunk, rows, coefficient[rows], live[rows], entropy_rows)
        return _rounded(gradients, hidden, weight)


def _rounded(gradients: Gradients, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outs = gradients.hidden, gradients.weight, gradients.bias
    a, b, c = (_or_empty(None if out is None else out.to(weight.dtype), hidden) for out in outs)
    return a, b, c


@linear_logprobs_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, wanted = *arguments[5:8], arguments[-1]
    a, b, c = (
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if is_wanted and value is not None
        else hidden.new_empty(0)
        for value, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
    )
    return a, b, c


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, token_ids, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, token_ids, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward_linear(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_logprobs, _, grad_entropy = grads[:3]
    wanted = ctx.needs_input_grad[:3]
    hidden, weight, bias, token_ids, logprobs, lse, entropy, matrix, factor = ctx.saved_tensors
    temperature, with_entropy, workspace_bytes, backend, group, start, vocab_size, skipped_share, _ = ctx.options
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 13
    outs = linear_logprobs_backward(
        grad_logprobs,
        grad_entropy if with_entropy else None,
        logprobs,
        lse,
        entropy,
        hidden,
        weight,
        bias,
        token_ids,
        temperature,
        workspace_bytes,
        backend,
        group,
        start,
        vocab_size,
        skipped_share,
        matrix,
        factor,
        list(wanted),
    )
    return (*(out if is_wanted else None for out, is_wanted in zip(outs, wanted, strict=True)), *(None,) * 10)


linear_logprobs.register_autograd(_backward_linear, setup_context=_setup_linear)


@torch.library.custom_op("paced_kernels::trajectory_balance", mutates_args=())
def trajectory_balance(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_z: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    behavior_logprobs: Tensor | None,
    denominator: Tensor | None,
    beta: float,
    importance_cap: float | None,
    temperature: float,
    reduction: str,
    entropy_bonus: float,
    with_entropy: bool,
    workspace_bytes: int | None,
    backend: str,
    shard_group: str,
    shard_start: int,
    vocab_size: int,
    skipped_share: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss [], residual [B], seq_logprobs [B], entropy [T], and gradients of hidden, weight, bias and log_z."""
    _checks.check_token_values(token_ids, vocab_size)
    _checks.check_offset_values(cu_seqlens, hidden.shape[0], "hidden")
    with Guard(hidden.device):
        offsets = cu_seqlens.to(hidden.device, torch.int64, non_blocking=True)
        terms = make_terms(
            offsets,
            hidden.shape[0],
            rewards=rewards,
            log_z=log_z,
            beta=beta,
            ref_logprobs=ref_logprobs,
            weights=weights,
            behavior_logprobs=behavior_logprobs,
            importance_cap=importance_cap,
            reduction=reduction,
            denominator=denominator,
        )
        head = make_head(weight, bias, temperature, shard_group, shard_start)
        needs_entropy = with_entropy or entropy_bonus != 0
        workspace_bytes = even_workspace(hidden, weight, workspace_bytes, backend, shard_group, vocab_size)
        engine = make_engine(head, hidden, token_ids, needs_entropy, workspace_bytes, backend)
        is_budget_firm = workspace_bytes is not None or is_torch(backend)
        options = FusedOptions(reduction, entropy_bonus, Wanted(*wanted), is_budget_firm, skipped_share)
        fused = FusedPass(engine, offsets, terms, options)
        fused.run(plan_groups(cu_seqlens, hidden.shape[0], engine.rows_per_chunk))
        dtype = head.accumulate
        _, residual, seq_logprobs, coefficient = fused.per_sequence
        return (
            fused.loss.to(dtype),
            residual.to(dtype, copy=True),
            seq_logprobs.to(dtype, copy=True),
            _or_empty(fused.entropy if with_entropy else None, hidden),
            _or_empty(fused.gradients.hidden, hidden),
            _or_empty(fused.gradients.weight, hidden),
            _or_empty(fused.gradients.bias, hidden),
            coefficient.to(log_z.dtype, copy=True),
        )


@trajectory_balance.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_z: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_entropy, workspace_bytes, backend, group, _, vocab_size = options[10:16]
    wants_hidden, wants_weight, wants_bias = options[-1]
    dtype = _accumulate(weight)
    num_sequences = cu_seqlens.shape[0] - 1
    weight_dtype = dtype
    if not is_torch(backend):
        workspace_bytes = even_workspace(hidden, weight, workspace_bytes, backend, group, vocab_size)
        weight_dtype = tiles.weight_gradient_dtype(hidden, weight, workspace_bytes)
    entropy = hidden.new_empty(hidden.shape[0], dtype=dtype) if with_entropy else hidden.new_empty(0)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(num_sequences, dtype=dtype),
        hidden.new_empty(num_sequences, dtype=dtype),
        entropy,
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        weight.new_empty(weight.shape, dtype=weight_dtype) if wants_weight else hidden.new_empty(0),
        bias.new_empty(bias.shape, dtype=dtype) if wants_bias and bias is not None else hidden.new_empty(0),
        log_z.new_empty(num_sequences),
    )


@torch.library.custom_op("paced_kernels::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * scale, multiplied in the wider dtype and rounded once.

    This is an operator so that no second derivative can be taken through it: the gradients are constants by then.
    """
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, scale, out=out)


@scale_gradient.register_fake
def _(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = [None if value is None else value.dtype for value in inputs[:4]]
    ctx.wanted = (*inputs[-1], True)
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward_loss(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    outs = [
        scale_gradient(gradient, grad_loss, dtype) if is_wanted and is_needed and dtype is not None else None
        for gradient, dtype, is_wanted, is_needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.wanted, ctx.needs_input_grad[:4], strict=True
        )
    ]
    return (*outs, *(None,) * (ctx.num_inputs - 4))


trajectory_balance.register_autograd(_backward_loss, setup_context=_setup_loss)


def _accumulate(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32

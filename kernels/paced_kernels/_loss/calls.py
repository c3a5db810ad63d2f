"""Calls of the operators, from the checked arguments of the public functions.

T = packed tokens, H = hidden size, V = vocabulary.
"""

import torch
from torch import Tensor

from .._backend import is_torch
from .._shard import VocabShard
from .engine import shard_options
from .operators import linear_logprobs, trajectory_balance
from .torch_rows import KEPT_BYTES, kept_bytes


def compute_linear_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    return_entropy: bool,
    workspace_bytes: int | None,
    backend: str,
    shard: VocabShard | None,
    skipped_share: float,
) -> tuple[Tensor, Tensor | None]:
    """`linear_logprobs` for checked arguments and a resolved backend: log-probs, and entropies if requested."""
    group, start, vocab_size = shard_options(shard, head_weight)
    tensors = hidden, head_weight, bias
    size = kept_bytes(hidden.shape[0], head_weight.shape[0], head_weight.dtype)
    keeps = (
        is_torch(backend)
        and hidden.device.type == "cpu"
        and shard is None
        and not return_entropy
        and torch.is_grad_enabled()
        and any(value is not None and value.requires_grad for value in tensors)
        and hidden.shape[0] > 0
        and size <= (KEPT_BYTES if workspace_bytes is None else workspace_bytes)
    )
    logprobs, _, entropy, _, _ = linear_logprobs(
        hidden,
        head_weight,
        bias,
        token_ids,
        temperature,
        return_entropy,
        workspace_bytes,
        backend,
        group,
        start,
        vocab_size,
        skipped_share,
        keeps,
    )
    return logprobs, entropy if return_entropy else None


def compute_trajectory_balance(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    rewards: Tensor,
    log_z: Tensor,
    beta: float,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    behavior_logprobs: Tensor | None,
    importance_cap: float | None,
    bias: Tensor | None,
    temperature: float,
    reduction: str,
    denominator: float | Tensor | None,
    entropy_bonus: float,
    return_entropy: bool,
    workspace_bytes: int | None,
    backend: str,
    shard: VocabShard | None,
    skipped_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`trajectory_balance_loss` for checked arguments and a resolved backend: the fields of `TBOutput`."""
    if isinstance(denominator, (int, float)):
        denominator = torch.full((), denominator, dtype=torch.float64, device=hidden.device)
    constants = [
        None if value is None else value.detach()
        for value in (rewards, ref_logprobs, weights, behavior_logprobs, denominator)
    ]
    is_enabled = torch.is_grad_enabled()
    wanted = [is_enabled and value is not None and value.requires_grad for value in (hidden, head_weight, bias)]
    loss, residual, seq_logprobs, entropy, *_ = trajectory_balance(
        hidden,
        head_weight,
        bias,
        log_z,
        token_ids,
        cu_seqlens,
        *constants,
        beta,
        importance_cap,
        temperature,
        reduction,
        entropy_bonus,
        return_entropy,
        workspace_bytes,
        backend,
        *shard_options(shard, head_weight),
        skipped_share,
        wanted,
    )
    return loss, residual.detach(), seq_logprobs.detach(), entropy.detach() if return_entropy else None

"""Trajectory-balance loss, fused with the vocabulary projection or from log-probs.

Trajectory balance is arXiv:2201.13259, eq. 14, for an autoregressive sampler, whose backward policy is 1. The old
policy as a moving reference is from arXiv:2602.12642.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from torch import Tensor

from . import _checks, reference
from ._backend import resolve_backend
from ._loss.calls import compute_trajectory_balance
from ._shard import VocabShard
from .reference import TBOutput


def trajectory_balance_loss(
    hidden: Tensor,  # [T, H]
    head_weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    ref_logprobs: Tensor | None = None,  # [T] or [B]
    weights: Tensor | None = None,  # [B]
    behavior_logprobs: Tensor | None = None,  # [T] or [B]
    importance_cap: float | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    reduction: str = "sum",
    denominator: float | Tensor | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    entropy_bonus: float = 0.0,
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> TBOutput:
    """Trajectory-balance loss of packed completions, computed from hidden states without full logits.

    In torch, with the log-probs of `linear_logprobs` split into sequences::

        s = torch.stack([part.sum() for part in logprobs.split(lengths)])        # or .mean()
        w = weights * (s - s_behavior).exp().clamp(max=importance_cap).detach()
        residual = log_z + s - s_ref - rewards / beta                            # in nats
        loss = (w * (beta * residual) ** 2).sum() / (2 * beta) / denominator

    beta * residual is value + beta * (s - s_ref) - reward, in reward units, with value = beta * log_z. The scale makes
    the gradient at s = s_ref that of REINFORCE with the value as its baseline, whatever beta is.

    Differentiable in `hidden`, `head_weight`, `bias` and `log_z`: dloss / dlogprobs[t] = w_i beta residual_i /
    denominator for every token t of sequence i (divided by its length for the mean), and dloss / dlog_z_i is the same
    number, undivided. The forward pass computes the gradients, 6 T H V floating-point operations (8 T H V for a
    sequence with more rows than a chunk, and when `cu_seqlens` is not on the CPU and T exceeds a chunk); the backward
    pass only scales them. No double backward.

    A sequence of weight exactly 0 contributes exactly 0 to the loss and to every gradient, even if its reward, its
    residual or its hidden states are not finite. An empty sequence has s = 0 and contributes its residual. B = 0 and
    T = 0 are legal: the loss is 0 with zero gradients.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64, rows of completion tokens only, packed: sequence i owns
            rows `cu_seqlens[i]:cu_seqlens[i + 1]`, and `hidden[t]` is the state that predicts `token_ids[t]`.
        head_weight: [V, H], same dtype and device.
        token_ids: [T] int64 or int32 in [0, V).
        cu_seqlens: [B + 1] int32 or int64 prefix sums of the lengths; on the CPU or on the device of `hidden`. On the
            CPU it also determines the chunks; on a device the host never reads it.
        rewards: [B] floating point, in reward units.
        log_z: [B] floating point, log Z in nats.
        beta: reward units per nat; finite and positive.
        ref_logprobs: [T] per token, or [B] already summed (or averaged, as `reduction` says); constant; None = 0.
            With T = B the tensor is read as per token.
        weights: [B] constant factors; None = 1.
        behavior_logprobs: [T] or [B] as for `ref_logprobs`; multiplies the weights by exp(s - s_behavior), a constant.
        importance_cap: upper bound of that factor; None = exp(80), which keeps it finite.
        bias: [V], same dtype, added after the division by the temperature; None = 0.
        temperature: divides the logits; finite and positive.
        reduction: "sum" or "mean" over the tokens of a sequence.
        denominator: positive number or 0-d tensor (constant); None = B.
        return_entropy: also return the entropy of each row, detached.
        workspace_bytes: memory for chunks of logits; None = 8192 rows of exponentials with Triton (2.5 GB for bfloat16
            and V = 152k), 144 MiB for the reference. A chunk has at least one row.
        backend: "auto", "triton" (a CUDA device, or the interpreter with TRITON_INTERPRET=1), "reference" (plain
            PyTorch), "compiled" (the same with products in C, for bfloat16 on a CPU with AVX512_BF16) or "pingpong"
            (bfloat16 on compute capability 9.0, with the package nvidia-cutlass-dsl; no GPU has run it yet). "auto" is
            "triton" on CUDA for every dtype but float64, else "compiled" where it can run, else "reference".
        entropy_bonus: subtract entropy_bonus * (mean entropy over all T rows) from the loss, with its gradient; rows of
            sequences of weight 0 count as 0. Costs one elementwise pass over the chunks.
        shard: part of the vocabulary that `head_weight` and `bias` hold; None = all of it.
        skipped_share: largest share of the gradient of the logits that the products for the gradients of `hidden` and
            `head_weight` may leave out, in [0, 1); 0 = none. Saves most of their time where the policy is peaked. At
            2**-9 the errors' bound is that of rounding to bfloat16; kernels/README.md derives it. Values, and the
            gradients of the other arguments, stay as they are; with a gradient through entropies nothing is left out.

    Returns:
        TBOutput(loss [] , residual [B], seq_logprobs [B], entropy [T] or None), float32 (float64 for float64 inputs);
        all but the loss are detached.

    Raises:
        ValueError: a shape, dtype, device or value is wrong; the message names the argument.
    """
    hidden, head_weight, bias = _checks.under_autocast(hidden, head_weight, bias)
    _checks.check_linear_args(hidden, head_weight, token_ids, bias, temperature, workspace_bytes, shard)
    _checks.check_share("skipped_share", skipped_share)
    _checks.check_trajectory_args(
        hidden,
        "hidden",
        cu_seqlens,
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
    _checks.check_finite("entropy_bonus", entropy_bonus)
    return TBOutput(
        *compute_trajectory_balance(
            hidden,
            head_weight,
            token_ids,
            cu_seqlens,
            rewards=rewards,
            log_z=log_z,
            beta=beta,
            ref_logprobs=ref_logprobs,
            weights=weights,
            behavior_logprobs=behavior_logprobs,
            importance_cap=importance_cap,
            bias=bias,
            temperature=temperature,
            reduction=reduction,
            denominator=denominator,
            entropy_bonus=entropy_bonus,
            return_entropy=return_entropy,
            workspace_bytes=workspace_bytes,
            backend=resolve_backend(backend, hidden),
            shard=shard,
            skipped_share=skipped_share,
        )
    )


def trajectory_balance_from_logprobs(
    logprobs: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    ref_logprobs: Tensor | None = None,  # [T] or [B]
    weights: Tensor | None = None,  # [B]
    behavior_logprobs: Tensor | None = None,  # [T] or [B]
    importance_cap: float | None = None,
    reduction: str = "sum",
    denominator: float | Tensor | None = None,
) -> TBOutput:
    """Loss of `trajectory_balance_loss` for a trainer that already has the log-probs.

    Differentiable in `logprobs` and `log_z` by ordinary autograd. Arguments, formula, errors, and the treatment of
    weight 0 and of empty sequences are those of `trajectory_balance_loss`.

    Args:
        logprobs: [T] floating point, log-probs of the chosen tokens in nats, packed.
        cu_seqlens: [B + 1] int32 or int64 prefix sums of the lengths.

    Returns:
        TBOutput with entropy None, float32 (float64 for float64 `logprobs`).

    Raises:
        ValueError: a shape, dtype, device or value is wrong; the message names the argument.
    """
    _checks.check_tensor("logprobs", logprobs, 1, _checks.FLOAT_DTYPES)
    _checks.check_trajectory_args(
        logprobs,
        "logprobs",
        cu_seqlens,
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
    _checks.check_offset_values(cu_seqlens, logprobs.shape[0], "logprobs")
    return reference.trajectory_balance_from_logprobs(
        logprobs,
        cu_seqlens,
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

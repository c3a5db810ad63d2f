"""Log-probs of chosen tokens, computed directly from hidden states: `linear_logprobs`.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from typing import Literal, overload

from torch import Tensor

from . import _checks
from ._backend import resolve_backend
from ._loss.calls import compute_linear_logprobs
from ._shard import VocabShard


@overload
def linear_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> Tensor:
    """Return log-probs only."""


@overload
def linear_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    workspace_bytes: int | None = None,
    backend: str = "auto",
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies."""


def linear_logprobs(
    hidden: Tensor,  # [T, H]
    head_weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each chosen token; the full [T, V] logits never exist.

    In torch::

        logits = hidden.float() @ head_weight.float().T / temperature + bias
        logprobs = logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)

    Logits are float32 (float64 for float64 inputs) and exist for a chunk of rows at a time. The backward pass
    recomputes them: 2 T H V floating-point operations forward, up to 6 T H V backward. On a CPU it does not where the
    exponentials of all rows fit the workspace, or 512 MiB without a bound, and entropies are not asked for: they are
    kept until then, and 4 T H V remain. A row whose incoming gradient
    is exactly 0 contributes exactly 0. A frozen head or frozen hidden states cost no gradient work.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; `hidden[t]` is the state that predicts `token_ids[t]`.
        head_weight: [V, H], same dtype and device.
        token_ids: [T] int64 or int32 in [0, V).
        bias: [V], same dtype, added after the division by the temperature; None = 0.
        temperature: divides the logits; finite and positive.
        return_entropy: also return the entropy of each row, differentiable too.
        workspace_bytes: memory for chunks of logits; None = 8192 rows of exponentials with Triton (2.5 GB for bfloat16
            and V = 152k), 144 MiB for the reference. A chunk has at least one row.
        backend: "auto", "triton" (a CUDA device, or the interpreter with TRITON_INTERPRET=1), "reference" (plain
            PyTorch), "compiled" (the same with products in C, for bfloat16 on a CPU with AVX512_BF16) or "pingpong"
            (bfloat16 on compute capability 9.0, with the package nvidia-cutlass-dsl; no GPU has run it yet). "auto" is
            "triton" on CUDA for every dtype but float64, else "compiled" where it can run, else "reference".
        shard: part of the vocabulary that `head_weight` and `bias` hold; None = all of it.
        skipped_share: largest share of the gradient of the logits that the products for the gradients of `hidden` and
            `head_weight` may leave out, in [0, 1); 0 = none. Saves most of their time where the policy is peaked. At
            2**-9 the errors' bound is that of rounding to bfloat16; kernels/README.md derives it. Values, and the
            gradients of the other arguments, stay as they are; with a gradient through entropies nothing is left out.

    Returns:
        [T] float32 (float64 for float64 inputs), in nats; with `return_entropy` the pair (logprobs, entropy).

    Raises:
        ValueError: a shape, dtype, device or value is wrong; the message names the argument.
    """
    hidden, head_weight, bias = _checks.under_autocast(hidden, head_weight, bias)
    _checks.check_linear_args(hidden, head_weight, token_ids, bias, temperature, workspace_bytes, shard)
    _checks.check_share("skipped_share", skipped_share)
    logprobs, entropy = compute_linear_logprobs(
        hidden,
        head_weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        return_entropy=return_entropy,
        workspace_bytes=workspace_bytes,
        backend=resolve_backend(backend, hidden),
        shard=shard,
        skipped_share=skipped_share,
    )
    return logprobs if entropy is None else (logprobs, entropy)

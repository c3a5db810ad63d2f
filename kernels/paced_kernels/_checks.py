"""Argument checks of the public functions: each failure is a ValueError that names the argument and shows its value.

Shapes, dtypes and devices are always checked. Values (token ids, sequence offsets) of a CPU tensor are checked by
raising; for a CUDA tensor the check is an asynchronous device assertion, because reading a value would make the host
wait. NaN is never rejected here: it has to reach the loss, where the trainer checks for it.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

import math

import torch
from torch import Tensor

from ._shard import VocabShard

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32)
BACKENDS = ("auto", "triton", "compiled", "reference", "pingpong")
REDUCTIONS = ("sum", "mean")
_PACKED = {
    "hidden": ": pack a padded batch by hidden[:, :-1][mask[:, 1:]], with mask [B, L] True on completion tokens",
    "token_ids": ": pack a padded batch by input_ids[:, 1:][mask[:, 1:]], with mask [B, L] True on completion tokens",
    **{
        name: f": pack a padded batch by {name}[mask], with mask True where {name} belong to completion tokens"
        for name in ("logprobs", "ref_logprobs", "behavior_logprobs")
    },
}
"""Cures of arguments that are padded; a state predicts the next token, so the states are those one place before."""


def check_backend(backend: str) -> None:
    """Require a known backend name; availability of Triton is checked where it is used."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def check_positive(name: str, value: float) -> None:
    """Require a Python number that is finite and greater than zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a Python number, got {type(value).__name__}")
    if not 0 < value < math.inf:  # only comparisons: for a compiler the number may be symbolic
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def check_finite(name: str, value: float) -> None:
    """Require a finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite Python number, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Require a Python number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a Python number of at least 0 and below 1, got {value!r}")


def check_workspace(workspace_bytes: int | None) -> None:
    """Require None or a positive number of bytes."""
    if workspace_bytes is None:
        return
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be None or a positive int, got {workspace_bytes!r}")


def check_tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Require a tensor of one of `dtypes` with `ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":  # by name: importing its module takes half a second
        raise ValueError(
            f"{name} is a DTensor: call the operation inside the forward of the module that FSDP2 wraps, as "
            "FusedLinearHead does, or pass local tensors"
        )
    if value.ndim != ndim:
        cure = _PACKED[name] if value.ndim == ndim + 1 and name in _PACKED else ""
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}{cure}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        is_count = dtypes is FLOAT_DTYPES and value.dtype in (*INTEGER_DTYPES, torch.bool)
        cure = f": give {name}.float()" if is_count else ""
        raise ValueError(f"{name} has dtype {value.dtype}, expected one of {allowed}{cure}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on the same device."""
    if value.device != other.device:
        raise ValueError(f"{name} and {other_name} are on different devices: {value.device} vs {other.device}")


def check_value(condition: Tensor, message: str) -> None:
    """Raise on a CPU tensor that is False; on CUDA assert on the device, without a host sync.

    A compiler that traces the caller has no values, so the check is left out of compiled code.
    """
    if torch.compiler.is_compiling():
        return
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(condition):
        raise ValueError(message)


def _check_row_major(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tuple(value.stride())}")


def check_token_ids(token_ids: Tensor, num_rows: int) -> None:
    """Require integers of shape [T]."""
    check_tensor("token_ids", token_ids, 1, INTEGER_DTYPES)
    if token_ids.shape[0] != num_rows:
        raise ValueError(f"hidden and token_ids disagree on T: {num_rows} vs {token_ids.shape[0]}")


def check_token_values(token_ids: Tensor, vocab_size: int) -> None:
    """Require every id in [0, V)."""
    message = f"token_ids must lie in [0, {vocab_size})"
    if token_ids.shape[0] > 0 and token_ids.device.type == "cpu":
        smallest, largest = (int(bound) for bound in token_ids.aminmax())
        message = f"{message}, got values from {smallest} to {largest}"
    check_value(((token_ids >= 0) & (token_ids < vocab_size)).all(), message)


def check_linear_args(
    hidden: Tensor,  # [T, H]
    head_weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    bias: Tensor | None,  # [V]
    temperature: float,
    workspace_bytes: int | None,
    shard: VocabShard | None,
) -> None:
    """Check the arguments that `linear_logprobs` and `trajectory_balance_loss` share."""
    check_tensor("hidden", hidden, 2, FLOAT_DTYPES)
    check_tensor("head_weight", head_weight, 2, FLOAT_DTYPES)
    if hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"hidden and head_weight disagree on H: {hidden.shape[1]} vs {head_weight.shape[1]}")
    if head_weight.numel() == 0:
        raise ValueError(f"head_weight must have at least one row and one column, got {tuple(head_weight.shape)}")
    if hidden.dtype != head_weight.dtype:
        raise ValueError(f"hidden and head_weight have different dtypes: {hidden.dtype} vs {head_weight.dtype}")
    check_same_device("head_weight", head_weight, "hidden", hidden)
    _check_row_major("hidden", hidden)
    _check_row_major("head_weight", head_weight)
    check_token_ids(token_ids, hidden.shape[0])
    check_same_device("token_ids", token_ids, "hidden", hidden)
    if bias is not None:
        check_tensor("bias", bias, 1, FLOAT_DTYPES)
        if bias.shape[0] != head_weight.shape[0]:
            raise ValueError(f"bias and head_weight disagree on V: {bias.shape[0]} vs {head_weight.shape[0]}")
        if bias.dtype != hidden.dtype:
            raise ValueError(f"bias and hidden have different dtypes: {bias.dtype} vs {hidden.dtype}")
        check_same_device("bias", bias, "hidden", hidden)
    check_positive("temperature", temperature)
    check_workspace(workspace_bytes)
    if shard is not None:
        end = shard.start + head_weight.shape[0]
        if shard.start < 0 or end > shard.vocab_size:
            raise ValueError(
                f"shard and head_weight disagree: rows {shard.start} to {end} of a vocabulary of {shard.vocab_size}"
            )


def under_autocast(hidden: Tensor, head_weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside torch.autocast, cast operands of different dtypes to the autocast dtype, as `F.linear` does.

    Operands of one dtype are left unchanged: rounding float32 operands would only lose accuracy.
    """
    if not isinstance(hidden, Tensor) or not isinstance(head_weight, Tensor):
        return hidden, head_weight, bias
    kind = hidden.device.type
    mixed = hidden.dtype != head_weight.dtype and torch.float64 not in (hidden.dtype, head_weight.dtype)
    if not mixed or not torch.is_autocast_enabled(kind):
        return hidden, head_weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), head_weight.to(dtype), None if bias is None else bias.to(dtype)


def check_cu_seqlens(cu_seqlens: Tensor, rows_name: str, rows: Tensor) -> None:
    """Require integers of shape [B + 1], on the CPU or on the device of the rows."""
    check_tensor("cu_seqlens", cu_seqlens, 1, INTEGER_DTYPES)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have B + 1 entries, got 0")
    if cu_seqlens.device.type != "cpu":
        check_same_device("cu_seqlens", cu_seqlens, rows_name, rows)


def check_offset_values(cu_seqlens: Tensor, num_rows: int, rows_name: str) -> None:
    """Require offsets that start at 0, never decrease and end at T."""
    check_value(cu_seqlens[0] == 0, "cu_seqlens must start at 0")
    check_value((cu_seqlens[1:] >= cu_seqlens[:-1]).all(), "cu_seqlens must not decrease")
    check_value(cu_seqlens[-1] == num_rows, f"cu_seqlens must end at T = {num_rows}, the rows of {rows_name}")


def _check_per_sequence(name: str, value: Tensor, num_sequences: int, rows_name: str, rows: Tensor) -> None:
    check_tensor(name, value, 1, FLOAT_DTYPES)
    if value.shape[0] != num_sequences:
        raise ValueError(f"{name} and cu_seqlens disagree on B: {value.shape[0]} vs {num_sequences}")
    check_same_device(name, value, rows_name, rows)


def _check_per_token_or_sequence(name: str, value: Tensor, num_sequences: int, rows_name: str, rows: Tensor) -> None:
    check_tensor(name, value, 1, FLOAT_DTYPES)
    num_rows = rows.shape[0]
    if value.shape[0] not in (num_rows, num_sequences):
        raise ValueError(
            f"{name} must have shape [T] = [{num_rows}] or [B] = [{num_sequences}], got {tuple(value.shape)}"
        )
    check_same_device(name, value, rows_name, rows)


def check_trajectory_args(
    rows: Tensor,  # [T, ...], the hidden states or the log-probs
    rows_name: str,
    cu_seqlens: Tensor,  # [B + 1]
    *,
    rewards: Tensor,  # [B]
    log_z: Tensor,  # [B]
    beta: float,
    ref_logprobs: Tensor | None,  # [T] or [B]
    weights: Tensor | None,  # [B]
    behavior_logprobs: Tensor | None,  # [T] or [B]
    importance_cap: float | None,
    reduction: str,
    denominator: float | Tensor | None,
) -> None:
    """Check the per-sequence arguments that both forms of the trajectory-balance loss share."""
    check_cu_seqlens(cu_seqlens, rows_name, rows)
    num_sequences = cu_seqlens.shape[0] - 1
    _check_per_sequence("rewards", rewards, num_sequences, rows_name, rows)
    _check_per_sequence("log_z", log_z, num_sequences, rows_name, rows)
    if weights is not None:
        _check_per_sequence("weights", weights, num_sequences, rows_name, rows)
    for name, value in (("ref_logprobs", ref_logprobs), ("behavior_logprobs", behavior_logprobs)):
        if value is not None:
            _check_per_token_or_sequence(name, value, num_sequences, rows_name, rows)
    check_positive("beta", beta)
    if importance_cap is not None:
        check_positive("importance_cap", importance_cap)
        if behavior_logprobs is None:
            raise ValueError("importance_cap needs behavior_logprobs, got None")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(f"denominator must be a number or a 0-d tensor, got shape {tuple(denominator.shape)}")
    elif denominator is not None:
        check_positive("denominator", denominator)

"""Other projects' code as methods of the kernel benchmarks, through their public names where available.

All peers are optional: one that is not installed, or does not support the device or the dtype, raises UnavailableError
and is listed in the table with that reason. The trajectory-balance loss follows from their log-probs by ordinary
autograd.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss.methods import Method, UnavailableError, fixed_thv

HALF = (torch.bfloat16, torch.float16)
TRL_VOCAB_CHUNK = 32768
QUACK_ROWS = 4096


def _module(name: str, distribution: str) -> ModuleType:
    """Import and return a module; UnavailableError with the reason on any failure."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        top = name.split(".")[0]
        reason = f"{distribution} is not installed" if missing == top else f"{distribution} needs {missing}"
        raise UnavailableError(reason) from error
    except Exception as error:  # other projects' imports may fail in any way
        raise UnavailableError(f"{name} cannot be imported: {type(error).__name__}: {error}"[:160]) from error


def _needs_gpu(device: torch.device, dtype: torch.dtype, half: bool = True) -> None:
    if device.type != "cuda":
        raise UnavailableError("runs only on a GPU")
    if half and dtype not in HALF:
        raise UnavailableError(f"has no {str(dtype).removeprefix('torch.')} backward pass")


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"{distribution}, version unknown"


def trl_selective(device: torch.device, dtype: torch.dtype) -> Method:
    """TRL's gather of log-softmax, on full logits in the dtype of the model."""
    select = _module("trl.trainer.utils", "trl").selective_log_softmax

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        return select(F.linear(hidden, head_weight), token_ids)

    return Method(name="trl selective_log_softmax", logprobs=logprobs, thv=fixed_thv(2, 4, 6), note=_version("trl"))


def trl_chunked(device: torch.device, dtype: torch.dtype) -> Method:
    """TRL's log-probs without full logits, in tiles of 4096 tokens by 32768 columns."""
    try:
        function = _module("trl.kernels", "trl").ChunkedLogProbFunction
    except (UnavailableError, AttributeError):
        function = getattr(_module("trl.trainer.utils", "trl"), "_ChunkedLogProbFunction", None)
    if function is None:
        raise UnavailableError(f"{_version('trl')} has no chunked log-probs")
    names = list(inspect.signature(function.forward).parameters)[1:]
    values: dict[str, Any] = {"bias": None, "temperature": 1.0, "chunk_size": TRL_VOCAB_CHUNK, "outputs": ()}

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        given = {"hidden": hidden, "weight": head_weight, "targets": token_ids, "labels": token_ids, **values}
        wanted = {"final_logit_softcapping": None, "logit_scale": 1.0} | given
        result = function.apply(*(wanted[name] for name in names))
        return result[0] if isinstance(result, tuple) else result

    return Method(name="trl chunked", logprobs=logprobs, thv=fixed_thv(2, 6, 8), note=_version("trl"))


def liger_flce(device: torch.device, dtype: torch.dtype, accum_dtype: torch.dtype | None = None) -> Method:
    """Liger's Triton fused linear cross entropy, with one loss per token."""
    _needs_gpu(device, dtype, half=False)
    module = _module("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=accum_dtype)

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        result = loss(head_weight, hidden, token_ids)
        return -(result[0] if isinstance(result, tuple) else result)

    name = "liger fused linear CE" + (", float32 accumulators" if accum_dtype else "")
    return Method(name=name, logprobs=logprobs, thv=fixed_thv(2, 6, 8), note=_version("liger-kernel"))


def liger_chunked(device: torch.device, dtype: torch.dtype) -> Method:
    """Log-probs as computed inside Liger's chunked GRPO and PPO losses."""
    module = _module("liger_kernel.chunked_loss.fused_linear_ppo", "liger-kernel")
    function = getattr(module, "_ChunkedSelectiveLogProbFunction", None)
    if function is None:
        raise UnavailableError(f"{_version('liger-kernel')} computes log-probs only inside its losses")
    columns = getattr(module, "_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE", 4096)

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        return function.apply(hidden, head_weight, token_ids, None, 1.0, columns)

    return Method(
        name="liger chunked losses' log-probs",
        logprobs=logprobs,
        thv=fixed_thv(2, 6, 8),
        note=_version("liger-kernel"),
    )


def liger_scaled(device: torch.device, dtype: torch.dtype, name: str = "liger scaled CE") -> Method:
    """Liger's scaled cross entropy: its CuTe kernels on Hopper, chunked PyTorch elsewhere."""
    module = _module("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    public = name == "liger scaled CE"
    attribute = "LigerFusedLinearScaledCrossEntropyFunction" if public else "_FusedLinearPPOFallbackFunction"
    function = getattr(module, attribute, None)
    if function is None:
        raise UnavailableError(f"{_version('liger-kernel')} has no {attribute}")
    if public and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        _module("cutlass", "nvidia-cutlass-dsl")
    if not public and device.type != "cuda":
        raise UnavailableError("without a GPU it is the same code as liger scaled CE")

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        if public:
            return -function.apply(hidden, head_weight, token_ids)
        return -function.apply(hidden, head_weight, token_ids, 1.0, -100, False)

    return Method(name=name, logprobs=logprobs, thv=fixed_thv(2, 8, 8), note=_version("liger-kernel"))


def cut_cross_entropy(device: torch.device, dtype: torch.dtype, exact: bool = False) -> Method:
    """Cut Cross-Entropy; `exact` = no gradient filtering, and float32 accumulators if the version has them."""
    _needs_gpu(device, dtype)
    function = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    known = inspect.signature(function).parameters
    wanted = {"filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": True} if exact else {}
    options = {name: value for name, value in wanted.items() if name in known}
    without = [name for name in wanted if name not in known]

    def logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        return -function(hidden, head_weight, token_ids, reduction="none", **options)

    note = _version("cut-cross-entropy") + (f"; this version has no {', '.join(without)}" if without else "")
    name = "cut-cross-entropy" + (", exact" if exact else "")
    return Method(name=name, logprobs=logprobs, thv=fixed_thv(2, 6, 8), note=note)


VERL_PLACES = (
    ("skyrl.backends.skyrl_train.distributed.megatron.fused_linear_logprob_triton", "skyrl"),
    ("fused_linear_logprob_triton", "SkyRL's file"),
    ("verl.utils.kernel.linear_cross_entropy", "verl"),
)


def verl_triton(device: torch.device, dtype: torch.dtype) -> Method:
    """verl's Triton kernel; SkyRL's copy with masked columns if SkyRL (or that file of it) can be imported."""
    _needs_gpu(device, dtype, half=False)
    reasons = []
    for name, distribution in VERL_PLACES:
        try:
            module = _module(name, distribution)
        except UnavailableError as error:
            reasons.append(str(error))
            continue
        function = module.LinearCrossEntropy

        def logprobs(
            hidden: Tensor, head_weight: Tensor, token_ids: Tensor, apply: Callable[..., Any] = function.apply
        ) -> Tensor:
            return apply(hidden, head_weight, token_ids, 1.0, "none", None)[0]

        return Method(name="verl triton", logprobs=logprobs, thv=fixed_thv(2, 8, 8), note=f"from {name}")
    raise UnavailableError("; ".join(reasons))


def quack_plain(device: torch.device, dtype: torch.dtype) -> Method:
    """QuACK's chunked cross entropy with one weight for all tokens: a bound only, it cannot compute this loss."""
    _needs_gpu(device, dtype)
    function = _module("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy

    def loss(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> Tensor:
        return function(hidden, head_weight, token_ids, chunk_size=QUACK_ROWS, reduction="sum")

    return Method(
        name="quack, plain CE only",
        plain_loss=loss,
        thv=fixed_thv(2, 6, 6),
        note=f"{_version('quack-kernels')}; takes no gradient per token, so not usable for trajectory balance",
    )


def peer_makers(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Method]]:
    """Return name in the table -> function that creates the method or raises UnavailableError."""
    float32 = torch.float32
    makers: dict[str, Callable[..., Method]] = {
        "trl selective_log_softmax": trl_selective,
        "trl chunked": trl_chunked,
        "verl triton": verl_triton,
        "liger scaled CE": liger_scaled,
        "liger scaled CE, PyTorch": functools.partial(liger_scaled, name="liger scaled CE, PyTorch"),
        "liger fused linear CE": liger_flce,
        "liger fused linear CE, float32 accumulators": functools.partial(liger_flce, accum_dtype=float32),
        "liger chunked losses' log-probs": liger_chunked,
        "cut-cross-entropy": cut_cross_entropy,
        "cut-cross-entropy, exact": functools.partial(cut_cross_entropy, exact=True),
        "quack, plain CE only": quack_plain,
    }
    return {name: functools.partial(make, device, dtype) for name, make in makers.items()}

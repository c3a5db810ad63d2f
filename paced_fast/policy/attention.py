"""Attention of the policy in training: the layout of its rows, and the kernel for packed rows.

transformers calls the function registered here for every layer. A packed row travels to it beside the tensors, with its
kernel; without one (sampling, embedding) it is transformers' own SDPA with its own mask.

L = tokens of a packed row, A = attention heads, K = key heads, D = size of a head.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from paced_fast.errors import InputError
from paced_fast.policy.families import unshareable
from paced_fast.policy.micro_batches import PackedRow
from paced_fast.policy.shape import head_size, text_settings

_NAME = "paced_fast"
"""Name by which the model's configuration refers to the function below."""

Kernel = Callable[[Tensor, Tensor, Tensor, "Packed", float, int | None], Tensor]
"""Query [1, A, L, D], key and value [1, K, L, D], the row, the scale, the window -> output [1, L, A, D]."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed row, its kernel, and the masks of blocks that need one, by window."""

    row: PackedRow
    kernel: Kernel
    masks: Mapping[int | None, Tensor]


@dataclass(frozen=True, slots=True)
class Attention:
    """Resolved setting `model.attention`. Without a kernel rows share their prompts."""

    name: str
    reason: str
    kernel: Kernel | None = None


SHARED = Attention("shared", "each prompt is computed once per group")
PADDED = Attention("padded", "one row per sequence")


def choose_attention(setting: str, model: PreTrainedModel, device: torch.device | None = None) -> Attention:
    """The attention that the setting names, or for `auto` the best that this model can have on `device`, by default
    where it is: a model that is about to be sharded still lies on the host.

    Raises InputError when the named one is absent or cannot take this model.
    """
    device = device or model.device
    why = unshareable(model.config)
    if setting == "padded":
        return PADDED
    if why is not None:
        if setting != "auto":
            raise InputError(f"--model.attention {setting}: {why}: use auto or padded")
        return Attention("padded", why)
    if setting == "auto":
        if device.type == "cpu":
            return SHARED
        lacking = dict.fromkeys(problem for name in _VARLEN if (problem := _lacks(name, model, device)) is not None)
        best = next((name for name in _VARLEN if _lacks(name, model, device) is None), None)
        if best is None:
            return Attention("shared", "; ".join(lacking))
        return Attention(best, "no padding and no mask", _VARLEN[best].load())
    if setting == "shared":
        return SHARED
    if setting == "packed-sdpa":
        return Attention(setting, "set by --model.attention", sdpa)
    problem = _lacks(setting, model, device)
    if problem is not None:
        raise InputError(f"--model.attention {setting}: {problem}: use auto, which picks an available kernel")
    return Attention(setting, "set by --model.attention", _VARLEN[setting].load())


def install(model: PreTrainedModel) -> None:
    """Make the model call the function here; calls without a packed row behave as before."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def sdpa_masks(row: PackedRow, windows: set[int | None], dtype: torch.dtype) -> dict[int | None, Tensor]:
    """For each window the mask [n, p + n] of the longest block after the longest prefix; `sdpa` cuts what it needs.

    0 where a token may attend, minus infinity elsewhere: attention would convert a boolean mask to numbers in every
    layer.
    """
    prefix = max((row.lengths[p] for p in row.prefixes if p >= 0), default=0)
    return block_masks(prefix, max(row.lengths), windows, dtype, row.input_ids.device)


def block_masks(
    prefix: int, length: int, windows: set[int | None], dtype: torch.dtype, device: torch.device
) -> dict[int | None, Tensor]:
    """For each window the mask [n, p + n] of a block of n = `length` tokens behind p = `prefix` others."""
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(-prefix, length, device=device)[None, :]
    masks = {}
    for window in windows:
        seen = key <= query if window is None else (key <= query) & (query - key < window)
        masks[window] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    return masks


def sdpa(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """Kernel of PyTorch's own attention, block by block: exact everywhere, and the only one that supports prefixes."""
    lengths, prefixes = packed.row.lengths, packed.row.prefixes
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    # One split has one gradient; slices would each have one of the size of the whole.
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for k, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        before = 0 if prefix < 0 else lengths[prefix]
        own_key, own_value, mask = keys[k], values[k], None
        if prefix >= 0:
            own_key, own_value = torch.cat([keys[prefix], keys[k]], 2), torch.cat([values[prefix], values[k]], 2)
        if prefix >= 0 or (window is not None and window < length):
            whole = packed.masks[window]
            start = whole.shape[1] - whole.shape[0]  # the column of the block's first token
            mask = whole[:length, start - before : start + length]
        output = scaled_dot_product_attention(
            queries[k], own_key, own_value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _attend(
    module: torch.nn.Module,
    query: Tensor,  # [R, A, L, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function that transformers calls in every layer, with its order of arguments."""
    for option in ("softcap", "s_aux"):
        if options.get(option) is not None:
            raise InputError(
                f"--model.attention: this model's attention uses {option}, which shared and packed rows do not "
                "support: use padded"
            )
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    windowed = getattr(getattr(module, "config", None), "sliding_window", None) is not None
    if windowed and "sliding_window" not in options:
        raise InputError("--model.attention: this model does not pass its sliding window to packed rows: use shared")
    return packed.kernel(query, key, value, packed, scaling, options.get("sliding_window")), None


@dataclass(frozen=True, slots=True)
class _Varlen:
    """A kernel that takes sequences one after another. `oldest` and `newest` are compute capabilities."""

    module: str
    install: str
    oldest: int
    newest: int
    load: Callable[[], Kernel]


def _flash(module: str) -> Callable[[], Kernel]:
    """The varlen function of a flash-attn package: versions 2 to 4 agree on these arguments and on little else."""

    def load() -> Kernel:
        function = importlib.import_module(module).flash_attn_varlen_func

        def attend(
            query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int | None
        ) -> Tensor:
            row, longest = packed.row, max(packed.row.lengths)
            output = function(
                *_flat(query, key, value),
                cu_seqlens_q=row.cu_seqlens,
                cu_seqlens_k=row.cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                softmax_scale=scale,
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                **({} if window is None else {"window_size": (window - 1, 0)}),
            )
            return (output[0] if isinstance(output, tuple) else output)[None]  # some return the log-sum-exp as well

        return attend

    return load


def _torch_varlen() -> Kernel:
    """PyTorch's own varlen attention."""
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    takes_groups = "enable_gqa" in inspect.signature(function).parameters

    def attend(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
        row, longest = packed.row, max(packed.row.lengths)
        options: dict[str, Any] = {"enable_gqa": True} if takes_groups else {}
        if not takes_groups and not _takes_groups_unasked(function, query.device, query.dtype):
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        left = -1 if window is None else window - 1
        output = function(
            *_flat(query, key, value),
            row.cu_seqlens,
            row.cu_seqlens,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0),  # nothing after the token itself
            **options,
        )
        return output[None]

    return attend


@functools.cache
def _takes_groups_unasked(function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a varlen function without `enable_gqa` is right with fewer heads of keys than of queries.

    The kernel below it may be, and then nothing has to be repeated in every layer. Tried once, on tiny operands, with
    their gradients.
    """
    source = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(8, heads, 64, generator=source, device=device).to(dtype).requires_grad_() for heads in (4, 2, 2)
    )
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)

    def results(repeats: int) -> list[Tensor]:
        all_key, all_value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        output = function(query, all_key, all_value, offsets, offsets, 5, 5, scale=0.125, window_size=(-1, 0))
        return [output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))]

    with torch.enable_grad():
        wanted = results(2)
        try:
            found = results(1)
        except (RuntimeError, ValueError):
            return False
    return all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(found, wanted, strict=True))


def _flat(*tensors: Tensor) -> list[Tensor]:
    """[1, A, L, D] -> [L, A, D], as varlen kernels have it."""
    return [tensor[0].transpose(0, 1) for tensor in tensors]


_VARLEN = {
    "packed-flash3": _Varlen("flash_attn_interface", "flash-attn-3", 9, 9, _flash("flash_attn_interface")),
    "packed-flash4": _Varlen("flash_attn.cute", "flash-attn-4", 9, 12, _flash("flash_attn.cute")),
    "packed-flash2": _Varlen("flash_attn.flash_attn_interface", "flash-attn", 8, 12, _flash("flash_attn")),
    "packed-torch": _Varlen("torch.nn.attention.varlen", "torch", 8, 12, _torch_varlen),
}
"""Kernels by their name in `model.attention`, in the order in which `auto` prefers them: flash-attn 3 was written for
compute capability 9.0 and runs on no other."""


def _lacks(name: str, model: PreTrainedModel, device: torch.device) -> str | None:
    """Reason why this model cannot use the kernel, or None."""
    kernel, settings = _VARLEN[name], model.config
    size = head_size(text_settings(settings))
    if device.type == "cuda" and model.dtype not in (torch.bfloat16, torch.float16):
        return f"varlen kernels need bfloat16 parameters, and these are {str(model.dtype).removeprefix('torch.')}"
    if device.type == "cuda" and (size % 8 or size > 256):
        return f"varlen kernels need a head size that is a multiple of 8 up to 256, and it is {size}"
    return _lacks_here(kernel, device)


def lacking_here(device: torch.device) -> dict[str, str | None]:
    """Reason why no model can use a kernel on `device`, or None, by the kernel's name in `model.attention`."""
    return {name: _lacks_here(kernel, device) for name, kernel in _VARLEN.items()}


def _lacks_here(kernel: _Varlen, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the kernel needs a GPU, and the model is on the {device.type}"
    major = torch.cuda.get_device_capability(device)[0]
    if not kernel.oldest <= major <= kernel.newest:
        return f"the kernel needs compute capability {kernel.oldest}.x to {kernel.newest}.x, and the GPU has {major}.x"
    return _absent(kernel)


def _absent(kernel: _Varlen) -> str | None:
    """Reason why the module cannot be imported, or None; asked on a GPU only, so that nothing heavy is imported
    elsewhere."""
    parent = kernel.module.partition(".")[0]
    if util.find_spec(parent) is None:
        return f"{kernel.install} is not installed"
    try:
        importlib.import_module(kernel.module)
    except (ImportError, OSError, RuntimeError) as error:  # absent, or built for another torch or CUDA
        return f"{kernel.install} is not installed or does not load ({(str(error).splitlines() or [''])[0]})"
    return None


MASKED_ROW = 256
"""On a CPU, rows that share a prompt are computed with a mask up to this many tokens, longer ones block by block: a
mask wastes most pairs of positions of a long row, and a call per block costs more than that in a short one."""

"""liger-kernel's fused RMSNorm, SwiGLU and rotary embedding in the layers of one model; nothing else of it.

Its patches change the classes of transformers for the whole process. Here every layer of the model gets its own.
"""

from __future__ import annotations

import types
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.errors import InputError, pip_install

_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose norm multiplies by the weight itself and whose MLP is SwiGLU of three linear layers."""
_ROTARY = "apply_rotary_pos_emb"


def use_liger(setting: str, model: PreTrainedModel, device: torch.device | None = None) -> str:
    """Apply the setting `model.liger` and return the outcome in words; `device` is where the model will be.

    Raises InputError when `on` is not possible.
    """
    problem = _lacks(model, device or model.device)
    if setting == "on" and problem is not None:
        raise InputError(f"--model.liger on: {problem}: give auto, which uses it only where possible, or off")
    if setting == "off" or problem is not None:
        return "off" if setting == "off" else f"off ({problem})"
    kernels = import_module("liger_kernel.transformers.functional")
    norms, others, without_rotary = 0, 0, 0
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm(kernels), module)
            norms += 1
        elif kind.endswith("MLP") and getattr(model.config, "hidden_act", "") in ("silu", "swish"):
            module.forward = types.MethodType(_swiglu(kernels), module)
            others += 1
        elif kind.endswith("Attention"):
            forward = _with_rotary(type(module).forward, kernels)
            if forward is None:
                without_rotary += 1
            else:
                module.forward = types.MethodType(forward, module)
                others += 1
    if without_rotary and setting == "on":
        raise InputError(
            f"--model.liger on: {without_rotary} attention layers of {model.config.model_type} do not call "
            f"{_ROTARY} in this version of transformers: give auto, which replaces the rest, or off"
        )
    left = f"; {without_rotary} rotary embeddings are not replaced" if without_rotary else ""
    return f"on ({norms} RMSNorm, {others} SwiGLU and rotary embeddings{left})"


def _lacks(model: PreTrainedModel, device: torch.device) -> str | None:
    """Reason why the model cannot use the kernels, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    if util.find_spec("liger_kernel") is None:
        return f"liger-kernel is not installed ({pip_install('liger')})"
    if model.config.model_type not in _KNOWN:
        return f"models of type {model.config.model_type} are not supported, only {', '.join(_KNOWN)}"
    return None


def _norm(kernels: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return kernels.liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _swiglu(kernels: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(kernels.liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def _with_rotary(forward: Any, kernels: Any) -> Any:
    """The layer's own forward pass that finds liger's function where it looks for `apply_rotary_pos_emb`.

    None where it does not look for it. Decorators are followed through what they close over.
    """
    cells, found = [], _ROTARY in forward.__code__.co_names
    for cell in forward.__closure__ or ():
        inside = cell.cell_contents
        rebuilt = _with_rotary(inside, kernels) if isinstance(inside, types.FunctionType) else None
        found = found or rebuilt is not None
        cells.append(cell if rebuilt is None else types.CellType(rebuilt))
    if not found:
        return None
    names = {**forward.__globals__, _ROTARY: kernels.liger_rope}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, tuple(cells))
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy

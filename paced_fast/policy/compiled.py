"""torch.compile of the norms and gated MLPs of one model: what lies between its products, in one pass over memory.

Whole layers are not compiled: attention of packed rows reads their lengths on the host, so that every batch would be
compiled anew. A part has no such argument, and one compilation with symbolic sizes serves every length.
"""

from __future__ import annotations

import os
import shutil

import torch
from transformers import PreTrainedModel

from paced_fast.errors import InputError

_PARTS = ("RMSNorm", "LayerNorm", "MLP")
"""Endings of the names of classes that are compiled."""


def compile_parts(setting: str, model: PreTrainedModel, device: torch.device | None = None) -> str:
    """Apply the setting `model.compile` and return the outcome in words; `device` is where the model will be.

    Parts that have a forward pass of their own already (liger-kernel's) keep it. Raises InputError when `on` is not
    possible.
    """
    if setting == "off":
        return "off"
    if (device or model.device).type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(
            "--model.compile on needs a C++ compiler on a CPU: install g++ or name one in CXX, or give off"
        )
    found = [
        module
        for module in model.modules()
        if type(module).__name__.endswith(_PARTS) and "forward" not in vars(module) and not _holds_parts(module)
    ]
    if not found:
        raise InputError(
            f"--model.compile on: {model.config.model_type} has no norm or MLP that is left to compile: give off"
        )
    for module in found:
        module.compile(dynamic=True)
    return f"{len(found)} norms and MLPs"


def _holds_parts(module: torch.nn.Module) -> bool:
    """Whether parts are inside, or experts, whose rows are chosen on the host."""
    inside = [inner for inner in module.modules() if inner is not module]
    return any(type(inner).__name__.endswith(_PARTS) or isinstance(inner, torch.nn.ModuleList) for inner in inside)

"""Gradient checkpointing: the backward pass computes a layer again instead of keeping its activations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from paced_fast.errors import InputError


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Prepare the model's layers for `checkpoint_next_forward`. Raises InputError when it has none that can."""
    layers = _layers(model)
    if not layers or not model.supports_gradient_checkpointing:
        raise InputError(
            f"--model.gradient-checkpointing: {type(model).__name__} has no layers that can be computed again: "
            "leave it out"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # embeddings get a gradient where they are trained, and need none elsewhere
    for layer in layers:
        if _calm not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_calm)


def checkpoint_next_forward(model: PreTrainedModel) -> None:
    """The layers of the next forward pass keep their input only.

    transformers checkpoints a layer that is in train mode when it is called. It is so until it runs, alone and without
    its parts: dropout stays off, and sampling, which keeps keys and values, is not affected.
    """
    for layer in _layers(model):
        layer.training = True


def _calm(layer: torch.nn.Module, _: Any) -> None:
    layer.training = False


def _layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

"""Gradient checkpointing: the backward pass computes a layer again instead of keeping its activations.

transformers has its own switch for this, but its requirements on a layer change with the release, and where they are
not met the switch does nothing. So each layer is wrapped here, and each pass checks that the wrapper ran.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from paced_fast.errors import InputError

_ARMED = "_computes_again"
"""Attribute of a layer whose next forward pass keeps its input only."""


def can_recompute(model: PreTrainedModel) -> bool:
    """Whether the model has layers that can be computed again."""
    return bool(_layers(model)) and model.supports_gradient_checkpointing


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Prepare the model's layers for `checkpoint_next_forward`. Raises InputError when it has none that can."""
    layers = _layers(model)
    if not can_recompute(model):
        raise InputError(
            f"--model.gradient-checkpointing: {type(model).__name__} has no layers that can be recomputed: "
            "leave the option out"
        )
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)


def checkpoint_next_forward(model: PreTrainedModel) -> None:
    """Make the layers of the next forward pass keep their input only, if that pass computes gradients.

    Sampling, which keeps keys and values, is not affected, because it does not call this. Raises InputError when none
    of the layers was reached by the forward pass before this one.
    """
    layers = _layers(model)
    if all(getattr(layer, _ARMED, False) for layer in layers):
        raise InputError(
            f"--model.gradient-checkpointing: the layers of {type(model).__name__} are not called by this version of "
            "transformers: leave the option out"
        )
    for layer in layers:
        setattr(layer, _ARMED, True)


def _forward(layer: torch.nn.Module, *args: Any, **options: Any) -> Any:
    """The forward pass of the layer's class, computed again by the backward pass if the layer is armed."""
    forward = types.MethodType(type(layer).forward, layer)
    armed = getattr(layer, _ARMED, False)
    setattr(layer, _ARMED, False)
    if armed and torch.is_grad_enabled():
        # The layers are in evaluation mode and draw no random numbers.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return forward(*args, **options)


def _layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

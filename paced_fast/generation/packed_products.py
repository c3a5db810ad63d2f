"""Products with the weights of linear layers, laid out once for many tokens of a few sequences on a CPU.

A library that multiplies a few rows by a weight spends about as long on laying the weight out for the processor as on
multiplying. Sampling multiplies by the same weights for every token, so they are laid out once a call, which costs a
copy of them in memory until the call ends.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEWEST_TOKENS = 16
"""Tokens a completion from which laying out pays: it takes about as long as sampling four."""
_LEAST_ELEMENTS = 2**18
"""Smaller weights gain too little: the call takes 12 us more than that of `linear`, and 16 tokens pay for no layout."""


@contextmanager
def packed_products(model: nn.Module, *, rows: int, tokens: int) -> Iterator[int]:
    """In this context linear layers of `model` multiply by weights laid out now, which must not change in it; its value
    is the number of those layers.

    It is for a float32 model on a CPU; elsewhere, and for fewer than `FEWEST_TOKENS` tokens, it changes nothing.

    A layer gets a `forward` of its own until the context ends. A mode that sees every operation of the model would do
    without, but costs a microsecond or two for each, which is a third of the time of a small model.

    Args:
        rows: number of sequences that are sampled together.
        tokens: most tokens of a completion.
    """
    layers = _layers(model) if tokens >= FEWEST_TOKENS and torch.backends.mkldnn.is_available() else []
    laid_out: dict[int, Tensor] = {}
    for layer in layers:
        weight = layer.weight
        if id(weight) not in laid_out:
            laid_out[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    try:
        for layer in layers:
            layer.forward = functools.partial(_product, layer, laid_out[id(layer.weight)], 4 * rows)
        yield len(layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> list[nn.Linear]:
    """Layers whose weight is worth laying out. Those with a `forward` that is not torch's keep it, and those inside a
    compiled part too, which would be compiled anew."""
    compiled = {
        id(inner) for part in model.modules() if part._compiled_call_impl is not None for inner in part.modules()
    }
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        and getattr(layer.forward, "__func__", None) is nn.Linear.forward
        and type(layer.weight) in (Tensor, nn.Parameter)
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
        and layer.weight.numel() >= _LEAST_ELEMENTS
        and id(layer) not in compiled
    ]


def _product(layer: nn.Linear, laid_out: Tensor, most_rows: int, input: Tensor) -> Tensor:
    """`layer.forward(input)`: more rows than `most_rows` are worth a layout of their own."""
    if input.numel() > most_rows * input.shape[-1]:
        return linear(input, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise.default(input, laid_out, layer.bias, "none", [], "")

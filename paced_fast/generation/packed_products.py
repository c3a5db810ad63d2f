"""Products with the weights of linear layers, laid out once for many tokens of a few sequences on a CPU.

A library that multiplies a few rows by a weight spends about as long on laying the weight out for the processor as on
multiplying. Sampling multiplies by the same weights for every token, so they are laid out once a call, which costs a
copy of them in memory until the call ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

FEWEST_TOKENS = 16
"""Tokens a completion from which laying out pays: it takes about as long as sampling four."""
_LEAST_ELEMENTS = 2**14
"""Smaller weights stay in the cache, in any layout."""


def packed_products(model: nn.Module, *, rows: int, tokens: int) -> AbstractContextManager[Any]:
    """Return a context in which linear layers of `model` multiply by weights laid out now; they must not change in it.

    It is for a float32 model on a CPU; elsewhere, and for fewer than `FEWEST_TOKENS` tokens, it changes nothing.

    Args:
        rows: number of sequences that are sampled together.
        tokens: most tokens of a completion.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return nullcontext()
    if tokens < FEWEST_TOKENS or not torch.backends.mkldnn.is_available():
        return nullcontext()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return _Packed(weights, rows)


class _Packed(TorchFunctionMode):
    """Replaces `linear` where its weight is one of those that were laid out."""

    def __init__(self, weights: Iterable[Tensor], rows: int) -> None:
        super().__init__()
        self._packed: dict[int, Tensor] = {}
        self._rows = rows
        for weight in weights:
            is_plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32
            if is_plain and weight.numel() >= _LEAST_ELEMENTS and id(weight) not in self._packed:
                self._packed[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func is linear and len(args) >= 2 and args[0].numel() // args[0].shape[-1] <= 4 * self._rows:
            packed = self._packed.get(id(args[1]))
            if packed is not None:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                return torch.ops.mkldnn._linear_pointwise(args[0], packed, bias, "none", [], "")
        return func(*args, **(kwargs or {}))

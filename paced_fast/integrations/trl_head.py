"""How a model's states become log-probs: by the fused op in its forward, by TRL's own head, or from its own logits.

B = sequences, P = longest prompt, C = longest completion, T = completion tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paced_fast.errors import InputError
from paced_fast.integrations.losses import offsets, packed

StateCall = Callable[[Tensor, Tensor, Tensor | None], Any]

FUSED, HOST, LOGITS = "fused", "host", "logits"


class Head(NamedTuple):
    """The way from states to log-probs, the factor of the logits, and why the way is not `FUSED` (else empty)."""

    way: str
    scale: float
    why: str


# What a forward does to its logits under these names, only its own forward knows; TRL's head does not.
_ONLY_ITS_OWN = ("logits_soft_cap", "output_logit_soft_cap", "logits_mup_width_multiplier", "unpadded_vocab_size")


def find_head(model: Any, *, takes_images: bool, is_whole: bool, has_router_loss: bool) -> Head:
    """How to score with `model`, a causal language model without wrappers.

    Args:
        takes_images: it comes with a processor; only TRL knows what to hand such a model.
        is_whole: its weights are here and in one piece, so that it can be asked what it does to its states.
        has_router_loss: it trains with the loss of its routers.

    Raises:
        InputError: it trains with that loss, and has no routers that it shows.
    """
    name = type(model).__name__
    if has_router_loss and is_whole and not takes_images and not _shows_routers(model):
        raise InputError(f"{name} returns no router logits to compute a router loss of: set router_aux_loss_coef=0")
    if takes_images:
        return Head(HOST, 1.0, f"{name} comes with a processor of images")
    settings = model.config.get_text_config()
    only = [key for key in _ONLY_ITS_OWN if getattr(settings, key, None) not in (None, 1, 1.0)]
    if only:
        return Head(LOGITS, 1.0, f"{name} changes its logits ({', '.join(only)})")
    head, scale = model.get_output_embeddings(), logit_scale(settings)
    if getattr(model, "lm_head", head) is not head or hasattr(model, "cls") or model.base_model is model:
        return Head(LOGITS, 1.0, f"{name} transforms its states before the output layer")
    is_capped = getattr(settings, "final_logit_softcapping", None) is not None
    if is_whole and not is_capped and not _is_linear(model, head, scale):
        return Head(LOGITS, 1.0, f"{name} does more to its states than its output layer")
    if is_capped:
        return Head(HOST, scale, f"{name} caps its logits (final_logit_softcapping)")
    if has_router_loss and _router_loss(model) is None:
        return Head(HOST, scale, f"{name} has a router loss of its own kind")
    if not (math.isfinite(scale) and scale > 0):
        return Head(HOST, scale, f"{name} multiplies its logits by {scale}")
    return Head(FUSED, scale, "")


def logit_scale(settings: Any) -> float:
    """What a model of these settings multiplies its logits by, under the names that families have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(settings, name, None) is not None:
            return float(getattr(settings, name))
    divisor = getattr(settings, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if settings.model_type == "hyperclovax" else 1.0 / float(divisor)


@torch.no_grad()
def _asked(model: Any, module: Any, **options: Any) -> Any:
    """What `module`, `model` or a part of it, makes of four tokens."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(4, device=embedding.device)[None] % embedding.shape[0]
    was_training = model.training
    model.eval()
    try:
        return module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    finally:
        model.train(was_training)


def _shows_routers(model: Any) -> bool:
    return bool(getattr(_asked(model, model.base_model, output_router_logits=True), "router_logits", None))


def _is_linear(model: Any, head: nn.Module, scale: float) -> bool:
    """Whether the logits of `model` are its last states times the output layer times `scale`."""
    found = _asked(model, model).logits
    states = getattr(_asked(model, model.base_model), "last_hidden_state", None)
    if states is None or not hasattr(head, "weight"):
        return False
    with torch.no_grad():
        expected = head(states.to(head.weight.device).to(head.weight.dtype)) * scale
    if expected.shape != found.shape:
        return False
    # A factor in half precision rounds each logit; whatever else a model does is not as small as that.
    tolerance = (1e-3 if found.dtype in (torch.float32, torch.float64) else 3e-2) * float(found.abs().max())
    return bool((found.float() - expected.to(found.device).float()).abs().max() <= tolerance)


def _router_loss(model: Any) -> Callable[..., Tensor] | None:
    """The load-balancing loss that the model's own forward adds; None where it does not have the usual parts."""
    has_counts = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None) if has_counts else None


class Completions:
    """The completion tokens of a micro-batch, in packed rows."""

    def __init__(
        self,
        completion_ids: Tensor,  # [B, C]
        mask: Tensor,  # [B, C]
    ) -> None:
        self.mask = mask.bool()
        self.token_ids = packed(completion_ids, self.mask)  # [T]

    def states(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:  # [B, P + C, H] -> [T, H]
        """The states that predict the tokens."""
        width = self.mask.shape[1]
        return packed(hidden[:, -width - 1 : -1], self.mask).to(dtype)

    def pack(self, values: Tensor) -> Tensor:  # [B, C] -> [T]
        """Of every token its value."""
        return packed(values, self.mask)

    def pad(self, values: Tensor) -> Tensor:  # [T] -> [B, C]
        """The inverse of `pack`, 0 elsewhere."""
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask, values)

    @property
    def offsets(self) -> Tensor:
        """i64[B + 1] on the CPU."""
        return offsets(self.mask)


def scores(
    logits: Tensor,  # [B, P + C, V]
    completions: Completions,
    *,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [B, C] from logits as the model gives them."""
    rows = completions.states(logits, torch.float32) / temperature
    table = rows.log_softmax(-1)
    logprobs = completions.pad(table.gather(1, completions.token_ids[:, None])[:, 0])
    return logprobs, completions.pad(torch.special.entr(table.exp()).sum(-1)) if with_entropy else None


def add_state_call(model: Any) -> None:
    """Let `model(..., state_call=f)` return `f(hidden states, head weight, head bias)` and a router loss, no logits.

    The router loss is None unless `router_loss=True` asks for it. The loss has to be computed inside the forward of the
    output layer, within that of the model: there DDP, FSDP, ZeRO and autocast have the weights ready, and reduce their
    gradients afterwards. Both modules keep their own forward for every other call. The loss travels as a function,
    because wrappers round the tensors they are handed (rewards in bfloat16).
    """

    def states(self: Any, *args: Any, state_call: StateCall, router_loss: bool = False, **options: Any) -> Any:
        options |= {"output_router_logits": True} if router_loss else {}
        out = self.base_model(*args, use_cache=False, **options)
        result = self.get_output_embeddings()(out.last_hidden_state, state_call=state_call)
        if not router_loss:
            return result, None
        balance = _router_loss(self)
        assert balance is not None
        counts = self.num_experts, self.num_experts_per_tok
        return result, balance(out.router_logits, *counts, options.get("attention_mask"))

    def loss(self: Any, hidden: Tensor, *, state_call: StateCall) -> Any:
        if isinstance(self.weight, DTensor):  # not by FSDP, which has put it together by now
            raise InputError("the output layer is split, which the fused loss does not know: set fused=False")
        return state_call(hidden.to(self.weight.device), self.weight, self.bias)

    for module, instead in ((model, states), (model.get_output_embeddings(), loss)):
        module.forward = types.MethodType(_or_own(module.forward, instead), module)


def _or_own(own: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """`instead` where a call has `state_call`, else `own`, which is bound."""

    @functools.wraps(getattr(own, "__func__", own))  # with its `self`, or the first argument would look bound
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return instead(self, *args, **options) if options.get("state_call") is not None else own(*args, **options)

    return forward

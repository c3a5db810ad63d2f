"""From hidden states to log-probs: by the fused op in the forward, by TRL's own head, or from the model's logits.

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
    """Way from states to log-probs, factor of the logits, and the reason if the way is not `FUSED` (else "")."""

    way: str
    scale: float
    why: str


# Settings that change the logits inside the model's own forward; TRL's head ignores them.
_ONLY_ITS_OWN = ("logits_soft_cap", "output_logit_soft_cap", "logits_mup_width_multiplier", "unpadded_vocab_size")


def find_head(model: Any, *, takes_images: bool, is_whole: bool, has_router_loss: bool) -> Head:
    """Choose how to score with `model`, a causal language model without wrappers.

    Args:
        takes_images: the model has a processor; only TRL knows what inputs such a model needs.
        is_whole: the weights are present and unsharded, so the model can be run to see how it treats its states.
        has_router_loss: training includes the model's router loss.

    Raises:
        InputError: training includes a router loss, and the model returns no router logits.
    """
    name = type(model).__name__
    if has_router_loss and is_whole and not takes_images and not _shows_routers(model):
        raise InputError(f"{name} returns no router logits, so there is no router loss: set router_aux_loss_coef=0")
    if takes_images:
        return Head(HOST, 1.0, f"{name} has an image processor")
    settings = model.config.get_text_config()
    only = [key for key in _ONLY_ITS_OWN if getattr(settings, key, None) not in (None, 1, 1.0)]
    if only:
        return Head(LOGITS, 1.0, f"{name} changes its logits ({', '.join(only)})")
    head, scale = model.get_output_embeddings(), logit_scale(settings)
    if getattr(model, "lm_head", head) is not head or hasattr(model, "cls") or model.base_model is model:
        return Head(LOGITS, 1.0, f"{name} transforms its hidden states before the output layer")
    is_capped = getattr(settings, "final_logit_softcapping", None) is not None
    if is_whole and not is_capped and not _is_linear(model, head, scale):
        return Head(LOGITS, 1.0, f"{name} applies more to its hidden states than the output layer")
    if is_capped:
        return Head(HOST, scale, f"{name} caps its logits (final_logit_softcapping)")
    if has_router_loss and _router_loss(model) is None:
        return Head(HOST, scale, f"{name} has a router loss of its own kind")
    if not (math.isfinite(scale) and scale > 0):
        return Head(HOST, scale, f"{name} multiplies its logits by {scale}")
    return Head(FUSED, scale, "")


def logit_scale(settings: Any) -> float:
    """Return the factor by which the model multiplies its logits; its setting is named differently per model family."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(settings, name, None) is not None:
            return float(getattr(settings, name))
    divisor = getattr(settings, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if settings.model_type == "hyperclovax" else 1.0 / float(divisor)


@torch.no_grad()
def _asked(model: Any, module: Any, **options: Any) -> Any:
    """Run `module` (`model` or a part of it) on four tokens and return its output."""
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
    """Return whether the logits of `model` equal output layer(last hidden states) * `scale`."""
    found = _asked(model, model).logits
    states = getattr(_asked(model, model.base_model), "last_hidden_state", None)
    if states is None or not hasattr(head, "weight"):
        return False
    with torch.no_grad():
        expected = head(states.to(head.weight.device).to(head.weight.dtype)) * scale
    if expected.shape != found.shape:
        return False
    # A factor in half precision rounds each logit; any other change by the model is larger than that.
    tolerance = (1e-3 if found.dtype in (torch.float32, torch.float64) else 3e-2) * float(found.abs().max())
    return bool((found.float() - expected.to(found.device).float()).abs().max() <= tolerance)


def _router_loss(model: Any) -> Callable[..., Tensor] | None:
    """Return the load-balancing loss function of the model's own forward; None if the usual attributes are missing."""
    has_counts = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None) if has_counts else None


class Completions:
    """Completion tokens of a micro-batch as packed rows."""

    def __init__(
        self,
        completion_ids: Tensor,  # [B, C]
        mask: Tensor,  # [B, C]
    ) -> None:
        self.mask = mask.bool()
        self.token_ids = packed(completion_ids, self.mask)  # [T]
        self.index: Tensor | None = None
        """Where other rows than [B, P + C] have the states of the completion tokens, i64[T]."""

    def states(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:  # [B, P + C, H] or [R, L, H] -> [T, H]
        """Return the states that predict the completion tokens."""
        if self.index is not None:
            return hidden.flatten(0, 1)[self.index].to(dtype)
        width = self.mask.shape[1]
        return packed(hidden[:, -width - 1 : -1], self.mask).to(dtype)

    def pack(self, values: Tensor) -> Tensor:  # [B, C] -> [T]
        """Return one value per completion token."""
        return packed(values, self.mask)

    def pad(self, values: Tensor) -> Tensor:  # [T] -> [B, C]
        """Invert `pack`; positions without a token are 0."""
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask, values)

    @property
    def offsets(self) -> Tensor:
        """Sequence offsets, i64[B + 1] on the CPU."""
        return offsets(self.mask)


def scores(
    logits: Tensor,  # [B, P + C, V]
    completions: Completions,
    *,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs and entropies [B, C] from the model's own logits."""
    rows = completions.states(logits, torch.float32) / temperature
    table = rows.log_softmax(-1)
    logprobs = completions.pad(table.gather(1, completions.token_ids[:, None])[:, 0])
    return logprobs, completions.pad(torch.special.entr(table.exp()).sum(-1)) if with_entropy else None


def add_state_call(model: Any) -> None:
    """Make `model(..., state_call=f)` return `f(hidden states, head weight, head bias)` and a router loss, no logits.

    The router loss is None unless `router_loss=True`. The loss has to be computed inside the forward of the output
    layer, itself inside the model's forward: there DDP, FSDP, ZeRO and autocast have the weights ready, and they reduce
    the gradients afterwards. Calls without `state_call` use the original forwards. The loss is passed as a function,
    because wrappers round tensor arguments (rewards would become bfloat16).
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
        if isinstance(self.weight, DTensor):  # not FSDP: it has gathered the weight by now
            raise InputError("the output layer is split, which the fused loss does not support: set fused=False")
        return state_call(hidden.to(self.weight.device), self.weight, self.bias)

    for module, instead in ((model, states), (model.get_output_embeddings(), loss)):
        module.forward = types.MethodType(_or_own(module.forward, instead), module)


def _or_own(own: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that calls `instead` if `state_call` is given, else the bound method `own`."""

    @functools.wraps(getattr(own, "__func__", own))  # with `self`, else the first argument would look bound
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return instead(self, *args, **options) if options.get("state_call") is not None else own(*args, **options)

    return forward

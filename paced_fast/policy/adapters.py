"""LoRA: low-rank matrices beside frozen ones (arXiv:2106.09685), by PEFT, inside the model that is there.

The model keeps its class and its head, so sampling, packing and the fused loss see nothing of it. Plain names are those
the model had before: what is handed to an engine or written to a folder is merged, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.config import LoraConfig
from paced_fast.errors import InputError

_ADAPTER = "default"
_BASE = ".base_layer"


def adapt(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
    """Freeze the model and give its linear layers trainable low-rank matrices that change nothing yet.

    Raises InputError when a target is none of the model's linear layers.
    """
    import peft

    everything = config.targets == ("all-linear",)
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    head = next(name for name, part in model.named_modules() if part is model.get_output_embeddings())
    for target in () if everything else config.targets:
        if target not in linear - {head.rpartition(".")[2]}:
            raise InputError(
                f"--lora.targets {target}: the model has linear layers {', '.join(sorted(linear - {head}))}: "
                "name some of them, or give all-linear (the output head stays as it is)"
            )
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear" if everything else list(config.targets),
        lora_dropout=0.0,  # log-probs of the same weights must be the same numbers twice
    )
    dtype = model.dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, model, _ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # float32 masters are the optimiser's affair, as for all others


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether the model has low-rank matrices beside its own."""
    return any(name.endswith(_BASE) for name, _ in model.named_modules())


def plain_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters with what was learned merged in, under the names the model had before, tied ones once.

    A merged one is made when it is asked for: who lets go of it before the next never holds two.
    """
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not _is_adapter(name):
            yield _plain(name), _merged(name, parameter, layers)


def plain_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """`state_dict()` of the model as it would be merged; what is merged lies on the host, the rest where it was."""
    layers = dict(model.named_modules())
    state = {}
    for name, tensor in model.state_dict().items():
        if not _is_adapter(name):
            merged = _merged(name, tensor, layers)
            state[_plain(name)] = tensor if merged is tensor else merged.cpu()
    return state


def adapter_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The low-rank matrices by name; none for a model without them."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if _is_adapter(name)}


@torch.no_grad()
def load_adapter_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Continue from `adapter_state()`. Raises InputError when it belongs to other settings."""
    own = adapter_state(model)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise InputError("the checkpoint's low-rank matrices belong to other --lora settings: give those of its run")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    return name.replace(f"{_BASE}.", ".")


@torch.no_grad()
def _merged(name: str, tensor: Tensor, layers: Mapping[str, Any]) -> Tensor:
    """The tensor, with its layer's product of low-rank matrices added where it is the weight of one that has them."""
    owner, found, kind = name.rpartition(f"{_BASE}.")
    if not found or kind != "weight":
        return tensor
    return tensor + layers[owner].get_delta_weight(_ADAPTER)

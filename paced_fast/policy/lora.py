"""LoRA: low-rank matrices beside frozen ones (arXiv:2106.09685), by PEFT, inside the model that is there.

The model keeps its class and its head, so sampling, packing and the fused loss need no change. Plain names are those of
the model without adapters: weights for an engine or a folder are merged, one parameter at a time.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paced_fast.config import LoraConfig
from paced_fast.errors import InputError
from paced_fast.policy.families import BROKEN

_ADAPTER = "default"
_BASE = "base_layer"


def adapt(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
    """Freeze the model and give its linear layers trainable low-rank matrices that change nothing yet.

    A matrix that a mixture keeps for all of its experts at once is a linear layer, too. Raises InputError when a target
    is none of the model's linear layers.
    """
    import peft

    layers, experts = _linear_layers(model), _expert_matrices(model)
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        uncalled = _uncalled(model, {*layers, *(name.rpartition(".")[0] for name in experts)})
        layers = [name for name in layers if name not in uncalled]
        experts = [name for name in experts if name.rpartition(".")[0] not in uncalled]
    read_inside = _read_by_kernels(model)
    layers = [name for name in layers if name not in read_inside]
    if not layers and not experts:
        raise InputError(
            f"--lora.rank {config.rank}: this {model.config.model_type} model has no linear layers except its "
            "output head: leave out --lora.rank, which trains the whole model"
        )
    if config.targets != ("all-linear",):
        named = {name.rpartition(".")[2] for name in (*layers, *experts)}
        for target in config.targets:
            if target not in named:
                raise InputError(
                    f"--lora.targets {target} is none of the layers that can have adapters: name some of "
                    f"{', '.join(sorted(named))}, or give all-linear (the output head is not adapted)"
                )
        layers, experts = (
            [name for name in names if name.rpartition(".")[2] in config.targets] for names in (layers, experts)
        )
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        # By whole names, and inside a module without settings: PEFT would give other targets to the mixtures it knows.
        target_modules=[f"model.{name}" for name in layers] or None,
        target_parameters=[f"model.{name}" for name in experts] or None,
        lora_dropout=0.0,  # log-probs of the same weights must be the same numbers twice
    )
    dtype = model.dtype
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # told of every layer of a GPT-2
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(options, torch.nn.ModuleDict({"model": model}), _ADAPTER)
        except ValueError as error:  # PEFT knows of layers that it cannot adapt
            reason = (str(error).strip().splitlines() or ["ValueError"])[0]
            raise InputError(f"--lora.targets: {reason}: name other layers") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # the optimiser keeps float32 masters, as for all parameters


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers but the output head, and but those that compute more than a product, as routers do."""
    head = model.get_output_embeddings()
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear | Conv1D) and _is_product(type(part)) and part is not head
    ]


@functools.cache
def _is_product(kind: type[torch.nn.Module]) -> bool:
    """Whether layers of this class give the product with their matrix, plus a bias: a small one is tried out."""
    if kind.forward in (torch.nn.Linear.forward, Conv1D.forward):
        return True
    layer: Any = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    weight, bias, given = (torch.arange(n, device="cpu") * 0.5 for n in (6.0, 2.0, 3.0))
    layer.in_features, layer.out_features, weight = 3, 2, weight.view(2, 3)
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    try:
        found = layer(given[None])
    except BROKEN:
        return False
    return isinstance(found, Tensor) and torch.equal(found, torch.nn.functional.linear(given[None], weight, bias))


@torch.no_grad()
def _uncalled(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Modules, of those given, that a forward pass does not call: code that reads their matrix directly would miss the
    adapter.

    Experts that are separate modules are left out, because they may be called for other tokens only.
    """
    called = set[str]()
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, part in model.named_modules()
        if name in names
    ]
    with torch.random.fork_rng():
        model.base_model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name for name in names - called if ".experts." not in name}


def _read_by_kernels(model: PreTrainedModel) -> set[str]:
    """Output layers of state-space mixers: their kernels on a GPU read the matrix, and would miss what is learned."""
    return {
        f"{name}.out_proj"
        for name, part in model.named_modules()
        if hasattr(part, "conv1d") and hasattr(part, "A_log") and hasattr(part, "D")
    }


def _expert_matrices(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold one matrix for each expert of a mixture."""
    return [
        f"{owner}.{name}"
        for owner, part in model.named_modules()
        if "expert" in f"{owner} {type(part).__name__}".lower() and not isinstance(part, torch.nn.Linear)
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model is a mixture whose experts are kept together."""
    return bool(_expert_matrices(model))


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether the model has low-rank matrices beside its own."""
    return any(name.rpartition(".")[2] == _BASE for name, _ in model.named_modules())


def plain_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters with what was learned merged in, under the names the model had before, tied ones once.

    A merged parameter is made when the iterator reaches it, so a caller that frees each one holds only one at a time.
    """
    learned = _learned(model)
    for name, parameter in model.named_parameters():
        if not _is_adapter(name):
            yield _plain(name), _merged(name, parameter, learned)


def plain_buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint has besides the parameters, such as the bias that balances the experts of a mixture."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield _plain(name), tensor


def plain_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """`state_dict()` of the model as it would be merged; what is merged lies on the host, the rest where it was."""
    learned = _learned(model)
    state = {}
    for name, tensor in model.state_dict().items():
        if not _is_adapter(name):
            merged = _merged(name, tensor, learned)
            state[_plain(name)] = tensor if merged is tensor else merged.cpu()
    return state


def plain_shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of `plain_state`, without merging anything."""
    return {_plain(name): tensor.shape for name, tensor in model.state_dict().items() if not _is_adapter(name)}


def adapter_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The low-rank matrices by name; none for a model without them."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if _is_adapter(name)}


@torch.no_grad()
def load_adapter_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Continue from `adapter_state()`. Raises InputError when it belongs to other settings."""
    own = adapter_state(model)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise InputError("the checkpoint's adapters belong to other --lora settings: give those of its run")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    """The name from before: PEFT puts a layer into another, and one with several matrices of experts into several."""
    return ".".join(part for part in name.split(".") if part != _BASE)


def _learned(model: torch.nn.Module) -> dict[str, Any]:
    """PEFT's layer by the name, as it is now, of the parameter that it adds its product of low-rank matrices to."""
    found = {}
    for name, part in model.named_modules():
        if _ADAPTER not in getattr(part, "lora_A", ()):
            continue
        path, inside = name, part
        while isinstance(layer := getattr(inside, _BASE, None), torch.nn.Module):
            path, inside = f"{path}.{_BASE}", layer
        found[f"{path}.{getattr(part, 'parameter_name', 'weight')}"] = part
    return found


@torch.no_grad()
def _merged(name: str, tensor: Tensor, learned: Mapping[str, Any]) -> Tensor:
    """The tensor, with the product of low-rank matrices added where it has some beside it."""
    return tensor + learned[name].get_delta_weight(_ADAPTER) if name in learned else tensor

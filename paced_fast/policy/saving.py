"""Save a policy as a Hugging Face folder, and read it back to verify it.

Weights are saved through an empty model of the same settings, not through the model that trains: it has the standard
names and no adapters, and no other thread computes with it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as version
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils.hub import cached_file

from paced_fast.config import ModelConfig
from paced_fast.data import hub
from paced_fast.errors import InputError
from paced_fast.policy.loading import load_model
from paced_fast.policy.lora import plain_shapes, plain_state

GENERATION = "generation_config.json"


class PolicyFiles:
    """Writes the weights of one model, as they are at the time, to folders; may be used beside training."""

    def __init__(self, model: PreTrainedModel, *, generation: bytes | None = None) -> None:
        """Prepare to write; nothing is written yet. `generation` is the content of the model's generation_config.json,
        kept to the byte.

        Raises InputError when the model, its adapters merged, has not the weights that its settings say.
        """
        self._empty = _empty_like(model)
        self._generation = generation
        if generation is None and model.can_generate():
            own = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
            self._generation = own.encode()
        self._empty.generation_config = GenerationConfig()  # the model's own need not pass the checks at saving
        self._check_names(plain_shapes(model))

    def _check_names(self, shapes: Mapping[str, torch.Size]) -> None:
        wanted = {name: tensor.shape for name, tensor in self._empty.state_dict().items()}
        wrong = sorted(
            {name for name, shape in wanted.items() if shapes.get(name) != shape} | (shapes.keys() - wanted.keys())
        )
        if wrong:
            raise InputError(
                f"this {self._empty.config.model_type} model cannot be saved: {wrong[0]} ({len(wrong)} such weights) "
                "differs in name or shape from a model made from its config.json: name other layers with "
                "--lora.targets, or use another model"
            )

    @torch.no_grad()
    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the weights `state`, by the names of `plain_state`, and settings to `folder`, and read the files back.

        Raises InputError, and leaves no folder, when they are not the same numbers; OSError or SafetensorError when the
        disk refuses.
        """
        self._check_names({name: tensor.shape for name, tensor in state.items()})
        empty = self._empty
        try:
            empty.load_state_dict(dict(state), assign=True)
            empty.save_pretrained(folder)
            self._compare(folder)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            empty.to("meta")  # pyright: ignore[reportArgumentType]
        (folder / GENERATION).unlink(missing_ok=True)
        if self._generation is not None:
            (folder / GENERATION).write_bytes(self._generation)

    def _compare(self, folder: Path) -> None:
        """Raises InputError unless the files hold what was to be written, by name, type and value."""
        weights = remove_tied_weights_from_state_dict(self._empty.state_dict(), self._empty)
        wanted = revert_weight_conversion(self._empty, weights)
        found: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    found.add(name)
                    if name not in wanted or not same(file.get_tensor(name), wanted[name]):
                        raise InputError(_differs(folder, name))
        if lost := sorted(wanted.keys() - found):
            raise InputError(_differs(folder, lost[0]))


class StoredNames:
    """The weights of a model as checkpoints have them: by other names, one matrix for each expert, and so on."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises InputError for a model of which several weights become one in a checkpoint."""
        self._empty = _empty_like(model)
        try:
            weights = remove_tied_weights_from_state_dict(self._empty.state_dict(), self._empty)
            whole = revert_weight_conversion(self._empty, dict(weights))
        except AttributeError as error:  # transformers below 5.19 and a buffer
            raise self._refusal(str(error)) from error
        single: dict[str, Tensor] = {}
        self._converted: set[str] = set()
        for name, tensor in weights.items():
            try:
                parts = revert_weight_conversion(self._empty, {name: tensor})
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise self._refusal(name) from error
            single |= parts
            if parts.keys() != {name}:
                self._converted.add(name)
        sizes, wanted = ({name: tensor.shape for name, tensor in each.items()} for each in (single, whole))
        if wrong := sorted(name for name in sizes.keys() | wanted.keys() if sizes.get(name) != wanted.get(name)):
            raise self._refusal(wrong[0])

    def _refusal(self, name: str) -> InputError:
        return InputError(
            f"--generator vllm: {name} of a {self._empty.config.model_type} model is stored together with other "
            "weights and cannot be passed to the engine alone: use --generator transformers"
        )

    def of(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """The weight `name` of the model by its names in a checkpoint, as views where possible."""
        if name not in self._converted:
            return [(name, tensor)]
        return revert_weight_conversion(self._empty, {name: tensor}).items()


def _empty_like(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same settings without weights, and with the names of the checkpoint the model came from."""
    settings = copy.deepcopy(model.config)
    settings._attn_implementation = "eager"  # not written, and known to every model
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = type(model)(settings)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        empty._weight_conversions = conversions
    return empty


def save_model(model: PreTrainedModel, folder: Path, *, generation: bytes | None = None) -> None:
    """Write the model as it is, its adapters merged, and load it back. Raises InputError, and leaves no folder, when
    what is loaded is not the same; not to be called beside training, because loading changes defaults of the process.
    """
    state = plain_state(model)
    PolicyFiles(model, generation=generation).write(folder, state)
    try:
        check_loads(folder, state, model.config)
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_loads(folder: Path, state: Mapping[str, Tensor], settings: PreTrainedConfig) -> None:
    """Raises InputError unless the model in `folder` loads with the weights `state`, to the bit, and the settings."""
    kind = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    try:
        loaded = load_model(
            ModelConfig(device="cpu", dtype="bfloat16" if kind == torch.bfloat16 else "float32"), str(folder)
        )
    except InputError as error:
        raise InputError(f"the model saved in {folder} cannot be read back, so it was removed: {error}") from error
    weights = loaded.state_dict()
    for name in sorted(state.keys() | weights.keys()):
        if name not in state or name not in weights or not same(weights[name], state[name]):
            raise InputError(_differs(folder, name))
    wanted, found = (_lasting(each.to_dict()) for each in (settings, loaded.config))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(_differs(folder, f"{name} of its config.json"))


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that determine how a model computes, without those of its origin or of how its weights are stored."""
    return {
        name: _lasting(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in ("_name_or_path", "architectures", "dtype", "transformers_version", "name_or_path")
    }


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same type, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def generation_settings(path: str) -> bytes | None:
    """The generation_config.json of a model's folder or id, as it is there; None where there is none."""
    place = hub.place_of(path, f"--model.name {path!r}")
    if Path(place).is_dir():
        file = Path(place) / GENERATION
    else:
        found = cached_file(
            place,
            GENERATION,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        file = Path(found) if found else Path()
    return file.read_bytes() if file.is_file() else None


def _differs(folder: Path, name: str) -> str:
    return (
        f"the model saved in {folder} differs from the policy in {name} when it is read back, so it was removed: "
        f"transformers {version} does not save this kind of model correctly; use another version or model"
    )

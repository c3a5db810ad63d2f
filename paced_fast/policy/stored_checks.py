"""Requirements on a stored model: a causal language model with all of its weights, as plain numbers.

No weight is read here. A folder is checked before it is loaded, so that errors name the file, and the result is checked
afterwards, because the loader initialises missing weights at random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from paced_fast.data.hub import pointer
from paced_fast.errors import InputError
from paced_fast.policy.shape import text_settings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_NUMBERS = {"F64", "F32", "F16", "BF16"}
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_layer": "PEFT",
    "base_model": "PEFT",
}
_OTHER_HEADS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice", "RewardModel")
_DECODERS_BY_NATURE = ("gpt_neox", "gpt_neox_japanese")
"""Have the setting `is_decoder`, and look back only whatever it says."""

_AGAIN = "download the model again"
_PLAIN = "training needs plain weights: give the model in bfloat16, or dequantise it, save that, and give the result"


def refused(path: str | Path, reason: str, remedy: str = "give a model folder or id") -> InputError:
    """The error, of one line, for a model that cannot be trained."""
    return InputError(f"--model.name {str(path)!r} cannot be loaded ({reason}): {remedy}")


def check_files(folder: Path) -> None:
    """Raises InputError for a folder that is no complete model in safetensors, naming what is wrong with it."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise refused(folder, "the folder is empty", "give a folder with a model")
    if "adapter_config.json" in names:
        raise refused(
            folder,
            "it holds adapters (adapter_config.json), not a whole model",
            "merge them with PEFT's merge_and_unload, save the whole model, and give its folder",
        )
    if "config.json" not in names:
        if found := sorted(name for name in names if name.endswith(".gguf")):
            raise refused(folder, f"its weights are quantised: {found[0]} is a GGUF file", _PLAIN)
        raise refused(folder, "it has no config.json", "give the folder of a Hugging Face model")
    if found := sorted(names.intersection(_QUANTISED_FILES)):
        raise refused(folder, f"its weights are quantised, according to {found[0]}", _PLAIN)
    for file in _weight_files(folder, names):
        _check_weights(folder, file)


def _weight_files(folder: Path, names: set[str]) -> list[Path]:
    """The files of the weights, all of them there."""
    if WEIGHTS in names:
        return [folder / WEIGHTS]
    if INDEX in names:
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise refused(folder, f"{INDEX} is {pointer(folder / INDEX) or 'not a valid index'}", _AGAIN) from error
        if absent:
            what = f"{len(absent)} of the {len(shards)} files in {INDEX} are missing, such as {absent[0]}"
            raise refused(folder, what, _AGAIN)
        return [folder / shard for shard in shards]
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise refused(
            folder,
            "its weights are pickled, and reading a pickle can run code",
            "load it with transformers, save it with save_pretrained, which writes safetensors, and give that folder",
        )
    raise refused(folder, f"it has no weights: neither {WEIGHTS} nor {INDEX}", "give the folder of a whole model")


def _check_weights(folder: Path, file: Path) -> None:
    """Raises InputError for a file whose header is none, that ends early, or whose numbers are not plain ones."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header: Any = json.loads(stream.read(length)) if 8 + length <= size else None
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            kinds = {name: entry["dtype"] for name, entry in entries.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise refused(folder, f"{file.name} is {pointer(file) or 'cut off or damaged'}", _AGAIN) from error
    if end != size:
        raise refused(folder, f"{file.name} has {size} bytes, but its header says {end}", _AGAIN)
    for name, kind in kinds.items():
        if name.endswith("weight") and kind not in _NUMBERS:
            raise refused(folder, f"its weights are quantised: {name} has dtype {kind}", _PLAIN)


def check_settings(settings: PreTrainedConfig, path: str) -> None:
    """Raises InputError for settings of quantised weights or of another kind of model."""
    if (method := quantisation(settings.to_dict())) is not None:
        raise refused(path, f"its weights are quantised with {method}", _PLAIN)
    if getattr(settings, "is_encoder_decoder", False):
        raise refused(path, f"{settings.model_type} is an encoder-decoder model", "give a decoder-only model")
    heads = getattr(settings, "architectures", None) or ()
    other = [name for name in heads if name.endswith(_OTHER_HEADS)]
    if other and len(other) == len(heads):
        raise refused(path, f"a {other[0]} does not generate text", "give a causal language model")
    if getattr(settings, "is_decoder", None) is False and settings.model_type not in _DECODERS_BY_NATURE:
        what = f"{settings.model_type} with is_decoder false is an encoder, whose tokens attend to later tokens"
        raise refused(path, what, "give a causal language model")


def quantisation(settings: Mapping[str, Any]) -> str | None:
    """Quantisation of the weights that the settings, or a part of them, declare; None for plain ones."""
    for name, value in settings.items():
        if not isinstance(value, Mapping):
            continue
        if name in ("quantization_config", "compression_config"):
            return str(value.get("quant_method") or value.get("quant_algo") or name)
        if (found := quantisation(value)) is not None:
            return found
    return None


def check_report(info: Mapping[str, Iterable[Any]], model: torch.nn.Module, path: str) -> list[str]:
    """Raises InputError unless every weight of the model came from its checkpoint; `info` is what the loader reports.

    Returns the names of weights that the checkpoint has and the model does not.
    """
    missing, unexpected = (sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys"))
    _check_wrappers(missing, unexpected, path)
    if missing:
        instead = f", and has {_some(unexpected)} instead" if unexpected else ""
        raise refused(
            path,
            f"it lacks {len(missing)} of {len(model.state_dict())} weights, {_some(missing)}{instead}",
            "give a complete causal language model, because missing weights are not initialised at random",
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise refused(
            path,
            f"{len(mismatched)} weights have other shapes than config.json says: {name} is {list(stored)} and should "
            f"be {list(wanted)}",
            "give a folder whose weights and config.json belong together",
        )
    known = {_without_numbers(name) for name in model.state_dict()}
    beyond = [name for name in unexpected if _without_numbers(name) in known]
    if beyond and not _guesses_ahead(model):
        raise refused(
            path,
            f"it has more layers than its config.json says, {_some(beyond)}",
            "give a folder whose weights and config.json belong together",
        )
    owners = {name for name, part in model.named_modules() if any(True for _ in part.parameters(recurse=False))}
    if changed := [name for name in unexpected if name.rpartition(".")[0] in owners]:
        raise refused(
            path,
            f"{_some(changed)}: the layer in its config.json has no such weight and would compute something else",
            "give a folder whose weights and config.json belong together",
        )
    return unexpected


def _without_numbers(name: str) -> str:
    return ".".join("0" if part.isdigit() else part for part in name.split("."))


def _guesses_ahead(model: torch.nn.Module) -> bool:
    """Whether checkpoints of the model have further layers that guess several tokens, which it leaves out."""
    return bool(getattr(text_settings(getattr(model, "config", None)), "num_nextn_predict_layers", 0))


def _check_wrappers(missing: list[str], unexpected: list[str], path: str) -> None:
    """Raises InputError where the missing weights are there by names that a wrapper around the model has left."""
    plain = set(missing)
    for name in unexpected:
        parts = name.split(".")
        wrappers = [part for part in parts if part in _WRAPPERS]
        bare = [part for part in parts if part not in _WRAPPERS]
        candidates = {".".join(bare[start:]) for start in range(min(2, len(bare)))}  # PEFT writes base_model.model.
        if wrappers and plain & candidates:
            raise refused(
                path,
                f"the names of its weights have the prefix of a wrapper: {name}, from {_WRAPPERS[wrappers[0]]}",
                "save the model inside the wrapper, or remove the prefix from the names",
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")

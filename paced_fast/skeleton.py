"""Models without their weights: a configuration, its sizes on the meta device, and one with random weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from paced_fast.config import ModelConfig
from paced_fast.data import hub
from paced_fast.errors import InputError
from paced_fast.policy.loading import tiny_settings
from paced_fast.policy.shape import KNOWN
from paced_fast.policy.stored import check_settings


def model_settings(config: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a model without its weights: `tiny`, a folder's, a cached one, a known one, or the hub's.

    `vocab_size` is that of `tiny`. Raises InputError when none of these has it, or when it is not of a model that can
    be trained.
    """
    if config.name == "tiny":
        return tiny_settings(config, vocab_size, stop_id=0, pad_id=0)
    if config.name in KNOWN:
        try:  # one that lies here may be newer than the table; the hub is not asked for what the table knows
            return AutoConfig.from_pretrained(config.name, local_files_only=True)
        except (OSError, ValueError):
            entry = dict(KNOWN[config.name])
            return AutoConfig.for_model(entry.pop("model_type"), **entry)
    place = hub.place_of(config.name, f"--model.name {config.name!r}")
    try:
        settings = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except hub.UNREADABLE as error:
        raise InputError(
            f"--model.name {config.name!r} has no configuration here ({hub.told(error)}): give a folder, or fetch it "
            "once"
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
            f"model.name: the configuration of type {settings.model_type} makes no model ({hub.told(error)}): give a "
            "causal language model, and a config.json that is right"
        ) from error


def random_model(config: ModelConfig, settings: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A model of these settings with fresh weights, made where `config` wants it."""
    with torch.random.fork_rng(), torch.device(config.device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.dtype))
    return model.eval()

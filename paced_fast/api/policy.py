"""The policy of a run folder, ready to generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paced_fast.config import Config
from paced_fast.config.saved import load_config
from paced_fast.data import prompts
from paced_fast.data.prompts.encoder import Encoder
from paced_fast.data.sources import BadRow
from paced_fast.errors import InputError
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.policy import load_model
from paced_fast.policy.loading import progress_bars_off
from paced_fast.run import checkpoint


def policy_folder(run: Path) -> Path:
    """The folder of the policy as it was last saved: the newest checkpoint's, or the one before training."""
    if any((run / "checkpoints").glob("step_*")):
        return checkpoint.policy_folder(run, None)
    return checkpoint.policy_folder(run, 0)


def load_policy(run: Path) -> PreTrainedModel:
    """Read the policy, on the device on which it was trained or else on the CPU."""
    settings = load_config(run).model
    if settings.device == "cuda" and not torch.cuda.is_available():
        settings = dataclasses.replace(settings, device="cpu")
    with progress_bars_off():
        return load_model(settings, str(policy_folder(run)))


def load_tokenizer(run: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of the policy."""
    return prompts.load_tokenizer(str(policy_folder(run)))


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, prompt: Any, sampling: Sampling
) -> Any:
    """Completions as `Result.generate` returns them.

    Raises:
        InputError: a prompt is no text or chat, or leaves no room for a completion.
    """
    if isinstance(prompt, str):
        return _shaped(_complete(model, tokenizer, config, [prompt], sampling)[0])
    items = list(prompt) if isinstance(prompt, Sequence) else []
    if items and all(isinstance(item, Mapping) for item in items):
        return _shaped(_complete(model, tokenizer, config, [items], sampling)[0])
    if not items or not all(isinstance(item, str) for item in items):
        raise InputError(f"the prompt is {prompt!r:.80}: give a text, a list of texts, or a list of messages")
    return [_shaped(group) for group in _complete(model, tokenizer, config, items, sampling)]


def _shaped(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    asked: Sequence[Any],
    sampling: Sampling,
) -> list[list[str]]:
    chat = prompts.ChatSettings.parsed(
        system_prompt=config.data.system_prompt, template_args=config.data.template_args, date=config.data.date
    )
    names = [f"prompt {i}" for i in range(len(asked))]
    encoded = Encoder(tokenizer, chat).encode(asked, config.data.template, names, refuse=_refuse)
    ids = [tuple(found) for found in encoded if found is not None]
    stops = prompts.find_stops(tokenizer, config.generation.stop_tokens, ())
    decode = prompts.Decoder(tokenizer, stops.ids, config.data.keep_special_tokens)
    generator = TransformersGenerator(
        model, stop_ids=stops.ids, max_batch_sequences=config.generation.batch_sequences()
    )
    texts = [decode(completion.token_ids) for completion in generator.generate(ids, sampling)]
    return [texts[i : i + sampling.samples] for i in range(0, len(texts), sampling.samples)]


def _refuse(bad: BadRow) -> None:
    raise InputError(str(bad)) from bad

"""A policy small enough for brute force, random rollouts for it, and settings by dotted name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from paced_fast.config import Config, ModelConfig
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.data import packing
from paced_fast.data.records import Completion, Rollouts
from paced_fast.policy import Policy, build_tiny

VOCAB = 11
STOP = 1
CPU = torch.device("cpu")


def model(*, seed: int = 0, sharpness: float = 8.0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Two layers of width 16; `sharpness` scales the head, so that the distribution is far from uniform."""
    config = ModelConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
    made = build_tiny(config, VOCAB, stop_id=STOP, pad_id=0, seed=seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(sharpness if "lm_head" not in name else 2 * sharpness)
    return made.to(dtype)


def biased() -> PreTrainedModel:
    """A model whose output layer has a bias, as large as its other logits."""
    settings = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=STOP,
    )
    made = PhiForCausalLM(settings).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20.0)
        made.lm_head.bias.normal_()
    return made


def policy(*, max_tokens: int = 4096, **options: Any) -> Policy:
    return Policy(model(**options), max_tokens=max_tokens)


def rollouts(
    lengths: Sequence[int],
    *,
    group_size: int = 1,
    prompt_lengths: Sequence[int] = (3, 5, 2),
    rewards: Sequence[float] | None = None,
    seed: int = 0,
) -> Rollouts:
    """Sequences of these lengths; every `group_size` of them share a prompt."""
    source = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=source).tolist()

    groups = -(-len(lengths) // group_size)
    prompts = [tuple([g % VOCAB, g // VOCAB, *ids(prompt_lengths[g % len(prompt_lengths)])]) for g in range(groups)]
    index = [i // group_size for i in range(len(lengths))]
    completions = [
        Completion(token_ids=ids(n), logprobs=torch.rand(n, generator=source).neg().tolist(), stopped=True)
        for n in lengths
    ]
    if rewards is None:
        rewards = torch.randint(0, 2, (len(lengths),), generator=source).float().tolist()
    return packing.pack(completions, [prompts[i] for i in index], index, rewards, 3, CPU)


def naive_hidden(made: PreTrainedModel, batch: Rollouts) -> Tensor:
    """States [T, H] from one forward pass per sequence, no packing, no padding."""
    parts = [torch.empty(0, made.config.hidden_size, dtype=made.dtype)]
    for prompt, tokens in zip(batch.prompt_ids, batch.token_ids.split(batch.lengths), strict=True):
        ids = torch.tensor([[*prompt, *tokens.tolist()]])
        states = made.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        parts.append(states[len(prompt) - 1 : len(prompt) - 1 + len(tokens)])
    return torch.cat(parts)


def naive_logprobs(made: PreTrainedModel, batch: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probs [T] by a full softmax on the states of `naive_hidden`; differentiable."""
    logits = made.get_output_embeddings()(naive_hidden(made, batch)) / temperature
    return logits.log_softmax(-1).gather(-1, batch.token_ids[:, None])[:, 0]


def gradients(made: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients by name; what has none counts as zero."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in made.named_parameters()
    }


def replaced(config: Config, **changes: Any) -> Config:
    """`config` with fields by dotted name, the dot written as two underscores."""
    for name, value in changes.items():
        config = _replaced(config, name.split("__"), value)
    return config


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def settings(algorithm: str = "paced", **changes: Any) -> Config:
    """The preset `tiny`, resolved for `algorithm`."""
    return resolve(replaced(preset("tiny"), algorithm=algorithm, **changes))

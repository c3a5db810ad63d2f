"""Tokens a second of our sampling through transformers beside `model.generate`, on the same weights and prompts.

Every completion has exactly `tokens` tokens: ours has no token that ends one, `generate` may not end before. Methods
alternate in one process; the seconds are the processor's, so that other work on the machine does not count.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from paced_fast.config import ModelConfig
from paced_fast.errors import InputError
from paced_fast.generation import Sampling, TransformersGenerator
from paced_fast.policy import build_tiny, smollm2_folder

LOG = logging.getLogger(__name__)
MODELS = ("tiny", "smollm2")
OURS, GENERATE = "paced_fast", "transformers generate"
TINY_VOCABULARY = 17


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare ways to sample completions."""

    models: tuple[str, ...] = MODELS
    """tiny, smollm2 or both."""
    prompts: int = 4
    """Prompts that are sampled together."""
    completions: int = 4
    """Completions per prompt."""
    prompt_tokens: int = 32
    """Tokens of every prompt."""
    tokens: int = 64
    """Tokens of every completion."""
    repeats: int = 3
    """Measured calls per method, after one to warm up."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of prompts and samples."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure every method with every model on the CPU, in float32."""
    del path
    for name in arguments.models:
        if name not in MODELS:
            raise InputError(f"--models {name!r}: give {' or '.join(MODELS)}")
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        rows = [row for name in arguments.models for row in _measured(name, arguments)]
    finally:
        torch.set_num_threads(before)
    print("\n".join(lines(rows)))
    return {"arguments": asdict(arguments), "rows": rows}


def _measured(name: str, arguments: Arguments) -> list[dict[str, Any]]:
    model = _model(name)
    source = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.prompts, arguments.prompt_tokens)
    ids = torch.randint(2, model.config.vocab_size, shape, generator=source)
    calls = {OURS: _ours(model, ids, arguments), GENERATE: _generate(model, ids, arguments)}
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    wanted = arguments.prompts * arguments.completions * arguments.tokens
    for turn in range(1 + arguments.repeats):
        for method, call in calls.items():
            began = time.process_time()
            sampled = call(turn)
            spent = time.process_time() - began
            assert sampled == wanted, (method, sampled, wanted)
            LOG.info("%s, %s: %.2f s", name, method, spent)
            if turn:
                seconds[method].append(spent)
    return [
        {
            "model": name,
            "method": method,
            "tokens": wanted,
            "cpu_seconds": statistics.median(found),
            "least_cpu_seconds": min(found),
            "largest_cpu_seconds": max(found),
            "tokens_per_cpu_second": wanted / statistics.median(found),
        }
        for method, found in seconds.items()
    ]


def _model(name: str) -> PreTrainedModel:
    if name == "tiny":
        return build_tiny(ModelConfig(), TINY_VOCABULARY, stop_id=1, pad_id=0, seed=0).eval()
    folder = smollm2_folder(Path.home() / ".cache" / "paced_fast")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _ours(model: PreTrainedModel, ids: Tensor, arguments: Arguments) -> Callable[[int], int]:
    generator = TransformersGenerator(model, stop_ids=[], max_batch_sequences=256)
    prompts = [tuple(row) for row in ids.tolist()]

    def call(turn: int) -> int:
        sampling = Sampling(
            samples=arguments.completions,
            max_completion_tokens=arguments.tokens,
            temperature=1.0,
            seed=arguments.seed + turn,
        )
        return sum(len(completion.token_ids) for completion in generator.generate(prompts, sampling))

    return call


def _generate(model: PreTrainedModel, ids: Tensor, arguments: Arguments) -> Callable[[int], int]:
    options: dict[str, Any] = {
        "min_new_tokens": arguments.tokens,
        "max_new_tokens": arguments.tokens,
        "pad_token_id": 0,
    }
    options |= {"do_sample": True, "top_k": 0, "num_return_sequences": arguments.completions}

    @torch.inference_mode()
    def call(turn: int) -> int:
        torch.manual_seed(arguments.seed + turn)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # pyright: ignore
        return found[:, ids.shape[1] :].numel()

    return call


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as text."""
    found = [f"{'model':<10}{'method':<24}{'tokens/s':>10}{'seconds':>10}"]
    for row in rows:
        rate, spent = row["tokens_per_cpu_second"], row["cpu_seconds"]
        found.append(f"{row['model']:<10}{row['method']:<24}{rate:>10,.0f}{spent:>10.2f}")
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Format the rows as Markdown, with ours against each other method of a model."""
    found = ["| model | method | tokens/s | seconds | ours in comparison |", "|---|---|---|---|---|"]
    ours = {row["model"]: row["tokens_per_cpu_second"] for row in result["rows"] if row["method"] == OURS}
    for row in result["rows"]:
        rate = row["tokens_per_cpu_second"]
        spread = f"({row['least_cpu_seconds']:.2f} to {row['largest_cpu_seconds']:.2f})"
        compared = "" if row["method"] == OURS else f"{ours[row['model']] / rate:.2f} x the speed"
        cells = [row["model"], row["method"], f"{rate:,.0f}", f"{row['cpu_seconds']:.2f} {spread}", compared]
        found.append(f"| {' | '.join(cells)} |")
    return found

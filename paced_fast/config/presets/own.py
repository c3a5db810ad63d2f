"""Preset of a model, data and reward of the user's own; nothing in it belongs to a demonstration."""

from __future__ import annotations

from paced_fast.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
)
from paced_fast.config.run import OWN


def own() -> Config:
    """Your own model and data: --model and --data, and --reward, --eval-data; device and data type fit the machine.

    No warm start. A prompt is written by the chat template of the tokenizer, if it has one.
    """
    return Config(
        preset=OWN,
        model=ModelConfig(name="", matmul_precision="auto"),
        data=DataConfig(template="auto", max_prompt_tokens=1024, too_long="skip"),
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=512),
        optimizer=OptimizerConfig(learning_rate=1e-6, decay="linear", micro_batch_tokens=8192),
        evaluation=EvaluationConfig(every=25, samples=4, final_samples=8),
    )

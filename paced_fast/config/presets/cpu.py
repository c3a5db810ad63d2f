"""Presets that train on a CPU in minutes."""

from __future__ import annotations

from paced_fast.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    WarmStartConfig,
    WarmStartPhase,
)


def tiny() -> Config:
    """Signed sums on a CPU: a 225k-parameter model learns to combine digits into a target, in minutes."""
    demonstrations = "task:signed_sums?split=demonstrations&size=60000"
    return Config(
        preset="tiny",
        steps=150,
        model=ModelConfig(name="tiny", device="cpu", dtype="float32"),
        data=DataConfig(
            train=("task:signed_sums?split=train&size=4000&seed=42",),
            eval=("task:signed_sums?split=eval",),
            headline=("k3", "k4", "k5", "k6"),
            max_prompt_tokens=12,
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=(f"{demonstrations}&seed=1",), steps=450, batch_size=256, learning_rate=2e-3, warmup_steps=30
            ),
            second=WarmStartPhase(
                sources=(f"{demonstrations}&seed=2&flip_probability=0.6",),
                steps=70,
                batch_size=256,
                learning_rate=1e-3,
                warmup_steps=10,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=32, group_size=4, max_completion_tokens=13),
        optimizer=OptimizerConfig(learning_rate=2e-4, decay="linear"),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
        run=RunConfig(threads=1),  # too small a model for two: they wait for each other, and for whatever else runs
    )

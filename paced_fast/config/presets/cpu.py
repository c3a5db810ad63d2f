"""Presets that train on a CPU in minutes."""

from __future__ import annotations

from paced_fast.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LogZConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    RunConfig,
    SchedulerConfig,
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
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=13),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
        run=RunConfig(threads=1),  # too small a model for two: they wait for each other, and for whatever else runs
    )


def smollm2() -> Config:
    """SmolLM2-135M on a CPU: sums and products in words, from easy ones to some far too hard for it.

    The raw model solves almost none of them. The warm start shows it answers, hardly any of them twice. No prompt is in
    two of the three splits.
    """
    return Config(
        preset="smollm2",
        steps=24,
        model=ModelConfig(name="smollm2", device="cpu", dtype="float32"),
        data=DataConfig(
            train=(
                *_sums("0.5:0.8", size=220),
                # Far too hard for this model: prompts for the scheduler to leave alone.
                "rg:products?size=30&seed=60000&min_digits=3&max_digits=4&slice=beyond&reward=number",
            ),
            eval=_sums("0.8:1", size=140),
            template="{prompt}\nAnswer: ",
            max_prompt_tokens=120,
            too_long="skip",
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=_sums("0:0.5", size=960, demonstration="@answer"),
                steps=60,
                batch_size=32,
                learning_rate=3e-4,
                warmup_steps=5,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=12),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=5, micro_batch_tokens=1024),
        # So few steps: the head makes more of each of them.
        log_z=LogZConfig(updates_per_step=8),
        scheduler=SchedulerConfig(warmup_steps=2),
        replay=ReplayConfig(insert_per_step=32, draw_per_step=16),
        evaluation=EvaluationConfig(every=12, samples=4, final_samples=8),
    )


_LEVELS = (
    # Far apart: reasoning-gym makes row i of seed s like row 0 of seed s + i.
    ("chain_sum?seed=10000&slice=three_digits&min_terms=3&max_terms=3&min_digits=1&max_digits=1", 1.0),
    ("chain_sum?seed=20000&slice=two_numbers&min_terms=2&max_terms=2&min_digits=2&max_digits=2", 1.0),
    ("chain_sum?seed=30000&slice=three_numbers&min_terms=3&max_terms=3&min_digits=2&max_digits=2", 1.0),
    ("chain_sum?seed=40000&slice=large_numbers&min_terms=2&max_terms=2&min_digits=3&max_digits=3", 1.0),
    ("products?seed=50000&slice=products&min_digits=1&max_digits=1", 0.4),  # there are few
)
"""Tasks of reasoning-gym from easy to hard, and their rows as a share of the first one's."""


def _sums(share: str, *, size: int, **more: str) -> tuple[str, ...]:
    """Sums of two and of three numbers and products; about `size` rows a level, of which the share is taken."""
    keys = "".join(f"&{key}={value}" for key, value in more.items())
    return tuple(f"rg:{level}&size={round(size * part)}&share={share}&reward=number{keys}" for level, part in _LEVELS)

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
        model=ModelConfig(name="tiny"),
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
    """SmolLM2-135M on a CPU: sums and one-step word problems; training finds out that writing the equation pays.

    The raw model solves almost none of them. The warm start shows word problems answered in two ways, by a bare number
    and by one line of arithmetic; only the second tends to be right. No prompt is in two of the three splits.
    """
    return Config(
        preset="smollm2",
        steps=24,
        model=ModelConfig(name="smollm2"),
        data=DataConfig(
            train=(
                *_word_problems("0.4:0.8"),
                *_sums("0.5:0.8", two=400, three=200, products=200),
                # Far too hard for this model: prompts for the scheduler to leave alone.
                "jsonl:gsm8k_train.jsonl?prompt=question&answer_after=####&reward=number&optional=true&rows=0:150",
            ),
            eval=(*_word_problems("0.8:1"), *_sums("0.8:1", two=150, three=150, products=150)),
            template="{prompt}\nAnswer: ",
            max_prompt_tokens=120,
            too_long="skip",
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=_sums("0:0.5", two=2000, three=800, products=1000, demonstration="@answer"),
                steps=30,
                batch_size=32,
                learning_rate=3e-4,
                warmup_steps=5,
            ),
            second=WarmStartPhase(
                sources=(
                    *_word_problems("0:0.4", demonstration="@equation"),
                    *_word_problems("0:0.3", demonstration="@answer"),
                    *_sums("0:0.5", two=100, three=50, products=50, demonstration="@answer"),
                ),
                steps=36,
                batch_size=32,
                learning_rate=2e-4,
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


def _sums(share: str, *, two: int, three: int, products: int, **more: str) -> tuple[str, ...]:
    """Sums of two and of three numbers and products, of one and two digits; sizes count before the share is taken."""
    keys = "".join(f"&{key}={value}" for key, value in more.items())
    numbers = f"min_digits=1&max_digits=2&reward=number&share={share}{keys}"
    return (
        f"rg:chain_sum?size={two}&seed=1&min_terms=2&max_terms=2&slice=two_terms&{numbers}",
        f"rg:chain_sum?size={three}&seed=2&min_terms=3&max_terms=3&slice=three_terms&{numbers}",
        f"rg:products?size={products}&seed=3&{numbers}",
    )


def _word_problems(share: str, **more: str) -> tuple[str, ...]:
    """Word problems of one step; the rows of addsub left out are mostly decimals."""
    keys = "".join(f"&{key}={value}" for key, value in more.items())
    fields = f"prompt=input&answer=target&reward=number&optional=true&share={share}{keys}"
    return (f"jsonl:mawps_singleop.jsonl?{fields}", f"jsonl:mawps_addsub.jsonl?rows=0:120&{fields}")

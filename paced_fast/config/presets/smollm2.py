"""Preset of a pretrained model on a CPU: SmolLM2-135M, sums, products, and lists of words and digits."""

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
    SchedulerConfig,
    WarmStartConfig,
    WarmStartPhase,
)
from paced_fast.config.presets.levels import Graded, Level, Task

_GRADED = Graded(
    tasks={
        "word_sequence_reversal": Task(keep="(?<=words: ).*", template="reverse {prompt}="),
        "word_sorting": Task(keep=r"(de|a)scending(?= order \()|(?<=separated list:) .*", template="sort {prompt}="),
        "spiral_matrix": Task(keep=r"[0-9](?=[ 0-9\n]*$)", template="spiral {prompt}="),
        "rotate_matrix": Task(keep=r"[0-9]+(?= degrees)| (?=degrees)|[0-9](?=[ 0-9\n]*$)", template="rotate {prompt}="),
        "chain_sum": Task(keep="[0-9+-]+", template="{prompt}=", reward="number"),
        "products": Task(keep=r"[0-9]+|\*", template="{prompt}=", reward="number"),
    },
    levels=(
        Level("word_sequence_reversal", "2words", 200, "min_words=2&max_words=2"),
        Level("spiral_matrix", "2x2", 200, "min_n=2&max_n=2"),
        Level("word_sequence_reversal", "3words", 50, "min_words=3&max_words=3", noise=0.04),
        Level("word_sequence_reversal", "4words", 50, "min_words=4&max_words=4", noise=0.05),
        Level("word_sorting", "2words", 50, "min_words=2&max_words=2", noise=0.04),
        Level("word_sorting", "3words", 50, "min_words=3&max_words=3", noise=0.04),
        Level("rotate_matrix", "2x2", 50, "min_n=2&max_n=2", noise=0.15),
        Level("chain_sum", "large", 130, "min_terms=4&max_terms=4&min_digits=4&max_digits=4", taught=False),
        Level("products", "large", 130, "min_terms=2&max_terms=2&min_digits=3&max_digits=4", taught=False),
        Level("chain_sum", "long", 130, "min_terms=5&max_terms=5&min_digits=3&max_digits=3", taught=False),
    ),
    held_out=28,
    demonstrations=700,
)


def smollm2() -> Config:
    """SmolLM2-135M on a CPU: sums, products, lists of words and digits, from easy ones to some far too hard for it.

    The raw model solves almost none of them. The first phase of the warm start teaches the tasks; the second shows
    answers with wrong characters in the harder levels, so that the policy knows more than it does reliably. The hardest
    levels are not taught. No prompt is in two of the three splits.
    """
    return Config(
        preset="smollm2",
        steps=32,
        model=ModelConfig(name="smollm2", device="cpu", dtype="float32"),
        data=DataConfig(
            train=_GRADED.train(),
            eval=_GRADED.eval(),
            headline=_GRADED.headline,
            max_prompt_tokens=48,
            too_long="skip",
            bad_rows="skip",
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(sources=_GRADED.taught(), steps=45, batch_size=32, learning_rate=3e-4, warmup_steps=5),
            second=WarmStartPhase(
                sources=_GRADED.taught(noisy=True), steps=15, batch_size=32, learning_rate=1e-4, warmup_steps=3
            ),
        ),
        generation=GenerationConfig(prompts_per_step=16, group_size=4, max_completion_tokens=14),
        optimizer=OptimizerConfig(learning_rate=4e-5, decay="linear", warmup_steps=5, micro_batch_tokens=1024),
        # So few steps: the head makes more of each of them.
        log_z=LogZConfig(updates_per_step=8),
        scheduler=SchedulerConfig(warmup_steps=2),
        replay=ReplayConfig(insert_per_step=32, draw_per_step=16),
        evaluation=EvaluationConfig(every=8, samples=4, final_samples=8),
    )

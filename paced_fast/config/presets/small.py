"""Preset of the middle scale: two million parameters and nine tasks of reasoning-gym, in minutes on a CPU."""

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
from paced_fast.config.presets.levels import Graded, Level, Task

_SORTED = "min_decimals=0&max_decimals=0&min_value=0&max_value=99"
_FILTERED = "max_decimals=0&min_value=0&max_value=99"

_GRADED = Graded(
    tasks={
        "spell_backward": Task(keep="(?<=: )[A-Za-z]+$", template="s{prompt}="),
        "palindrome_generation": Task(keep=r"[a-z](?=(?:, [a-z])*\s*$)", template="p{prompt}=", reward="reasoning_gym"),
        "spiral_matrix": Task(keep=r"[0-9](?=[ 0-9\n]*$)", template="m{prompt}="),
        "string_insertion": Task(keep=r"[A-E]+(?=\s*$)", template="i{prompt}="),
        "number_sorting": Task(
            keep=r"d(?=escending order:)|a(?=scending order:)|[0-9]+(?=\.0.*\nPlease)|,(?= [0-9].*\nPlease)",
            template="{prompt}=",
        ),
        "number_filtering": Task(keep="^[KR]|[ls](?=arger|maller)|-?[0-9]+| (?=in this|')", template="{prompt}="),
        "gcd": Task(keep="[0-9]+|(?<=[0-9],) ", template="g{prompt}="),
        "chain_sum": Task(keep="[0-9+-]+", template="{prompt}="),
        "count_bits": Task(keep=r"[0-9]+(?=\?)", template="b{prompt}="),
    },
    levels=(
        Level("spell_backward", "4letters", 450, "min_word_len=3&max_word_len=4"),
        Level("palindrome_generation", "4letters", 450, "min_length=3&max_length=4"),
        Level("spiral_matrix", "2x2", 450, "min_n=2&max_n=2"),
        Level("string_insertion", "6letters", 450, "min_string_length=5&max_string_length=6"),
        Level("string_insertion", "8letters", 190, "min_string_length=7&max_string_length=8", noise=0.15),
        Level("string_insertion", "12letters", 190, "min_string_length=9&max_string_length=12", noise=0.25),
        Level("spiral_matrix", "3x3", 190, "min_n=3&max_n=3", noise=0.25),
        Level("spell_backward", "6letters", 190, "min_word_len=5&max_word_len=6", noise=0.2),
        Level("spell_backward", "8letters", 190, "min_word_len=7&max_word_len=8", noise=0.25),
        Level("spell_backward", "10letters", 190, "min_word_len=9&max_word_len=10", noise=0.25),
        Level("palindrome_generation", "6letters", 190, "min_length=5&max_length=6", noise=0.2),
        Level("number_sorting", "2numbers", 190, f"min_numbers=2&max_numbers=2&{_SORTED}", noise=0.2),
        Level("number_filtering", "2numbers", 190, f"min_numbers=2&max_numbers=2&{_FILTERED}", noise=0.2),
        Level("gcd", "to99", 190, "min_value=10&max_value=99", noise=0.1),
        Level("count_bits", "to511", 110, "min_n=1&max_n=511", noise=0.1),
        Level("palindrome_generation", "9letters", 380, "min_length=7&max_length=9", taught=False),
        Level("palindrome_generation", "16letters", 380, "min_length=14&max_length=16", taught=False),
        Level("spiral_matrix", "4x4", 380, "min_n=4&max_n=4", taught=False),
        Level("string_insertion", "20letters", 380, "min_string_length=18&max_string_length=20", taught=False),
        Level("number_sorting", "3numbers", 380, f"min_numbers=3&max_numbers=3&{_SORTED}", taught=False),
        Level("number_filtering", "3numbers", 380, f"min_numbers=3&max_numbers=3&{_FILTERED}", taught=False),
        Level("chain_sum", "2digits", 380, "min_terms=2&max_terms=2&min_digits=2&max_digits=2", taught=False),
        Level("chain_sum", "4digits", 380, "min_terms=3&max_terms=3&min_digits=4&max_digits=4", taught=False),
    ),
    held_out=24,
    demonstrations=5000,
)
"""Easy levels, levels that are known and not done reliably, and levels that are far too hard; each kind a third of the
rows or more, as in a table that nobody has filtered."""


def small() -> Config:
    """Letters and numbers on a CPU: a 2.3M-parameter model, tasks of reasoning-gym of every difficulty.

    The first phase of the warm start teaches the tasks. The second shows answers with wrong characters, none in the
    easy levels and many in the harder ones, so that the policy knows more than it does reliably. The hardest levels are
    not taught.
    """
    return Config(
        preset="small",
        steps=150,
        model=ModelConfig(
            name="tiny", alphabet="ascii", hidden_size=192, intermediate_size=512, num_layers=5, num_heads=6
        ),
        data=DataConfig(
            train=_GRADED.train(),
            eval=_GRADED.eval(),
            headline=_GRADED.headline,
            max_prompt_tokens=64,
            bad_rows="skip",  # a few words have accents
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=_GRADED.taught(),
                steps=700,
                batch_size=64,
                learning_rate=1.5e-3,
                warmup_steps=60,
            ),
            second=WarmStartPhase(
                sources=_GRADED.taught(noisy=True),
                steps=100,
                batch_size=64,
                learning_rate=5e-4,
                warmup_steps=10,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=32, group_size=4, max_completion_tokens=32),
        optimizer=OptimizerConfig(learning_rate=4e-5, micro_batch_tokens=1024),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
        run=RunConfig(threads=1),
    )

"""Preset of the middle scale: two million parameters and a dozen tasks of reasoning-gym, in minutes on a CPU."""

from __future__ import annotations

from urllib.parse import quote

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

_TASKS = {
    # What of the question is kept, what tells the task to the policy, and how an answer is judged.
    "spell_backward": ("(?<=: )[A-Za-z]+$", "s{prompt}=", "exact"),
    "palindrome_generation": (r"[a-z](?=(?:, [a-z])*\s*$)", "p{prompt}=", "reasoning_gym"),
    "spiral_matrix": (r"[0-9](?=[ 0-9\n]*$)", "m{prompt}=", "exact"),
    "string_insertion": (r"[A-E]+(?=\s*$)", "i{prompt}=", "exact"),
    "word_sequence_reversal": (
        r"[^\s,:]+(?=(?:, [^\s,:]+)*\s*$)|,(?=(?: [^\s,:]+,)* [^\s,:]+\s*$)",
        "w{prompt}=",
        "exact",
    ),
    "number_sorting": (
        r"d(?=escending order:)|a(?=scending order:)|[0-9]+(?=\.0.*\nPlease)|,(?= [0-9].*\nPlease)",
        "{prompt}=",
        "exact",
    ),
    "number_filtering": (r"^[KR]|[ls](?=arger|maller)|-?[0-9]+| (?=in this|')", "{prompt}=", "exact"),
    "gcd": ("[0-9]+|(?<=[0-9],) ", "g{prompt}=", "exact"),
    "chain_sum": ("[0-9+-]+", "{prompt}=", "exact"),
    "count_bits": (r"[0-9]+(?=\?)", "b{prompt}=", "exact"),
    "number_sequence": ("-?[0-9]+|(?<=[0-9],) (?=[0-9-])", "n{prompt}=", "exact"),
}

_LEVELS = (
    # task, level, noise, rows to train on and to hold out as a share (fewer where few are different), parameters
    ("spell_backward", "5letters", 0.0, 1.0, "min_word_len=3&max_word_len=5"),
    ("spell_backward", "8letters", 0.04, 1.0, "min_word_len=7&max_word_len=8"),
    ("spell_backward", "10letters", 0.12, 1.0, "min_word_len=9&max_word_len=10"),
    ("palindrome_generation", "4letters", 0.0, 1.0, "min_length=3&max_length=4"),
    ("palindrome_generation", "6letters", 0.04, 1.0, "min_length=5&max_length=6"),
    ("palindrome_generation", "9letters", 0.1, 1.0, "min_length=7&max_length=9"),
    ("spiral_matrix", "2x2", 0.0, 1.0, "min_n=2&max_n=2"),
    ("spiral_matrix", "3x3", 0.12, 1.0, "min_n=3&max_n=3"),
    ("string_insertion", "6letters", 0.02, 1.0, "min_string_length=5&max_string_length=6"),
    ("string_insertion", "12letters", 0.12, 1.0, "min_string_length=9&max_string_length=12"),
    ("word_sequence_reversal", "2words", 0.06, 1.0, "min_words=2&max_words=2"),
    (
        "number_sorting",
        "2numbers",
        0.05,
        1.0,
        "min_numbers=2&max_numbers=2&min_decimals=0&max_decimals=0&min_value=0&max_value=99",
    ),
    (
        "number_sorting",
        "3numbers",
        0.1,
        1.0,
        "min_numbers=3&max_numbers=3&min_decimals=0&max_decimals=0&min_value=0&max_value=99",
    ),
    ("number_filtering", "2numbers", 0.05, 1.0, "min_numbers=2&max_numbers=2&max_decimals=0&min_value=0&max_value=99"),
    ("gcd", "to99", 0.05, 1.0, "min_value=10&max_value=99"),
    ("chain_sum", "1digit", 0.02, 0.3, "min_terms=2&max_terms=2&min_digits=1&max_digits=1"),
    ("chain_sum", "2digits", 0.1, 1.0, "min_terms=2&max_terms=2&min_digits=2&max_digits=2"),
    ("count_bits", "to511", 0.05, 0.6, "min_n=1&max_n=511"),
    ("number_sequence", "simple", 0.05, 0.8, "max_terms=5&min_value=0&max_value=20&max_complexity=1"),
)

_EASIEST = (("spell_backward", "5letters"), ("palindrome_generation", "4letters"))
"""Levels that the warm start teaches best; they show what reinforcement forgets."""


def small() -> Config:
    """Letters and numbers on a CPU: a 2.3M-parameter model, tasks of reasoning-gym of every difficulty.

    The first phase of the warm start teaches the tasks. The second shows answers with wrong characters, many in the
    hard levels and few in the easy ones, so that the policy knows more than it does reliably.
    """
    return Config(
        preset="small",
        steps=200,
        model=ModelConfig(
            name="tiny", alphabet="ascii", hidden_size=192, intermediate_size=512, num_layers=5, num_heads=6
        ),
        data=DataConfig(
            train=_sources("0.7:0.92", 900),
            eval=_sources("0.92:1", 300),
            headline=tuple(f"{task}_{level}" for task, level, *_ in _LEVELS if (task, level) not in _EASIEST),
            max_prompt_tokens=64,
            bad_rows="skip",  # a few words have accents
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=_sources("0:0.7", 5000, demonstrations=True),
                steps=700,
                batch_size=64,
                learning_rate=1.5e-3,
                warmup_steps=60,
            ),
            second=WarmStartPhase(
                sources=_sources("0:0.7", 5000, demonstrations=True, noisy=True),
                steps=100,
                batch_size=64,
                learning_rate=5e-4,
                warmup_steps=10,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=26),
        optimizer=OptimizerConfig(learning_rate=1e-4, micro_batch_tokens=1024),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
        run=RunConfig(threads=1),
    )


def _sources(share: str, rows: int, *, demonstrations: bool = False, noisy: bool = False) -> tuple[str, ...]:
    """About `share` of `rows` rows of a level; of demonstrations there are as many of every level."""
    sources: list[str] = []
    for number, (task, level, noise, part, parameters) in enumerate(_LEVELS, start=1):
        keep, template, reward = _TASKS[task]
        size = rows if demonstrations else round(rows * part)
        shown = f"&demonstration=@answer&noise={noise if noisy else 0}" if demonstrations else ""
        # Seeds far apart: reasoning-gym makes row i of seed s like row 0 of seed s + i.
        sources.append(
            f"rg:{task}?slice={task}_{level}&seed={number * 1_000_000}&size={size}&share={share}&{parameters}"
            f"&keep={quote(keep)}&template={template}&reward={reward}{shown}"
        )
    return tuple(sources)

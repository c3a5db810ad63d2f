"""Preset of the middle scale: two million parameters and nine tasks of reasoning-gym, in minutes on a CPU."""

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
    "number_sorting": (
        r"d(?=escending order:)|a(?=scending order:)|[0-9]+(?=\.0.*\nPlease)|,(?= [0-9].*\nPlease)",
        "{prompt}=",
        "exact",
    ),
    "number_filtering": (r"^[KR]|[ls](?=arger|maller)|-?[0-9]+| (?=in this|')", "{prompt}=", "exact"),
    "gcd": ("[0-9]+|(?<=[0-9],) ", "g{prompt}=", "exact"),
    "chain_sum": ("[0-9+-]+", "{prompt}=", "exact"),
    "count_bits": (r"[0-9]+(?=\?)", "b{prompt}=", "exact"),
}

_NOT_TAUGHT = None
_HELD_OUT, _HELD_OUT_FROM = 24, 0.92
_SORTED = "min_decimals=0&max_decimals=0&min_value=0&max_value=99"
_FILTERED = "max_decimals=0&min_value=0&max_value=99"
_LEVELS = (
    # task, level, noise of its demonstrations in the second phase, about how many rows to train on, parameters
    ("spell_backward", "4letters", 0.0, 450, "min_word_len=3&max_word_len=4"),
    ("palindrome_generation", "4letters", 0.0, 450, "min_length=3&max_length=4"),
    ("spiral_matrix", "2x2", 0.0, 450, "min_n=2&max_n=2"),
    ("string_insertion", "6letters", 0.0, 450, "min_string_length=5&max_string_length=6"),
    ("string_insertion", "8letters", 0.15, 190, "min_string_length=7&max_string_length=8"),
    ("string_insertion", "12letters", 0.25, 190, "min_string_length=9&max_string_length=12"),
    ("spiral_matrix", "3x3", 0.25, 190, "min_n=3&max_n=3"),
    ("spell_backward", "6letters", 0.2, 190, "min_word_len=5&max_word_len=6"),
    ("spell_backward", "8letters", 0.25, 190, "min_word_len=7&max_word_len=8"),
    ("spell_backward", "10letters", 0.25, 190, "min_word_len=9&max_word_len=10"),
    ("palindrome_generation", "6letters", 0.2, 190, "min_length=5&max_length=6"),
    ("number_sorting", "2numbers", 0.2, 190, f"min_numbers=2&max_numbers=2&{_SORTED}"),
    ("number_filtering", "2numbers", 0.2, 190, f"min_numbers=2&max_numbers=2&{_FILTERED}"),
    ("gcd", "to99", 0.1, 190, "min_value=10&max_value=99"),
    ("count_bits", "to511", 0.1, 110, "min_n=1&max_n=511"),
    ("palindrome_generation", "9letters", _NOT_TAUGHT, 380, "min_length=7&max_length=9"),
    ("palindrome_generation", "16letters", _NOT_TAUGHT, 380, "min_length=14&max_length=16"),
    ("spiral_matrix", "4x4", _NOT_TAUGHT, 380, "min_n=4&max_n=4"),
    ("string_insertion", "20letters", _NOT_TAUGHT, 380, "min_string_length=18&max_string_length=20"),
    ("number_sorting", "3numbers", _NOT_TAUGHT, 380, f"min_numbers=3&max_numbers=3&{_SORTED}"),
    ("number_filtering", "3numbers", _NOT_TAUGHT, 380, f"min_numbers=3&max_numbers=3&{_FILTERED}"),
    ("chain_sum", "2digits", _NOT_TAUGHT, 380, "min_terms=2&max_terms=2&min_digits=2&max_digits=2"),
    ("chain_sum", "4digits", _NOT_TAUGHT, 380, "min_terms=3&max_terms=3&min_digits=4&max_digits=4"),
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
            train=_sources("0.7:0.92"),
            eval=_sources("0.92:1"),
            headline=tuple(f"{task}_{level}" for task, level, noise, *_ in _LEVELS if noise),
            max_prompt_tokens=64,
            bad_rows="skip",  # a few words have accents
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=_sources("0:0.7", demonstrations=True),
                steps=700,
                batch_size=64,
                learning_rate=1.5e-3,
                warmup_steps=60,
            ),
            second=WarmStartPhase(
                sources=_sources("0:0.7", demonstrations=True, noisy=True),
                steps=100,
                batch_size=64,
                learning_rate=5e-4,
                warmup_steps=10,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=32),
        optimizer=OptimizerConfig(learning_rate=4e-5, micro_batch_tokens=1024),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
        run=RunConfig(threads=1),
    )


def _sources(share: str, *, demonstrations: bool = False, noisy: bool = False) -> tuple[str, ...]:
    """Rows of every level whose hash is in `share`; of demonstrations there are as many of every level that is taught.

    Held-out rows are few, because all of them are answered many times.
    """
    sources: list[str] = []
    low, high = map(float, share.split(":"))
    for number, (task, level, noise, rows, parameters) in enumerate(_LEVELS, start=1):
        keep, template, reward = _TASKS[task]
        if demonstrations and noise is _NOT_TAUGHT:
            continue
        wanted = rows if low < _HELD_OUT_FROM else _HELD_OUT if noise else _HELD_OUT // 2
        size = 5000 if demonstrations else round(wanted / (high - low))
        shown = f"&demonstration=@answer&noise={noise if noisy else 0}" if demonstrations else ""
        # Seeds far apart: reasoning-gym makes row i of seed s like row 0 of seed s + i.
        sources.append(
            f"rg:{task}?slice={task}_{level}&seed={number * 1_000_000}&size={size}&share={share}&{parameters}"
            f"&keep={quote(keep)}&template={template}&reward={reward}{shown}"
        )
    return tuple(sources)

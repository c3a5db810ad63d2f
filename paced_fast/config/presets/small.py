"""Preset of the middle scale: two million parameters and a dozen tasks of reasoning-gym, in minutes on a CPU."""

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

_TASKS = {
    # What of the question is kept, and what tells the task to the policy.
    "chain_sum": ("[0-9+-]+", "{prompt}="),
    "products": ("[0-9*]+", "{prompt}="),
    "basic_arithmetic": ("[0-9()*/+-]+", "{prompt}="),
    "simple_equations": (r"[0-9*=+-]+|(?<=\*)[a-z]", "{prompt}:"),
    "fraction_simplification": ("[0-9]+/[0-9]+", "{prompt}:"),
    "gcd": ("[0-9]+|(?<=[0-9],) ", "g{prompt}="),
    "lcm": ("[0-9]+|(?<=[0-9],) ", "l{prompt}="),
    "count_bits": (r"[0-9]+(?=\?)", "b{prompt}="),
    "count_primes": ("[0-9]+(?= and)|(?<=and )[0-9]+| (?=and)", "p{prompt}="),
    "number_sequence": ("-?[0-9]+|(?<=[0-9],) (?=[0-9-])", "n{prompt}="),
    "number_filtering": (r"^[KR]|[ls](?=arger|maller)|-?[0-9]+| (?=in this|')", "{prompt}="),
    "spell_backward": ("(?<=: )[A-Za-z]+$", "s{prompt}="),
}

_LEVELS = (
    # task, level, rows to train on and to hold out (fewer where few are different), parameters
    ("spell_backward", "5letters", 0.6, "min_word_len=4&max_word_len=5"),
    ("spell_backward", "7letters", 0.6, "min_word_len=6&max_word_len=7"),
    ("spell_backward", "10letters", 0.6, "min_word_len=8&max_word_len=10"),
    ("number_filtering", "2numbers", 1.5, "min_numbers=2&max_numbers=2&max_decimals=0&min_value=0&max_value=99"),
    ("number_filtering", "3numbers", 1.5, "min_numbers=3&max_numbers=3&max_decimals=0&min_value=0&max_value=99"),
    ("chain_sum", "1digit", 0.3, "min_terms=2&max_terms=2&min_digits=1&max_digits=1"),
    ("chain_sum", "2digits", 1.0, "min_terms=2&max_terms=2&min_digits=1&max_digits=2"),
    ("products", "1digit", 0.2, "min_digits=1&max_digits=1"),
    ("basic_arithmetic", "2terms", 1.0, "min_terms=2&max_terms=2&min_digits=1&max_digits=1&whitespace=no_space"),
    ("simple_equations", "to10", 1.2, "min_terms=2&max_terms=2&max_value=10"),
    ("gcd", "to30", 0.6, "min_value=2&max_value=30"),
    ("gcd", "to99", 1.2, "min_value=10&max_value=99"),
    ("lcm", "to20", 0.5, "min_value=2&max_value=20"),
    ("fraction_simplification", "to12", 0.5, 'max_value=12&max_factor=9&styles=["plain"]'),
    ("number_sequence", "simple", 0.8, "max_terms=5&min_value=0&max_value=20&max_complexity=1"),
    ("number_sequence", "composed", 0.8, "max_terms=6&min_value=0&max_value=20&max_complexity=2"),
    ("count_bits", "to511", 0.6, "min_n=1&max_n=511"),
    ("count_primes", "to50", 0.8, "max_n=50"),
)

_EASIEST = (("spell_backward", "5letters"), ("spell_backward", "7letters"))
"""Levels that the warm start teaches best; they show what reinforcement forgets."""


def small() -> Config:
    """Arithmetic, number theory and spelling on a CPU: a 2.3M-parameter model, problems of every difficulty."""
    return Config(
        preset="small",
        steps=200,
        model=ModelConfig(
            name="tiny", alphabet="ascii", hidden_size=192, intermediate_size=512, num_layers=5, num_heads=6
        ),
        data=DataConfig(
            train=_sources("0.7:0.92", 1100),
            eval=_sources("0.92:1", 300),
            headline=tuple(f"{task}_{level}" for task, level, *_ in _LEVELS if (task, level) not in _EASIEST),
            max_prompt_tokens=64,
        ),
        warm_start=WarmStartConfig(
            first=WarmStartPhase(
                sources=_sources("0:0.7", 5000, demonstrations=True),
                steps=900,
                batch_size=64,
                learning_rate=1.5e-3,
                warmup_steps=60,
            ),
        ),
        generation=GenerationConfig(prompts_per_step=16, group_size=8, max_completion_tokens=20),
        optimizer=OptimizerConfig(learning_rate=3e-5, micro_batch_tokens=1024),
        evaluation=EvaluationConfig(every=25, samples=8, final_samples=16),
        run=RunConfig(threads=1),
    )


def _sources(share: str, rows: int, *, demonstrations: bool = False) -> tuple[str, ...]:
    """About `share` of `rows` rows of a level; of demonstrations there are as many of every level."""
    sources: list[str] = []
    for number, (task, level, part, parameters) in enumerate(_LEVELS, start=1):
        keep, template = _TASKS[task]
        size = rows if demonstrations else round(rows * part)
        # Seeds far apart: reasoning-gym makes row i of seed s like row 0 of seed s + i.
        sources.append(
            f"rg:{task}?slice={task}_{level}&seed={number * 1_000_000}&size={size}&share={share}&{parameters}"
            f"&keep={keep}&template={template}&reward=exact{'&demonstration=@answer' if demonstrations else ''}"
        )
    return tuple(sources)

"""Benchmarks by name: sources of their prompts, and their reward functions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import util

from paced_fast.data.sources import find_file, looked_at, parse_source
from paced_fast.errors import InputError, nearest, pip_install

logger = logging.getLogger(__name__)

_PROBLEM = "prompt=problem&answer=answer&reward=math"
_QUESTION = "prompt=question&answer=answer&reward=math"
_GSM8K = "prompt=question&answer=answer&answer_after=####&reward=number"

BENCHMARKS: dict[str, tuple[str, str]] = {
    "gsm8k": (f"jsonl:gsm8k_test.jsonl?{_GSM8K}", f"hf:openai/gsm8k?config=main&split=test&{_GSM8K}"),
    "math500": (f"jsonl:math500.jsonl?{_PROBLEM}", f"hf:HuggingFaceH4/MATH-500?split=test&{_PROBLEM}"),
    "aime24": (f"jsonl:aime24.jsonl?{_PROBLEM}", f"hf:HuggingFaceH4/aime_2024?split=train&{_PROBLEM}"),
    "aime25": (f"jsonl:aime25.jsonl?{_PROBLEM}", f"hf:math-ai/aime25?split=test&{_PROBLEM}"),
    "amc23": (f"jsonl:amc23.jsonl?{_PROBLEM}", f"hf:math-ai/amc23?split=test&{_QUESTION}"),
}
"""The source of each benchmark as a file, and on the Hugging Face hub where that file is absent."""


def benchmark_sources(names: Sequence[str], data_dir: str | None) -> tuple[str, ...]:
    """One source for each benchmark, its slice named after it.

    Raises InputError for an unknown name (with the nearest), and for a file that is absent where the hub is no way out.
    """
    chosen: list[str] = []
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(
                f"unknown benchmark {name!r}{nearest(name, list(BENCHMARKS))}: the benchmarks are "
                f"{', '.join(BENCHMARKS)}; other prompts are given as in --data held_out.jsonl?reward=number"
            )
        file, hub = BENCHMARKS[name]
        source = parse_source(file)
        if find_file(source, data_dir) is not None:
            chosen.append(f"{file}&slice={name}")
            continue
        if util.find_spec("datasets") is None:
            raise InputError(
                f"benchmark {name}: no such file {source.name} (looked for {looked_at(source, data_dir)}): give its "
                f"folder by --data-dir, or {pip_install('data')} to read it from the Hugging Face hub"
            )
        logger.warning(
            "benchmark %s: no such file %s (looked for %s; --data-dir names its folder): reading %s instead",
            *(name, source.name, looked_at(source, data_dir), hub.partition("?")[0]),
        )
        chosen.append(f"{hub}&slice={name}")
    return tuple(chosen)

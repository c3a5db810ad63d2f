"""From the command line to a Config: `[PRESET] [--field.subfield value ...]`."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from paced_fast.config import Config, flatten
from paced_fast.errors import InputError
from paced_fast.presets import PRESETS, preset

T = TypeVar("T")


def parse(arguments: Sequence[str]) -> Config:
    """The settings that `arguments` ask for; `--help` prints every field with its sentence and exits.

    Raises InputError, in one line, for an unknown preset or option and for a value that does not fit.
    """
    words = list(arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    default = preset(name)
    known = {f"--{field.replace('_', '-')}" for field in flatten(default)}
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        plain = re.sub(r"(^--|\.)no-", r"\1", option)  # --run.no-report switches off --run.report
        if option.startswith("--") and option != "--help" and option not in known and plain not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            raise InputError(f"unknown option {word.partition('=')[0]}: {hint}")
    description = "Post-train a language model by PACED-RL. Presets: " + "; ".join(
        f"{key}: {(make.__doc__ or '').strip().splitlines()[0]}" for key, make in PRESETS.items()
    )
    prog = f"python -m paced_fast.train {name}"
    return read(words, lambda: tyro.cli(Config, args=words, default=default, prog=prog, description=description))


def read(words: Sequence[str], parse_words: Callable[[], T]) -> T:
    """What `parse_words` makes of the command line `words`; a complaint of tyro's becomes an InputError of one line."""
    complaint = io.StringIO()
    wants_help = "--help" in words or "-h" in words
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(complaint):
            return parse_words()
    except SystemExit as stop:
        if wants_help or stop.code == 0:
            raise
        raise InputError(_one_line(complaint.getvalue())) from None


def _one_line(boxed: str) -> str:
    """Tyro's complaint without its frame, whose upper edge holds a title."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]", " ", line).strip(" -+|") for line in boxed.splitlines()[1:]]
    words = re.sub(r"\s+", " ", " ".join(lines)).strip()
    return re.split(r" (?:Argument helptext|For full helptext)", words)[0]

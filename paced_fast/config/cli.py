"""From the command line to a Config: `[PRESET] [--field.subfield value ...]`."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import tyro

from paced_fast.config import Config, flatten
from paced_fast.config import modes as launch
from paced_fast.config.bounds import settings
from paced_fast.config.presets import PRESETS, preset
from paced_fast.config.resolve import check_value
from paced_fast.errors import InputError

T = TypeVar("T")


def parse(arguments: Sequence[str]) -> Config:
    """The settings that `arguments` ask for; `--help` prints every field with its sentence and exits.

    Raises InputError, in one line, for an unknown preset or option and for a value that does not fit.
    """
    words = list(arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    default = preset(name)
    _check_words(words, {f"--{field.replace('_', '-')}": field for field in flatten(default)})
    presets = "\n".join(f"  {key}  {(make.__doc__ or '').strip().splitlines()[0]}" for key, make in PRESETS.items())
    description = (
        f"Post-train a language model by PACED-RL.\n\nPresets, given as the first word (default: tiny):\n{presets}"
    )
    modes = "\n".join(f"  {option}  {words}" for option, words in launch.HELP.items())
    description += f"\n\nModes of the command, which are not settings and are not saved in the run folder:\n{modes}"
    prog = f"python -m paced_fast.train {name}"
    config = read(words, lambda: tyro.cli(Config, args=words, default=default, prog=prog, description=description))
    if config.preset != name:
        raise InputError(f"--preset {config.preset}: give the preset as the first word, before every option")
    return config


def _check_words(words: Sequence[str], known: Mapping[str, str]) -> None:
    """Raises InputError for the first option that is unknown, and for the first value that does not fit its own.

    Tyro would refuse both, but it says less: not which flag was handed a value, nor what was expected.
    """
    types = {name: setting.kind for name, setting in settings(Config).items()}
    for i, word in enumerate(words):
        if not word.startswith("--") or word == "--help":
            continue
        given, equals, value = word.partition("=")
        option = given.replace("_", "-")
        positive = re.sub(r"(^--|\.)no-", r"\1", option)  # --run.no-report switches off --run.report
        if option not in known and (positive not in known or types[known[positive]] is not bool):
            near = difflib.get_close_matches(option, [*launch.NAMES, *known], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists all options"
            raise InputError(f"unknown option {given}: {hint}")
        field = known.get(option) or known[positive]
        values = (
            [value] if equals else list(itertools.takewhile(lambda word: not word.startswith("--"), words[i + 1 :]))
        )
        _check_values(option, field, types[field], values)


def _check_values(option: str, field: str, kind: Any, values: Sequence[str]) -> None:
    if kind is bool:
        if values:
            off = "".join(option.rpartition(".")[:2]) + f"no-{option.rpartition('.')[2]}"
            raise InputError(f"{option} {values[0]!r}: a switch takes no value: give {option} or {off}")
        return
    is_many = typing.get_origin(kind) is tuple
    if not values and not is_many:
        raise InputError(f"{option} needs a value")
    for text in values if is_many else values[:1]:
        check_value(field, _value(option, typing.get_args(kind)[0] if is_many else kind, text))


def _value(option: str, kind: Any, text: str) -> Any:
    """The value that a text stands for. Raises InputError when it is none of that kind."""
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"{option} {text[:80]!r}: {hint}the choices are {', '.join(choices)}")
        return choices[text]
    if kind in (int, float):
        try:
            return kind(text)
        except (ValueError, OverflowError):
            wanted = "a whole number" if kind is int else "a number"
            raise InputError(f"{option} {text[:80]!r} is not {wanted}") from None
    return text


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

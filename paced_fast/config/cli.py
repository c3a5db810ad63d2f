"""From the command line to a Config: `[PRESET] [--field.subfield value ...]`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from paced_fast.config import Config, short_help
from paced_fast.config import modes as launch
from paced_fast.config.bounds import settings
from paced_fast.config.command import value_of
from paced_fast.config.files import SHORT, read_config
from paced_fast.config.foreign_names import counterpart, suggestion, unknown
from paced_fast.config.presets import BASES, known, preset
from paced_fast.config.resolve import check, check_files, check_value
from paced_fast.config.resuming import differences, remedy
from paced_fast.config.run import OWN
from paced_fast.config.saved import load_config
from paced_fast.errors import InputError

__all__ = ["check", "check_files", "parse"]

PROG = "paced-fast train"
_SHORT_OPTIONS = {f"--{name.replace('_', '-')}": f"--{full.replace('_', '-')}" for name, full in SHORT.items()}
_HELP = ("--help", "-h", "--help-all")


def parse(arguments: Sequence[str]) -> Config:
    """The settings that `arguments` ask for; `--help` prints those that most users change, `--help-all` every field
    with its sentence, and both exit.

    Raises InputError, in one line, for an unknown preset, for all unknown options, and for a value that does not fit.
    """
    words = [_full(word) for word in arguments]
    if set(_HELP).isdisjoint(words):
        _check_names(words)
    name = words.pop(0) if words and not words[0].startswith("-") else None
    if not set(_HELP).isdisjoint(words):
        return _help(words, preset(name or OWN))
    _check_preset_first(words)
    short = next((word.partition("=")[0] for word in arguments if _full(word) != word), None)
    default, words, resumed = _start(words, name, short)
    _check_words(words)
    config = _read(words, lambda: tyro.cli(Config, args=words, default=default, prog=PROG))
    if config.preset != default.preset:
        first = "the preset is the first word, before every option"
        if config.preset not in BASES:
            raise InputError(f"--preset {config.preset[:80]}: unknown preset: {known(config.preset)}; {first}")
        raise InputError(f"--preset {config.preset}: {first}, as in {PROG} {config.preset}")
    if resumed is not None and (changed := differences(default, config)):
        raise InputError(f"--resume {resumed}: {remedy(resumed, changed)}")
    return config


def _check_preset_first(words: Sequence[str]) -> None:
    """Raises InputError for the name of a preset behind options, where it is not the one value of one."""
    kinds = {f"--{name.replace('_', '-')}": setting.kind for name, setting in settings(Config).items()}
    for i, word in enumerate(words):
        if word not in BASES:
            continue
        option = next((j for j in reversed(range(i)) if words[j].startswith("--")), None)
        given, equals, _ = ("", "", "") if option is None else words[option].partition("=")
        kind = kinds.get(given.replace("_", "-"), str)
        takes = 0 if kind is bool or equals or typing.get_origin(kind) is tuple else 1  # of several none is a preset
        if option is None or i - option > takes:
            raise InputError(f"the preset {word} comes first, before every option: train {word} ...")


def _full(word: str) -> str:
    """The word with the long name of a setting for its short one."""
    given, equals, value = word.partition("=")
    return f"{_SHORT_OPTIONS.get(given.replace('_', '-'), given)}{equals}{value}"


def _help(words: Sequence[str], default: Config) -> Config:
    """Print help and exit."""
    if "--help-all" not in words:
        sys.stdout.write(short_help.text(default, PROG))
        raise SystemExit(0)
    presets = "\n".join(f"  {key}  {short_help.first_line(make)}" for key, make in BASES.items())
    description = (
        "Post-train a language model by PACED-RL.\n\nPresets, given as the first word (default: tiny, or own with "
        f"--model):\n{presets}"
    )
    modes = "\n".join(f"  {option}  {told}" for option, told in launch.HELP.items())
    description += f"\n\nModes of the command, which are not settings and are not saved in the run folder:\n{modes}"
    short = "\n".join(f"  {option}  stands for {full}" for option, full in _SHORT_OPTIONS.items())
    description += f"\n\nShort options:\n{short}"
    return tyro.cli(Config, args=["--help"], default=default, prog=PROG, description=description)


def _start(words: Sequence[str], name: str | None, short: str | None) -> tuple[Config, list[str], Path | None]:
    """The settings that a command begins with, the other words, and the folder of a run that it goes on with.

    They are those of the run in `--resume RUN_DIR`, of `--config FILE`, of the preset `name`, of `own` with a model, or
    of `tiny`, which no command means that has a `short` option.
    """
    file, rest = _take(words, "--config")
    resume = _value_of(rest, "--resume")
    folder = next((Path(one) for one in _values(rest, "--resume") if one not in ("", "never", "auto")), None)
    if (
        folder is None
        and resume == "auto"
        and name is None
        and file is None
        and _value_of(rest, "--model.name") is None
    ):
        given = _value_of(rest, "--run-dir")
        folder = Path(given) if given is not None and Path(given, "config.json").is_file() else None
    if folder is not None:
        if file is not None:
            raise InputError(f"--resume {folder} has its settings in its folder: leave --config out")
        _, rest = _take(rest, "--resume")
        saved = _saved(folder)
        if name not in (None, saved.preset):
            raise InputError(f"--resume {folder} is a run of the preset {saved.preset!r}: leave {name} out")
        return dataclasses.replace(saved, run_dir=str(folder.expanduser()), resume="auto"), rest, folder
    if file is not None:
        return read_config(Path(file).expanduser(), name), rest, None
    if name is None and _value_of(rest, "--model.name") is not None:
        name = OWN
    if name is None and short is not None:
        raise InputError(f"{short} is given without a model: give --model NAME, or a preset as the first word")
    return preset(name or "tiny"), rest, None


def _saved(folder: Path) -> Config:
    """The settings of a run folder given to --resume."""
    try:
        return load_config(folder.expanduser())
    except InputError as error:
        near = difflib.get_close_matches(str(folder), ("never", "auto"), n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "give a run folder, auto or never"
        raise InputError(f"--resume {str(folder)!r}: {hint} ({error})") from None


def _take(words: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, None where it is not given, and the words without both."""
    rest, found, left = [], None, list(words)
    while left:
        word = left.pop(0)
        given, equals, value = word.partition("=")
        if given.replace("_", "-") != option:
            rest.append(word)
            continue
        if found is not None:
            raise InputError(f"{option} is given twice: give it once")
        found = value if equals else left.pop(0) if left and not left[0].startswith("--") else ""
        if not found:
            raise InputError(f"{option} needs a value")
    return found, rest


def _values(words: Sequence[str], option: str) -> list[str]:
    """Every value of an option, "" for one that is missing."""
    found: list[str] = []
    for word, after in itertools.zip_longest(words, words[1:], fillvalue="--"):
        given, equals, value = word.partition("=")
        if given.replace("_", "-") == option:
            found.append(value if equals else "" if after.startswith("--") else after)
    return found


def _value_of(words: Sequence[str], option: str) -> str | None:
    """The value of an option that counts, which is the last; None where it is not given."""
    return next(reversed(_values(words, option)), None)


def _check_names(words: Sequence[str]) -> None:
    """Raises InputError for all options that are unknown, and settings as verl's command line has them,
    `trainer.nnodes=2`, each with what it is called here."""
    known = [f"--{field.replace('_', '-')}" for field in settings(Config)]
    names = [*launch.NAMES, *_SHORT_OPTIONS, *known]
    hints: dict[str, str] = {}
    for word in words:
        given, equals, _ = word.partition("=")
        if not word.startswith("--"):
            if (equals or word is words[0]) and not word.startswith("-") and counterpart(given) is not None:
                hints[given[:80]] = suggestion(given, ())
        elif given.replace("_", "-") != "--config" and _field(given) is None:
            hints[given[:80]] = suggestion(given.replace("_", "-"), names)
    if hints:
        options = any(name.startswith("--") for name in hints)
        raise InputError(unknown("option" if options else "setting", hints))


def _field(given: str) -> str | None:
    """The setting that an option stands for, as `--run.report` and `--run.no-report` for `run.report`; None of none."""
    option = given.replace("_", "-")
    positive = re.sub(r"(^--|\.)no-", r"\1", option)
    for field, setting in settings(Config).items():
        name = f"--{field.replace('_', '-')}"
        if name == option or (name == positive and setting.kind is bool):
            return field
    return None


def _check_words(words: Sequence[str]) -> None:
    """Raises InputError for the first value that does not fit its option.

    Tyro would refuse it too, but it says less: not which flag was handed a value, nor what was expected.
    """
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        given, equals, value = word.partition("=")
        field = _field(given)
        assert field is not None
        values = (
            [value] if equals else list(itertools.takewhile(lambda word: not word.startswith("--"), words[i + 1 :]))
        )
        _check_values(given.replace("_", "-"), field, settings(Config)[field].kind, values)


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
        check_value(field, value_of(option, typing.get_args(kind)[0] if is_many else kind, text))


def _read(words: Sequence[str], parse_words: Callable[[], Config]) -> Config:
    """What `parse_words` makes of the command line `words`; a complaint of tyro's becomes an InputError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse_words()
    except SystemExit:
        raise InputError(_one_line(complaint.getvalue())) from None


def _one_line(boxed: str) -> str:
    """Tyro's complaint without its frame, whose upper edge holds a title."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]", " ", line).strip(" -+|") for line in boxed.splitlines()[1:]]
    words = re.sub(r"\s+", " ", " ".join(lines)).strip()
    return re.split(r" (?:Argument helptext|For full helptext)", words)[0]

"""Command lines of the commands beside `train`: their fields are the options, the sentences below them the help."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from paced_fast.config.foreign_names import counterpart, unknown
from paced_fast.config.short_help import sentences_of, wrapped
from paced_fast.errors import InputError

T = TypeVar("T")

_NEAR = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What is told of a command beside its fields."""

    name: str
    """Word after `paced-fast`."""
    purpose: str
    words: Mapping[str, str]
    """Fields that are given by their place, in order, and how the help writes them."""
    examples: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Command lines, each with what it does."""
    metavars: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How the help writes the values of fields, where TEXT, N or X says too little."""
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Options that a user may expect, and the field each stands for; none is taken, all are led to the right one."""

    @property
    def prog(self) -> str:
        """How the command is called."""
        return f"paced-fast {self.name}"


def read(command: Command, kind: type[T], arguments: Sequence[str]) -> T:
    """The dataclass `kind` with the values that the words of a command line give; `--help` prints help and exits.

    A field is a text, a number, a choice, a switch, or a tuple of texts. Raises InputError, in one line, for all
    unknown options, a value that does not fit, a word too many and one that is missing.
    """
    if not {"--help", "-h"}.isdisjoint(arguments):
        sys.stdout.write(help_text(command, kind))
        raise SystemExit(0)
    kinds = typing.get_type_hints(kind)
    options = {f"--{name.replace('_', '-')}": name for name in kinds if name not in command.words}
    names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    hints = {name[:80]: _hint(command, option, options) for name in names if (option := _dashed(name)) not in options}
    if hints:
        raise InputError(unknown("option", hints))
    found: dict[str, Any] = {}
    placed: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            placed.append(word)
            continue
        given, equals, value = word.partition("=")
        option = _dashed(given)
        name = options[option]
        if name in found:
            raise InputError(f"{option} is given twice: give it once")
        found[name] = _taken(option, kinds[name], [value] if equals else None, left)
    return kind(**_by_place(command, kinds, placed), **found)


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _taken(option: str, kind: Any, value: Sequence[str] | None, left: list[str]) -> Any:
    """The value of an option, whose words are taken off `left` where they do not stand behind a `=`."""
    plain = _plain(kind)
    if plain is bool:
        if value is not None:
            raise InputError(f"{option} is a switch and takes no value: give {option} alone")
        return True
    is_many = typing.get_origin(plain) is tuple
    if value is None:
        value = list(itertools.takewhile(lambda word: not word.startswith("--"), left))
        value = value if is_many else value[:1]
        del left[: len(value)]
    if not value:
        raise InputError(f"{option} needs a value: --help says what it takes")
    return tuple(value) if is_many else value_of(option, plain, value[0])


def _by_place(command: Command, kinds: Mapping[str, Any], placed: Sequence[str]) -> dict[str, Any]:
    """The words without an option, by field; the last field takes all that are left if it is a tuple."""
    found: dict[str, Any] = {}
    left = list(placed)
    for name, shown in command.words.items():
        if not left:
            raise InputError(f"{shown.split()[0]} is missing: {usage(command)}; --help says more")
        is_many = typing.get_origin(kinds[name]) is tuple
        found[name] = tuple(left) if is_many else left[0]
        left = [] if is_many else left[1:]
    if left:
        raise InputError(f"unexpected word {left[0][:80]!r}: {usage(command)}; --help lists the options")
    return found


def value_of(option: str, kind: Any, text: str) -> Any:
    """The value that a text stands for. Raises InputError when it is none of that kind."""
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1, cutoff=_NEAR)
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


def usage(command: Command) -> str:
    """One line: how the command is called."""
    return f"{command.prog} {' '.join(command.words.values())} [--option value ...]"


def help_text(command: Command, kind: type[Any]) -> str:
    """The help: usage, purpose, examples, and each field with its default and the sentences below it."""
    sentences, kinds = sentences_of(kind), typing.get_type_hints(kind)
    lines = [f"usage: {usage(command)}", "", *wrapped(command.purpose, 0), ""]
    for name, shown in command.words.items():
        lines += [f"  {shown}", *wrapped(sentences[name])]
    if command.examples:
        lines += ["", "Examples:"]
    for example, told in command.examples.items():
        lines += [f"  {example}", *wrapped(told)]
    lines += ["", "Options:"]
    for field in dataclasses.fields(kind):
        if field.name not in command.words:
            option = f"--{field.name.replace('_', '-')}"
            is_told = field.default is None or field.default is False or field.default == ()  # in words, below
            default = "" if is_told else f"  (default: {field.default})"
            lines += [f"  {option}{_metavar(command, field.name, kinds[field.name])}{default}"]
            lines += wrapped(sentences[field.name])
    return "\n".join(lines) + "\n"


def _metavar(command: Command, name: str, kind: Any) -> str:
    plain = _plain(kind)
    if plain is bool:
        return ""
    is_many = typing.get_origin(plain) is tuple
    item = typing.get_args(plain)[0] if is_many else plain
    word = "|".join(map(str, typing.get_args(item))) if typing.get_origin(item) is Literal else ""
    word = command.metavars.get(name) or word or {int: "N", float: "X"}.get(item, "TEXT")
    return f" {word}{' ...' if is_many else ''}"


def _plain(kind: Any) -> Any:
    """The type of a field without its None."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    (plain,) = (one for one in typing.get_args(kind) if one is not type(None))
    return plain


def _hint(command: Command, option: str, options: Mapping[str, str]) -> str:
    """What to give in place of an unknown option: what it is called here, the nearest one, or where all are listed."""
    foreign = counterpart(option)
    words = [option, *(foreign.options if foreign is not None else ())]
    for word in (one.lstrip("-").rpartition(".")[2] for one in words):
        name = command.synonyms.get(word) or options.get(f"--{word}")
        if name is not None and name in command.words:
            return f"{command.words[name].split()[0]} is given without an option: {usage(command)}"
        if name is not None:
            return f"did you mean --{name.replace('_', '-')}?"
    near = difflib.get_close_matches(option, options, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean {near[0]}?"
    if foreign is not None and not foreign.options:
        return foreign.note
    return f"{command.prog} --help lists all options"

"""Command-line options from a frozen dataclass, using only the standard library.

Benchmarks also run where little is installed. The string under a field is its help; fields are str, int, float, bool,
`bool | None` (neither the flag nor its opposite) or tuple[str, ...]. `continue_` is the option `--continue`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from typing import TypeVar

Options = TypeVar("Options")


def parse(options: type[Options], words: Sequence[str], program: str) -> Options:
    """Parse `options` from the words of a command line; `--name value`, `--flag`, `--no-flag`, `--names a b c`."""
    description = inspect.cleandoc(options.__doc__ or "")
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    sentences = _sentences(options)
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        kind, name = kinds[field.name], "--" + field.name.rstrip("_").replace("_", "-")
        text = " ".join(sentences.get(field.name, "").split()).replace("%", "%%")
        shown = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        common = {"dest": field.name, "default": field.default, "help": f"{text} (default: {shown})"}
        if kind in (bool, bool | None):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        elif kind in (str, int, float):
            parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), **common)
        else:
            parser.add_argument(name, type=str, nargs="*", metavar="NAME", **common)
    values = vars(parser.parse_args(list(words)))
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _sentences(options: type) -> dict[str, str]:
    """Return the string under each field, read from the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(options))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[before.target.id] = str(after.value.value)
    return found

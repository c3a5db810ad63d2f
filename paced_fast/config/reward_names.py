"""Names of rewards, and what can be told of one before anything of a user's is run."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paced_fast.config import given
from paced_fast.config.reward_terms import parse_reward
from paced_fast.data.sources import MissingColumn
from paced_fast.errors import InputError, nearest

BUILT_IN = ("exact", "number", "math", "math_strict", "code", "reasoning_gym", "signed_sums")
"""Names of the rewards of this package."""
_HOSTS = ("verl:", "trl:")
_NAMES_AT_RUN_TIME = re.compile(r"import\s*\*|\b(globals|vars|setattr|exec|__getattr__|__dict__)\b")
"""What a file may give names to that it does not spell out."""


def check_name(name: str) -> None:
    """Raises InputError for the name of a reward that no function can have; of files only the names are looked at."""
    if name.startswith(given.REWARD):
        raise InputError(
            f"reward {name!r} is a function that was handed over from Python and is in no file: give it again "
            "(reward= of paced_fast.api), or put it into a file and name that, as in reward=file.py:function"
        )
    if name in BUILT_IN:
        return
    if name in _HOSTS:
        raise InputError(
            f"reward {name!r} names no function: give {name}package.module:function or {name}file.py:function"
        )
    if name.removesuffix(":").endswith(".py"):
        raise without_function(name, "reward")
    if ":" not in name:
        path, _, function = name.rpartition(".")
        path = f"{path.replace('.', '/')}.py"
        hint = f" (did you mean {path}:{function}?)" if function and _is_file(path) else nearest(name, BUILT_IN)
        raise InputError(
            f"unknown reward {name!r}{hint}: use one of {', '.join(BUILT_IN)}, "
            "package.module:function or path/to/file.py:function"
        )


def check_file(name: str) -> None:
    """Raises InputError for a sum with the name of a reward that no function can have, or whose file is absent or says
    nowhere that it has that function. The file is read, not run."""
    for term in parse_reward(name):
        check_name(term.name)
        plain = _plain(term.name)
        path, _, function = plain.rpartition(":")
        if not path.endswith(".py"):
            continue
        if not _is_file(path):
            raise no_file(f"reward {plain!r}", path)
        with contextlib.suppress(OSError):
            text = Path(path).expanduser().read_text(encoding="utf-8", errors="replace")
            if not re.search(rf"\b{re.escape(function)}\b", text) and not _NAMES_AT_RUN_TIME.search(text):
                raise no_function(f"reward {plain!r}", path, function)


def missing_column(name: str, columns: Mapping[str, Any]) -> MissingColumn | None:
    """The first parameter without a default that no column of a row fills, of the functions of a sum that a file
    defines in plain sight; what decorators, assignments and imports make of a function is not known without running it.
    """
    filled = {"prompts", "completions", *columns} - ({"answer"} if columns.get("answer") is None else set())
    for term in parse_reward(name):
        if term.name.startswith(_HOSTS):  # which have columns of their own
            continue
        path, _, function = term.name.rpartition(":")
        needed = _needed(path, function) if path.endswith(".py") else []
        lacks = [parameter for parameter in needed if parameter not in filled]
        if lacks:
            return MissingColumn(term.name, lacks[0])
    return None


def no_file(who: str, path: str) -> InputError:
    """The error for a file that is absent."""
    return InputError(f"{who}: no such file {str(Path(path).expanduser().absolute())!r}")


def no_function(who: str, module: str, function: str) -> InputError:
    """The error for a module or file without that function; it names those that a file has."""
    known = functions_in(module)
    hint = f"{nearest(function, known)}: it has {', '.join(known)}" if known else ""
    return InputError(f"{who}: {module} has no function {function!r}{hint}")


def without_function(name: str, kind: str) -> InputError:
    """The error for a file that is named without a function; it names those that the file has."""
    file = name.removesuffix(":")
    path = _plain(file)
    if not _is_file(path):
        return no_file(f"{kind} {name!r}", path)
    known = functions_in(path)
    told = f"the file has {', '.join(known)}" if known else "the file has no function yet"
    return InputError(f"{kind} {name!r} names no function: give {file}:{known[0] if known else 'FUNCTION'} ({told})")


def functions_in(path: str) -> list[str]:
    """Names of the functions of a file that do not begin with _, without running it; none for a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [one.name for one in _parsed(path).body if isinstance(one, kinds) and not one.name.startswith("_")]


def _plain(name: str) -> str:
    """The name without the host that the function was written for."""
    return name.removeprefix("verl:").removeprefix("trl:")


def _is_file(path: str) -> bool:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return Path(path).expanduser().is_file()
    return False


def _parsed(path: str) -> ast.Module:
    """The statements of a file; none where it cannot be read or is not Python, which running it will tell."""
    with contextlib.suppress(OSError, RuntimeError, ValueError, SyntaxError):
        return ast.parse(Path(path).expanduser().read_bytes())
    return ast.Module(body=[], type_ignores=[])


def _needed(path: str, function: str) -> list[str]:
    """The parameters without a default of a function that a file defines once and leaves as it is; none of others."""
    tree = _parsed(path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == function]
    if len(found) != 1 or found[0] not in tree.body or isinstance(found[0], ast.ClassDef) or found[0].decorator_list:
        return []
    if any(_changes(node, function) for node in ast.walk(tree)):
        return []
    given = found[0].args
    by_place = [*given.posonlyargs, *given.args]
    required = by_place[len(given.posonlyargs) : len(by_place) - len(given.defaults)]
    required += [one for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    return [one.arg for one in required]


def _changes(node: ast.AST, function: str) -> bool:
    """Whether a part of a file may give the name of a function to another object, or an attribute to the function."""
    if isinstance(node, ast.alias):
        return (node.asname or node.name) in (function, "*")
    if isinstance(node, ast.Attribute):
        return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == function
    return isinstance(node, ast.Name) and node.id == function and not isinstance(node.ctx, ast.Load)

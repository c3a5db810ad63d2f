"""Settings by name, as Python gives them, to a Config."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paced_fast.config import Config
from paced_fast.config.bounds import settings
from paced_fast.config.files import SHORT
from paced_fast.config.foreign_names import Counterpart, counterpart, unknown
from paced_fast.config.presets import preset
from paced_fast.config.saved import config_from_dict
from paced_fast.errors import InputError

_LISTS = re.compile(
    r"--(data|eval-data|benchmarks) (?:'([^']*)'|(FILE|(?=[^\s']*[.:/?=,]\w)[^\s']+?))(?=[,;.:]?(?:\s|$))"
)
"""Options whose values stand as those of an argument; other words may follow them in a sentence too."""
_NEAR = 0.8
"""Least similarity of a suggestion, as on the command line."""


def base(name: str | None = None) -> Config:
    """The settings that a run from Python begins with: of a preset by name, else nothing of a demonstration."""
    return preset("own" if name is None else name)


def with_settings(config: Config, given: Mapping[str, Any]) -> Config:
    """The configuration with settings by dotted or nested name, `{"optimizer.learning_rate": 1e-5}` or
    `{"optimizer": {"learning_rate": 1e-5}}`.

    Raises InputError for all that are no settings, with those that each may stand for, and for a value of the wrong
    kind.
    """
    known = settings(Config)
    raw = dataclasses.asdict(config)
    flat = _flat(given)
    if hints := {repr(name): _suggestion(name, list(known)) for name in flat if name not in known}:
        told = unknown("setting", hints).rstrip()
        raise InputError(f"{told}{'' if told[-1] in ':?.' else ':'} docs/settings.md lists all settings")
    for name, value in flat.items():
        *rooms, last = name.split(".")
        place = raw
        for room in rooms:
            place = place[room]
        is_many = getattr(known[name].kind, "__origin__", None) is tuple
        place[last] = _plain(value, is_many=is_many)
    return config_from_dict(Config, raw)


def _flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in given.items():
        full = prefix + str(name).replace("-", "_")
        flat.update(_flat(value, f"{full}.") if isinstance(value, Mapping) else {full: value})
    return flat


def _plain(value: Any, *, is_many: bool) -> Any:
    """The value as JSON has it: a path as text, a number of NumPy or PyTorch as one of Python."""
    if isinstance(value, Path):
        value = str(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if is_many and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _suggestion(name: str, known: list[str]) -> str:
    """What another trainer's option is called here, else settings of the same last name, else of a similar one."""
    last = name.rpartition(".")[2]
    foreign = foreign_option(name)
    if foreign is not None:
        options = " or ".join(repr(in_python(option)) for option in foreign.options)
        asks = f"did you mean {options}?" if options else ""
        return f"{asks} {in_python(foreign.note)}".strip()
    same = [full for full in known if full.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR) or [
        full
        for near in difflib.get_close_matches(last, [full.rpartition(".")[2] for full in known], n=1, cutoff=_NEAR)
        for full in known
        if full.rpartition(".")[2] == near
    ]
    found = sorted(same or close, key=lambda full: full.count("."))[:4]  # the outer rooms are the likelier
    return f"did you mean {' or '.join(map(repr, found))}?" if found else ""


def foreign_option(name: str) -> Counterpart | None:
    """What stands for another trainer's option, also inside a dictionary: `num_generations`, `optimizer.lr`, `lora.r`.

    None for a name that is in no other trainer.
    """
    names = (name, name.replace(".", "-"), name.rpartition(".")[2])
    return next((found for found in map(counterpart, names) if found is not None), None)


def in_python(message: str) -> str:
    """The message with the options of the command line written as the settings of `train` and the arguments of
    `evaluate`."""
    known = settings(Config)

    def spelled(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return name if name in known or name in SHORT else match[0]

    message = _LISTS.sub(lambda match: f"{match[1].replace('-', '_')}={(match[2] or match[3])!r}", message)
    message = re.sub(
        r"--resume ('[^']*'|\S+), which stands for all other options",
        lambda match: f"train(..., run_dir={match[1].strip(chr(39))!r}, resume=True)",
        message,
    )
    message = message.replace("--resume auto", "resume=True").replace("--run.overwrite", '{"run.overwrite": True}')
    return re.sub(r"--([a-z][a-z0-9_-]*(?:\.[a-z][a-z0-9_-]*)*)", spelled, message)

"""Configuration files: settings by name in TOML, YAML or JSON, and the config.json of a run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from paced_fast.config import Config, flatten
from paced_fast.config.bounds import settings
from paced_fast.config.foreign_names import suggestion, unknown
from paced_fast.config.presets import preset
from paced_fast.config.resolve import check_value
from paced_fast.config.run import OWN
from paced_fast.config.saved import config_from_dict, fits
from paced_fast.errors import InputError

SHORT = {"model": "model.name", "data": "data.train", "eval_data": "data.eval", "reward": "reward.name"}
"""Short names of the settings that every run of a user's own model has."""

_OF_A_RUN = {"preset", "run_dir", "resume", "model", "data", "warm_start", "run"}
"""Settings that every config.json of a run has, and hardly another file has together."""


def read_config(path: Path, name: str | None = None) -> Config:
    """The settings of a configuration file, on top of the preset `name`, or else of the preset that the file names.

    A file that names a model and no preset begins at `own`. The config.json of a run gives all of that run's settings
    but for its folder. Raises InputError for all settings that are unknown, and for the first that has no such value.
    """
    raw = _read(path)
    if raw.keys() >= _OF_A_RUN:
        if name not in (None, raw["preset"]):
            raise InputError(f"{path} holds the settings of a run of the preset {raw['preset']!r}: leave {name} out")
        try:
            return dataclasses.replace(config_from_dict(Config, raw), run_dir=None, resume="never")
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    hints: dict[str, str] = {}
    given = dict(_given(raw, path, hints))
    if hints:
        raise InputError(f"{path}: {unknown('setting', hints)}")
    named = given.pop("preset", None)
    if named is not None and not isinstance(named, str):
        raise InputError(f"{path}: preset is {json.dumps(named)[:80]}, not the name of a preset")
    if name is not None and named not in (None, name):
        raise InputError(f"{path} names the preset {named!r}, and the command names {name!r}: leave one out")
    base = name or named or (OWN if "model.name" in given else None)
    if base is None:
        raise InputError(f"{path} names neither a model nor a preset: add model, or preset")
    return replaced(preset(base), {key: _value(key, value, path) for key, value in given.items()})


def replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """The settings with those changed that `changes` has by dotted name."""
    own: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    own |= {name: replaced(getattr(config, name), part) for name, part in inside.items()}
    return dataclasses.replace(config, **own)


def write_config(config: Config, path: Path) -> None:
    """Write the preset and every setting that differs from it, as TOML, YAML or JSON by the ending of the name."""
    base = flatten(preset(config.preset))
    changed = {name: value for name, value in flatten(config).items() if value != base[name]}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    nested: dict[str, Any] = {"preset": config.preset}
    for name, value in lists.items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    kind = _kind(path, "--save-config")
    if kind == "toml":
        text = "\n".join(_toml(nested)) + "\n"
    elif kind == "json":
        text = json.dumps(nested, indent=2) + "\n"
    else:
        import yaml

        text = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--save-config {path} cannot be written ({error.strerror}): give another place") from error


def _kind(path: Path, option: str) -> str:
    kind = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{option} {path}: the ending must be .toml, .yaml, .yml or .json")
    return kind


def _read(path: Path) -> dict[str, Any]:
    kind = _kind(path, "--config")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"--config {path} cannot be read ({reason}): give a file in TOML, YAML or JSON") from error
    try:
        if kind == "toml":
            raw: Any = tomllib.loads(text)
        elif kind == "json":
            raw = json.loads(text)
        else:
            raw = _yaml(text)
    except ValueError as error:
        raise InputError(f"--config {path} is not {kind.upper()}: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"--config {path} holds no settings by name, such as steps = 100")
    return raw


def _yaml(text: str) -> Any:
    import yaml  # only where a file is YAML

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _given(raw: Mapping[Any, Any], path: Path, hints: dict[str, str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name with their values as the file has them; unknown names go into `hints`, each with its."""
    known = settings(Config)
    groups = {name.rpartition(".")[0] for name in known} | {"warm_start"}
    for key, value in raw.items():
        full = f"{prefix}{key}".replace("-", "_")
        if not prefix and full in SHORT and not isinstance(value, Mapping):
            full = SHORT[full]
        if full in known:
            yield full, value
        elif full in groups and isinstance(value, Mapping):
            yield from _given(value, path, hints, f"{full}.")
        elif full in groups:
            raise InputError(f"{path}: {full} is {json.dumps(value, default=str)[:80]}, not a table of settings")
        else:
            options = [f"--{name.replace('_', '-')}" for name in (*SHORT, *known)]
            hint = suggestion(f"--{full.replace('_', '-')}", options)
            hints[full[:80]] = "docs/settings.md lists all settings" if "--help-all" in hint else hint


def _value(name: str, value: Any, path: Path) -> Any:
    """The value of a setting as its type wants it. Raises InputError for one that is none."""
    kind = settings(Config)[name].kind
    is_many = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if is_many else kind
    if is_many:
        values = value if isinstance(value, list) else [value]
        found: Any = tuple(_plain(one, item) for one in values)
    else:
        found = _plain(value, kind)
    if not fits(found, kind):
        wanted = " or ".join(map(str, typing.get_args(item))) if typing.get_origin(item) is Literal else _words(item)
        raise InputError(
            f"{path}: {name} is {json.dumps(value, default=str)[:80]}: give {'a list of ' * is_many}{wanted}"
        )
    try:
        check_value(name, found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return found


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def _plain(value: Any, kind: Any) -> Any:
    """A value as the file's format may have mistaken it: in YAML, 1e-6 is a text and on a truth value."""
    if typing.get_origin(kind) is Literal and isinstance(value, bool):
        return "on" if value else "off"
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value


def _toml(nested: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in nested.items():
        if not isinstance(value, Mapping) and value is not None:  # None is what a setting is without a word about it
            yield f"{name} = {_toml_value(value)}"
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield ""
            yield f"[{prefix}{name}]"
            yield from _toml(value, f"{prefix}{name}.")


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):  # the escapes of JSON are those of TOML, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value)

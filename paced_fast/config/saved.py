"""A configuration read back from a run folder."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

from paced_fast.config import Config
from paced_fast.errors import InputError

_BEFORE = {"log_z.memory": "off", "model.device": "cpu", "model.dtype": "float32"}
"""Settings that older run folders lack, with the value that those runs had; for all others that is the default."""


def config_from_dict(kind: Any, raw: Any, name: str = "") -> Any:
    """Rebuild a settings dataclass from `dataclasses.asdict` gone through JSON; an absent setting has its default.

    `name` is that of the setting that `raw` is, "" for all of them. Raises InputError for the first value of the wrong
    kind.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{name or 'the content'} is {json.dumps(raw)[:80]}, not an object of settings")
    values: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(kind).items():
        full = f"{name}.{key}".lstrip(".")
        if key not in raw and full not in _BEFORE:
            continue
        value = raw[key] if key in raw else _BEFORE[full]
        if isinstance(value, bool) and {"on", "off"} <= set(typing.get_args(hint)):
            value = "on" if value else "off"  # a switch, before it had a third value
        if dataclasses.is_dataclass(hint):
            value = config_from_dict(hint, value, full)
        elif not fits(value, hint):
            if typing.get_origin(hint) is Literal:
                choices = ", ".join(map(str, typing.get_args(hint)))
                raise InputError(f"{full} is {json.dumps(value)[:80]}, not one of {choices}")
            wanted = str(getattr(hint, "__name__", hint)) if isinstance(hint, type) else str(hint)
            raise InputError(f"{full} is {json.dumps(value)[:80]}, not {wanted.removeprefix('typing.')}")
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the kind that a setting's annotation says."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in parts and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    if parts:  # a union
        return any(fits(value, part) for part in parts)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def load_config(run_dir: Path) -> Config:
    """The resolved settings of a run. Raises InputError when the folder holds none, or what are none."""
    return parse_config(run_dir, read_settings(run_dir))


def parse_config(run_dir: Path, raw: dict[str, Any]) -> Config:
    """The settings in `raw`, which `read_settings` read. Raises InputError for those of a model, and for the first that
    is none."""
    if "model_type" in raw or "architectures" in raw:
        raise InputError(f"{run_dir} is the folder of a model, not of a run")
    try:
        return config_from_dict(Config, raw)
    except InputError as error:
        raise InputError(f"{run_dir / 'config.json'}: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The JSON object in the folder's config.json. Raises InputError when it cannot be read or is none."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{folder} is not a run folder: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} is a JSON {type(raw).__name__}, not an object of settings")
    return raw

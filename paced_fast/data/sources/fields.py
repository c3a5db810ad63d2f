"""Fields of a row by their names, and what to say of one that is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paced_fast.data.sources.faults import BadRow


def find_field(data: Mapping[str, Any], name: str) -> Any:
    """The field `name`, which may be dotted, where a number stands for an item of a list; None when there is none."""
    value: Any = data.get(name)
    if value is None:
        value = data
        for part in name.split("."):
            if isinstance(value, Mapping):
                value = value.get(part)
            else:
                is_place = isinstance(value, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(value)
                value = value[int(part)] if is_place else None
    return value


def lookup(data: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    """The value of the field `name`. Raises BadRow when the row `where` has none; `key` of a source names another."""
    value = find_field(data, name)
    if value is None:
        cure = "mend the row, or give --data.bad-rows skip" if name in data else f"name another, as in {key}=FIELD"
        raise BadRow(f"{where} has {lack_of(data, name)}: {cure}")
    return value


def lack_of(row: Mapping[str, Any], name: str) -> str:
    """What a row has instead of a value in the field `name`."""
    if name in row:
        return f"nothing in its field {name!r}"
    return f"no field {name!r}, only {', '.join(map(str, row))}"

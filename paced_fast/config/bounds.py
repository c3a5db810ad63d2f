"""Bounds of settings, written beside their fields: `steps: Annotated[int, Bounds(0, 10**9)] = 150`."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from typing import Annotated, Any, NamedTuple

from paced_fast.errors import InputError


class Bounds(NamedTuple):
    """Least and greatest value of a number, both included.

    What is counted is bounded far above any use, so that a slip of the keyboard is not taken for a wish.
    """

    low: float
    high: float


MAY_BE_EMPTY = "may be empty"
"""Beside a text that may be empty; no other may."""


class Setting(NamedTuple):
    """Type of a setting and what its value is checked against."""

    kind: Any
    bounds: Bounds | None
    may_be_empty: bool

    def check(self, option: str, value: Any) -> None:
        """Raises InputError, naming the `option`, when `value` is out of bounds or an empty text."""
        if self.bounds is not None:
            low, high = self.bounds
            if not low <= value <= high:  # a NaN fails every comparison, so it ends here too
                wanted = f"{low:g} or more" if high == math.inf else f"a value from {low:g} to {high:g}"
                raise InputError(f"{option} is {value}: give {wanted}")
        if self.may_be_empty:
            return
        if any(isinstance(text, str) and not text.strip() for text in (value if isinstance(value, tuple) else [value])):
            raise InputError(f"{option} is empty: give a value, or leave it out")


@functools.cache
def settings(group: Any, prefix: str = "") -> dict[str, Setting]:
    """Every setting of a dataclass by dotted name, those of the dataclasses inside it too."""
    found: dict[str, Setting] = {}
    for name, hint in typing.get_type_hints(group, include_extras=True).items():
        kind, *beside = typing.get_args(hint) if typing.get_origin(hint) is Annotated else [hint]
        if dataclasses.is_dataclass(kind):
            found.update(settings(kind, f"{prefix}{name}."))
        else:
            bounds = next((one for one in beside if isinstance(one, Bounds)), None)
            found[f"{prefix}{name}"] = Setting(kind, bounds, MAY_BE_EMPTY in beside)
    return found

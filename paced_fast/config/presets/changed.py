"""Settings of a run that differ from those of its preset."""

from __future__ import annotations

from collections.abc import Mapping

from paced_fast.config import flatten
from paced_fast.config.given import in_words
from paced_fast.config.presets import BASES
from paced_fast.config.resuming import OF_THE_START

Changes = dict[str, tuple[object, object]]
"""(value of the preset, value of the run) by dotted name."""


_DECIDED = ("data.date", "log_z.updates_per_step")
"""Settings of which another value than `auto` leaves the choice to the run."""


def changed_settings(config: Mapping[str, object]) -> tuple[Changes, Changes]:
    """Return the settings that the user changed, and those that the preset leaves to the algorithm or the machine.

    `config` has dotted names, as `flatten` makes them or as config.json holds them; what Python handed over stands in
    words. How the run was started is left out. Both are empty for settings of a preset that this version does not know.
    """
    preset = config.get("preset")
    if not isinstance(preset, str) or preset not in BASES:
        return {}, {}
    changed: Changes = {}
    decided: Changes = {}
    for name, default in flatten(BASES[preset]()).items():
        if name in config and name not in OF_THE_START and _plain(config[name]) != _plain(default):
            found = decided if default in ("auto", ("auto",)) or name in _DECIDED else changed
            found[name] = (_plain(default), in_words(_plain(config[name])))
    return changed, decided


def _plain(value: object) -> object:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value

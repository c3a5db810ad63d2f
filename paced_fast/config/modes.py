"""What a command does beside training by its settings: plan, measure or replay; no run folder keeps any of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paced_fast.errors import InputError

HELP = {
    "--config FILE": "take settings from FILE (TOML, YAML, or the config.json of a run); options override them",
    "--save-config FILE": "write the settings that differ from the preset to FILE (.toml, .yaml or .json), then exit",
    "--check": "read the data, show the first row of every source as the model will see it, with its expected answer "
    "and what the reward gives for that answer, then exit",
    "--dry-run [RANKS]": "print settings, memory plan and estimated time for RANKS processes (default: as many as "
    "torchrun started, or 1), then exit",
    "--dry-run-device NAME": "plan for this device: h100, h200, a100, l40s, 4090 or cpu; default: this machine's",
    "--dry-run-nodes NODES": "plan for NODES machines; default: one per 8 processes",
    "--bench [STEPS]": "time STEPS training steps (default: 5) on random rollouts, without generation, rewards, "
    "weights or data; several processes replicate the parameters",
    "--bench-lengths full|even": "full: every completion has the maximum length; even: lengths drawn uniformly from 1 "
    "to the maximum; default: full",
    "--bench-json FILE": "also write the measurements to FILE",
    "--replay-rollouts FILE": "train on the rollouts in FILE, written by a run with --run.save-rollouts, and sample "
    "none",
}
"""Options and what they do, for `--help`."""

_NOT_TAKEN = ("--config",)
"""Options that decide which settings a command begins with; `cli.parse` reads them."""
_BARE = ("--check",)
"""Options without a value."""
_SWITCHES = {"--dry-run": 0, "--bench": 5}
"""Options whose number may be left out, and what stands for it."""
_EXCLUSIVE = ("--dry-run", "--bench", "--replay-rollouts", "--check", "--save-config")
_NEEDS = {"--dry-run-device": "--dry-run", "--dry-run-nodes": "--dry-run"} | {
    name: "--bench" for name in ("--bench-lengths", "--bench-json")
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Which of the modes a command asks for; plain training is none of them."""

    dry_run: int | None = None
    """Processes to plan for; 0 for those of the environment."""
    device: str | None = None
    nodes: int | None = None
    bench: int | None = None
    """Steps to time."""
    lengths: str = "full"
    json: Path | None = None
    replay: Path | None = None
    check: bool = False
    save_config: Path | None = None

    @property
    def trains(self) -> bool:
        """Whether the data are read: to train, or to check them."""
        return self.dry_run is None and self.bench is None and self.save_config is None


def take(arguments: Sequence[str]) -> tuple[Launch, list[str]]:
    """The modes among `arguments`, and the other words.

    Raises InputError for a value that does not fit, an option given twice, and options that exclude each other.
    """
    found: dict[str, str | None] = {}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        option = name.replace("_", "-")
        if option not in NAMES or option in _NOT_TAKEN:
            rest.append(word)
            continue
        if option in _BARE and equals:
            raise InputError(f"{option} takes no value: give it alone")
        if option in found:
            raise InputError(f"{option} is given twice: give it once")
        follows = (
            option not in _BARE and bool(words) and re.match("-[^0-9]|-$", words[0]) is None
        )  # a number below 0 is a wrong value
        found[option] = value if equals else words.pop(0) if follows else None
        if found[option] in (None, "") and option not in (*_SWITCHES, *_BARE):
            raise InputError(f"{option} needs a value")
    modes = [name for name in _EXCLUSIVE if name in found]
    if len(modes) > 1:
        raise InputError(f"{modes[0]} and {modes[1]} exclude each other: give one of them")
    for option, needed in _NEEDS.items():
        if option in found and needed not in found:
            raise InputError(f"{option} works only with {needed}: give that too")
    lengths = found.get("--bench-lengths") or "full"
    if lengths not in ("full", "even"):
        near = difflib.get_close_matches(lengths, ("full", "even"), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"--bench-lengths {lengths[:80]!r}: {hint}the choices are full, even")
    file, replay, saved = (found.get(name) for name in ("--bench-json", "--replay-rollouts", "--save-config"))
    launch = Launch(
        dry_run=_number(found, "--dry-run"),
        device=found.get("--dry-run-device"),
        nodes=_number(found, "--dry-run-nodes"),
        bench=_number(found, "--bench"),
        lengths=lengths,
        json=None if file is None else Path(file),
        replay=None if replay is None else Path(replay),
        check="--check" in found,
        save_config=None if saved is None else Path(saved),
    )
    return launch, rest


NAMES = tuple(text.partition(" ")[0] for text in HELP)
"""The options."""


def _number(found: dict[str, str | None], option: str) -> int | None:
    if option not in found:
        return None
    text = found[option]
    if text is None:
        return _SWITCHES[option]
    if not text.isdecimal() or not 1 <= int(text) <= 10**5:
        raise InputError(f"{option} {text[:80]!r} is not a whole number from 1 to 100000")
    return int(text)

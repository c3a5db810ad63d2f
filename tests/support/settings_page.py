"""The page of all settings, from the dataclasses they are.

python tests/support/settings_page.py     # writes docs/settings.md
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from paced_fast.config import Config
from paced_fast.config.bounds import Bounds, settings
from paced_fast.config.paced import ALGORITHMS
from paced_fast.config.short_help import sentences_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"

HEAD = """# Settings

Every option of `python -m paced_fast train [PRESET] [--option value ...]`, with its type, its default and the range of
a number, both ends included. A preset may have another default: `python -m paced_fast train PRESET --help-all` shows
it. `--model`, `--data`, `--eval-data` and `--reward` stand for `--model.name`, `--data.train`, `--data.eval` and
`--reward.name`. `--config FILE` reads the same names from TOML or YAML, with a table for each group:

```toml
model = "Qwen/Qwen2.5-0.5B-Instruct"
data = ["train.jsonl"]
steps = 200

[optimizer]
learning_rate = 2e-6
```

Written by `python tests/support/settings_page.py`.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, *_algorithms(), "## The run\n", *_table(Config, "")]
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            parts += [f"\n## `{name.replace('_', '-')}`\n", f"{_plain(kind.__doc__)}\n", *_table(kind, f"{name}.")]
    return "\n".join(parts) + "\n"


def _algorithms() -> Iterator[str]:
    """What `auto` comes to for each algorithm, and what it refuses."""
    yield "## Algorithms\n\nMeaning of `auto` for each `--algorithm`, and the settings that it refuses.\n"
    yield "| algorithm | `--scheduler.rule` | `--replay.mode` | `--loss.intercept` | refused |\n|---|---|---|---|---|"
    for name, traits in ALGORITHMS.items():
        other = "value" if traits.intercepts[0] == "group_mean" else "group_mean"
        refused = [f"`--loss.intercept {other}`"] * (len(traits.intercepts) == 1)
        refused += ["`--replay.mode on`"] * (not traits.may_replay)
        refused += ["rules that read the value"] * (not traits.value_is_accuracy)
        row = (f"`{name}`", traits.rule, traits.replay, traits.intercepts[0], ", ".join(refused))
        yield f"| {' | '.join(row)} |"
    yield ""


def _table(group: Any, prefix: str) -> Iterator[str]:
    """The settings of one dataclass; those inside a group of the run come with it."""
    yield "| option | type | default | range | meaning |\n|---|---|---|---|---|"
    defaults, sentences = {item.name: item.default for item in dataclasses.fields(group)}, sentences_of(Config)
    for name, kind in typing.get_type_hints(group).items():
        if not dataclasses.is_dataclass(kind):
            full = f"{prefix}{name}"
            setting = settings(Config)[full]
            option = f"`--{full.replace('_', '-')}`"
            cells = (_type(setting.kind), _value(defaults[name]), _range(setting.bounds), _plain(sentences[full]))
            yield f"| {option} | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        elif prefix:
            yield from list(_table(kind, f"{prefix}{name}."))[1:]


def _plain(text: str) -> str:
    """One line, in which <words> in angle brackets are no tags."""
    return " ".join(text.split()).replace("<", "&lt;")


def _type(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"any number of: {_type(parts[0])}"
    if parts:  # a text or None
        return _type(parts[0])
    return {int: "whole number", float: "number", bool: "switch", str: "text"}[kind]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "none"
    words = value if isinstance(value, tuple) else (value,)
    return " ".join(f"`{word}`" for word in words)


def _range(bounds: Bounds | None) -> str:
    if bounds is None:
        return ""
    low, high = (f"{end:,}" if isinstance(end, int) else f"{end:.7g}" for end in bounds)
    return f"{low} or more" if high == "inf" else f"{low} to {high}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

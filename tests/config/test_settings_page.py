"""docs/settings.md: up to date, and nothing is missing from it."""

from __future__ import annotations

import re

import settings_page

from paced_fast.config import Config, flatten
from paced_fast.config.paced import ALGORITHMS


def test_the_page_is_what_the_settings_are() -> None:
    kept = settings_page.PAGE.read_text(encoding="utf-8")
    assert kept == settings_page.page(), "run: python tests/support/settings_page.py"


def test_every_setting_is_on_the_page_once_with_a_sentence() -> None:
    rows = re.findall(r"^\| `--([^`]+)` \| (.*) \|$", settings_page.page(), re.MULTILINE)
    names = list(flatten(Config()))
    first = [name for name in names if "." not in name]  # those of the run itself
    assert [name.replace("-", "_") for name, _ in rows] == first + [name for name in names if name not in first]
    for name, cells in rows:
        kind, default, _, sentence = re.split(r"(?<!\\) \| ", cells)
        assert kind, name
        assert default, name
        assert sentence.endswith("."), name


def test_cells_of_a_few_settings() -> None:
    lines = settings_page.page().splitlines()
    assert "| `--steps` | whole number | `150` | 0 to 1,000,000,000 | Steps of training. |" in lines
    assert (
        "| `--optimizer.max-grad-norm` | number | `1.0` | 1e-12 or more | Gradients are scaled down to this norm. |"
        in lines
    )
    assert (
        "| `--run.overwrite` | switch | off |  | Replace the results of an earlier run in the same folder. |" in lines
    )
    assert "| `flowrl` | uniform | off | value | `--loss.intercept group_mean`, `--replay.mode on`, " in "\n".join(
        lines
    )
    assert sum(line.startswith(tuple(f"| `{name}` |" for name in ALGORITHMS)) for line in lines) == len(ALGORITHMS)

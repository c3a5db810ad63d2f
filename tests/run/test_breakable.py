"""Tables of settings in a narrow terminal: where their values are broken."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from paced_fast.run.record import terminal
from paced_fast.run.record.breakable import Breakable, setting_in_words

SOURCE = (
    "task:chain_sum?split=train&size=4000&seed=42&min_terms=4&max_terms=4&min_digits=4&max_digits=4",
    "/home/somebody/data/all-of-it.jsonl?share=0:0.9&prompt=question",
)


def shown(what: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(what)
    return capture.get().splitlines()


def test_a_data_source_is_broken_between_its_parts() -> None:
    changed = {"data.train": (("task:signed_sums?split=train",), SOURCE), "seed": (0, 5)}
    lines = shown(terminal.settings_table(changed, preset="tiny"), 80)
    assert [line.rstrip() for line in lines[4:-1]] == [
        "  data.train   task:chain_sum?split=train&        task:signed_sums?split=train",
        "               size=4000&seed=42&min_terms=4&",
        "               max_terms=4&min_digits=4&",
        "               max_digits=4",
        "               /home/somebody/data/",
        "               all-of-it.jsonl?share=0:0.9&",
        "               prompt=question",
        "  seed         5                                  0",
    ]
    lines = shown(terminal.config_table({"data.train": SOURCE[:1]}), 80)
    assert [line.split("\u2502")[2].strip() for line in lines[2:-1]] == [
        "task:chain_sum?split=train&size=4000&seed=42&min_terms=4&",
        "max_terms=4&min_digits=4&max_digits=4",
    ]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (60, ["/home/somebody/data/all-of-it.jsonl?share=0:0.9&", "prompt=question"]),
        (24, ["/home/somebody/data/", "all-of-it.jsonl?", "share=0:0.9&", "prompt=question"]),
        (12, ["/home/", "somebody/", "data/all-of-", "it.jsonl?", "share=0:0.9&", "prompt=", "question"]),
    ],
)
def test_the_narrower_the_finer(width: int, lines: list[str]) -> None:
    assert [line.rstrip() for line in shown(Breakable(SOURCE[1]), width)] == lines


@given(st.text("ab-?&/,\n \u4e00", max_size=60), st.integers(3, 30))
def test_nothing_is_lost_and_no_part_that_fits_is_broken(text: str, width: int) -> None:
    lines = shown(Breakable(text), width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= width for line in lines)
    for part in re.findall(r"[^?&/,\s]+[?&/,]*", text):
        assert cell_len(part) > width or any(part in line for line in lines)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "none"),
        ("", "none"),
        ((), "none"),
        (0, "0"),
        (False, "False"),
        (("kl", "truncated"), "kl, truncated"),
        (["a.jsonl", SOURCE[1]], f"a.jsonl\n{SOURCE[1]}"),
    ],
)
def test_values_in_words(value: object, words: str) -> None:
    assert setting_in_words(value) == words

"""The first row of a file is tried before anything else is done; what is said is what reading all rows would say."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from paced_fast.data.sources import MissingColumn, check_first_row, drafts, read_drafts
from paced_fast.errors import InputError

ROW = {"question": "1 + 1", "answer": "2", "note": "n"}
ROWS = [ROW, {"question": "1 + 2"}, {"problem": "1 + 3"}]


def asks(reward: str, columns: Mapping[str, Any]) -> MissingColumn | str | None:
    assert "prompt" in columns
    if reward == "f.py:needs_gold":
        return MissingColumn(reward, "gold")
    return "no tests" if reward == "f.py:refuses" else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text("\n" + lines)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text("question,answer,note\n1 + 1,2,n\n")
    parquet.write_table(pa.Table.from_pylist([ROW, ROW]), tmp_path / "a.parquet")
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1"\n' + lines)
    (tmp_path / "twice.csv").write_text("question,answer,answer\n1 + 1,2,n\n")
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


def said(read: Any) -> str | None:
    try:
        read()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize(
    ("query", "lacks"),
    [
        ("prompt=quest", "has no field 'quest', only question, answer, note: name another, as in prompt=FIELD"),
        ("answer=ans", "has no field 'ans', only question, answer, note: name another, as in answer=FIELD"),
        ("answer=ans&seed=1", None),
        ("answer=ans&size=1", "has no field 'ans'"),
        ("slice_by=level", "has no field 'level'"),
        ("reward=f.py:needs_gold", "has no field 'gold', only question, answer, note: the reward 'f.py:needs_gold'"),
        ("reward=f.py:refuses", ": no tests"),
        ("format=taco", "has no"),
    ],
)
def test_the_first_row_is_refused_in_the_same_words(
    file: str, query: str, lacks: str | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = f"{folder / file}?{query}"
    with caplog.at_level(logging.INFO):
        early = said(lambda: check_first_row(spec, None, check=asks))
    assert not caplog.records
    assert early is not None
    assert early.startswith(str(folder / file))
    if lacks is not None:  # a shuffled file is read in its own order, so its first row is the same
        assert lacks in early
    assert early == said(lambda: read_drafts(spec, None, check=asks))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("broken.jsonl", "is not JSON"),
        ("twice.csv", "has the column 'answer' twice"),
        ("a.jsonl?rows=2:", "no known format has the fields problem"),
        ("a.jsonl?rows=1:", "no known format has the fields question"),
        ("a.jsonl?share=0:0.999&prompt=quest", "has no field 'quest'"),
    ],
)
def test_what_cannot_be_read_is_told(spec: str, told: str, folder: Path) -> None:
    early = said(lambda: check_first_row(str(folder / spec), None, check=asks))
    assert early is not None
    assert told in early
    assert early == said(lambda: read_drafts(str(folder / spec), None, check=asks))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("a.jsonl", "the rows after the first are read later"),
        ("a.jsonl?rows=:1&reward=f.py:g", "it is a good row"),
        ("a.jsonl?answer=ans&seed=3&size=1", "the row may not be among those drawn"),
        ("a.jsonl?rows=9:", "there is no such row, which its reader tells"),
        ("empty.jsonl", "the same"),
        ("absent.jsonl?prompt=x", "that the file is absent is told elsewhere"),
        ("task:signed_sums?size=5", "it is no file"),
    ],
)
def test_nothing_is_said_of_what_only_reading_tells(spec: str, why: str, folder: Path) -> None:
    name = spec if spec.startswith("task:") else str(folder / spec)
    assert said(lambda: check_first_row(name, None, check=asks)) is None, why


def test_rows_outside_the_share_and_the_reward_of_the_run(folder: Path) -> None:
    path = folder / "s.jsonl"
    rows = [{"question": f"1 + {i}", "answer": "2"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for share in ("0:0.1", "0.5:0.7"):
        spec = f"{path}?share={share}&answer=ans"
        early = said(lambda spec=spec: check_first_row(spec, None, check=asks))
        assert early is not None
        assert early == said(lambda spec=spec: read_drafts(spec, None, check=asks))
    early = said(lambda: check_first_row(str(path), None, check=asks, reward="f.py:needs_gold"))
    assert early is not None
    assert "has no field 'gold'" in early


def test_a_large_file_that_is_read_as_a_whole_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(lambda: check_first_row(f"{folder / 'a.csv'}?prompt=x", None, check=asks))
    monkeypatch.setattr(drafts, "_LARGE_BYTES", 10)
    for name in ("a.csv", "a.json"):
        assert said(lambda name=name: check_first_row(f"{folder / name}?prompt=x", None, check=asks)) is None
    assert said(lambda: check_first_row(f"{folder / 'a.jsonl'}?prompt=x", None, check=asks))

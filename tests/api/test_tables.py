"""What a table prints: the columns that matter and have room, whole, in a script and in a notebook."""

from __future__ import annotations

import math
import pickle
from importlib import util
from typing import Any

import pytest

from paced_fast.api.result import METRICS
from paced_fast.api.tables import table
from paced_fast.data.step_record import KEYS

ROWS = [
    {"step": 0, "memory.other": 12345678.5, "eval.accuracy": 0.25},
    {"step": 1, "memory.other": 12345678.5, "reward_mean": 2 / 3, "tokens": [1.5, 2.0]},
    {"step": 2, "memory.other": math.inf, "reward_mean": 1e-6, "text": "one\ntwo" + 30 * "x"},
]
MAIN = ("step", "reward_mean", "eval.accuracy")
NARROW = """\
   step  reward_mean  eval.accuracy
0     0            -           0.25
1     1       0.6667              -
2     2        1e-06              -
3 rows; 3 more columns: """
WIDE = """\
   step  memory.other  eval.accuracy  reward_mean    tokens                          text
0     0    12345678.5           0.25            -         -                             -
1     1    12345678.5              -       0.6667  [1.5, 2]                             -
2     2           inf              -        1e-06         -  one\\ntwoxxxxxxxxxxxxxxxxx..."""


@pytest.fixture(params=["pandas", "plain"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The table of `ROWS` with pandas, and as it is where pandas is not installed."""
    if request.param == "pandas":
        pytest.importorskip("pandas", reason="needs pandas")
        return table(ROWS, MAIN)
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "pandas" else find(name, *more))
    return table(ROWS, MAIN)


@pytest.mark.parametrize(("columns", "text"), [(88, NARROW), (89, WIDE)], ids=["narrow", "wide"])
def test_columns_that_have_room_are_whole(made: Any, columns: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    others = "the keys of its rows" if isinstance(made, list) else "list(table.columns)"
    assert str(made) == repr(made) == text + (others if text is NARROW else "")


def test_one_column_is_shown_however_narrow(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "3")
    assert str(made).startswith("   step\n0     0\n1     1\n2     2\n3 rows; 5 more columns: ")


def test_of_many_rows_the_ends_are_shown(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(table([{"step": i} for i in range(61)], MAIN)).splitlines()
    assert [line.split() for line in lines[1:6]] == [[str(i)] * 2 for i in range(5)]
    assert lines[6] == "..."
    assert [line.split() for line in lines[7:]] == [*([str(i)] * 2 for i in range(56, 61)), ["61", "rows"]]
    assert len(str(table([{"step": i} for i in range(60)], MAIN)).splitlines()) == 61


def test_a_frame_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    monkeypatch.setenv("COLUMNS", "80")
    made = table(ROWS, MAIN)
    pandas.testing.assert_frame_equal(pandas.DataFrame(made), pandas.DataFrame(ROWS))
    # Parts print alike, also with a label of their own, after a copy and from a pickle.
    assert str(made.tail(1)) == "   step  reward_mean  eval.accuracy\n2     2        1e-06              -\n" + (
        "1 row; 3 more columns: list(table.columns)"
    )
    assert str(made.set_index("step")[["eval.accuracy"]].head(1)) == "   eval.accuracy\n0           0.25"
    assert str(pickle.loads(pickle.dumps(made))) == str(made.copy()) == str(made)
    # What has no text per column, or no rows, prints as pandas prints it.
    for other in (made.T, made.iloc[:0], pandas.concat([made, made], axis=1)):
        assert str(other).replace("Frame", "DataFrame") == str(pandas.DataFrame(other))


def test_a_notebook_shows_the_main_columns_and_where_the_others_are() -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    made = table(ROWS, MAIN)
    shown = pandas.DataFrame(ROWS)[list(MAIN)]._repr_html_()
    assert made._repr_html_() == f"{shown}<p>3 more columns: <code>list(table.columns)</code></p>"
    assert made[["step"]]._repr_html_() == pandas.DataFrame(ROWS)[["step"]]._repr_html_()


def test_columns_of_the_metrics_are_keys_of_a_record() -> None:
    assert {name.partition(".")[0] for name in METRICS} <= set(KEYS)

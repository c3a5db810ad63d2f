"""`hf:FOLDER` of a folder that `save_to_disk` of datasets wrote, for which no hub is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from paced_fast.data import hub
from paced_fast.data.sources import read_drafts
from paced_fast.errors import InputError

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install -e '.[data]'")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def ask(*_: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "place_of", ask)
    rows = datasets.Dataset.from_dict({"question": ["1 + 1", "2 + 2", "3 + 3"], "answer": ["2", "4", "6"]})
    rows.save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": rows, "held": rows.select([2])}).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("table", ["2", "4", "6"]), ("splits", ["2", "4", "6"]), ("splits?split=held", ["6"])],
)
def test_rows_of_a_folder(saved: Path, spec: str, expected: list[str]) -> None:
    assert [draft.columns["answer"] for draft in read_drafts(f"hf:{saved}/{spec}", None)[1]] == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("table?split=held", r"table was written by save_to_disk without splits: leave split= out"),
        ("table?config=main", r"table was written by save_to_disk and has no configurations: leave config= out"),
        ("splits?split=test", r"splits has no split 'test': the splits are train, held"),
    ],
)
def test_what_such_a_folder_does_not_have_is_named(saved: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_drafts(f"hf:{saved}/{spec}", None)

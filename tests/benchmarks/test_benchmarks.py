"""The command of the benchmarks, and the tables made from its results."""

from pathlib import Path

import pytest

from benchmarks import run, tables

ROOT = Path(__file__).resolve().parents[2]


def test_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["sample_eficiency"])
    assert stop.value.code == 2
    assert "did you mean sample_efficiency" in capsys.readouterr().err


def test_readme_tables_are_generated_from_the_committed_results():
    for path in tables.READMES:
        assert tables.render(path.read_text()) == path.read_text(), path
    readme = (ROOT / "README.md").read_text()
    assert "accuracy goes from" in readme, "the section of one run of tiny has been written"

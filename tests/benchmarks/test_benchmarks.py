"""The command of the benchmarks, and the tables made from its results."""

from pathlib import Path

import pytest

from benchmarks import options, pictures, run, tables
from benchmarks.training import sample_efficiency

ROOT = Path(__file__).resolve().parents[2]


def test_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["sample_eficiency"])
    assert stop.value.code == 2
    assert "did you mean sample_efficiency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sweep", "goes_on"), [("", None, False), ("--sweep", True, False), ("--no-sweep --continue", False, True)]
)
def test_a_switch_can_be_on_off_or_left_out(words, sweep, goes_on):
    found = options.parse(sample_efficiency.Arguments, words.split(), "x")
    assert (found.sweep, found.continue_) == (sweep, goes_on)


def test_readme_tables_are_generated_from_the_committed_results():
    for path in tables.READMES:
        assert tables.render(path.read_text()) == path.read_text(), path
    readme = (ROOT / "README.md").read_text()
    assert "accuracy goes from" in readme, "the section of one run of tiny has been written"


def test_every_suite_with_runs_has_a_picture_and_readme_shows_the_first(monkeypatch, tmp_path):
    section = tables.SECTIONS["sample_efficiency"]
    with_runs = [name for name, runs in section.read().items() if runs]
    assert with_runs
    assert [name for name in with_runs if not pictures.place(name).is_file()] == []
    link = f"![learning curves](benchmarks/results/sample_efficiency/{with_runs[0]}.png)"
    assert section.text().endswith(link)
    monkeypatch.setattr(pictures, "place", lambda suite: tmp_path / f"{suite}.png")
    assert "![" not in section.text()

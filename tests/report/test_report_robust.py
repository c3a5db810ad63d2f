"""What a report withstands: odd numbers, odd names, broken pictures, and places that cannot be written."""

from __future__ import annotations

import html.parser
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import drawn_charts
import numpy as np
import pytest

from paced_fast.errors import InputError
from paced_fast.report import compare, compare_page, make_report, run_page
from paced_fast.report import html as page
from paced_fast.report.__main__ import main
from paced_fast.report.charts import renderer, training, value
from paced_fast.report.charts.chart import Axis, Chart, Line, percent
from paced_fast.report.read_run import Run


def _folder(path: Path, *records: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def _run(*records: dict[str, Any], **more: Any) -> Run:
    return Run(folder=Path("a-run"), records=list(records), **more)


def _two_figures(folder: Path) -> Path:
    _folder(folder, {"step": 1, "reward_mean": 0.5, "mixed_group_share": 0.5})
    (folder / "plots").mkdir()
    (folder / "plots" / "mixed_groups.png").write_text("of an earlier report")
    return folder


@pytest.mark.process
@pytest.mark.parametrize("where", ["describing", "drawing"])
def test_a_broken_chart_costs_only_itself_and_is_logged(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    view = renderer._view

    def broken(chart: Chart, colors: Any) -> Any:
        if chart.name != "mixed_groups":
            return view(chart, colors)
        if where == "describing":
            raise ValueError("no font")
        return {"layer": [{"mark": "no font"}]}

    monkeypatch.setattr(renderer, "_view", broken)
    folder = _two_figures(tmp_path / "a")
    with caplog.at_level(logging.ERROR):
        text = make_report(folder).read_text()
    assert [path.name for path in (folder / "plots").iterdir()] == ["train_reward.png"]
    assert "chart mixed_groups.png could not be drawn" in caplog.text
    assert "chart mixed_groups.svg could not be drawn" in caplog.text
    assert ("no font" if where == "describing" else "TypeError") in caplog.text
    assert text.count("<svg") == text.count("This chart could not be drawn.") == 1
    assert "<td>50%</td>" in text, "its numbers are there all the same"


@pytest.mark.process
@pytest.mark.parametrize("end", ["import os; os.abort()", "no program", "print('{')", "import time; time.sleep(999)"])
def test_a_process_that_cannot_draw_leaves_a_page_without_pictures(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The library aborts, for one, where a limit on addresses leaves V8 no room; a page is worth having without it.
    program = tmp_path / "program.py"
    program.write_text(end)
    monkeypatch.setattr(renderer, "_PROGRAM", program)
    if "sleep" in end:
        monkeypatch.setattr(renderer, "_SECONDS", 0.5)
    folder = _two_figures(tmp_path / "a")
    with caplog.at_level(logging.ERROR):
        text = make_report(folder).read_text()
    assert text.count("This chart could not be drawn.") == 2
    assert "<td>50%</td>" in text
    assert list((folder / "plots").iterdir()) == []
    assert "the drawing process ended" in caplog.text


@pytest.mark.process
def test_text_that_no_picture_can_hold_stands_there_by_its_number(tmp_path: Path) -> None:
    names = ["\x00\x1b", "\ufffe", "\ud800 & <b>", "\u202e" + "x" * 500, "</svg><script>", "{{7*7}}", "'] + datum"]
    slices = {name: {"accuracy": 0.1} for name in names}
    folder = _folder(tmp_path / "a", {"step": 0, "rollouts": 0, "eval": {"accuracy": 0.1, "slices": slices}})
    text = make_report(folder).read_text()
    assert "could not be drawn" not in text
    assert text.count("<script") == 1
    assert "{{7*7}}" in text
    assert drawn_charts.png_size(folder / "plots" / "learning_curve.png")[0] > 700
    assert renderer._plain("\x00\ud800\u202e\ufffe") == "U+0000U+D800U+202EU+FFFE"
    assert renderer._plain("x" * 500) == "x" * 37 + "..."


@pytest.mark.parametrize("known", [0, 3])
def test_groups_without_a_verdict_leave_calibration_to_the_others(known: int) -> None:
    null = {"value_fresh": [0.5, None], "accuracy_fresh": [None, 0.5]}
    rows: list[dict[str, Any]] = [{"step": i, **null} for i in range(1, 7)]
    rows += [{"step": 7 + i, "value_fresh": [0.5], "accuracy_fresh": [1.0]} for i in range(known)]
    assert len(value.value_charts(_run(*rows))) == (2 if known else 0)


@pytest.mark.process
def test_a_step_recorded_twice_does_not_stop_stacks_and_maps() -> None:
    row = {"step": 3, "seconds": {"update": 1.0}, "value_histogram": [1, 2], "value_fresh": [0.5], "replay_ages": [1]}
    text = run_page.report_of(_run(row, row, {**row, "step": 4}))[0]
    assert text.count("<svg") == text.count('class="chart"') > 4
    for chart in text.split("<svg")[1:]:
        assert "nan" not in chart[: chart.index("</svg>")].lower()
        assert "inf" not in chart[: chart.index("</svg>")].lower()


@pytest.mark.process
def test_names_need_not_be_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slices = {"\ud800x": {"accuracy": 0.1}, "$b_$": {"accuracy": 0.2}, "_c": {"accuracy": 0.3}}
    name = os.fsdecode(b"\xff")
    folder = _folder(tmp_path / name, {"step": 0, "rollouts": 0, "eval": {"accuracy": 0.1, "slices": slices}})
    (folder / "config.json").write_text(json.dumps({"data": {"template": "\ud83d"}}))
    main([str(folder)])
    assert capsys.readouterr().out.endswith("\\udcff/report.html\n")
    assert (folder / "plots" / "learning_curve.png").stat().st_size > 1000
    text = (folder / "report.html").read_text()
    assert "\\ud800x" in text
    assert "\\udcff" in text


def test_what_is_in_the_way_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_charts.draws_nothing(monkeypatch)
    plain = _folder(tmp_path / "plain", {"step": 1})
    (plain / "plots").write_text("")
    with pytest.raises(InputError, match="plots is not a folder"):
        make_report(plain)
    assert (plain / "report.html").exists()
    odd = _folder(tmp_path / "odd", {"step": 1})
    (odd / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json cannot be read: Is a directory"):
        make_report(odd)
    other = _folder(tmp_path / "other", {"step": 1})
    with pytest.raises(InputError, match="cannot be written to"):
        compare([plain, other], other / "metrics.jsonl" / "x.html")


def test_shaping_is_drawn_with_the_rewards() -> None:
    drawn = training.reward_charts(_run({"step": 1, "shaping_mean": -0.2}, {"step": 2, "shaping_mean": -0.1}))
    assert [chart.name for chart in drawn] == ["shaping_mean"]


def test_columns_are_cut_off_only_where_some_are_far_higher_and_then_it_is_said() -> None:
    def caption(slow: float) -> str:
        steps = [{"step": i, "seconds": {"update": slow if i == 50 else 1.0}} for i in range(1, 101)]
        return training.time_charts(_run(*steps))[0].caption

    assert "cut off" not in caption(1.4)
    assert "cut off" in caption(9.0)


def test_ages_stand_in_rows_around_whole_numbers() -> None:
    few, many = {"step": 1, "replay_ages": [0, 1, 1, 3]}, {"step": 1, "replay_ages": [0, 49]}
    (chart,) = value._held([few], "replay_ages", title="", caption="", whole=True)
    assert renderer.pointer(chart)["g"]["y"] == ["0", "1", "2", "3"]
    assert chart.heat is not None
    assert percent(chart.heat.darkest) == "49.2%", "the share that 1 in 100 exceed"
    (chart,) = value._held([many], "replay_ages", title="", caption="", whole=True)
    assert renderer.pointer(chart)["g"]["y"][:2] == ["0 to 2", "3 to 5"]


@pytest.mark.process
def test_one_point_stands_in_the_middle_and_below_the_top() -> None:
    line = Line(name="", x=np.array([7.0]), y=np.array([0.5]))
    (dot,) = drawn_charts.marks(
        Chart(name="c", title="", words="", lines=[line], x=Axis(low=0.0), y=Axis(low=0.0), height=100)
    )
    ((x, y),) = dot.points
    assert dot.dot
    assert x == 0.5
    assert 0.9 < y < 1


@pytest.mark.process
def test_vertical_axes_have_their_names_and_counts_a_strip_of_their_own() -> None:
    chart = value._reliability("x", "", np.array([0.05] * 4), np.zeros(4))
    assert ">measured accuracy</text>" in renderer.draw([chart])[0]["calibration_x"]
    drawn = drawn_charts.marks(chart)
    (point,) = (mark.points for mark in drawn if mark.dot)
    (bar,) = (mark.points for mark in drawn if mark.color == "c0" and mark.opacity == 0.35)
    assert min(y for _, y in bar) == 0
    assert 0 < max(y for _, y in bar) < point[0][1]


HOSTILE = (
    "\"'><script>x()</script><img src=x onerror=x()></style></svg> {{ 7 * 7 }} {% raw %} <!-- ]]> &lt; \x00\u202e\ud800"
)


def _saying(word: str, folder: str) -> Run:
    """A run that says `word` wherever a run can say something."""
    figures = {"accuracy": 0.5, "pass_at_8": 0.6, "slices": {word: {"accuracy": 0.1}, "a": {"accuracy": 0.2}}}
    record: dict[str, Any] = {"step": 1, "rollouts": 8, "train_seconds": 1.0, "reward_mean": 0.5, "eval": figures}
    record |= {"verdicts": {word: {word: 3, "b": 1}}, "seconds": {word: 2.0, "b": 1.0}, "memory": {word: 1e9}}
    record |= {"value_fresh": [0.5], "accuracy_fresh": [1.0], "value_histogram": [1, 2], "replay_ages": [1, 2]}
    config = {word: word, "preset": word, "algorithm": word, "model.name": word, "seed": word, "list": [word]}
    summary = {word: word, "nested": {word: [word]}}
    row = {"step": 1, "prompt": [{"role": word, "content": word}], "completion": word * 2, "slice": word, "reward": 0.0}
    rollouts = [row, row | {"tokens": [word, "b"], "logprobs": [-1.0, word], "prompt": word, "replayed": True}]
    records = [record, {**record, "step": 2}]
    return Run(
        folder=Path(folder, re.sub("[/\x00\ud800]", "", word)),
        records=records,
        config=config,
        summary=summary,
        rollouts=rollouts,
    )


class _Structure(html.parser.HTMLParser):
    """Every tag of a page with the names of its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, *attrs) != ("i", ("class", "code")):  # a character by its number
            self.found.append((tag, *(name for name, _ in attrs)))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))


def test_whatever_a_run_says_stays_text(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_charts.draws_nothing(monkeypatch)
    pages = []
    for word in (HOSTILE, "x" * len(HOSTILE)):
        page = run_page.report_of(_saying(word, "p"))[0]
        both = compare_page.page_of([_saying(word, "p"), _saying(word + "y", "q")])
        pages.append([_Structure(text).found for text in (page, both)])
    hostile, harmless = pages
    assert len(hostile[0]) > 300
    assert hostile == harmless


def test_nested_values_of_a_summary_are_folded() -> None:
    text = page.pairs_table({"steps": 3, "curve": [{"a": 1}], "pass_at_k": {"1": 0.5}, "none": []})
    assert text.count("<details>") == 2
    assert text.index("steps") < text.index("none") < text.index("<details>")


def test_one_step_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"step": 1, "rollouts": 8, "skipped_steps": 1, "unscored_share": 0.5}
    drawn_charts.draws_nothing(monkeypatch)
    text = run_page.report_of(_run(record, summary={"a": 1}))[0]
    assert "after 1 step<" in text
    assert "in 1 step<" in text
    assert "1 step was skipped" in text
    assert "completions of the first step are unscored" in text

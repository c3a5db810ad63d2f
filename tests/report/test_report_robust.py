"""What a report withstands: odd numbers, odd names, broken pictures, and places that cannot be written."""

from __future__ import annotations

import html
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paced_fast.errors import InputError
from paced_fast.report import compare, make_report, run_page
from paced_fast.report import html as page
from paced_fast.report.__main__ import main
from paced_fast.report.charts import png, svg, svg_maps, training, value
from paced_fast.report.read_run import Run


def _folder(path: Path, *records: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def _run(*records: dict[str, Any], **more: Any) -> Run:
    return Run(folder=Path("a-run"), records=list(records), **more)


def test_a_broken_picture_costs_only_itself_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(records: object) -> None:
        raise ValueError("no font")

    folder = _folder(tmp_path / "a", {"step": 1, "reward_mean": 0.5})
    (folder / "plots").mkdir()
    (folder / "plots" / "broken.png").write_text("of an earlier report")
    monkeypatch.setattr(run_page, "PLOTS", {"broken": broken, "train_reward": png.train_reward})
    with caplog.at_level(logging.ERROR):
        assert make_report(folder).exists()
    assert [path.name for path in (folder / "plots").iterdir()] == ["train_reward.png"]
    assert "broken.png is not drawn" in caplog.text
    assert "no font" in caplog.text


@pytest.mark.parametrize("known", [0, 3])
def test_groups_without_a_verdict_leave_calibration_to_the_others(known: int) -> None:
    null = {"value_fresh": [0.5, None], "accuracy_fresh": [None, 0.5]}
    rows: list[dict[str, Any]] = [{"step": i, **null} for i in range(1, 7)]
    rows += [{"step": 7 + i, "value_fresh": [0.5], "accuracy_fresh": [1.0]} for i in range(known)]
    assert (png.calibration(rows) is None) == (known == 0)
    assert len(value.value_charts(_run(*rows))) == (2 if known else 0)


def test_a_step_recorded_twice_does_not_stop_stacks_and_maps() -> None:
    row = {"step": 3, "seconds": {"update": 1.0}, "value_histogram": [1, 2], "value_fresh": [0.5], "replay_ages": [1]}
    for chart in re.findall("<svg.*?</svg>", run_page.page_of(_run(row, row, {**row, "step": 4}))):
        assert "nan" not in chart
        assert "inf" not in chart


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


def test_what_is_in_the_way_is_one_line(tmp_path: Path) -> None:
    plain = _folder(tmp_path / "plain", {"step": 1})
    (plain / "plots").write_text("")
    with pytest.raises(InputError, match="plots is no folder"):
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


def _rows(text: str) -> Any:
    return json.loads(html.unescape(re.findall(r'data-hover="([^"]*)"', text)[0]))["g"]["y"]


def test_ages_stand_in_rows_around_whole_numbers() -> None:
    few, many = {"step": 1, "replay_ages": [0, 1, 1, 3]}, {"step": 1, "replay_ages": [0, 49]}
    (chart,) = value._held([few], "replay_ages", title="", caption="", whole=True)
    assert [row[1] for row in _rows(chart.svg)] == ["0", "1", "2", "3"]
    assert chart.shades == "49.2%", "the share that 1 in 100 exceed"
    (chart,) = value._held([many], "replay_ages", title="", caption="", whole=True)
    assert [row[1] for row in _rows(chart.svg)][:2] == ["0 to 2", "3 to 5"]


def test_one_point_stands_in_the_middle_and_below_the_top() -> None:
    size = svg.Size(width=100, height=100, left=0, right=0, top=0, bottom=0)
    line = svg.Line(name="", x=np.array([7.0]), y=np.array([0.5]))
    text = svg.line_chart([line], svg.Axis(low=0.0), svg.Axis(low=0.0), "", size=size)
    ((x, y),) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)
    assert float(x) == 50
    assert 0 < float(y) < 10


def test_vertical_axes_have_their_names_and_counts_a_strip_of_their_own() -> None:
    axes = svg.Axis(label="value"), svg.Axis(label="measured")
    text = svg_maps.reliability([(0.05, 0.0, 0.0, 4)], axes, "", size=svg.Size(width=200, height=200))
    assert ">measured</text>" in text
    point = float(re.findall(r'<circle[^>]* cy="([\d.]+)"', text)[0])
    assert float(re.findall(r'<rect[^>]* y="([\d.]+)"', text)[0]) > point


def test_nested_values_of_a_summary_are_folded() -> None:
    text = page.pairs_table({"steps": 3, "curve": [{"a": 1}], "pass_at_k": {"1": 0.5}, "none": []})
    assert text.count("<details>") == 2
    assert text.index("steps") < text.index("none") < text.index("<details>")


def test_one_step_is_one_step() -> None:
    record = {"step": 1, "rollouts": 8, "skipped_steps": 1, "unscored_share": 0.5}
    text = run_page.page_of(_run(record, summary={"a": 1}))
    assert "after 1 step<" in text
    assert "in 1 step<" in text
    assert "1 step was skipped" in text
    assert "completions of the first step got no verdict" in text

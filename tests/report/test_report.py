"""The report of an invented run: what it draws, what it does without, and how it refuses."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import drawn_charts
import numpy as np
import pytest

from paced_fast import report
from paced_fast.config.presets import preset
from paced_fast.errors import InputError
from paced_fast.report import read_run, run_page, sample_rollouts
from paced_fast.report.__main__ import main
from paced_fast.report.charts import chart as described
from paced_fast.report.charts import held_out, renderer, training
from paced_fast.report.charts import value as learning
from paced_fast.report.charts.chart import Axis, Chart, Heat, Line, Stack


def _records(*, num_steps: int = 60, learned_value: bool = True, seed: int = 0) -> list[dict[str, object]]:
    """Records of steps 0..num_steps; an evaluation each 20 steps, a value that improves, a slow first step."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, object]] = [{"step": 0, "rollouts": 0, "train_seconds": 0.0, "eval": _evaluation(0.0)}]
    for step in range(1, num_steps + 1):
        done = step / num_steps
        accuracy = rng.beta(0.4 + 2 * done, 0.6 + 2 * done, size=16).round(3)
        value = np.clip(done * accuracy + (1 - done) * 0.5 + rng.normal(0, 0.12, size=16), 0.01, 0.99)
        table = np.clip(rng.normal(0.5, 0.03 + 0.3 * done, size=400), 0, 1)
        record: dict[str, object] = {
            "step": step,
            "rollouts": 128 * step,
            "train_seconds": 0.25 * step,
            "loss": 3.0 - done + rng.normal(0, 0.3),
            "grad_norm": float(rng.gamma(4, 0.3)),
            "learning_rate": 1e-4,
            "reward_mean": float(accuracy.mean()),
            "mixed_group_share": float(np.mean((accuracy > 0.06) & (accuracy < 0.94))),
            "entropy": 6.6 - 3 * done + rng.normal(0, 0.2),
            "mean_length": 8 + done,
            "truncated_share": 0.02,
            "log_ratio_mean": -0.01,
            "kl": 0.002 * done,
            "generator_mismatch_mean": 1e-7,
            "generator_mismatch_max": 2e-6,
            "skipped_steps": 0,
            "verdicts": {"signed_sums": {"right": 60, "wrong": 60, "unreadable": 8}},
            "unscored_share": 0.01,
            "memory": {"generate": 4 << 30, "update": 7 << 30, "other": 3 << 30},
            "value_mean": float(value.mean()) if learned_value else None,
            "value_brier": 0.25 - 0.12 * done if learned_value else None,
            "value_ece": 0.26 - 0.2 * done if learned_value else None,
            "value_rank_correlation": (0.7 * done if step > 2 else None) if learned_value else None,
            "tokens_per_second": 5000 + rng.normal(0, 300),
            "seconds": {
                "schedule": 0.002,
                "generate": 0.08 if step > 1 else 2.0,
                "reward": 0.01,
                "old_logprobs": 0.03,
                "update": 0.11,
                "head": 0.006,
                "replay": 0.01,
                "other": 0.01,
            },
        }
        if learned_value:
            record["value_fresh"] = value.tolist()
            record["accuracy_fresh"] = accuracy.tolist()
            record["value_histogram"] = np.histogram(table, bins=20, range=(0, 1))[0].tolist()
            record["replay_size"] = min(128, 64 * step)
            record["replay_age_mean"] = 1.5
            record["replay_ages"] = rng.integers(0, 5, size=min(128, 64 * step)).tolist()
            record["replay_priorities"] = rng.beta(2, 5, size=min(128, 64 * step)).tolist()
        if step % 20 == 0:
            record["eval"] = _evaluation(done)
        records.append(record)
    return records


def _write_run(path: Path, records: list[dict[str, object]], *, finished: bool = True) -> Path:
    """Writes `records` and, for a finished run, the files beside them."""
    path.mkdir(parents=True, exist_ok=True)
    path.joinpath("metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    if finished:
        (path / "config.json").write_text(json.dumps({"seed": 0, "loss": {"beta": 0.05, "note": "<b>"}}))
        rows = [
            {
                "step": i,
                "prompt": f"{i}951=2:",
                "completion": "1+9-5-3<script>#" if i % 2 else "9-5-1-1#",
                "reward": float(i % 2),
                "value": None if i == 3 else 0.4,
                "slice": "k4",
                "replayed": i == 7,
            }
            for i in range(20)
        ]
        (path / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        summary = {
            "preset": "tiny",
            "algorithm": "paced",
            "steps": len(records) - 1,
            "rollouts": 128 * (len(records) - 1),
            "train_seconds": 15.0,
            "accuracy_before": 0.142,
            "accuracy_after": 0.287,
            "pass_at_8_before": 0.574,
            "pass_at_8_after": 0.646,
            "distinct_correct_after": 1.82,
            "value_brier": 0.13,
            "value_ece": 0.06,
            "value_rank_correlation": 0.72,
            "mixed_group_share": 0.51,
            "skipped_steps": 0,
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def _evaluation(done: float) -> dict[str, object]:
    start = {"trivial": 0.96, "k3": 0.27, "k4": 0.16, "k5": 0.10, "k6": 0.05, "hard": 0.0}
    gain = {"trivial": 0.01, "k3": 0.2, "k4": 0.15, "k5": 0.12, "k6": 0.1, "hard": 0.0}
    slices = {
        name: {"accuracy": start[name] + gain[name] * done, "pass_at_8": min(1.0, 2.5 * start[name]), "prompts": 40}
        for name in start
    }
    headline = 0.142 + 0.145 * done
    return {
        "accuracy": headline,
        "pass_at_8": 0.574 + 0.07 * done,
        "distinct_correct": 1.7 + 0.1 * done,
        "slices": slices,
        "samples": 16,
    }


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, show or find unbalanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.open_tags: list[str] = []
        self.scripts = 0
        self.charts: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"
        self.charts |= {str(value) for name, value in attrs if name == "id" and str(value).startswith("chart-")}
        if tag not in ("meta", "img", "input"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


EVERY_PLOT = set(run_page.PICTURES)
SECTIONS = (
    *("learning", "value", "schedule", "replay", "reward", "health", "generator", "cost", "rollouts"),
    *("configuration", "summary"),
)
CHARTS = {
    f"chart-{name}"
    for name in (
        *("learning_rollouts", "learning_time", "pass_at_k", "calibration_first", "calibration_last", "value_ece"),
        *("value_histogram", "selection", "selection_share", "mixed_groups", "train_reward", "replay_priorities"),
        *("replay_ages", "verdicts_signed_sums", "unscored_share", "loss", "grad_norm", "entropy", "mean_length"),
        *("truncated_share", "generator_mismatch_mean", "seconds_by_phase", "memory_by_phase"),
    )
}
NEEDS_VALUE = {"calibration", "value_histogram", "value_quality", "replay_priorities"}


def _drawn(run_dir: Path) -> set[str]:
    return {path.stem for path in (run_dir / "plots").glob("*.png")}


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_charts.draws_nothing(monkeypatch)


@pytest.mark.process
def test_report_of_a_finished_run_holds_everything_and_fetches_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = report.make_report(_write_run(tmp_path / "my-run", _records()))
    page = Page(path)
    assert caplog.text == "", "every chart is drawn"
    assert path.read_text(encoding="utf-8").count('class="spark"') == 2
    assert path == tmp_path / "my-run" / "report.html"
    assert page.open_tags == [], "every tag is closed"
    assert _drawn(path.parent) == EVERY_PLOT
    for name in EVERY_PLOT:
        width, height = drawn_charts.png_size(path.parent / "plots" / f"{name}.png")
        assert width > 700, name
        assert height > 400, name
    assert page.sources == [f"#{name}" for name in SECTIONS], "links lead to parts of the page, and nothing is loaded"
    assert "://" not in path.read_text(encoding="utf-8")
    assert "default-src 'none'" in html.unescape(path.read_text(encoding="utf-8"))
    for text in (
        "my-run",
        "finished",
        "14.2% \u2192 28.7%",
        "57.4% \u2192 64.6%",
        "loss.beta",
        "value_rank_correlation",
    ):
        assert text in page.text
    assert page.scripts == 1, "the page's own; a completion is text, whatever it holds"
    assert "1+9-5-3<script>#" in page.text
    assert page.charts >= CHARTS


def test_rollouts_shown_are_the_newest_of_each_outcome_newest_first() -> None:
    rows = [{"step": i, "reward": float(i % 2), "replayed": i % 10 == 1} for i in range(100)]
    rows[50]["reward"] = None
    shown = [row["step"] for row in sample_rollouts.chosen(rows)]
    fresh_right = [i for i in range(99, 0, -2) if i % 10 != 1][:10]
    assert shown == sorted([*range(98, 78, -2), *fresh_right, *range(91, 0, -10), 50], reverse=True)


@pytest.mark.usefixtures("_undrawn")
def test_report_without_a_learned_value_leaves_those_figures_out(tmp_path: Path) -> None:
    run_dir = _write_run(tmp_path, _records())
    report.make_report(run_dir)
    _write_run(run_dir, _records(learned_value=False))
    report.make_report(run_dir)
    assert _drawn(run_dir) == EVERY_PLOT - NEEDS_VALUE, "figures of the earlier report are gone too"


@pytest.mark.usefixtures("_undrawn")
def test_report_of_a_running_run_without_evaluation(tmp_path: Path) -> None:
    records = [{key: r[key] for key in ("step", "reward_mean", "seconds")} for r in _records(num_steps=4)[1:]]
    run_dir = _write_run(tmp_path, records, finished=False)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    page = Page(report.make_report(run_dir))
    assert _drawn(run_dir) == {"train_reward", "seconds_by_phase"}
    assert "not finished" in page.text
    assert "step 4" in page.text


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_report_after_the_first_steps(tmp_path: Path, count: int) -> None:
    run_dir = _write_run(tmp_path, _records(num_steps=3)[:count], finished=False)
    report.make_report(run_dir)
    assert _drawn(run_dir) == ({"learning_curve"} if count == 1 else EVERY_PLOT)


@pytest.mark.process
def test_unusual_numbers_do_not_stop_the_report(tmp_path: Path) -> None:
    records = _records(num_steps=6)
    records[3] |= {
        "loss": None,
        "value_fresh": [None] * 16,
        "value_histogram": [0] * 20,
        "replay_priorities": [None, 0.5],
    }
    records[4] |= {"seconds": {}, "eval": {"accuracy": None, "slices": {"new": {"accuracy": 0.5}}}}
    run_dir = _write_run(tmp_path, records)
    report.make_report(run_dir)
    assert _drawn(run_dir) == EVERY_PLOT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics.jsonl in"),
        ("", "has no record yet"),
        ('{"step": 1}\nbroken\n{"step": 2}\n', "metrics.jsonl:2 is not JSON"),
        ('{"loss": 1}\n', "metrics.jsonl:1 is not a metrics record"),
    ],
)
def test_a_folder_without_usable_metrics_is_an_input_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        report.make_report(tmp_path)


@pytest.mark.usefixtures("_undrawn")
def test_command_line_prints_the_path_and_exits_2_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(_write_run(tmp_path, _records(num_steps=2)))])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "absent")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: no such folder {tmp_path / 'absent'}: give a run folder\n"


def _charts(charts: list[Chart]) -> dict[str, Chart]:
    return {chart.name: chart for chart in charts}


def test_learning_curve_draws_the_headline_against_rollouts() -> None:
    chart = _charts(held_out.learning_charts(_run(_records())))["learning_rollouts"]
    headline, *slices = chart.lines
    assert (headline.name, headline.style) == ("held-out", "thick"), "as the tile has it"
    assert chart.caption == "Thick: all held-out prompts. Thin: every slice."
    assert headline.x.tolist() == [0, 2560, 5120, 7680]
    assert headline.y.tolist() == pytest.approx([0.142, 0.142 + 0.145 / 3, 0.142 + 0.29 / 3, 0.287])
    assert [line.name for line in slices] == ["hard", "k3", "k4", "k5", "k6", "trivial"]
    assert slices[1].y.tolist() == pytest.approx([0.27 + 0.2 * done for done in (0, 1 / 3, 2 / 3, 1)])
    passed = _charts(held_out.learning_charts(_run(_records())))["pass_at_8"]
    assert passed.lines[0].y[-1] == pytest.approx(0.574 + 0.07)
    assert passed.lines[-1].y.tolist() == [1.0] * 4, "of the trivial slice"


def test_calibration_compares_the_first_third_with_the_last() -> None:
    record = {"step": 1, "value_fresh": [0.21, 0.28, 1.0, None], "accuracy_fresh": [0.5, 0.25, 1.0, 0.5]}
    late = {"step": 9, "value_fresh": [0.71], "accuracy_fresh": [0.75]}
    charts = learning.value_charts(_run([record, record, late]))
    assert [chart.title for chart in charts] == ["Calibration, first step", "Calibration, last step"]
    assert "3 groups" in charts[0].caption
    assert "1 group." in charts[1].caption
    first, last = (chart.lines[-1] for chart in charts)
    assert first.x.tolist() == pytest.approx([0.245, 1.0])
    assert first.y.tolist() == pytest.approx([0.375, 1.0])
    assert (last.x.tolist(), last.y.tolist()) == ([0.71], [0.75])
    assert first.sizes is not None
    assert first.sizes.tolist() == [1.0, 0.5], "half the groups, half the area"


def test_histogram_columns_are_shares_of_their_own_step() -> None:
    records = [{"step": 1, "value_histogram": [3, 1], "value_fresh": [0.5]}]
    records += [{"step": 2, "value_histogram": [0, 8], "value_fresh": [0.5]}]
    heat = _charts(learning.schedule_charts(_run(records)))["value_histogram"].heat
    assert heat is not None
    assert heat.shares.tolist() == [[0.75, 0.25], [0.0, 1.0]]
    priorities = [{"step": 1, "replay_priorities": [0.0, 0.26, 0.27, 0.99]}]
    heat = _charts(learning.replay_charts(_run(priorities)))["replay_priorities"].heat
    assert heat is not None
    (column,) = heat.shares
    assert {int(i): float(column[i]) for i in np.flatnonzero(column)} == {0: 0.25, 5: 0.5, 19: 0.25}


def test_seconds_are_stacked_and_shares_are_of_the_whole_run() -> None:
    records = [{"step": s, "seconds": {"generate": 1.0 * s, "update": 2.0, "idle": 0.0, "other": 0.5}} for s in (1, 2)]
    (chart,) = training.time_charts(_run(records))
    assert chart.stack is not None
    assert {name: layer.tolist() for name, layer in chart.stack.layers.items()} == {
        "update": [2.0, 2.0],
        "generate": [1.0, 2.0],
        "other": [0.5, 0.5],
    }
    assert chart.legend == [("update 50%", 0), ("generate 37.5%", 1), ("other 12.5%", 2)]


def test_the_smoothed_line_is_a_mean_of_neighbours_also_at_the_ends() -> None:
    def reward(rows: list[dict[str, object]]) -> Chart:
        return _charts(learning.schedule_charts(_run(rows)))["train_reward"]

    raw, smooth = (line.y for line in reward([{"step": s, "reward_mean": float(s == 23)} for s in range(1, 46)]).lines)
    assert raw.sum() == 1.0
    assert smooth[21:24].tolist() == pytest.approx([1 / 3] * 3)
    flat = reward([{"step": s, "reward_mean": 0.5} for s in range(1, 46)]).lines[1].y
    assert flat.tolist() == pytest.approx([0.5] * 45), "no droop where the window leaves the run"


@pytest.mark.usefixtures("_undrawn")
def test_what_a_run_did_not_have_is_left_out() -> None:
    rows = _records(num_steps=4)
    for row in rows:
        row |= {"unscored_share": 0.0, "truncated_share": 0.0, "kl": 0.0, "reward_mean": 0.0, "verdicts": {}}
        for key in [key for key in row if key.startswith("replay")]:
            del row[key]
    text = _page(_run(rows))
    for name in ("unscored_share", "truncated_share", "kl", "replay_ages", "trained_sequences"):
        assert f'id="chart-{name}"' not in text
    assert 'href="#reward"' not in text
    assert 'href="#replay"' not in text
    assert 'id="chart-train_reward"' in text, "no reward at all is worth seeing"
    rows[2]["unscored_share"] = 0.01
    assert 'id="chart-unscored_share"' in _page(_run(rows))


@pytest.mark.process
def test_importing_report_needs_no_torch_and_nothing_that_draws() -> None:
    code = "import sys, paced_fast.report; sys.exit(bool({'torch', 'vl_convert', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _run(rows: list[dict[str, object]], **more: Any) -> read_run.Run:
    return read_run.Run(folder=Path("a-run"), records=list(rows), **more)


def _page(run: read_run.Run) -> str:
    return run_page.report_of(run)[0]


@pytest.mark.process
@pytest.mark.parametrize("seed", [1, 2])
def test_odd_values_are_drawn(seed: int) -> None:
    text = _odd_page(random.Random(seed))
    assert text.count("<svg") > 15
    assert "could not be drawn" not in text


@pytest.mark.usefixtures("_undrawn")
def test_no_odd_value_stops_the_page() -> None:
    rng = random.Random(0)
    for _ in range(80):
        text = _odd_page(rng)
        assert "</html>" in text
        assert "could not be drawn" not in text


def _odd_page(rng: random.Random) -> str:
    # Whatever a figure holds, at any depth: a run of another version, a bug, a hand-edited file.
    odd = [None, "text", [], {}, [None], [[1]], {"a": {"b": 1}}, True, math.nan, math.inf, -1e300, 10**400, -5, 0]
    rows = _records(num_steps=4)
    for row in rows:
        places: list[tuple[Any, Any]] = [(row, key) for key in row if key != "step"]
        places += [(row[k], key) for k in ("eval", "seconds", "memory") if k in row for key in row[k]]  # type: ignore
        places += [(row["value_fresh"], 3)] if "value_fresh" in row else []
        for owner, key in rng.sample(places, 6):
            owner[key] = rng.choice(odd)
    sample = [{"step": rng.choice(odd), "tokens": rng.choice(odd), "logprobs": rng.choice(odd), "prompt": 1}]
    config = read_run.flatten({"preset": rng.choice(odd), "steps": rng.choice(odd), "seed": {}, "a": rng.choice(odd)})
    return _page(_run(rows, rollouts=sample, config=config, summary={"accuracy_after": "x"}))


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_page_after_the_first_steps(count: int) -> None:
    assert "</html>" in _page(_run(_records(num_steps=3)[:count]))
    assert "</html>" in _page(_run(_records(num_steps=3, learned_value=False)[1 : count + 1]))


@pytest.mark.process
def test_a_long_run_stays_a_page_of_moderate_size() -> None:
    sizes = [len(_page(_run(_records(num_steps=n)))) for n in (150, 1000)]
    assert sizes[0] < 1_000_000
    assert sizes[1] < 1_500_000, "curves and maps of a long run are averaged"


def test_numbers_are_written_short() -> None:
    found = [
        described.compact(x) for x in (0, 0.12345, 3, 1234.5, 99_999, 123_456, 2.5e6, 3e9, 7.5e-5, -2e-7, math.nan)
    ]
    assert found == ["0", "0.123", "3", "1,234", "99,999", "123k", "2.5M", "3G", "7.5e-5", "-2e-7", "-"]
    assert [described.percent(x) for x in (0, 0.5, 0.1234, 1, 0.00255, 2e-7)] == [
        "0%",
        "50%",
        "12.3%",
        "100%",
        "0.26%",
        "0%",
    ]


def _chart(**parts: Any) -> Chart:
    return Chart(**({"name": "c", "title": "", "words": "", "x": Axis(), "y": Axis()} | parts))


def _hover(text: str, name: str) -> dict[str, Any]:
    figure = text[text.index(f'id="chart-{name}"') :]
    return json.loads(html.unescape(re.findall(r'data-hover="([^"]*)"', figure)[0]))


@pytest.mark.process
def test_a_curve_goes_through_its_points() -> None:
    low, high = np.array([0.0, 0.2, 0.9]), np.array([0.1, 0.3, 1.0])
    line = Line(name="a<b", x=np.array([0.0, 1.0, 4.0]), y=np.array([0.0, 0.25, 1.0]), low=low, high=high, color=3)
    chart = _chart(lines=[line], x=Axis(low=0, high=4), y=Axis(low=0, high=1))
    band, curve = drawn_charts.marks(chart)
    assert (curve.color, curve.points) == ("c3", [(0, 0), (0.25, 0.25), (1, 1)])
    assert (band.color, band.opacity) == ("c3", 0.16)
    assert sorted(band.points) == [(0, 0), (0, 0.1), (0.25, 0.2), (0.25, 0.3), (1, 0.9), (1, 1)]
    assert renderer.pointer(chart)["s"] == [
        {"n": "a<b", "c": 3, "p": [(0, "0", "0 [0, 0.1]"), (0.25, "1", "0.25 [0.2, 0.3]"), (1, "4", "1 [0.9, 1]")]}
    ]


@pytest.mark.process
def test_a_stack_puts_each_layer_on_those_before() -> None:
    layers = {"a": np.array([1.0, 2.0]), "b": np.array([1.0, 0.0]), "c": np.ones(2)}
    chart = _chart(stack=Stack(x=np.array([1.0, 2.0]), layers=layers), y=Axis(high=4.0))
    # Two columns, each half as wide as the plot; a quarter of the height for one.
    corners = [
        [(0, 0.25), (0.5, 0.25), (0.5, 0.5), (1, 0.5), (1, 0), (0.5, 0), (0.5, 0), (0, 0)],
        [(0, 0.5), (0.5, 0.5), (0.5, 0.5), (1, 0.5), (1, 0.5), (0.5, 0.5), (0.5, 0.25), (0, 0.25)],
        [(0, 0.75), (0.5, 0.75), (0.5, 0.75), (1, 0.75), (1, 0.5), (0.5, 0.5), (0.5, 0.5), (0, 0.5)],
    ]
    drawn = drawn_charts.marks(chart)
    assert [mark.color for mark in drawn] == ["c0", "c1", "c2"]
    for mark, expected in zip(drawn, corners, strict=True):
        assert set(mark.points) == set(expected)
    shown = [(s["n"], [p[2] for p in s["p"]]) for s in renderer.pointer(chart)["s"]]
    assert shown == [("c", ["1", "1"]), ("b", ["1", "0"]), ("a", ["1", "2"])]


@pytest.mark.process
def test_a_heat_map_is_darkest_where_the_share_is_largest() -> None:
    shares = np.array([[0.25, 0.75], [1.0, 0.0]])
    chart = _chart(heat=Heat(x=np.array([1.0, 2.0]), shares=shares), y=Axis(low=0.0, high=1.0))
    cells = {(min(mark.points), max(mark.points)): mark.opacity for mark in drawn_charts.marks(chart)}
    # Of the 99th percentile, 0.9925: the square roots of 0.252, 0.756 and 1 in ninths, rounded up to 5, 8 and 9.
    shades = [round(0.08 + 0.92 * (level / 9) ** 1.2, 2) for level in (5, 8, 9)]
    places = [((0, 0), (0.5, 0.5)), ((0, 0.5), (0.5, 1)), ((0.5, 0), (1, 0.5))]
    assert cells == dict(zip(places, shades, strict=True))
    grid = renderer.pointer(chart)["g"]
    assert grid["v"] == [[0.25, 0.75], [1.0, 0.0]]
    assert grid["x"] == [(0.25, "1"), (0.75, "2")]
    assert grid["y"] == ["0 to 0.5", "0.5 to 1"]


def test_what_is_averaged_keeps_its_mean_and_order() -> None:
    x = np.arange(1000.0)
    merged_x, columns = described.merged(x, np.stack([x, x**2], axis=1))
    assert merged_x.size == columns.shape[0] == described.MAX_POINTS
    assert np.all(np.diff(merged_x) > 0)
    assert columns[:, 0].tolist() == merged_x.tolist()
    assert merged_x[0] == 1.5, "of 0, 1, 2, 3"


def test_calibration_bins_are_tenths_of_the_value() -> None:
    value, accuracy = np.array([0.21, 0.28, 1.0, 0.3]), np.array([0.5, 0.25, 1.0, 0.0])
    expected = [(0.245, 0.375, 0.125 / math.sqrt(2), 2), (0.3, 0.0, 0.0, 1), (1.0, 1.0, 0.0, 1)]
    assert np.array(learning.calibration_bins(value, accuracy)) == pytest.approx(np.array(expected))


def test_the_selection_is_compared_with_what_there_was() -> None:
    record = {"step": 1, "value_histogram": [6, 2], "value_fresh": [0.1, 0.6, None, 0.5, 1.0]}
    ((step, there, drawn),) = learning._histograms([record, {"step": 2, "value_histogram": [0, 0]}])
    assert (step, there.tolist(), drawn.tolist()) == (1.0, [0.75, 0.25], [0.25, 0.75])


def test_pass_at_k_has_a_curve_before_and_one_after() -> None:
    before = {"accuracy": 0.2, "pass_at_k": {"1": 0.2, "2": 0.3, "4": 0.5}, "pass_at_k_interval": {"4": [0.4, 0.6]}}
    (chart,) = held_out.over_k([("before", before), ("after", {"accuracy": 0.3, "pass_at_8": 0.9})])
    first, second = renderer.pointer(chart)["s"]
    assert [list(p[1:]) for p in first["p"]] == [["1", "20%"], ["2", "30%"], ["4", "50% [40%, 60%]"]]
    assert [list(p[1:]) for p in second["p"]] == [["1", "30%"], ["8", "90%"]]
    assert held_out.over_k([("before", {"accuracy": 0.2})]) == []


@pytest.mark.usefixtures("_undrawn")
def test_intervals_of_evaluations_become_bands() -> None:
    rows = _records(num_steps=40)
    for row in rows:
        if "eval" in row:
            row["eval"] |= {"accuracy_interval": [0.1, 0.4]}  # type: ignore[operator]
    charts = _charts(held_out.learning_charts(_run(rows)))
    assert [line.name for line in charts["learning_rollouts"].lines if line.low is not None] == ["held-out"]
    points = _hover(_page(_run(rows)), "learning_time")["s"][0]["p"]
    assert [p[1] for p in points] == ["0 s", "5 s", "10 s"]
    assert all("[10%, 40%]" in p[2] for p in points)


@pytest.mark.usefixtures("_undrawn")
def test_settings_are_compared_with_the_preset() -> None:
    config = read_run.flatten(json.loads(json.dumps(dataclasses.asdict(preset("tiny")))))
    config |= {"steps": 7, "loss.intercept": "value", "run_dir": "x", "resume": "auto", "scheduler.tau": 0.25}
    page = " ".join(_page(_run(_records(), config=config)).split())
    for name, default, value in (("steps", "150", "7"), ("scheduler.tau", "0.5", "0.25")):
        assert f'<th scope="row">{name}</th><td>{default}</td><td class="changed">{value}</td>' in page
    assert '<th scope="row">loss.intercept</th><td>auto</td><td>value</td>' in page
    assert '<th scope="row">resume</th><td>never</td>' not in page


def test_what_stands_out_is_said() -> None:
    assert run_page._notes(_run(_records())) == []
    rows: list[dict[str, object]] = [
        {
            "step": s,
            "skipped_steps": 2,
            "truncated_share": 0.5,
            "generator_mismatch_token_ratio": 1.2,
            "unscored_share": 0.1,
        }
        for s in range(1, 4)
    ]
    assert [line.split()[0] for line in run_page._notes(_run(rows))] == ["2", "50%", "Generator", "10%"]


@pytest.mark.parametrize(
    ("group_size", "mixed", "said"),
    [(8, 0.09, True), (8, 0.11, False), (16, 0.09, True), (4, 0.06, False), (4, 0.04, True)],
)
def test_few_mixed_groups_are_said_by_their_size(group_size: int, mixed: float, said: bool) -> None:
    rows: list[dict[str, object]] = [{"step": step, "mixed_group_share": mixed} for step in range(1, 13)]
    notes = run_page._notes(_run(rows, config={"generation.group_size": group_size}))
    line = f"{1 - mixed:.0%} of the groups of the last 10 steps were all right or all wrong and taught little."
    assert notes == ([line] if said else [])


def test_text_shows_what_it_hides() -> None:
    text = "a<b>&\"'\x00\u202e\ud800\n\t"
    codes = "".join(f'<i class="code">U+{code}</i>' for code in ("0000", "202E", "D800"))
    assert sample_rollouts.visible(text) == f"a&lt;b&gt;&amp;&#34;&#39;{codes}\n\t"


def test_tokens_are_coloured_by_their_probability_and_the_rest_follows() -> None:
    row = {"completion": "ab<c>", "tokens": ["a", "b", ""], "logprobs": [-0.01, -3.0, None]}
    assert sample_rollouts._completion(row) == (
        '<span class="p0" title="99%, log-prob -0.01">a</span><span class="p4" title="4.98%, log-prob -3">b</span>'
        "<span>&#9633;</span>&lt;c&gt;"
    )


def test_a_half_written_character_at_the_end_is_left_out(tmp_path: Path) -> None:
    run_dir = _write_run(tmp_path, _records(num_steps=2), finished=False)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 3, "note": "\u00e9'.encode()[:-1])
    assert read_run.read_run(run_dir).last_step == 2

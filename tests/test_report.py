"""The report of an invented run: what it draws, what it does without, and how it refuses."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paced_fast import plots, report
from paced_fast.errors import InputError


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
            record["replay_priorities"] = rng.beta(2, 5, size=min(128, 64 * step)).tolist()
            record["mixed_group_share_uniform"] = 0.14
        if step % 20 == 0:
            record["eval"] = _evaluation(done)
        records.append(record)
    return records


def _write_run(path: Path, records: list[dict[str, object]], *, finished: bool = True) -> Path:
    """Writes `records` and, for a finished run, the files beside them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
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
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


EVERY_PLOT = {plot.name for plot in plots.PLOTS}
NEEDS_VALUE = {"calibration", "value_histogram", "value_quality", "replay_priorities"}


def _drawn(run_dir: Path) -> set[str]:
    return {path.stem for path in (run_dir / "plots").glob("*.png")}


def test_report_of_a_finished_run_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    path = report.make_report(_write_run(tmp_path / "my-run", _records()))
    page = Page(path)
    assert path == tmp_path / "my-run" / "report.html"
    assert page.open_tags == [], "every tag is closed"
    assert _drawn(path.parent) == EVERY_PLOT
    assert len(page.sources) == len(EVERY_PLOT)
    for source in page.sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "://" not in path.read_text(encoding="utf-8")
    for text in (
        "my-run",
        "finished",
        "0.142 \u2192 0.287",
        "0.574 \u2192 0.646",
        "loss.beta",
        "value_rank_correlation",
    ):
        assert text in page.text
    assert page.scripts == 0, "a completion is text, whatever it holds"
    assert "1+9-5-3<script>#" in page.text


def test_rollouts_shown_are_the_newest_of_each_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PLOTS", ())
    page = Page(report.make_report(_write_run(tmp_path, _records(num_steps=3))))
    shown = [int(step) for step in re.findall(r"^(\d+)951=2:$", page.text, flags=re.MULTILINE)]
    assert shown == [9, 11, 13, 15, 17, 19, 8, 10, 12, 14, 16, 18]


def test_report_without_a_learned_value_leaves_those_figures_out(tmp_path: Path) -> None:
    run_dir = _write_run(tmp_path, _records())
    report.make_report(run_dir)
    _write_run(run_dir, _records(learned_value=False))
    report.make_report(run_dir)
    assert _drawn(run_dir) == EVERY_PLOT - NEEDS_VALUE, "figures of the earlier report are gone too"


def test_report_of_a_running_run_without_evaluation(tmp_path: Path) -> None:
    records = [{key: r[key] for key in ("step", "reward_mean", "seconds")} for r in _records(num_steps=4)[1:]]
    run_dir = _write_run(tmp_path, records, finished=False)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    page = Page(report.make_report(run_dir))
    assert _drawn(run_dir) == {"train_reward", "seconds_by_phase"}
    assert "not finished: step 4" in page.text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_report_after_the_first_steps(tmp_path: Path, count: int) -> None:
    run_dir = _write_run(tmp_path, _records(num_steps=3)[:count], finished=False)
    report.make_report(run_dir)
    assert _drawn(run_dir) == ({"learning_curve"} if count == 1 else EVERY_PLOT)


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
        ("", "holds no record yet"),
        ('{"step": 1}\nbroken\n{"step": 2}\n', "metrics.jsonl:2 is not JSON"),
        ('{"loss": 1}\n', "metrics.jsonl:1 is not a metrics record"),
    ],
)
def test_a_folder_without_usable_metrics_is_an_input_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        report.make_report(tmp_path)


def test_command_line_prints_the_path_and_exits_2_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PLOTS", ())
    report.main([str(_write_run(tmp_path, _records(num_steps=2)))])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "absent")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"report: no run folder at {tmp_path / 'absent'}\n"


def _axes(figure: Figure | None) -> list[Axes]:
    assert figure is not None
    return list(figure.axes)


def test_learning_curve_draws_the_headline_against_rollouts() -> None:
    axes = _axes(plots.learning_curve(_records()))[0]
    line = next(line for line in axes.get_lines() if line.get_label() == "headline")
    assert np.asarray(line.get_xdata()).tolist() == [0, 2560, 5120, 7680]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([0.142, 0.142 + 0.145 / 3, 0.142 + 0.29 / 3, 0.287])


def test_calibration_compares_the_first_third_with_the_last() -> None:
    record = {"step": 1, "value_fresh": [0.21, 0.28, 1.0, None], "accuracy_fresh": [0.5, 0.25, 1.0, 0.5]}
    late = {"step": 9, "value_fresh": [0.71], "accuracy_fresh": [0.75]}
    axes = _axes(plots.calibration([record, record, late]))
    assert [a.get_title(loc="left") for a in axes] == ["first 1 steps: 4 groups", "last 1 steps: 1 groups"]
    first, last = (np.asarray(a.collections[-1].get_offsets()) for a in axes)
    assert first == pytest.approx(np.array([[0.245, 0.375], [1.0, 1.0]]))
    assert last == pytest.approx(np.array([[0.71, 0.75]]))
    areas = axes[0].collections[-1].get_sizes()  # type: ignore[attr-defined]
    assert areas[0] == pytest.approx(400)
    assert areas[1] == pytest.approx(210), "half the groups, half the scaled area"


def test_histogram_columns_are_shares_of_their_own_step() -> None:
    records = [{"step": 1, "value_histogram": [3, 1]}, {"step": 2, "value_histogram": [0, 8]}]
    mesh = _axes(plots.value_histogram(records))[0].collections[0]
    assert np.asarray(mesh.get_array()).tolist() == [[0.75, 0.0], [0.25, 1.0]]
    priorities = [{"step": 1, "replay_priorities": [0.0, 0.26, 0.27, 0.99]}]
    column = np.asarray(_axes(plots.replay_priorities(priorities))[0].collections[0].get_array())[:, 0]
    assert {int(i): float(column[i]) for i in np.flatnonzero(column)} == {0: 0.25, 5: 0.5, 19: 0.25}


def test_seconds_are_stacked_and_shares_are_of_the_whole_run() -> None:
    records = [{"step": s, "seconds": {"generate": 1.0 * s, "update": 2.0, "idle": 0.0, "other": 0.5}} for s in (1, 2)]
    figure = plots.seconds_by_phase(records)
    axes = _axes(figure)[0]
    bars = [(b.get_x() + 0.5, b.get_y(), b.get_height()) for b in axes.patches]  # type: ignore[attr-defined]
    assert bars == [(1, 0, 1), (2, 0, 2), (1, 1, 2), (2, 2, 2), (1, 3, 0.5), (2, 4, 0.5)]
    assert figure is not None
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["other  12%", "update  50%", "generate  38%"]


def test_mixed_groups_say_what_uniform_prompts_would_give() -> None:
    texts = [t.get_text() for t in _axes(plots.mixed_groups(_records(num_steps=3)))[0].texts]
    assert texts == ["uniform prompts: 14%"]
    assert _axes(plots.mixed_groups([{"step": 1, "mixed_group_share": 0.5}]))[0].texts[:] == []


def test_the_smoothed_line_is_a_mean_of_neighbours_also_at_the_ends() -> None:
    records = [{"step": s, "reward_mean": float(s == 23)} for s in range(1, 46)]
    raw, smooth = (np.asarray(line.get_ydata()) for line in _axes(plots.train_reward(records))[0].get_lines())
    assert raw.sum() == 1.0
    assert smooth[21:24].tolist() == pytest.approx([1 / 3] * 3)
    level = [{"step": s, "reward_mean": 0.5} for s in range(1, 46)]
    flat = np.asarray(_axes(plots.train_reward(level))[0].get_lines()[1].get_ydata())
    assert flat.tolist() == pytest.approx([0.5] * 45), "no droop where the window leaves the run"


def test_importing_report_needs_no_torch_and_no_window_system() -> None:
    code = "import sys, paced_fast.report; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Numbers against brute force and hand-worked cases, files against kills, displays against what a reader needs."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import subprocess
import sys
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from paced_fast.errors import InputError
from paced_fast.evaluation import calibration
from paced_fast.run.record import files, loggers, terminal
from paced_fast.run.record.phases import Phases
from paced_fast.run.record.writer import MetricsWriter, drop_steps


def test_brier_score_is_the_mean_over_single_outcomes() -> None:
    values, groups = [0.2, 0.9], [[1, 0, 0, 0], [1, 1]]
    outcomes = [(v, x) for v, group in zip(values, groups, strict=True) for x in group]
    expected = np.mean([(x - v) ** 2 for v, x in outcomes])
    assert calibration.brier_score(values, [0.25, 1.0], group_size=[4, 2]) == pytest.approx(expected)
    by_group = np.mean([np.mean([(x - v) ** 2 for x in g]) for v, g in zip(values, groups, strict=True)])
    assert calibration.brier_score(values, [0.25, 1.0], group_size=8) == pytest.approx(by_group)
    assert calibration.brier_score([0.5], [0.5]) == 0.25, "a perfect value keeps the outcomes' own variance"
    assert math.isnan(calibration.brier_score([], []))


def test_ece_bins_own_their_lower_edge_and_the_last_owns_one() -> None:
    # 0.5 belongs to [0.5, 1] with 1.0; together their mean value 0.75 meets the mean accuracy 0.75.
    assert calibration.expected_calibration_error([0.5, 1.0], [1.0, 0.5], bins=2) == pytest.approx(0.0)
    # 0.49 and 0.51 lie in two bins, so their errors cannot cancel.
    assert calibration.expected_calibration_error([0.49, 0.51], [0.51, 0.49], bins=2) == pytest.approx(0.02)
    # Two of three groups are off by 0.3 in one bin, the third by 0.1: weighted by groups.
    assert calibration.expected_calibration_error([0.05, 0.05, 0.9], [0.35, 0.35, 1.0]) == pytest.approx(0.7 / 3)
    assert math.isnan(calibration.expected_calibration_error([], []))
    assert math.isnan(calibration.expected_calibration_error([math.nan, 0.5], [0.5, 0.5]))


def test_rank_correlation_averages_ties() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3.5, 3.5: covariance 3 over sqrt(4.5 * 4).
    assert calibration.rank_correlation([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]) == pytest.approx(3 / math.sqrt(18))
    assert calibration.rank_correlation([1, 2, 3, 4], [10, 100, 1000, 10_000]) == pytest.approx(1.0)
    assert calibration.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("v", "a"), [([0.5, 0.5], [0, 1]), ([0.1, 0.9], [1, 1]), ([0.3], [1]), ([], []), ([math.nan, 0.1], [0, 1])]
)
def test_rank_correlation_without_an_order_is_none(v: list[float], a: list[float]) -> None:
    assert calibration.rank_correlation(v, a) is None


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=30))
def test_rank_correlation_ignores_order_of_groups_and_monotone_scale(pairs: list[tuple[int, int]]) -> None:
    v, a = (np.array(x, dtype=float) for x in zip(*pairs, strict=True))
    before = calibration.rank_correlation(v, a)
    after = calibration.rank_correlation(np.exp(v[::-1]), a[::-1])
    assert after == (pytest.approx(before, abs=1e-9) if before is not None else None)


def test_measures_refuse_lists_of_different_length() -> None:
    for measure in (calibration.brier_score, calibration.expected_calibration_error, calibration.rank_correlation):
        with pytest.raises(ValueError, match="disagree on P: 2 vs 1"):
            measure([0.1, 0.2], [1.0])


def test_mixed_group_share_counts_neither_all_right_nor_all_wrong() -> None:
    assert calibration.mixed_group_share([0.0, 0.125, 0.875, 1.0]) == 0.5
    assert math.isnan(calibration.mixed_group_share([]))


def test_metrics_lines_keep_their_order_and_turn_non_finite_numbers_to_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        record = {"step": 1, "loss": math.nan, "a": np.float32(0.5), "b": {"x": [math.inf, 1], "y": np.arange(2)}}
        writer.write(record)
        line = (tmp_path / "metrics.jsonl").read_text()  # before closing: each line is flushed
    assert line == '{"step": 1, "loss": null, "a": 0.5, "b": {"x": [null, 1], "y": [0, 1]}}\n'


def test_metrics_refuse_what_json_cannot_hold_and_records_without_a_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(TypeError, match="set cannot be written as JSON"):
            writer.write({"step": 1, "loss": {1.0}})
        with pytest.raises(ValueError, match="integer step"):
            writer.write({"loss": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_resume_drops_later_steps_and_a_torn_line_from_both_files(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write({"step": step})
            writer.write_rollouts([{"step": step, "prompt": "p"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # what a kill in the middle of a write leaves
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 4})
        writer.drop_from(3)
        writer.write({"step": 3, "again": True})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    rollouts = [json.loads(line)["step"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts == [0, 1, 2]


def test_dropping_steps_names_a_broken_line_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="jsonl:2 is not a metrics record"):
        drop_steps(path, 1)
    assert path.read_text().count("\n") == 3
    assert drop_steps(tmp_path / "absent.jsonl", 1) == 0


def test_atomic_json_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    files.write_json_atomic(path, {"a": math.inf, "path": tmp_path})
    assert json.loads(path.read_text()) == {"a": None, "path": str(tmp_path)}

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        files.write_json_atomic(path, {"a": 1})
    assert json.loads(path.read_text())["a"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"], "no temporary file stays behind"


def test_sinks_are_named_and_a_missing_one_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unknown logger 'neptune': choose from wandb, tensorboard, trackio, mlflow"):
        MetricsWriter(tmp_path / "run", sinks=["neptune"])
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises ImportError
    with pytest.raises(InputError, match=r"pip install 'wandb>=0.20'"):
        MetricsWriter(tmp_path / "run", sinks=["wandb"])
    assert not (tmp_path / "run").exists()


def test_sinks_receive_flat_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[object] = []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((row, step)), finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    with MetricsWriter(tmp_path, sinks=["wandb"]) as writer:
        writer.write({"step": 7, "loss": math.nan, "seconds": {"update": 0.5}, "value_fresh": [0.1], "done": True})
    assert logged == [({"time/update": 0.5}, 7), "end"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_keep_the_most_memory_of_each() -> None:
    held = iter([5, 10, 90, 20, 7, 1, 2])
    phases = Phases(memory=lambda: next(held))
    with phases.phase("update"), phases.phase("head"):  # 5 before it, 10 for update before head
        pass  # 90 for head, then 20 for update
    assert phases.peak_bytes == {}
    phases.take()  # other 7
    assert phases.peak_bytes == {"other": 7, "update": 20, "head": 90}
    phases.take()
    assert phases.peak_bytes == {"other": 1}, "a step starts from nothing"


def test_phases_add_up_to_the_step_and_nest_without_counting_twice() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    clock.now += 1
    with phases.phase("update"):
        clock.now += 2
        with phases.phase("head"):
            clock.now += 4
        clock.now += 8
    with suppress(RuntimeError), phases.phase("generate"):
        clock.now += 16
        raise RuntimeError("a failing phase is charged as well")
    with phases.phase("update"):
        clock.now += 32
    assert phases.take() == {"update": 42.0, "head": 4.0, "generate": 16.0, "other": 1.0}
    clock.now += 3
    assert phases.take() == {"other": 3.0}, "a step starts from nothing"


def test_configured_logging_reaches_the_console_once() -> None:
    out = io.StringIO()
    for _ in range(2):
        terminal.configure_logging(console=Console(file=out))
    logging.getLogger("paced_fast.train").info("hello")
    assert out.getvalue().count("INFO hello") == 1
    terminal.configure_logging(rank=1, console=Console(file=out))
    logging.getLogger("paced_fast.train").info("quiet")
    assert "quiet" not in out.getvalue()


def _text(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_show_the_numbers() -> None:
    config = _text(terminal.config_table({"data.template": "[bold]{prompt}", "seed": 7}))
    assert "data.template" in config
    assert "[bold]{prompt}" in config, "brackets are text, not markup"
    plan = _text(terminal.memory_plan_table({"weights": 2**30, "optimizer": 2**31}, available_bytes=2**33))
    assert [line.split()[-2] for line in plan.splitlines() if "\u2502" in line] == ["1.000", "2.000", "3.000", "8.000"]
    final = _text(
        terminal.final_table({"accuracy_before": 0.142, "accuracy_after": 0.291, "steps": 150}, run_dir="runs/x")
    )
    assert "0.142 -> 0.291" in final
    assert [line.split("\u2502")[1].strip() for line in final.splitlines() if "\u2502" in line] == [
        "accuracy",
        "steps, rollouts",
        "run folder",
    ], "what is missing or null has no line"
    assert "150, -" in final
    assert "runs/x" in final
    fell = {"forgetting": [{"slice": "trivial", "before": 0.98, "after": 0.787}]}
    assert "trivial 0.980 -> 0.787" in _text(terminal.final_table(fell, run_dir="x"))


@pytest.mark.parametrize(
    ("summary", "accuracy"),
    [
        (
            {"accuracy_before": None, "pass_at_8_after": None},
            "not measured: give held-out rows by --eval-data A",
        ),
        ({"accuracy_after": None, "curve": [{"accuracy": None}]}, "not measured: no completion was scored"),
        ({"accuracy_after": 0.5, "curve": [{"accuracy": 0.5}]}, "- -> 0.500"),
    ],
)
def test_a_table_says_why_accuracy_is_missing(summary: dict[str, object], accuracy: str) -> None:
    rows = _text(terminal.final_table({"steps": 3, **summary}, run_dir="x", held_out="--eval-data A")).splitlines()
    cells = [[cell.strip() for cell in row.split("\u2502")[1:3]] for row in rows if "\u2502" in row]
    assert cells == [["accuracy", accuracy], ["steps, rollouts", "3, -"], ["run folder", "x"]]


@pytest.mark.process
def test_importing_metrics_needs_no_torch() -> None:
    code = "import sys, paced_fast.run.record.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_sink_is_found_before_any_work(monkeypatch):
    with pytest.raises(InputError, match="unknown logger 'wandbb'"):
        loggers.require_sinks(["wandbb"])
    monkeypatch.setattr("paced_fast.run.record.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tensorboard>=2.18'"):
        loggers.require_sinks(["tensorboard"])
    loggers.require_sinks([])

"""What loggers get: names in groups, no constants, one run however often it is resumed; each real package, offline."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from loggers_alike import Wandb

from paced_fast import train
from paced_fast.run.record import logged, sinks
from paced_fast.run.record.sinks import RunInfo
from paced_fast.run.record.writer import MetricsWriter

ROOT = Path(__file__).resolve().parents[2]
LINES: dict[str, list[str]] = json.loads((Path(__file__).parent / "metrics_lines.json").read_text())


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES["paced"]]


def test_every_figure_is_in_a_group_and_no_setting_is_a_curve() -> None:
    found = {name for record in records() for name in logged.figures(record)}
    assert {name.partition("/")[0] for name in found} == {"train", "eval", "value", "time"}
    assert {"train/loss", "train/reward_mean", "eval/accuracy", "value/brier", "value/head_loss"} <= found
    assert {"time/update", "time/tokens_per_second", "time/train_seconds", "value/held_out_brier"} <= found
    ends = {name.rpartition("/")[2] for name in found}
    assert ends.isdisjoint({"step", "seed", "samples", "temperature", "top_p", "max_completion_tokens", "prompts"})
    assert ends.isdisjoint({"repeated", "training_prompts"})


def test_names_of_an_evaluation() -> None:
    evaluation = {
        "accuracy": 0.5,
        "accuracy_interval": [0.4, 0.6],
        "pass_at_k": {"1": 0.5, "2": 0.6, "3": 0.7, "x": 1.0},
        "seconds": 3.0,
        "seed": 7,
        "slices": {"k4": {"accuracy": 0.25, "prompts": 9, "pass_at_8": None}},
        "prompt_accuracy": [1.0],
    }
    assert logged.figures({"step": 1, "eval": evaluation, "weight_sync": {"bytes": 4}, "parity": {"mean": 0.1}}) == {
        "eval/accuracy": 0.5,
        "eval/pass_at_k/1": 0.5,
        "eval/pass_at_k/2": 0.6,
        "time/eval_seconds": 3.0,
        "eval/slices/k4/accuracy": 0.25,
        "time/weight_sync/bytes": 4.0,
        "train/parity/mean": 0.1,
    }
    assert logged.histograms({"value_histogram": [1, 2]}) == {"value/histogram": [1, 2]}
    assert logged.histograms({"step": 1}) == {}


def test_a_run_gives_wandb_figures_a_histogram_completions_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "log", lambda row, step: rows.append(row | {"step": step}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("paced_fast.run.record.writer._TABLE_EVERY", 2)
    monkeypatch.setattr("paced_fast.report.run_page.report_of", lambda run, **_: ("<p>the report", {}))
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        steps=4,
        run__loggers=("wandb",),
        run__project="sums",
        run__group="first",
        run__tags=("a", "b"),
        run__report=True,
        run__report_every=0,
        run_dir=str(tmp_path / "run"),
    )
    train.run(settings, tiny_run.quiet())
    ((_, begun),) = [asked for asked in wandb.asked if asked[0] == "init"]
    assert {name: begun[name] for name in ("project", "group", "tags", "name")} == {
        "project": "sums",
        "group": "first",
        "tags": ["a", "b"],
        "name": "run",
    }
    assert begun["config"]["generation.group_size"] == 4
    counts, edges = next(row["value/histogram"] for row in rows if "value/histogram" in row)["np_histogram"]
    assert (sum(counts), len(edges), edges[-1]) == (40, len(counts) + 1, 1.0)
    tables = [row["completions"] for row in rows if "completions" in row]
    assert [row["step"] for row in rows if "completions" in row] == [2, 4]
    assert tables[0]["columns"] == ["step", "slice", "prompt", "completion", "reward", "value", "replayed"]
    assert len(tables[1]["data"]) > len(tables[0]["data"]) > 1
    ((_, artifact),) = [asked for asked in wandb.asked if asked[0] == "artifact"]
    assert (artifact.type, artifact.files) == ("report", [str(tmp_path / "run" / "report.html")])
    assert [name for name, _ in wandb.asked][-1] == "finish", "the report comes before the end"


def test_a_logger_that_fails_gets_no_tables_until_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb(failing=("log",))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("paced_fast.run.record.writer._TABLE_EVERY", 1)
    with MetricsWriter(tmp_path, sinks=["wandb"]) as writer:
        for step in range(1, 4):
            writer.write({"step": step, "loss": 1.0})
            writer.write_rollouts([{"step": step, "prompt": "p", "completion": "c"}])
        assert wandb.count("log") == 2, "figures at steps 1 and 3, and no table in between"


class Events:
    """Stands for torch.utils.tensorboard."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def SummaryWriter(self, folder: str) -> Events:
        self.asked.append(("open", Path(folder).name))
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: self.asked.append((name, *words, named))


def test_tensorboard_gets_histograms_and_tables() -> None:
    events = Events()
    sink = sinks.Tensorboard(events, RunInfo(folder=Path("run")))
    sink.log({"train/loss": 1.0}, {"value/histogram": [1.0, 3.0]}, 7)
    sink.table("completions", [{"prompt": "a|b", "completion": "<i>\n", "reward": None}], 7)
    sink.artifact(Path("report.html"), "report")
    assert events.asked[1] == ("add_scalar", "train/loss", 1.0, 7, {})
    drawn = events.asked[2][-1]
    assert (drawn["num"], drawn["sum"], drawn["bucket_limits"], drawn["global_step"]) == (4.0, 2.5, [0.5, 1.0], 7)
    assert drawn["sum_squares"] == pytest.approx(0.0625 + 3 * 0.5625)
    assert events.asked[3][2].splitlines()[2] == "| a\\|b | &lt;i><br> |  |"
    assert len(events.asked) == 4


def test_an_id_that_cannot_be_kept_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sinks.remember(tmp_path, "mlflow", "7")
    assert sinks.run_id(tmp_path, "mlflow") == "7"
    sinks.remember(tmp_path, "wandb", "")
    assert sinks.run_id(tmp_path, "wandb") is None
    with caplog.at_level(logging.WARNING):
        sinks.remember(tmp_path / "gone", "trackio", "8")
    assert "after a resume, metrics go to a new trackio run" in caplog.text


_TWICE = """
import json, sys
from pathlib import Path
from paced_fast.run.record.writer import MetricsWriter
name, folder, lines = sys.argv[1], Path(sys.argv[2]), json.load(open(sys.argv[3]))["paced"]
records = [json.loads(line) for line in lines]
for part in (records[:3], records[3:]):
    options = dict(sinks=[name], config={"seed": 0, "data.train": ["a"]}, project="sums", group="g", tags=("t",))
    with MetricsWriter(folder, **options) as writer:
        for record in part:
            writer.write(record)
        writer.write_rollouts([{"step": 25, "prompt": "p<", "completion": "c|", "reward": 1.0, "value": None}])
        (folder / "report.html").write_text("<p>")
        writer.artifact(folder / "report.html", "report")
"""


def log_twice(name: str, folder: Path, **env: str) -> str:
    """The records of a run and of its continuation, in a process of its own, by the real package; what it printed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    folder.mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    words = [sys.executable, "-c", _TWICE, name, str(folder), str(Path(__file__).parent / "metrics_lines.json")]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=False
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "logger" not in told, "a failure is told by that word"
    return told


@pytest.mark.process
@pytest.mark.slow
def test_the_real_wandb_goes_on_with_its_run(tmp_path: Path) -> None:
    log_twice("wandb", tmp_path / "run", WANDB_MODE="offline", WANDB_SILENT="true")
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    parts = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(parts) == 2
    assert all(name.endswith(known) for name in parts)


@pytest.mark.process
@pytest.mark.slow
def test_the_real_tensorboard_reads_all_of_it(tmp_path: Path) -> None:
    log_twice("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    steps = [event.step for event in found.Scalars("train/loss")]
    assert steps == [record["step"] for record in records() if "loss" in record]
    assert found.Tags()["histograms"] == ["value/histogram"]
    assert found.Tags()["tensors"] == ["completions/text_summary"]


@pytest.mark.process
@pytest.mark.slow
def test_the_real_trackio_goes_on_with_its_run(tmp_path: Path) -> None:
    log_twice("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    with sqlite3.connect(tmp_path / "trackio" / "sums.db") as base:
        names = base.execute("select distinct run_name from metrics").fetchall()
        steps = {step for (step,) in base.execute("select step from metrics").fetchall()}
    assert [name for (name,) in names] == [json.loads((tmp_path / "run" / "trackio.json").read_text())["id"]]
    assert steps == {record["step"] for record in records()} | {25}


@pytest.mark.process
@pytest.mark.slow
def test_the_real_mlflow_goes_on_with_its_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("sqlalchemy") is None:
        pytest.skip("needs sqlalchemy, which mlflow-skinny leaves out")
    log_twice("mlflow", tmp_path / "run", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}")
    known = json.loads((tmp_path / "run" / "mlflow.json").read_text())["id"]
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        assert base.execute("select run_uuid, status from runs").fetchall() == [(known, "FINISHED")]
        found = base.execute("select step from metrics where key = 'train/loss' order by step").fetchall()
        tags = dict(base.execute("select key, value from tags").fetchall())
    assert [step for (step,) in found] == [record["step"] for record in records() if "loss" in record]
    assert (tags["group"], tags["tag.t"]) == ("g", "true")
    assert len(list((tmp_path / "run").rglob("report.html"))) == 2, "the run's and the artefact"


def test_old_folders_with_an_id_of_wandb_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb.json").write_text('{"id": "of-before"}')
    MetricsWriter(tmp_path, sinks=["wandb"]).close()
    assert wandb.asked[0][1]["id"] == "of-before"

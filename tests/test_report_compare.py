"""The comparison of runs: who belongs together, what is drawn, and which differences are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paced_fast.report.__main__ import main
from paced_fast.report.compare import _ROWS, Group, _ends, _overlap, _paired, grouped, mean_line, page_of
from paced_fast.report.records import Run
from paced_fast.report.svg import Line


def _records(
    accuracy: float, *, interval: tuple[float, float] | None = None, prompts: list[float] | None = None
) -> Any:
    last: dict[str, Any] = {"accuracy": accuracy, "pass_at_8": min(1.0, 2 * accuracy)}
    if interval is not None:
        last["accuracy_interval"] = list(interval)
    end: dict[str, Any] = {"step": 2, "rollouts": 20, "train_seconds": 4.0, "reward_mean": accuracy, "eval": last}
    if prompts is not None:
        end["eval_value"] = {"accuracies": prompts}
    return [{"step": 0, "rollouts": 0, "train_seconds": 0.0, "eval": {"accuracy": 0.1, "pass_at_8": 0.2}}, end]


def _run(name: str, accuracy: float, seed: int = 0, *, settings: dict[str, object] | None = None, **more: Any) -> Run:
    config = {"algorithm": "paced", "seed": seed, "run_dir": name, "run.threads": seed, **(settings or {})}
    return Run(folder=Path(name), records=_records(accuracy, **more), config=config)


def _folder(path: Path, run: Run) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run.records))
    (path / "config.json").write_text(json.dumps(run.config))
    return path


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    runs = [_run("tiny-0", 0.2), _run("grpo", 0.3, settings={"algorithm": "grpo"}), _run("tiny-1", 0.4, 1)]
    groups = grouped(runs)
    assert [(g.name, [r.name for r in g.runs]) for g in groups] == [("tiny", ["tiny-0", "tiny-1"]), ("grpo", ["grpo"])]
    unknown = [Run(folder=Path(name), records=[{"step": 1}]) for name in "ab"]
    assert len(grouped(unknown)) == 2, "without a configuration nobody knows"


def test_a_group_has_the_mean_and_its_standard_error_as_far_as_all_have_come() -> None:
    one = Line(name="", x=np.array([0.0, 2.0, 4.0]), y=np.array([0.0, 2.0, 8.0]))
    two = Line(name="", x=np.array([0.0, 1.0, 2.0]), y=np.array([2.0, 2.0, 4.0]))
    line = mean_line([one, two], name="m", color=3)
    assert line is not None
    assert line.low is not None
    assert line.x.tolist() == [0, 1, 2]
    assert line.y.tolist() == [1.0, 1.5, 3.0]
    # Of two values the standard error of the mean is half their difference.
    assert (line.y - line.low).tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert mean_line([], name="m", color=0) is None


def test_differences_intervals_and_settings_are_shown() -> None:
    first = _run("first", 0.2, interval=(0.15, 0.25), prompts=[0.0, 0.5, 0.5])
    second = _run("second", 0.3, settings={"algorithm": "grpo"}, interval=(0.26, 0.34), prompts=[0.5, 0.5, 1.0])
    text = page_of([first, second])
    assert "30% [26%, 34%]  (+10.0 points, intervals apart)" in text
    assert "60%  (+20.0 points)" in text
    # Differences of 1/2, 0 and 1/2: mean 1/3, standard error 1/6.
    assert "+33.3 points +- 16.7% over 3 prompts, paired" in text
    settings = text[text.index('<section id="settings">') : text.index('<section id="runs">')]
    assert "algorithm" in settings
    assert "run_dir" not in settings
    assert "run.threads" not in settings
    assert "seed" not in settings


def test_intervals_overlap_when_they_share_a_point() -> None:
    assert _overlap((0.1, 0.3), (0.3, 0.5)) == ", intervals overlap"
    assert _overlap((0.1, 0.3), (0.31, 0.5)) == ", intervals apart"
    assert _overlap((0.4, 0.5), (0.1, 0.3)) == ", intervals apart"
    assert _overlap((float("nan"), 0.3), (0.3, 0.5)) == ""


def test_several_seeds_have_two_standard_errors() -> None:
    accuracy = next(row for row in _ROWS if row.key == "accuracy")
    group = Group(name="g", runs=[_run("a", 0.2), _run("b", 0.4, 1)])
    assert _ends(accuracy, group, [0.2, 0.4]) == pytest.approx((0.1, 0.5))


def test_other_held_out_prompts_are_not_paired() -> None:
    groups = [Group(name=n, runs=[_run(n, 0.2, settings={"data.eval": [n]}, prompts=[0.0, 1.0])]) for n in ("a", "b")]
    assert _paired(*groups) == ""


def test_command_line_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (_folder(tmp_path / name, _run(name, 0.2)) for name in ("a", "b"))
    main([str(a), str(b)])
    assert capsys.readouterr().out == f"{tmp_path / 'compare.html'}\n"
    main([str(a), str(b), "--out", str(tmp_path / "new" / "x.html")])
    assert (tmp_path / "new" / "x.html").read_text().count("</html>") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "absent"], "no run folder at absent"),
        (["a", "b", "./a"], "a is named twice: give different run folders"),
        (["a", "b", "--out", "b"], "--out b is a folder: give the name of a file"),
        (["a", "--out", "x.html"], "--out is for a comparison: give two run folders or more, or leave it out"),
        (["a", "empty"], "no metrics.jsonl in empty: it is no run folder, or the run has not started"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        _folder(Path(name), _run(name, 0.2))
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"report: {message}\n"


def test_runs_without_anything_in_common_are_compared() -> None:
    bare = Run(folder=Path("bare"), records=[{"step": 1, "loss": None}])
    assert "no config.json: bare" in page_of([bare, _run("full", 0.2)])

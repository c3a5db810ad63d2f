"""The comparison of runs: who belongs together, what is drawn, and which differences are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import drawn_charts
import numpy as np
import pytest

from paced_fast.report.__main__ import main
from paced_fast.report.charts.chart import Line
from paced_fast.report.compare_page import page_of
from paced_fast.report.figures_table import _EVALUATED, _ends, _overlap, paired
from paced_fast.report.read_run import Run
from paced_fast.report.seeds import SeedGroup, grouped, mean_line, t_quantile


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_charts.draws_nothing(monkeypatch)


def _records(
    accuracy: float, *, interval: tuple[float, float] | None = None, prompts: dict[str, float | None] | None = None
) -> Any:
    last: dict[str, Any] = {"accuracy": accuracy, "pass_at_8": min(1.0, 2 * accuracy)}
    if interval is not None:
        last["accuracy_interval"] = list(interval)
    end: dict[str, Any] = {"step": 2, "rollouts": 20, "train_seconds": 4.0, "reward_mean": accuracy, "eval": last}
    first: dict[str, Any] = {"accuracy": 0.1, "pass_at_8": 0.2}
    if prompts is not None:
        first |= {"prompt_ids": list(prompts), "prompt_slices": [name[0] for name in prompts]}
        last["prompt_accuracy"] = list(prompts.values())
    return [{"step": 0, "rollouts": 0, "train_seconds": 0.0, "eval": first}, end]


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


def test_a_group_is_named_by_what_its_runs_share() -> None:
    def named(*names: str) -> list[str]:
        return [g.name for g in grouped([_run(n, 0.2, i, settings={"preset": "tiny"}) for i, n in enumerate(names)])]

    assert named("kk-seed1", "kk-seed12") == ["kk"]
    assert named("b", "c") == named("seed0", "seed1") == named("s1", "s2") == ["tiny paced"]
    assert named("x/out", "y/out") == ["out"]


def test_quantiles_of_t_are_those_of_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 11: 2.201, 20: 2.086, 60: 2.000, 1000: 1.962}
    assert {n: t_quantile(n) for n in known} == pytest.approx(known, abs=1e-3)


def test_a_group_has_the_mean_and_its_interval_as_far_as_all_have_come() -> None:
    one = Line(name="", x=np.array([0.0, 2.0, 4.0]), y=np.array([0.0, 2.0, 8.0]))
    two = Line(name="", x=np.array([0.0, 1.0, 2.0]), y=np.array([2.0, 2.0, 4.0]))
    line = mean_line([one, two], name="m", color=3)
    assert line is not None
    assert line.low is None, "two seeds are too few"
    assert line.x.tolist() == [0, 1, 2]
    assert line.y.tolist() == [1.0, 1.5, 3.0]
    line = mean_line([one, two, Line(name="", x=one.x, y=np.array([1.0, 3.0, 0.0]))], name="m", color=3)
    assert line is not None
    assert line.low is not None
    # 0, 2 and 1: mean 1, deviation 1; t of two degrees of freedom.
    assert line.y[0] - line.low[0] == pytest.approx(4.303 / 3**0.5)
    assert mean_line([], name="m", color=0) is None


def test_what_a_band_is_is_said() -> None:
    interval = (0.1, 0.5)
    group = [_run(f"g{i}", 0.2 + 0.1 * i, i, interval=interval) for i in range(3)]
    single = _run("one", 0.3, settings={"algorithm": "grpo"}, interval=interval)
    text = page_of([*group[:2], single])
    assert "because there are too few seeds" in text
    assert "Band of a single run: 95% interval over held-out prompts." in text
    assert "Band of a group" not in text
    text = page_of([*group, single])
    assert "too few seeds" not in text
    assert "Band of a group: 95% t interval of the mean over its seeds." in text


def test_pass_at_k_of_a_group_is_the_mean_of_its_seeds() -> None:
    text = page_of([_run("g0", 0.2), _run("g1", 0.4, 1)])
    chart = text[text.index('id="chart-pass_at_k"') :]
    assert "30% to 60%" in chart[: chart.index("data-hover")]


def test_differences_intervals_and_settings_are_shown() -> None:
    first = _run("first", 0.2, interval=(0.15, 0.25), prompts={"a1": 0.0, "a2": 0.5, "a3": 0.5})
    second = _run(
        "second",
        0.3,
        settings={"algorithm": "grpo"},
        interval=(0.26, 0.34),
        prompts={"a3": 1.0, "a1": 0.5, "a2": 0.5},
    )
    text = page_of([first, second])
    assert "30% [26%, 34%]  (+10.0 points, intervals do not overlap)" in text
    assert "60%  (+20.0 points)" in text
    # Differences of 1/2, 0 and 1/2: mean 1/3, standard error 1/6, t 4.303.
    assert "+33.3 points [-38.4, +105.0] over 3 prompts" in text
    settings = text[text.index('<section id="settings">') : text.index('<section id="runs">')]
    assert "algorithm" in settings
    assert "run_dir" not in settings
    assert "run.threads" not in settings
    assert "seed" not in settings


def test_intervals_overlap_when_they_share_a_point() -> None:
    assert _overlap((0.1, 0.3), (0.3, 0.5)) == ", intervals overlap"
    assert _overlap((0.1, 0.3), (0.31, 0.5)) == ", intervals do not overlap"
    assert _overlap((0.4, 0.5), (0.1, 0.3)) == ", intervals do not overlap"
    assert _overlap((float("nan"), 0.3), (0.3, 0.5)) == ""


def test_several_seeds_have_the_interval_of_their_mean() -> None:
    accuracy = next(row for row in _EVALUATED if row.key == "accuracy")
    group = SeedGroup(name="g", runs=[_run("a", 0.2), _run("b", 0.3, 1), _run("c", 0.4, 2)])
    error = 4.303 * 0.1 / 3**0.5
    assert _ends(accuracy, group, [0.2, 0.3, 0.4]) == pytest.approx((0.3 - error, 0.3 + error))
    assert np.isnan(_ends(accuracy, group, [0.2, 0.3])).all(), "two are too few"


def test_pairs_are_the_headline_prompts_that_both_scored() -> None:
    def group(**prompts: float | None) -> SeedGroup:
        return SeedGroup(name="g", runs=[_run("g", 0.2, settings={"data.headline": ["a"]}, prompts=prompts)])

    first = group(a1=0.0, a2=0.5, a3=None, a4=0.0, b1=0.0)
    assert paired(first, group(a2=0.75, a1=0.25, a3=1.0, b1=1.0)) == "+25.0 points [+25.0, +25.0] over 2 prompts"
    assert paired(first, group(c1=1.0, c2=1.0)) == ""
    assert paired(first, SeedGroup(name="old", runs=[_run("old", 0.2)])) == ""


def test_distinct_completions_of_unlike_numbers_of_samples_are_not_compared() -> None:
    runs = [_run("a", 0.2), _run("b", 0.2, settings={"algorithm": "grpo"})]
    for run, samples in zip(runs, (4, 16), strict=True):
        run.records[-1]["eval"] |= {"distinct_correct": samples / 2, "samples": samples}  # type: ignore[operator,index]
    assert "8  (not comparable: different number of completions)" in page_of(runs)


def test_command_line_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (_folder(tmp_path / name, _run(name, 0.2)) for name in ("a", "b"))
    main([str(a), str(b)])
    assert capsys.readouterr().out == f"{tmp_path / 'compare.html'}\n"
    main([str(a), str(b), "--out", str(tmp_path / "new" / "x.html")])
    assert (tmp_path / "new" / "x.html").read_text().count("</html>") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "absent"], "no such folder absent: give a run folder"),
        (["a", "b", "./a"], "a is named twice: give different run folders"),
        (["a", "b", "--out", "b"], "--out b is a folder: give the name of a file"),
        (["a", "--out", "x.html"], "--out is for a comparison: give two or more run folders, or leave it out"),
        (["a", "empty"], "no metrics.jsonl in empty: give a run folder, or wait for the run's first record"),
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
    assert capsys.readouterr().err == f"error: {message}\n"


def test_runs_without_anything_in_common_are_compared() -> None:
    bare = Run(folder=Path("bare"), records=[{"step": 1, "loss": None}])
    assert "no config.json: bare" in page_of([bare, _run("full", 0.2)])

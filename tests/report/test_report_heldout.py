"""What a page says of held-out evaluations: on which prompts, with which interval, and what had no verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import drawn_charts
import pytest

from paced_fast.report import run_page
from paced_fast.report.charts import held_out, value
from paced_fast.report.read_run import Record, Run


def _run(*evaluations: Record, **first: Any) -> Run:
    rows: list[Record] = [
        {"step": i, "rollouts": 10 * i, "train_seconds": float(i), "eval": e} for i, e in enumerate(evaluations)
    ]
    rows[0] = {**rows[0], **first}
    return Run(folder=Path("a-run"), records=rows)


def _evaluation(accuracy: float, **more: Any) -> Record:
    votes = {"1": accuracy, "4": accuracy + 0.05, "16": accuracy + 0.1}
    passed = {"1": accuracy, "8": 2 * accuracy}
    return {
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.02, accuracy + 0.03],
        "pass_at_8": 2 * accuracy,
        "pass_at_k": passed,
        "pass_at_k_interval": {k: [v - 0.1, v + 0.1] for k, v in passed.items()},
        "maj_at_k": votes,
        "maj_at_k_interval": {k: [v - 0.05, v + 0.05] for k, v in votes.items()},
        "prompts": 40,
        "samples": 16,
        "unscored": 0,
        "unscored_prompts": 0,
    } | more


@pytest.mark.parametrize(
    ("first", "lead"),
    [
        ({}, "Measured on the held-out prompts."),
        ({"overlap": {"repeated": 0, "training_prompts": 4000}}, "Measured on prompts that training never sees."),
        (
            {"overlap": {"repeated": 12, "training_prompts": 4000}},
            "Measured on the held-out prompts; 12 of 4,000 training prompts are among them.",
        ),
    ],
)
def test_that_training_never_sees_them_is_said_only_where_it_was_counted(
    first: dict[str, Any], lead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_charts.draws_nothing(monkeypatch)
    assert lead in run_page.report_of(_run(_evaluation(0.2), **first))[0]


def test_majority_vote_is_shown_at_the_largest_common_k_with_its_interval() -> None:
    run = _run(_evaluation(0.2), _evaluation(0.3, maj_at_k={"1": 0.3, "4": 0.35}))
    tile = next(t for t in run_page._tiles(run) if t.name == "held-out maj@4")
    assert tile.text == "25% \u2192 35%"
    assert "+10.0 points" in tile.sub
    charts = {chart.name: chart for chart in held_out.learning_charts(run)}
    assert charts["maj_at_k"].legend == [("before", 0), ("after step 1", 1)], "the run may go on"
    assert charts["pass_at_8"].title == "pass@8 and maj@4 against rollouts"
    assert held_out.largest_k([{"maj_at_k": {"1": 0.5}}], "maj_at_k") == 0, "one sample is no vote"


def test_pass_at_8_and_accuracy_have_the_interval_of_the_end() -> None:
    tiles = {t.name: t.sub for t in run_page._tiles(_run(_evaluation(0.2), _evaluation(0.3)))}
    assert "95% interval: 50.0 to 70.0% after step 1" in tiles["held-out pass@8"]
    assert (
        tiles["held-out accuracy"] == '<span class="up">+10.0 points</span>; 95% interval: 28.0 to 33.0% after step 1'
    )
    assert tiles["held-out pass@8"].startswith("+20.0 points, within the noise; "), "40 +- 10 % against 60 +- 10 %"
    (alone,) = [t for t in run_page._tiles(_run(_evaluation(0.2))) if t.name == "held-out accuracy"]
    assert alone.sub == "95% interval: 18.0 to 23.0%"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # 20 prompts; the error of their mean change is its spread / sqrt(20): 1.96 * .205 / 4.47 = .090
        ([0.2, -0.2] * 9 + [0.2, 0.2], "+2.0 points, within the noise"),
        ([0.1, 0.1, -0.1, 0.1] * 5, '<span class="up">+5.0 points</span>'),  # .05 +- .039
        ([-0.1, -0.1, 0.1, -0.1] * 5, '<span class="down">-5.0 points</span>'),
        ([0.0] * 20, "+0.0 points, within the noise"),
    ],
)
def test_a_change_has_a_colour_only_beyond_its_noise_prompt_by_prompt(changes: list[float], told: str) -> None:
    """Whatever the intervals of both ends do, which hold the spread of the prompts' difficulty too."""
    before = [0.3 + 0.02 * i for i in range(20)]
    first = _evaluation(0.49, prompt_accuracy=[*before, 0.0], prompt_slices=["k3"] * 20 + ["trivial"], headline=["k3"])
    after = [old + change for old, change in zip(before, changes, strict=True)]
    last = _evaluation(sum(after) / 20, prompt_accuracy=[*after, 1.0], headline=["k3"])
    (tile,) = [t for t in run_page._tiles(_run(first, last)) if t.name == "held-out accuracy"]
    assert tile.sub.startswith(f"{told}; 95% interval: ")


def test_the_prompts_of_the_curve_are_named() -> None:
    run = _run(_evaluation(0.2, headline=["k3", "k4"]), _evaluation(0.3, headline=["k3", "k4"]))
    charts = {chart.name: chart for chart in held_out.learning_charts(run)}
    band = "Band: 95% interval over held-out prompts."
    assert charts["learning_rollouts"].caption == f"On the held-out prompts of slices k3, k4. {band}"
    assert charts["pass_at_8"].caption == f"On the held-out prompts of slices k3, k4. {band}"


def test_pass_at_k_over_time_is_that_of_every_evaluation() -> None:
    """The shorter ones during training have no pass@8, which would leave a dot for a curve."""
    few = {"pass_at_8": None, "pass_at_k": {"1": 0.3, "4": 0.5}}
    run = _run(_evaluation(0.2, pass_at_k={"1": 0.2, "4": 0.4, "8": 0.6}), _evaluation(0.3, **few))
    (chart,) = [chart for chart in held_out.learning_charts(run) if chart.name == "pass_at_8"]
    passed = next(line for line in chart.lines if line.name == "pass@4")
    assert passed.y.tolist() == [0.4, 0.5]
    assert chart.title.startswith("pass@4")


def test_one_group_has_no_standard_error() -> None:
    record = {"step": 1, "value_fresh": [0.21, 0.28, 0.9], "accuracy_fresh": [0.5, 0.25, 1.0]}
    (chart, *_) = value.value_charts(replace(_run(_evaluation(0.2)), records=[record]))
    _, rows = chart.numbers()
    assert [row[2:] for row in rows] == [["8.8%", "2"], ["-", "1"]], "0.125 / sqrt(2) of two"


def test_what_evaluations_could_not_score_is_said() -> None:
    run = _run(_evaluation(0.2, unscored_prompts=24), _evaluation(0.3, unscored_prompts=26))
    assert held_out.unscored_notes(run) == [
        "24 of 40 held-out prompts had no scored completion before training.",
        "26 of 40 held-out prompts had no scored completion in the newest evaluation.",
    ]
    assert "on different scored prompts" in run_page._tiles(run)[0].sub
    assert held_out.unscored_notes(_run(_evaluation(0.2, unscored=3))) == [
        "3 of 640 held-out completions are unscored before training."
    ]
    marks = [_evaluation(0.2, prompt_accuracy=p, unscored_prompts=1) for p in ([None, 0.5], [0.5, None])]
    assert "on different scored prompts" in run_page._tiles(_run(*marks))[0].sub, "as many, yet others"

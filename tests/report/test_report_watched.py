"""The page of a run that goes on: it is replaced whole, loads itself again, warns, and shows groups worth reading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import drawn_charts
import numpy as np
import pytest

from paced_fast import report
from paced_fast.errors import InputError
from paced_fast.report import html, run_page
from paced_fast.report.__main__ import main
from paced_fast.report.charts import renderer
from paced_fast.report.charts.chart import Axis, Chart, Line
from paced_fast.report.charts.held_out import learning_lead
from paced_fast.report.html import options
from paced_fast.report.read_run import Run, read_run
from paced_fast.report.sample_rollouts import groups_section, rollouts_section
from paced_fast.report.warning_tiles import warning_tiles


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_charts.draws_nothing(monkeypatch)


def run_of(records: list[dict[str, Any]], **more: Any) -> Run:
    return Run(folder=Path("a-run"), records=list(records), **more)


def evaluation(trivial: float, hard: float, **more: Any) -> dict[str, Any]:
    prompts = [trivial] * 20 + [hard] * 20
    slices = {name: {"accuracy": a} for name, a in (("trivial", trivial), ("hard", hard))}
    return {"accuracy": hard, "prompt_accuracy": prompts, "slices": slices, "headline": ["hard"]} | more


def evaluated(before: float, after: float) -> list[dict[str, Any]]:
    names = ["trivial"] * 20 + ["hard"] * 20
    return [
        {"step": 0, "eval": evaluation(before, 0.1, prompt_slices=names)},
        {"step": 1, "eval": evaluation(after, 0.3)},
    ]


def test_a_slice_that_was_forgotten_has_a_tile_that_warns_and_a_note() -> None:
    (tile,) = warning_tiles(run_of(evaluated(0.98, 0.787)))
    assert (tile.name, tile.text, tile.warns) == ("forgetting", "98% \u2192 78.7%", True)
    assert tile.sub == "slice trivial: -19.3 points; a lower --optimizer.learning-rate forgets less"
    (note,) = run_page._notes(run_of(evaluated(0.98, 0.787)))
    assert note.startswith("Slice trivial fell from 98.0% to 78.7% (")
    (tile,) = warning_tiles(run_of(evaluated(0.9, 0.95)))
    assert (tile.text, tile.warns) == ("none", False)
    few = evaluated(0.98, 0.787)
    for record, marks in zip(few, ([0.9, 0.1], [0.1, 0.2]), strict=True):
        record["eval"] |= {"prompt_slices": ["trivial", "hard"], "prompt_accuracy": marks}
    assert warning_tiles(run_of(few)) == [], "two prompts do not say that nothing was forgotten"


@pytest.mark.parametrize("is_bad", [False, True])
def test_tiles_warn_beyond_their_bounds(is_bad: bool) -> None:
    figures = {
        "value_fresh": ([0.5] * 4, [0.2] * 4),
        "truncated_share": (0.05, 0.4),
        "generator_mismatch_token_ratio": (1.001, 1.2),
    }
    accuracy = {"accuracy_fresh": [0.5, 0.5, 0.4, 0.6]}
    steps = [{"step": s, **{name: pair[is_bad] for name, pair in figures.items()}} | accuracy for s in range(1, 11)]
    tiles = warning_tiles(run_of(steps))
    assert [tile.name for tile in tiles] == ["calibration error", "cut completions", "mismatch"]
    assert [tile.warns for tile in tiles] == [is_bad] * 3
    assert not warning_tiles(run_of(steps[:9]))[0].warns, "of a head that has hardly begun to learn"
    assert [tile.text for tile in tiles] == (["0.300", "40%", "20%"] if is_bad else ["0.000", "5%", "0.1%"])
    remedies = ["--log-z.learning-rate", "--generation.max-completion-tokens", "--mismatch.mode"]
    assert [remedy in tile.sub for remedy, tile in zip(remedies, tiles, strict=True)] == [is_bad] * 3
    shown = str(html.part("tiles", tiles, {}))
    assert shown.count('class="card tile warns"') == 3 * is_bad
    assert shown.count(">look</span>") == 3 * is_bad, "not by colour alone"


def test_repeated_prompts_are_named_by_slice_and_are_contamination_only_in_the_headline() -> None:
    def lead(headline: list[str], **overlap: Any) -> str:
        figures = {"accuracy": 0.5, "headline": headline}
        return learning_lead(run_of([{"step": 0, "overlap": overlap, "eval": figures}]))

    counts: dict[str, Any] = {"repeated": 837, "training_prompts": 4000}
    assert lead(["k4"], **counts, slices={"trivial": 837}) == (
        "Held-out accuracy is measured on prompts that training never sees. 837 of 4,000 training prompts are also "
        "held-out prompts of slice trivial, which it leaves out: this is no contamination."
    )
    found = lead([], **counts, slices={"k3": 830, "k4": 7})
    assert "held-out prompts of slices k3 (830), k4 (7), so this accuracy is not that of unseen prompts." in found
    assert "are among them" in lead(["k4"], **counts), "a run of before"
    assert lead(["k4"], repeated=0, training_prompts=4) == "Measured on prompts that training never sees."


GROUPS = [
    {
        "kind": "surprising",
        "step": 12,
        "slice": "k<4>",
        "prompt": "1951=2:",
        "answer": "1+<b>",
        "value": 0.9,
        "accuracy": 0.25,
        "size": 4,
        "completions": [
            {"text": "so it is\n<script>1", "reward": 1.0, "stopped": True},
            {"text": "x" * 200 + " no", "reward": 0.0, "stopped": False},
            {"text": "\u202e", "reward": None, "stopped": True},
        ],
    }
]


def test_a_group_shows_prompt_expected_answer_estimate_and_every_completion() -> None:
    text = str(groups_section(GROUPS))
    assert "<h3>Most surprising</h3>" in text
    assert "step 12 &middot; k&lt;4&gt; &middot; accuracy 25% &middot; estimate before 90%" in text
    assert '<p class="answer">expected: <b dir="auto">1+&lt;b&gt;</b></p>' in text
    assert text.count("<details") == 3
    assert ">right 1</b>" in text
    assert ">wrong 0, cut</b>" in text
    assert "xx no</bdi>" in text, "the end of a long completion, where the answer stands"
    assert ">unscored</b>" in text
    assert "and 1 more completions" in text
    assert "<script" not in text
    assert groups_section([]) == ""
    assert "Group" in str(groups_section([{"completions": [3], "value": "x"}])), "damaged, and shown as far as it goes"


def test_rollouts_can_be_chosen_by_slice() -> None:
    rows = [{"step": s, "prompt": "p", "completion": "c", "reward": 1.0, "slice": f"k{s % 2}<"} for s in range(4)]
    text = str(rollouts_section(rows))
    assert [f'for="slice-{i}">k{i}&lt;</label>' in text for i in range(3)] == [True, True, False]
    assert [text.count(f"right s{i}") for i in range(2)] == [2, 2]
    assert "slice-0" not in str(rollouts_section(rows[:1])), "one slice needs no choice"
    style = (Path(html.__file__).parent / "templates" / "style.css").read_text()
    assert "#slice-11:checked ~ .list .r:not(.s11) { display: none; }" in style


def write_run(folder: Path, steps: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": s, "loss": 1.0, "reward_mean": 0.5}) for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("_undrawn")
def test_the_page_of_a_run_that_goes_on_loads_itself_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    main([str(run), "--page-only"])
    text = (run / "report.html").read_text()
    assert '<body data-refresh="15">' in text
    assert 'id="pause"' in text
    assert not (run / "plots").exists()
    report.make_report(run)
    assert "data-refresh=" not in (run / "report.html").read_text(), "written by hand, it stays as it is"
    (run / "summary.json").write_text('{"steps": 3}')
    report.make_report(run, pictures=False)
    assert "data-refresh=" not in (run / "report.html").read_text(), "finished"
    with pytest.raises(SystemExit):
        main([str(run), str(run), "--page-only"])


@pytest.mark.usefixtures("_undrawn")
def test_versions_and_groups_are_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "groups.json").write_text(json.dumps(GROUPS))
    starts = [
        {"started": "monday", "host": "h1"},
        {"started": "tuesday", "host": "h2", "torch": "2.13", "commit": None},
    ]
    (run / "origin.json").write_text(json.dumps(starts))
    text = report.make_report(run).read_text()
    assert '<section id="groups">' in text
    assert '<th scope="row">torch</th><td>2.13</td>' in text
    assert "monday on h1" in text
    for name in ("groups.json", "origin.json"):
        (run / name).write_text('{"torn')
    text = report.make_report(run).read_text()
    assert '<section id="groups">' not in text
    assert '<section id="origin">' not in text


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    html.write_page(page, "old")

    def full(source: object, target: object) -> None:
        assert page.read_text() == "old", "the old page stays until the new one is complete"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        html.write_page(page, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.read_text() == "old"


@pytest.mark.parametrize("style", ["thick", "plain", "thin", "raw"])
def test_no_line_leaves_its_chart(style: Any) -> None:
    x, y = np.arange(50.0), np.ones(50)
    y[20] = 1e3
    y[30] = -1e3
    line = Line(name="spike", x=x, y=y, style=style, low=y - 1, high=y + 1)
    chart = Chart(name="c", title="c", x=Axis(), y=Axis(low=0.0, high=2.0), words="", lines=[line])
    spec = renderer.specification(chart, renderer._light())
    low, high = spec["encoding"]["y"]["scale"]["domain"]
    drawn = [
        row[key]
        for layer in spec["layer"]
        for row in layer["data"]["values"]
        for key in ("y", "low", "high")
        if key in row
    ]
    assert len(drawn) == 150
    assert low <= min(drawn) < max(drawn) <= high


@pytest.mark.usefixtures("_undrawn")
def test_what_a_run_of_before_wrote_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (run.groups, run.starts) == ([], [])


def test_an_option_in_a_tile_breaks_at_its_dots_only() -> None:
    assert options("a < b; lower --log-z.learning-rate") == (
        'a &lt; b; lower <span class="option">--log-z.</span><wbr><span class="option">learning-rate</span>'
    )

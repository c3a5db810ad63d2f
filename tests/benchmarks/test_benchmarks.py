"""The statistics behind the published tables, and the tables themselves."""

import json
from pathlib import Path

import drawn_charts
import numpy as np
import pytest

from benchmarks import run, tables
from benchmarks.training import curves, sample_efficiency

ROOT = Path(__file__).resolve().parents[2]


def test_isotonic_pools_adjacent_violators():
    # By hand: 3, 1 pool to 2, 2; then 2.5; the pair 6, 2 pools to 4, 4; 5 stays.
    np.testing.assert_allclose(curves.isotonic(np.array([3, 1, 2.5, 6, 2, 5.0])), [2, 2, 2.5, 4, 4, 5])
    rising = np.array([0.1, 0.2, 0.4])
    np.testing.assert_allclose(curves.isotonic(rising), rising)


def test_isotonic_is_the_least_squares_fit():
    source = np.random.default_rng(1)
    values = source.normal(size=12)
    fitted = curves.isotonic(values)
    assert (np.diff(fitted) >= 0).all()
    best = ((fitted - values) ** 2).sum()
    for _ in range(300):
        other = np.sort(fitted + 0.1 * source.normal(size=12))
        assert ((other - values) ** 2).sum() >= best - 1e-12


def test_share_to_reach_interpolates():
    grid = np.array([0.0, 100.0, 200.0])
    assert curves.share_to_reach(grid, np.array([0.1, 0.2, 0.4]), 0.3) == pytest.approx(0.75)
    assert curves.share_to_reach(grid, np.array([0.1, 0.2, 0.4]), 0.1) == 0.0
    assert curves.share_to_reach(grid, np.array([0.1, 0.2, 0.4]), 0.41) is None


def _run(arm: str, seed: int, final: float) -> dict:
    points = [
        {
            "rollouts": n,
            "train_seconds": n / 10,
            "accuracy": a,
            "pass_at_8": 0.5,
            "distinct_correct": 1.0,
            "trivial": 1.0,
        }
        for n, a in ((0, 0.1), (100, final))
    ]
    return {
        "arm": arm,
        "seed": seed,
        "curve": points,
        "start": points[0],
        "at_budget": points[-1],
        "mixed_group_share": 0.25,
        "steps": 2,
        "skipped_steps": 0,
    }


def test_summary_pairs_seeds_and_counts_wins():
    runs = {
        "grpo": [_run("grpo", 0, 0.2), _run("grpo", 1, 0.3)],
        "paced": [_run("paced", 0, 0.4), _run("paced", 1, 0.3)],
    }
    row = curves.summarise("paced", runs, 100, 5.0)
    assert row["accuracy"]["mean"] == pytest.approx(0.35)
    assert row["gain"]["mean"] == pytest.approx(0.1)
    assert row["gain"]["error"] == pytest.approx(0.1)  # gains .2 and 0: standard deviation .1414 over sqrt 2
    assert row["wins"] == 1
    assert row["accuracy_at_seconds"]["mean"] == pytest.approx((0.25 + 0.2) / 2)
    # Mean curves rise linearly from .1 to .35 and to .25, so the level .25 is reached at .15 / .25 of the budget.
    assert row["share"] == pytest.approx(0.6)


@pytest.mark.process
def test_curves_are_drawn_against_rollouts_and_time(tmp_path):
    runs = {name: [_run(name, seed, 0.2 + seed / 10) for seed in (0, 1)] for name in ("grpo", "paced")}
    curves.draw(runs, {"grpo": "GRPO", "paced": "PACED-RL"}, tmp_path / "curves.png")
    width, height = drawn_charts.png_size(tmp_path / "curves.png")
    assert width > 2 * 900
    assert height > 600


def test_a_losing_arm_is_shown_as_losing():
    runs = {"grpo": [_run("grpo", 0, 0.3)], "paced": [_run("paced", 0, 0.2)]}
    row = curves.summarise("paced", runs, 100, 10.0)
    assert row["share"] is None
    cells = curves.cells(row)
    assert cells[1] == "-0.100"
    assert cells[2] == "0/1"
    assert cells[3] == "not reached"


def test_arms_differ_only_in_what_they_say():
    base = sample_efficiency.arm_config("grpo", 3, 150)
    assert base.algorithm == "grpo"
    assert base.scheduler.rule == "uniform"
    paced = sample_efficiency.arm_config("paced", 3, 150)
    assert (paced.scheduler.rule, paced.replay.mode, paced.loss.intercept, paced.log_z.loss) == (
        "tree",
        "on",
        "value",
        "tb",
    )
    alone = sample_efficiency.arm_config("selection", 3, 150)
    assert (alone.scheduler.rule, alone.replay.mode) == ("tree", "off")
    assert sample_efficiency.arm_config("replay", 3, 150).scheduler.rule == "uniform"
    assert sample_efficiency.arm_config("dynamic", 3, 150).scheduler.rule == "dynamic"
    for config in (paced, alone):
        assert config.optimizer == base.optimizer
        assert config.generation == base.generation
        assert config.warm_start == base.warm_start


def test_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["sample_eficiency"])
    assert stop.value.code == 2
    assert "did you mean sample_efficiency" in capsys.readouterr().err


def test_readme_tables_are_generated_from_the_committed_results():
    results = ROOT / "benchmarks" / "results"
    if not (results / "sample_efficiency.json").is_file():
        pytest.skip("benchmarks/results/sample_efficiency.json is absent")
    for path in tables.READMES:
        assert tables.render(path.read_text()) == path.read_text(), path
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((results / "sample_efficiency.json").read_text())["rows"]
    assert f"{rows[0]['accuracy']['mean']:.3f}" in readme

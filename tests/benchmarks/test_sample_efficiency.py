"""Statistics, rows and goals of the comparison of algorithms, from run files made by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import drawn_charts
import numpy as np
import pytest

from benchmarks.training.efficiency import arms, curves, files, goals, schedule, statistics, suites, summary, table
from benchmarks.training.efficiency.files import Job
from paced_fast.errors import InputError

TINY = suites.find("tiny")


# Statistics


def test_isotonic_pools_adjacent_violators() -> None:
    # By hand: 3, 1 pool to 2, 2; then 2.5; the pair 6, 2 pools to 4, 4; 5 stays.
    np.testing.assert_allclose(statistics.isotonic(np.array([3, 1, 2.5, 6, 2, 5.0])), [2, 2, 2.5, 4, 4, 5])
    rising = np.array([0.1, 0.2, 0.4])
    np.testing.assert_allclose(statistics.isotonic(rising), rising)


def test_isotonic_is_the_least_squares_fit() -> None:
    source = np.random.default_rng(1)
    values = source.normal(size=12)
    fitted = statistics.isotonic(values)
    assert (np.diff(fitted) >= 0).all()
    best = ((fitted - values) ** 2).sum()
    for _ in range(300):
        other = np.sort(fitted + 0.1 * source.normal(size=12))
        assert ((other - values) ** 2).sum() >= best - 1e-12


def test_share_to_reach_interpolates() -> None:
    grid = np.array([0.0, 100.0, 200.0])
    assert statistics.share_to_reach(grid, np.array([0.1, 0.2, 0.4]), 0.3) == pytest.approx(0.75)
    assert statistics.share_to_reach(grid, np.array([0.1, 0.2, 0.4]), 0.1) == 0.0
    assert statistics.share_to_reach(grid, np.array([0.1, 0.2, 0.4]), 0.41) is None


@pytest.mark.parametrize(
    ("share", "degrees", "wanted"), [(0.95, 1, 6.3138), (0.95, 2, 2.9200), (0.95, 4, 2.1318), (0.975, 9, 2.2622)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(share: float, degrees: int, wanted: float) -> None:
    assert statistics.t_quantile(share, degrees) == pytest.approx(wanted, abs=1e-4)
    assert statistics.t_quantile(1 - share, degrees) == pytest.approx(-wanted, abs=1e-4)


def test_the_interval_of_two_seeds_is_the_widened_pair() -> None:
    """Resamples of (0, 1) have the means 0, 1/2, 1 with 1/4, 1/2, 1/4, so both quantiles are at the ends, half away
    from the mean; widened by 6.3138 / (1.6449 sqrt(1 / 2)) = 5.4285."""
    found = statistics.paired([0.0, 1.0])
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - 0.5 * 5.4285, abs=1e-3)
    assert found.high == pytest.approx(0.5 + 0.5 * 5.4285, abs=1e-3)
    assert found.claim == "not told apart"


def test_claims_follow_the_interval() -> None:
    assert statistics.paired([0.1, 0.11, 0.12, 0.1, 0.13]).claim == "ahead"
    assert statistics.paired([-0.1, -0.11, -0.12, -0.1, -0.13]).claim == "behind"
    assert statistics.paired([0.1, -0.11, 0.12, -0.1, 0.03]).claim == "not told apart"
    assert statistics.paired([0.1]).claim == "one seed"
    assert statistics.paired([]).mean is None


@pytest.mark.parametrize(("seeds", "least", "most"), [(3, 0.82, 0.90), (5, 0.87, 0.93), (10, 0.87, 0.93)])
def test_intervals_cover_the_true_difference_nine_times_of_ten(seeds: int, least: float, most: float) -> None:
    source = np.random.default_rng(2)
    cases = [statistics.paired(source.normal(0.3, 1.0, seeds)) for _ in range(1000)]
    covered = np.mean([case.low < 0.3 < case.high for case in cases])
    assert least < covered < most


def test_the_share_has_an_interval_over_seeds() -> None:
    """Three seeds rise to 2 linearly, the base to 1: half of the budget in each resample, whatever the seeds."""
    grid = np.linspace(0, 1, 5)
    found = statistics.share_interval(grid, np.stack([2 * grid] * 3), np.stack([grid] * 3))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    # One seed never arrives: the pairs of it alone do not either, which is the upper end.
    found = statistics.share_interval(grid, np.stack([2 * grid, 2 * grid, 0 * grid]), np.stack([grid] * 3))
    assert found.mean == pytest.approx(0.75)  # the mean curve ends at 4 / 3
    assert found.low == pytest.approx(0.5)
    assert found.high is None


# Rows


def run_file(arm: str, seed: int, final: float, *, rate: float = 1e-4, seconds: float = 10.0) -> dict[str, Any]:
    """A run that rises linearly from .1 to `final`, at the budget of `tiny`."""

    def point(share: float) -> dict[str, Any]:
        return {
            "rollouts": round(share * TINY.rollouts),
            "tokens": round(share * 1000),
            "train_seconds": share * seconds,
            "samples": 16,
            "accuracy": 0.1 + share * (final - 0.1),
            "pass_at_8": 0.5 + share * final,
            "distinct_correct": 2.0,
            "slices": {"trivial": 0.99 - 0.05 * share, "k3": 0.1},
        }

    errors = {"prompts": 5, "brier": 0.2, "ece": 0.04, "rank": 0.8}
    value = {"end": {"whole": errors, "band": errors | {"rank": 0.6}}}
    is_base = arm == "grpo"
    return {
        "suite": "tiny",
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "code": "c0de",
        "environment": {
            "date": "2026-01-02",
            "commit": "abc1234",
            "uncommitted_changes": False,
            "cpu": "a processor",
            "cores": 2,
            "gpu": None,
            "versions": {"torch": "2.13"},
        },
        "time_budget": None if is_base else {"seconds": 10.0, "on_this_processor": True},
        "settings": {},
        "policy": f"policy {seed}",
        "held_out": "prompts",
        "table": "others",
        "curve": [point(0.0), point(0.5), point(1.0)],
        "at_budget": point(1.0),
        "at_seconds": None if is_base else point(min(1.0, 10.0 / seconds)),
        "value": {"held_out": {}, "table": {}} if is_base else {"held_out": value, "table": value},
        "mixed_group_share": 0.25,
        "drawn_accuracy": 0.5,
        "steps": 150,
        "skipped_steps": 0,
        "warnings": [],
    }


def swept(arm: str, best: float) -> list[dict[str, Any]]:
    """A sweep in which the rate `best` wins."""
    jobs = schedule.sweep_jobs(TINY, [arm])
    return [run_file(arm, job.seed, 0.5 if job.rate == best else 0.2, rate=job.rate) for job in jobs]


def two_arms() -> list[dict[str, Any]]:
    """GRPO ends at .3 on average, PACED .2, .1 and .15 above it."""
    ends, gains = (0.25, 0.3, 0.35), (0.2, 0.1, 0.15)
    base = [run_file("grpo", seed, end) for seed, end in enumerate(ends)]
    return base + [run_file("groups_of_4", seed, ends[seed] + gain, seconds=20.0) for seed, gain in enumerate(gains)]


def test_rows_pair_seeds_and_count_wins() -> None:
    base, row = summary.rows("tiny", [*two_arms(), run_file("groups_of_4", 7, 0.9)])
    assert (base.arm, row.arm, row.paired, row.wins) == ("grpo", "groups_of_4", (0, 1, 2), 3)
    assert row.gain.mean == pytest.approx(0.15)
    assert row.gain.low == pytest.approx(statistics.paired([0.2, 0.1, 0.15]).low), "a run without a partner is left out"
    # PACED rises to .45 on average, .35 above the start; the level .3 is .2 above it.
    assert row.share.mean == pytest.approx(0.2 / 0.35)
    # Twice as slow: at GRPO's time it is half way, at (.1 + final) / 2, .275 on average.
    assert row.gain_at_seconds.mean == pytest.approx(0.275 - 0.3)
    assert row.gain_at_tokens.mean == pytest.approx(0.15)
    assert row.easiest == pytest.approx(0.94)
    assert row.easiest_change.mean == pytest.approx(-0.05)
    assert row.value["table band rank"] == pytest.approx(0.6)
    assert row.tuning == "untuned"


@pytest.mark.parametrize("change", [{"on_this_processor": False}, {"seconds": 9.0}])
def test_pairs_without_one_clock_are_not_compared_by_time(change: dict[str, Any]) -> None:
    """The runs of a pair came from different processors, or the time budget from another run of GRPO."""
    runs = two_arms()
    runs[-1]["time_budget"] |= change
    row = summary.rows("tiny", runs)[1]
    # Seeds 0 and 1: half way to .45 and .4, which is .275 and .25, against .25 and .3.
    assert row.gain_at_seconds.mean == pytest.approx(-0.0125)
    assert row.gain_at_seconds.low == pytest.approx(statistics.paired([0.025, -0.05]).low)
    assert row.gain.mean == pytest.approx(0.15)


def test_a_failed_run_counts_with_its_last_point() -> None:
    runs = two_arms()
    runs[-1] |= {"at_budget": None, "failed": "non-finite loss", "curve": runs[-1]["curve"][:2]}
    row = summary.rows("tiny", runs)[1]
    assert row.gain.mean == pytest.approx((0.2 + 0.1 + (0.3 - 0.35)) / 3)  # half way from .1 to .5
    assert "failed, non-finite loss" in table.full("tiny", summary.rows("tiny", runs))


# The sweep


def test_the_rate_is_that_of_the_best_mean_of_the_sweep() -> None:
    double = schedule.swept_rate(TINY, 2.0)
    assert schedule.tuned_rate(TINY, swept("groups_of_4", double)) == double
    assert schedule.tuned_rate(TINY, [*swept("groups_of_4", double)[:-1], {}]) is None, "a run is missing"
    same = [run | {"at_budget": run["curve"][0]} for run in swept("groups_of_4", double)]
    assert schedule.tuned_rate(TINY, same) == schedule.swept_rate(TINY, 1.0), "of equals the preset's"
    failed = [run | {"at_budget": None} if run["rate"] == double else run for run in swept("groups_of_4", double)]
    assert schedule.tuned_rate(TINY, failed) != double


def test_a_second_round_decides_between_the_best_rates_of_the_first(tmp_path: Path) -> None:
    suite = dataclasses.replace(TINY, sweep_seeds=1, finalists=2, factors=(0.25, 0.5, 1.0))
    ends = {5e-5: 0.4, 1e-4: 0.3, 2e-4: 0.45}
    first = [run_file("groups_of_4", 100, end, rate=rate) for rate, end in ends.items()]
    assert schedule.tuned_rate(suite, first) is None, "the second round is missing"
    for run in first:
        files.write(Job(suite="tiny", arm="groups_of_4", rate=run["rate"], seed=100), tmp_path, run)
    finals = schedule.final_jobs(suite, ["groups_of_4", "grpo"], tmp_path)
    assert [(job.arm, job.rate, job.seed) for job in finals] == [("groups_of_4", 2e-4, 101), ("groups_of_4", 5e-5, 101)]
    second = [run_file("groups_of_4", 101, end, rate=rate) for rate, end in ((5e-5, 0.5), (2e-4, 0.3))]
    assert schedule.tuned_rate(suite, first + second[:1]) is None
    assert schedule.tuned_rate(suite, first + second) == 5e-5
    # A rate that is no finalist any more is not chosen, however it did on the seed of the second round.
    assert schedule.tuned_rate(suite, [*first, *second, run_file("groups_of_4", 101, 0.99, rate=1e-4)]) == 5e-5
    for run in second:
        files.write(Job(suite="tiny", arm="groups_of_4", rate=run["rate"], seed=101), tmp_path, run)
    assert schedule.tuned_rates(suite, ["groups_of_4", "grpo"], tmp_path) == {"groups_of_4": 5e-5, "grpo": None}


def test_every_arm_is_swept_alike_on_seeds_of_its_own() -> None:
    jobs = schedule.sweep_jobs(TINY, list(arms.ARMS))
    for name in arms.ARMS:
        mine = [(job.rate, job.seed) for job in jobs if job.arm == name]
        assert sorted(mine) == [(rate, seed) for rate in (5e-5, 1e-4, 2e-4, 4e-4) for seed in (100, 101)]
    with pytest.raises(InputError, match="those from there on are swept"):
        schedule.seeds_of("90:101", TINY)


def test_tuned_runs_are_those_at_the_chosen_rate() -> None:
    runs = two_arms() + swept("grpo", 1e-4) + swept("groups_of_4", 4e-4)
    runs += [run_file("groups_of_4", seed, 0.8, rate=4e-4) for seed in range(2)]
    base, row = summary.rows("tiny", runs)
    assert (base.rate, base.tuning) == (1e-4, "tuned")
    assert (row.rate, row.tuning, row.paired) == (4e-4, "tuned (at the edge)", (0, 1))


def test_every_rate_that_was_tried_is_told_with_what_it_costs() -> None:
    runs = two_arms() + swept("grpo", 1e-4) + swept("groups_of_4", 2e-4)
    runs += [run_file("groups_of_4", seed, 0.8, rate=2e-4) for seed in range(2)]
    rows = summary.rows("tiny", runs)
    low, middle, high, highest = rows[1].tried
    assert (low.rate, low.sweep_accuracy, low.seeds, low.accuracy, low.gain.mean) == (5e-5, 0.2, 0, None, None)
    assert (middle.seeds, middle.sweep_accuracy) == (3, 0.2)
    assert middle.gain.mean == pytest.approx(0.15), "against the base at its own rate, seed by seed"
    assert (high.seeds, high.sweep_accuracy) == (2, 0.5)
    assert (highest.rate, highest.sweep_accuracy, highest.seeds) == (4e-4, 0.2, 0)
    assert high.pass_gain.mean == pytest.approx(0.8 - (0.25 + 0.3) / 2)
    text = table.full("tiny", rows)
    assert "| PACED-RL, groups of 4 | 0.0002 (chosen) | 0.500 | 1.000 | 2 | 0.800 | +0.525 [" in text
    assert "| GRPO | 0.0001 (chosen) | 0.500 | 1.000 | 3 | 0.300 |  |  |  |" in text
    assert "Every learning rate" not in table.full("tiny", summary.rows("tiny", two_arms())), "only one was run"


@pytest.mark.parametrize(("text", "wanted"), [("", list(range(10))), ("3", [0, 1, 2]), ("3:6", [3, 4, 5])])
def test_seeds_are_a_number_or_a_range(text: str, wanted: list[int]) -> None:
    assert schedule.seeds_of(text, TINY) == wanted


@pytest.mark.parametrize("text", ["3:", "x", ":4", "5:5", "0", "-1"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--seeds"):
        schedule.seeds_of(text, TINY)


# Files


def test_a_file_keeps_six_digits_and_its_job(tmp_path: Path) -> None:
    job = Job(suite="tiny", arm="grpo", rate=5e-5, seed=3)
    files.write(job, tmp_path, {"a": [1 / 3, 12345.678, 7], "b": math.nan, "c": {"d": True}})
    assert job.path(tmp_path) == tmp_path / "tiny/grpo/lr-5e-05_seed-3.json"
    assert job.read(tmp_path) == {"a": [0.333333, 12345.7, 7], "b": None, "c": {"d": True}}


@pytest.mark.parametrize(
    ("key", "words"), [("policy", "initial policies"), ("held_out", "held-out prompts"), ("table", "training prompts")]
)
def test_runs_that_do_not_go_together_are_refused(key: str, words: str) -> None:
    runs = two_arms()
    files.check_alike(runs)
    runs[-1][key] = "another"
    with pytest.raises(InputError, match=rf"grpo \(lr 0.0001, seed .\) and groups_of_4 .* different {words}"):
        files.check_alike(runs)


# Goals and tables


def test_goals_are_met_missed_or_not_measured() -> None:
    runs = [run_file(arm, seed, final) for arm, final in (("grpo", 0.3), ("groups_of_4", 0.5)) for seed in range(10)]
    words = {goal.words: word for goal, _, word in goals.verdicts("tiny", summary.rows("tiny", runs))}
    assert set(words.values()) == {"not measured", "not measured (grpo and groups_of_4 untuned)"}
    runs += swept("grpo", 1e-4) + swept("groups_of_4", 1e-4)
    words = {goal.words: word for goal, _, word in goals.verdicts("tiny", summary.rows("tiny", runs))}
    assert words == {
        "rollouts to GRPO's final accuracy": "missed",  # at .2 / .4
        "accuracy above GRPO, equal rollouts": "met",
        "the same at equal training time": "met",
        "trivial slice at the end": "missed",  # .94
        "pass@8 against GRPO": "met",
        "distinct correct answers against GRPO": "met",
        "ECE on held-out prompts": "met",
        "rank on held-out prompts": "met",
        "rank on the training table": "missed",
        "the same inside the band": "missed",
        "ahead of MoPPS, equal rollouts": "not measured",
        "ahead of PCL, equal rollouts": "not measured",
    }
    runs += [run_file("pcl", seed, 0.2) for seed in range(10)]
    words = {goal.words: word for goal, _, word in goals.verdicts("tiny", summary.rows("tiny", runs))}
    assert words["ahead of PCL, equal rollouts"] == "not measured (pcl untuned)"
    runs += swept("pcl", 1e-4)
    words = {goal.words: word for goal, _, word in goals.verdicts("tiny", summary.rows("tiny", runs))}
    assert words["ahead of PCL, equal rollouts"] == "met"
    few = [run for run in runs if run["seed"] != 4]
    assert {word for *_, word in goals.verdicts("tiny", summary.rows("tiny", few))} == {
        "not measured",
        "not measured (9 of 10 seeds)",
    }


def test_every_suite_has_goals_for_the_same_things() -> None:
    assert set(goals.GOALS) == set(suites.NAMES)
    assert len({len(found) for found in goals.GOALS.values()}) == 1


def test_a_table_is_the_same_when_made_twice_and_names_commits_and_processors() -> None:
    runs = two_arms()
    runs[0]["environment"] = runs[0]["environment"] | {"commit": "fff0000", "cpu": "another"}
    text = table.full("tiny", summary.rows("tiny", runs))
    assert text == table.full("tiny", summary.rows("tiny", list(reversed(runs))))
    assert "commit abc1234 (5 runs), fff0000 (1 run)" in " ".join(text.split())
    assert "a processor, 2 cores (5 runs), another, 2 cores (1 run)" in " ".join(text.split())
    assert "| 0.450 | +0.150 [" in text
    assert "| ahead | 3/3 | 0.57 [" in text
    swept = run_file("groups_of_4", 100, 0.4)
    swept["environment"] = swept["environment"] | {"commit": "eee0000"}
    rows = summary.rows("tiny", [*runs, swept])
    for text in (table.full("tiny", rows), table.short({"tiny": rows})):
        assert "commit abc1234 (5 runs), eee0000 (1 run), fff0000 (1 run)" in " ".join(text.split())


def test_completions_that_are_not_counted_are_told() -> None:
    runs = two_arms()
    assert "not counted" not in table.full("tiny", summary.rows("tiny", runs))
    measured = [run | {"arm": "oracle"} for run in runs if run["arm"] != "grpo"]
    text = " ".join(table.full("tiny", summary.rows("tiny", [*runs, *measured])).split())
    assert "`measured values` is no competitor: 8 completions of every training prompt, every 20 steps" in text


def test_a_sentence_says_what_the_runs_show() -> None:
    rows = summary.rows("tiny", two_arms())
    assert goals.claim("tiny", rows) == (
        "On `tiny` PACED-RL is ahead of GRPO at equal rollouts and not told apart from GRPO at equal training time "
        "(3 seeds)."
    )
    assert goals.claim("tiny", rows) in table.full("tiny", rows)
    one = summary.rows("tiny", [run for run in two_arms() if run["seed"] == 0])
    assert goals.claim("tiny", one) == "On `tiny` one seed was run, which shows nothing."
    assert goals.claim("tiny", rows[:1]) == ""


def test_suites_without_runs_are_named() -> None:
    assert table.full("small", []).startswith("No runs of the suite `small` yet.")
    text = table.short({"tiny": summary.rows("tiny", two_arms()), "small": [], "smollm2": []})
    assert "No runs yet: `small`, `smollm2`." in text
    assert "| tiny | PACED-RL, groups of 4 | 0.450 |" in text


# Curves


def test_at_most_six_curves_and_no_two_alike() -> None:
    runs = {name: [run_file(name, seed, 0.2 + seed / 10) for seed in (0, 1)] for name in arms.ARMS}
    assert len(runs) > len(curves.DASHES) == 6
    for chart in curves.charts(runs):
        assert {line.name for line in chart.lines} >= {"GRPO", "PACED-RL, groups of 4", "PACED-RL, groups of 8"}
        looks = {(line.color, line.dash) for line in chart.lines}
        assert len(looks) == len({line.dash for line in chart.lines}) == len({line.color for line in chart.lines}) == 6


@pytest.mark.process
def test_curves_are_drawn_against_rollouts_tokens_and_time(tmp_path: Path) -> None:
    runs = {name: [run_file(name, seed, 0.2 + seed / 10) for seed in (0, 1)] for name in ("grpo", "groups_of_4")}
    curves.draw(runs, tmp_path / "curves.png")
    width, height = drawn_charts.png_size(tmp_path / "curves.png")
    assert width > 3 * 900
    assert height > 600

"""Answers to tasks of reasoning-gym with a full stop, in stress, in a box: as good as the package takes them to be."""

from __future__ import annotations

import pytest

from paced_fast.rewards.procedural.rules import RULES


def score(task: str, text: str, answer: str, **facts: object) -> float:
    rule = RULES[task]
    assert rule.judge is not None
    return rule.score(rule.judge(text, {"answer": answer, "metadata": facts}, {}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("463", 1.0), ("463.", 3 / 4), ("$463$", 3 / 5), ("**463**", 3 / 7), (r"\boxed{463}", 3 / 11), ("'463'", 3 / 5),
        ("```\n463\n```", 3 / 11), ("0463", 3 / 4), ("+463", 3 / 4), ("The answer is 463.", 3 / 18),
        ("464.", 0.0), ("1463", 0.0), ("462 463", 0.0), ("$462$ $463$", 0.0), (r"\boxed{462}", 0.0), ("4630", 0.0),
        ("462, 463.", 0.0), ("-463", 0.0), ("", 0.0), ("....", 0.0), ("$$", 0.0), (r"\boxed{}", 0.0),
    ],
)  # fmt: skip
def test_dress_costs_its_share_where_the_package_counts_characters(text, expected):
    assert score("count_primes", text, "463") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("task", "text", "answer", "facts", "expected"),
    [
        ("countdown", "2 + 1.", "1 + 2", {"numbers": [1, 2], "target": 3}, 1.0),
        ("countdown", "2 * 1.", "1 + 2", {"numbers": [1, 2], "target": 3}, 0.0),
        ("puzzle24", "$4 * 6$", "6 * 4", {"numbers": [4, 6]}, 1.0),
        ("game_of_life_halting", "The answer is True.", "True", {}, 1.0),
        ("game_of_life_halting", r"\boxed{False}", "True", {}, 0.0),
        ("game_of_life_halting", "True or False.", "True", {}, 0.0),
        ("fraction_simplification", r"$\dfrac{4}{7}$.", r"$\dfrac{4}{7}$", {}, 1.0),
        ("fraction_simplification", "8/14.", "$4/7$", {}, 0.0),
        ("simple_integration", "'x**2 + C'", "x**2 + C", {"integrand": "2*x", "variable": "x"}, 1.0),
        ("simple_integration", "'x**3 + C'", "x**2 + C", {"integrand": "2*x", "variable": "x"}, 0.0),
        ("survo", "```\n1 2\n3 4\n```", "1 2\n3 4", {}, 1.0),
        ("survo", "```\n1 2\n4 3\n```", "1 2\n3 4", {}, 0.0),
        ("sentence_reordering", '"go home" now.', '"go home" now', {}, 13 / 14),
        ("knights_knaves", "**Ann is a knight.**", "Ann is a knight.", {}, 16 / 20),
        ("knights_knaves", "**Ann is a knave.**", "Ann is a knight.", {}, 0.0),
    ],
)
def test_dress_costs_nothing_where_the_package_reads_through_it(task, text, answer, facts, expected):
    assert score(task, text, answer, **facts) == pytest.approx(expected)


def test_dress_without_end_is_taken_off_in_no_time():
    for text in (
        "$" * 200_000,
        "'" * 200_000,
        "." * 200_000,
        "answer " * 30_000,
        "\\boxed{" * 30_000,
        "```\n" * 50_000,
    ):
        assert score("count_primes", text, "463") == 0.0

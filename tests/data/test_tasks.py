"""The procedural tasks: exact checking, the mix of slices, no leak from eval into training data, and speed."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from steady import takes_less

from paced_fast.data.tasks import (
    SIGNED_SUMS_ALPHABET,
    check_signed_sum,
    equation,
    reasoning_gym_rows,
    signed_sums_demonstrations,
    signed_sums_rows,
)
from paced_fast.errors import InputError
from paced_fast.rewards.procedural.reward import ReasoningGymReward


def problem(row: dict) -> tuple[str, str]:
    """Sorted digits and target: what makes two prompts the same problem."""
    digits, _, target = row["prompt"].strip(" :").partition("=")
    return "".join(sorted(digits)), target


def reachable(prompt: str) -> bool:
    """Whether any expression of + and - reaches the target, by brute force."""
    digits, _, target = prompt.strip(" :").partition("=")
    return any(
        order[0] + sum(sign * digit for sign, digit in zip(signs, order[1:], strict=True)) == int(target)
        for order in itertools.permutations([int(d) for d in digits])
        for signs in itertools.product((1, -1), repeat=len(digits) - 1)
    )


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("     1951=2:", "9-5-1-1", 1.0),
        ("     1951=2:", "1-1-5+9", 0.0),  # 4
        ("     1951=4:", "1-1-5+9", 1.0),
        ("     1951=2:", "9-5-1", 0.0),  # a digit left out
        ("     1951=2:", "9-5-1-1-0", 0.0),  # a digit too many
        ("     1951=2:", "9-5-1-1+1-1", 0.0),  # digits used twice
        ("      112=3:", "1+2", 0.0),
        ("      124=3:", "1+1+1", 0.0),  # reaches the target with one digit used thrice
        ("     1951=2:", " 9-5-1-1", 0.0),
        ("     1951=2:", "9-5-1-1 ", 0.0),
        ("     1951=2:", "9-5-1-1#", 0.0),
        ("     1951=2:", "9-5-1-1\n", 0.0),
        ("     1951=2:", "", 0.0),
        ("       12=1:", "-1+2", 0.0),  # leading sign
        ("       12=3:", "+1+2", 0.0),
        ("      12=12:", "12", 0.0),  # digits are single
        ("       12=3:", "1++2", 0.0),
        ("       12=3:", "1+2+", 0.0),
        ("       12=3:", "1+2=3", 0.0),
        ("        3=3:", "3", 1.0),
        ("        0=0:", "0", 1.0),
        ("    2399=110:", "2+9*9+3*9", 0.0),
        ("    2993=104:", "9*9+2*3", 0.0),  # 87
        ("     399=106:", "9*9+3", 0.0),
        ("   2599=101:", "9*9+2*5", 0.0),  # 91, left to right it would be 415
        ("   4955=101:", "9*9+4*5", 0.0),
        ("   4599=101:", "9*9+4*5", 1.0),  # * first: 81 + 20
        ("   4599=425:", "9*9+4*5", 0.0),  # what left to right would give
        ("   5299=143:", "9+2*9*5", 0.0),  # 99
        ("    925=165:", "9*2-5", 0.0),
        ("  19999=719:", "9*9*9-1-9", 1.0),
        ("  19999=719:", "1-9-9*9*9", 0.0),  # -737
        ("       23=6:", "2*3", 0.0),  # * only for targets of 100 and more
        ("  12=3:", "\N{ARABIC-INDIC DIGIT ONE}+2", 0.0),
    ],
)
def test_check_signed_sum(prompt, completion, reward):
    assert check_signed_sum(prompt, completion) == reward


@pytest.mark.parametrize("prompt", ["", "1951=2", "Question: 1951=2:", "1951=-2:", "1234567=1:", "1951=2:\n"])
def test_check_signed_sum_names_a_foreign_prompt(prompt):
    with pytest.raises(InputError, match=r"signed_sums cannot judge the prompt .*expected digits=target:"):
        check_signed_sum(prompt, "1")


def test_train_mix_and_form():
    rows = signed_sums_rows("train", seed=42)
    assert Counter(row["slice"] for row in rows) == {
        "trivial": 1600, "k3": 200, "k4": 200, "k5": 200, "k6": 200, "hard": 1600,
    }  # fmt: skip
    for row in rows:
        digits, _, target = row["prompt"].strip(" :").partition("=")
        assert len(row["prompt"]) == 12
        assert set(row["prompt"]) <= set(" 0123456789=:") <= set(SIGNED_SUMS_ALPHABET)
        assert "0" not in digits
        assert row["answer"] == target
        assert row["reward"] == "signed_sums"
        if row["slice"] == "trivial":
            assert int(target) == sum(map(int, digits))
            assert len(digits) in (1, 2)
        elif row["slice"] == "hard":
            assert 100 <= int(target) <= 999
            assert len(digits) in (4, 5, 6)
        else:
            assert len(digits) == int(row["slice"][1])
            assert 0 <= int(target) <= 54
    of_one_digit = sum(len(problem(row)[0]) == 1 for row in rows)
    assert of_one_digit == 533  # k = 2 twice as likely
    assert Counter(len(problem(row)[0]) for row in rows[:400]).keys() == {1, 2, 3, 4, 5, 6}, "the order is mixed"


def test_shuffled_digits_and_solvable_medium_problems():
    rows = [row for row in signed_sums_rows("train", size=1000, seed=3) if row["slice"] in ("k3", "k4", "k5")]
    assert len(rows) == 150
    assert all(reachable(row["prompt"]) for row in rows)
    assert not any(
        reachable(row["prompt"])
        for row in signed_sums_rows("eval")
        if row["slice"] == "hard" and len(problem(row)[0]) < 6
    )


def test_eval_is_fixed_and_absent_from_training_data():
    held_out = signed_sums_rows("eval")
    assert held_out == signed_sums_rows("eval", seed=7)
    assert Counter(row["slice"] for row in held_out) == {
        "trivial": 32, "k3": 40, "k4": 40, "k5": 40, "k6": 40, "hard": 32,
    }  # fmt: skip
    assert len({problem(row) for row in held_out}) == 224
    secret = {problem(row) for row in held_out if len(problem(row)[0]) >= 3}
    assert len(secret) == 192
    for seed in (0, 42):
        seen = signed_sums_rows("train", size=20000, seed=seed) + signed_sums_demonstrations(size=30000, seed=seed)
        assert not secret & {problem(row) for row in seen}
    assert Counter(row["slice"] for row in signed_sums_rows("eval", size=28)) == {
        "trivial": 4, "k3": 5, "k4": 5, "k5": 5, "k6": 5, "hard": 4,
    }  # fmt: skip


def test_seed_and_size_of_train():
    assert signed_sums_rows("train", size=100, seed=1) == signed_sums_rows("train", size=100, seed=1)
    assert signed_sums_rows("train", size=100, seed=1) != signed_sums_rows("train", size=100, seed=2)
    for size in (1, 7, 10, 999):
        assert len(signed_sums_rows("train", size=size, seed=0)) == size


def test_demonstrations_are_right_or_have_one_flipped_sign():
    rows = signed_sums_demonstrations(size=20000, seed=5)
    assert all(check_signed_sum(row["prompt"], row["demonstration"]) == 1.0 for row in rows)
    assert Counter(len(problem(row)[0]) for row in rows) == {1: 800, 2: 4400, 3: 5600, 4: 5000, 5: 2600, 6: 1600}
    assert any(row["demonstration"][0] < row["demonstration"][-1] for row in rows if row["slice"] == "k6")

    in_order = [row["prompt"].strip().startswith(row["demonstration"][::2]) for row in rows if row["slice"] == "k6"]
    assert sum(in_order) / len(in_order) < 0.05, "the digits of a prompt are shuffled"

    flipped = signed_sums_demonstrations(size=20000, seed=5, flip_probability=0.6)
    wrong = Counter(row["slice"] for row in flipped if check_signed_sum(row["prompt"], row["demonstration"]) == 0.0)
    total = Counter(row["slice"] for row in flipped)
    assert wrong["trivial"] == 0
    for name in ("k3", "k4", "k5", "k6"):
        assert 0.55 < wrong[name] / total[name] < 0.65
    always = signed_sums_demonstrations(size=2000, seed=5, flip_probability=1.0)
    for row in always:
        if row["slice"] == "trivial":
            continue
        text = row["demonstration"]
        signs = [i for i in range(1, len(text), 2)]
        mended = [text[:i] + ("+" if text[i] == "-" else "-") + text[i + 1 :] for i in signs]
        assert check_signed_sum(row["prompt"], text) == 0.0
        assert any(check_signed_sum(row["prompt"], other) == 1.0 for other in mended)


def test_demonstration_weights():
    rows = signed_sums_demonstrations(size=10, slice_weights=(0, 0, 0, 1, 0, 0))
    assert {row["slice"] for row in rows} == {"k4"}


def test_demonstrations_are_fast():
    signed_sums_demonstrations(size=1000, seed=0)
    assert takes_less(2.0, lambda: signed_sums_demonstrations(size=60000, seed=0, flip_probability=0.6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: signed_sums_rows("test"), "no split 'test'"),
        (lambda: signed_sums_rows("train", size=0), "size >= 1, not 0"),
        (lambda: signed_sums_rows("eval", size=225), "has 224 rows.*got 225"),
        (lambda: signed_sums_demonstrations(size=0), "size >= 1, not 0"),
        (lambda: signed_sums_demonstrations(size=9, flip_probability=1.5), "flip_probability.*1.5"),
        (lambda: signed_sums_demonstrations(size=9, slice_weights=(1, 2)), r"six shares.*\(1, 2\)"),
        (lambda: signed_sums_demonstrations(size=9, slice_weights=(0,) * 6), "six shares"),
        (lambda: reasoning_gym_rows("chain_sun", 3, 1), "no task 'chain_sun' .did you mean 'chain_sum'"),
        (
            lambda: reasoning_gym_rows("chain_sum", 3, 1, min_term=2),
            "no parameter 'min_term' .did you mean 'min_terms'",
        ),
        (
            lambda: reasoning_gym_rows("chain_sum", 3, 1, min_terms=9, max_terms=2),
            "'chain_sum' refuses .*'min_terms': 9",
        ),
        (lambda: reasoning_gym_rows("chain_sum", 3, 1, min_terms="many"), "'chain_sum' refuses .*many"),
        (lambda: reasoning_gym_rows("chain_sum", 0, 1), "'chain_sum' needs size >= 1, not 0"),
    ],
)
def test_errors_name_the_thing(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_reasoning_gym_rows_carry_what_their_verdict_needs():
    rows = reasoning_gym_rows("chain_sum", 5, 1, min_terms=2, max_terms=3)
    assert rows[0]["prompt"] == "State the final answer to the following arithmetic problem: 4 - 1 ="
    assert rows[0]["answer"] == "3"
    assert rows == reasoning_gym_rows("chain_sum", 5, 1, min_terms=2, max_terms=3)
    columns = {key: [row[key] for row in rows] for key in ("task", "settings", "entry")}
    reward, prompts = ReasoningGymReward(), [row["prompt"] for row in rows]
    assert reward(prompts, [row["answer"] for row in rows], **columns) == [1.0] * 5
    assert reward(prompts, ["4"] * 5, **columns)[0] == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "line"),
    [
        ("Joan found 70 seashells and has 27 now. How many did she give away?", "43", "70-27=43"),
        ("Tim had 28 and there are now 54.", "26", "54-28=26"),
        ("There are 7 caps in a box and Linda puts 7 more inside.", "14", "7+7=14"),
        ("2 and 2", "4", "2+2=4"),  # a sum comes before a product
        ("84 leaves with 139 ladybugs each", "11,676", "84*139=11,676"),
        ("256 miles at 32 miles per hour", "8", "256/32=8"),
        ("It weighs 28.3 grams; how much do 5 weigh?", "141.5", "28.3*5=141.5"),
        ("33 cards, 6 torn, 23 new", "50", "33-6+23=50"),
        ("0 and 5", "17", "=17"),
        ("one 7 is not two", "14", "=14"),
        ("no number at all", "3", "=3"),
    ],
)
def test_an_equation_leads_from_the_text_to_the_answer(text: str, answer: str, line: str) -> None:
    assert equation(text, answer) == line

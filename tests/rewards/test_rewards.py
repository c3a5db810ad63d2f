"""Verifiers: tables of verdicts, and one error line for each wrong return value; those of math are tested apart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from paced_fast.data.records import PromptRow
from paced_fast.data.tasks import reasoning_gym_rows
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer, last_number, load_reward


def row(reward: str, prompt: str = "p", **columns) -> PromptRow:
    return PromptRow(prompt=prompt, token_ids=(0,), reward=reward, slice="s", columns=columns)


def one(name: str, completion: str, answer: object) -> float:
    return Scorer().score([row(name, answer=answer)], [completion])[0]


def data_file(name: str) -> Path:
    """The data file `name`; skips the test when there is none."""
    repository = Path(__file__).resolve().parents[2]
    folders = [os.environ.get("PACED_FAST_DATA"), repository / "data", repository.parent / "shared" / "data"]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    pytest.skip(f"needs {name}: set PACED_FAST_DATA")


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1.0),
        ("  New \n York ", "New York", 1.0),
        ("paris", "Paris", 0.0),
        ("43", "43.0", 1.0),
        ("43", 43.0, 1.0),
        ("43.0", 43, 1.0),
        ("1,234", 1234, 1.0),
        ("\N{MINUS SIGN}5", -5, 1.0),
        ("43 apples", 43, 0.0),
        ("1/2", 0.5, 1.0),
        ("", "x", 0.0),
        ("nan", float("nan"), 1.0),  # as text
        ("inf", 5, 0.0),
        ("1e999999999", "1e999999998", 0.0),
        ("9" * 200, "9" * 199 + "8", 0.0),
        ("True", True, 1.0),
    ],
)
def test_exact(completion, answer, reward):
    assert one("exact", completion, answer) == reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 18 dollars.", "18"),
        ("18.", "18"),
        ("3.50", "7/2"),
        ("it is -3", "-3"),
        ("x = -3", "-3"),
        ("10-3", "3"),
        ("(10)-3", "3"),
        ("$1,234.50 left", "1234.5"),
        ("-$5", "-5"),
        ("1,2,3", "3"),
        ("1234,5", "5"),
        ("4 of 3/4", "3/4"),
        ("2e3", "2000"),
        ("\N{MINUS SIGN}7", "-7"),
        (".5", "1/2"),
        ("5%", "5"),
        ("from 7 to 12 and back", "12"),
        ("#### 72", "72"),
        ("3/0", None),
        ("none", None),
        ("", None),
        ("7" * 101, None),
        ("1e99999", "99999"),  # no exponent that long: it is not computed
        ("\N{ARABIC-INDIC DIGIT SEVEN}", None),
    ],
)
def test_last_number(text, expected):
    number = last_number(text)
    assert (None if number is None else str(number)) == (None if expected is None else _fraction(expected))


def _fraction(text: str) -> str:
    from fractions import Fraction

    return str(Fraction(text))


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("5 + 38 = 43", 43.0, 1.0),
        ("43 is 5 + 38", 43.0, 0.0),  # the last one counts
        ("no idea", 43, 0.0),
        ("0.30", 0.1 + 0.2, 1.0),
        ("0.3001", 0.3, 0.0),
        ("0", 0, 1.0),
        ("-43", 43, 0.0),
        ("so 72", "48/2=24\n#### 72", 1.0),
    ],
)
def test_number(completion, answer, reward):
    assert one("number", completion, answer) == reward


@pytest.mark.process
def test_amc_answers_are_right_by_math_and_by_number():
    rows = [json.loads(line) for line in data_file("amc23.jsonl").read_text().splitlines()]
    golds = [r["answer"] for r in rows]
    texts = [rf"thus \boxed{{{int(gold)}}}" for gold in golds]
    scorer = Scorer()
    for name in ("math", "math_strict", "number"):
        assert scorer.score([row(name, answer=gold) for gold in golds], texts) == [1.0] * 40
        assert sum(scorer.score([row(name, answer=gold + 1) for gold in golds], texts)) == 0.0
    scorer.close()


def test_exact_reads_numpy_answers():
    assert one("exact", "3", np.int64(3)) == 1.0


def test_signed_sums():
    rows = [row("signed_sums", prompt="     1951=2:", answer="2")] * 2
    assert Scorer().score(rows, ["9-5-1-1", "2"]) == [1.0, 0.0]


def test_reasoning_gym_scores_as_they_are():
    made = reasoning_gym_rows("chain_sum", 3, 1, min_terms=2, max_terms=3)
    rows = [
        row("reasoning_gym", prompt=m["prompt"], **{k: m[k] for k in ("answer", "task", "settings", "entry")})
        for m in made
    ]
    answers = [m["answer"] for m in made]
    scorer = Scorer(["reasoning_gym"])
    assert scorer.score(rows, answers) == [1.0, 1.0, 1.0]
    assert scorer.score(rows, [f"<answer>9</answer> so <answer> {answer} </answer>" for answer in answers]) == [1.0] * 3
    assert scorer.score(rows, ["", "x", "-1"]) == [0.0, 0.0, 0.0]
    assert 0 < scorer.score(rows[:1], ["it is 3"])[0] < 1  # partial credit of that scorer
    with pytest.raises(InputError, match="rows of an rg: source: the column 'task' is missing"):
        scorer.score([row("reasoning_gym", answer="1")], ["1"])


class TestScorer:
    def write(self, folder: Path, body: str, signature: str = "prompts, completions, **columns") -> str:
        path = folder / "own.py"
        path.write_text(f"import numpy as np, torch\nCALLS = []\n\ndef judge({signature}):\n    {body}\n")
        return f"{path}:judge"

    def test_groups_columns_and_order(self, tmp_path):
        name = self.write(tmp_path, "CALLS.append((prompts, completions, columns)); return [0.25, True]")
        rows = [row(name, "a", answer=1, x=5), row("exact", "b", answer="B"), row(name, "c", answer=2, y=6, prompts=9)]
        scorer = Scorer(r.reward for r in rows)
        assert scorer.score(rows, ["A", "B", "C"]) == [0.25, 1.0, 1.0]
        function = scorer._functions[name]
        assert function.__globals__["CALLS"] == [
            (["a", "c"], ["A", "C"], {"answer": [1, 2], "x": [5, None], "y": [None, 6]})
        ]
        assert all(type(value) is float for value in scorer.score(rows, ["A", "B", "C"]))
        assert scorer.score([], []) == []

    def test_a_function_gets_only_the_columns_it_names(self, tmp_path):
        name = self.write(
            tmp_path, "return [float(c == a) for c, a in zip(completions, answer)]", "completions, answer"
        )
        assert Scorer().score([row(name, answer="1", other=2)], ["1"]) == [1.0]

    @pytest.mark.parametrize(
        "body",
        ["return np.ones(2)", "return torch.ones(2)", "return (1, 1.0)", "return [np.float32(1), np.bool_(True)]"],
    )
    def test_kinds_of_numbers(self, tmp_path, body):
        name = self.write(tmp_path, body)
        assert Scorer().score([row(name)] * 2, ["a", "b"]) == [1.0, 1.0]

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("return [1.0]", r"own.py:judge' returned 1 rewards for 2 completions"),
            ("return 1.0", r"own.py:judge' returned a float, not a list: return a list with one number per completion"),
            ("return None", r"own.py:judge' returned None, not a list: return a list with one number per completion"),
            ("return [1.0, float('nan')]", r"own.py:judge' returned nan for completion 2: return a number in \[0, 1\]"),
            ("return [1.0, float('inf')]", r"returned inf for completion 2"),
            ("return ['1', 1.0]", r"returned '1' for completion 0"),
            ("return [1.0, 1.5]", r"returned 1.5 for completion 2"),
            ("return [-0.1, 1.0]", r"returned -0.1 for completion 0"),
            ("return torch.tensor([[1.0], [1.0]])", r"returned \[1.0\] for completion 0"),
            ("raise KeyError('gold')", r"own.py:judge' failed: KeyError: 'gold'"),
            ("return [1 / 0]", r"own.py:judge' failed: ZeroDivisionError: division by zero"),
        ],
    )
    def test_errors_name_the_function_and_the_completion(self, tmp_path, body, message):
        name = self.write(tmp_path, body)
        rows = [row(name), row("exact", answer="b"), row(name)]  # the second completion of `name` is number 2
        with pytest.raises(InputError, match=message) as caught:
            Scorer().score(rows, ["a", "b", "c"])
        assert "\n" not in str(caught.value)
        assert ("failed" in message) == isinstance(caught.value.__cause__, Exception)

    def test_missing_column_of_a_function(self, tmp_path):
        name = self.write(tmp_path, "return gold", "completions, gold")
        with pytest.raises(InputError, match=r"own.py:judge' failed: TypeError: .*'gold'"):
            Scorer().score([row(name)], ["a"])

    def test_wrong_lengths(self):
        with pytest.raises(InputError, match="got 1 rows and 2 completions"):
            Scorer().score([row("exact", answer=1)], ["a", "b"])

    @pytest.mark.parametrize("name", ["exact", "number", "math", "math_strict"])
    def test_missing_answer(self, name):
        with pytest.raises(InputError, match=f"reward '{name}' needs a column 'answer', .* completion 1 lacks"):
            Scorer().score([row(name, answer=1), row(name, x=1)], ["1", "1"])

    def test_number_needs_a_number(self):
        with pytest.raises(InputError, match="'number' needs a number as answer, not 'Tuesday'"):
            one("number", "5", "Tuesday")


class TestLoadReward:
    def test_module_path(self):
        assert load_reward("math:isnan") is __import__("math").isnan
        assert load_reward("os.path:join") is os.path.join

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("exakt", "unknown reward 'exakt' .did you mean 'exact'"),
            ("nothing_like_it", "unknown reward 'nothing_like_it': use one of exact, number, math"),
            (":f", "reward ':f' is neither package.module:function nor path"),
            ("math:", "reward 'math:' is neither package.module:function nor path"),
            ("no.such.module:f", "reward 'no.such.module:f': cannot import 'no.such.module': ModuleNotFoundError"),
            ("math:no_such", "reward 'math:no_such': math has no function 'no_such'"),
            ("math:pi", "math has no function 'pi'"),
            ("no/such/file.py:f", "reward 'no/such/file.py:f': no such file '.*no/such/file.py'"),
        ],
    )
    def test_errors(self, name, message):
        with pytest.raises(InputError, match=message):
            load_reward(name)

    def test_a_file_that_fails_on_import(self, tmp_path):
        (tmp_path / "own.py").write_text("def f(:\n")
        with pytest.raises(InputError, match=r"cannot import '.*own.py': SyntaxError"):
            load_reward(f"{tmp_path / 'own.py'}:f")

    def test_scorer_fails_early_on_a_wrong_name(self):
        with pytest.raises(InputError, match=r"unknown reward 'maths' .did you mean 'math'"):
            Scorer(["exact", "maths"])

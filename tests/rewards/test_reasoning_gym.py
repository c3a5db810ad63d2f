"""Tasks of reasoning-gym: right answers are right, absurd ones are not, and no text is ever run, by anybody."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from task_sweep import (
    EVALUATING,
    MOST_FOR_ABSURD,
    PAYLOADS,
    TABLE,
    judged_by,
    most_for_absurd,
    rows_of,
)

from paced_fast import train
from paced_fast.config import RewardConfig
from paced_fast.config.resolve import resolve
from paced_fast.data import prompts
from paced_fast.data.records import PromptRow
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer
from paced_fast.rewards.math.formulas import is_formula, is_integral, is_sum
from paced_fast.rewards.procedural import reward as tasks
from paced_fast.rewards.procedural import rules
from paced_fast.rewards.procedural.plain import value_of
from paced_fast.rewards.procedural.reward import ReasoningGymReward
from paced_fast.rewards.procedural.rules import RULES, Rule
from paced_fast.rewards.sandbox import SandboxError

OURS = sorted(task for task, rule in RULES.items() if rule.judge is not None)
CHECKED = sorted(task for task, rule in RULES.items() if rule.needs_sandbox)
SLOW_TO_MAKE = {"arc_agi", "group_anagrams", "rearc", "simple_equations", "zebra_puzzles", "puzzle24", "spell_backward"}


def scored(reward: ReasoningGymReward, rows: list[dict[str, Any]], texts: list[str]) -> list[float | None]:
    """Every text for the row at its place."""
    columns = {key: [row[key] for row in rows] for key in ("task", "settings", "entry")}
    return reward([row["prompt"] for row in rows], texts, **columns)


def problem(reward: ReasoningGymReward, row: dict[str, Any]) -> str | None:
    return reward.problem(row)


def test_every_task_of_the_package_has_a_rule():
    from reasoning_gym.factory import DATASETS

    assert set(RULES) == set(DATASETS)
    assert len(RULES) == len(OURS) + len(CHECKED) + 1


@pytest.mark.parametrize("task", [task for task in OURS if task not in SLOW_TO_MAKE])
def test_our_own_rules(task):
    reward, rows = ReasoningGymReward(), rows_of(task)
    assert [problem(reward, row) for row in rows] == [None, None]
    if task != "intermediate_integration":  # the package cannot solve some of its own
        assert scored(reward, rows, [f"so <answer> {row['answer']} </answer>" for row in rows]) == [1.0, 1.0]
    most, text = most_for_absurd(reward, task, rows)
    assert most <= MOST_FOR_ABSURD, text


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(SLOW_TO_MAKE))
def test_our_own_rules_for_tasks_that_take_long_to_make(task):
    test_our_own_rules(task)


class Watch:
    """What the interpreter is asked to do while `is_on`; an audit hook stays for good."""

    def __init__(self) -> None:
        self.is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event.split(".")[0] in ("compile", "exec", "open", "os", "subprocess", "import", "socket"):
            self.seen.append(event)


def test_our_own_rules_evaluate_nothing_and_take_no_time():
    names = ("chain_sum", "gsm_symbolic", "coin_flip", "complex_arithmetic", "number_sorting", "game_of_life")
    reward, watch = ReasoningGymReward(), Watch()
    for task in (*EVALUATING, *names):
        rows = rows_of(task)
        most_for_absurd(reward, task, rows)  # imports what it needs
        watch.is_on = True
        most, _ = most_for_absurd(reward, task, rows)
        watch.is_on = False
        assert most <= MOST_FOR_ABSURD
    assert watch.seen == []


@pytest.mark.parametrize("task", EVALUATING)
def test_code_in_a_completion_is_a_wrong_answer(task, tmp_path):
    row = rows_of(task, 1)[0]
    target = tmp_path / "written"
    texts = [payload.format(where=target) for payload in PAYLOADS]
    rows = [PromptRow(prompt="p", token_ids=(0,), reward="reasoning_gym", slice="s", columns=row)] * len(texts)
    assert Scorer().score(rows, texts) == [0.0] * len(texts)
    assert not target.exists()


def test_no_checker_in_the_sandbox_evaluates_text():
    """The package's code for the tasks whose checkers it brings, searched for what turns text into code."""
    from reasoning_gym.factory import DATASETS

    evaluating = set()
    for task in CHECKED:
        source = inspect.getsource(inspect.getmodule(DATASETS[task][0]))  # type: ignore[arg-type]
        if re.search(r"(?<![\w.])(?:eval|exec|compile)\(|parse_expr|sympify|literal_eval|pickle|yaml", source):
            evaluating.add(task)
    # The problems of codeio are programs of the package, run when they are made; propositional_logic has a parser of
    # its own by that name.
    assert evaluating == {"codeio", "propositional_logic"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3*x**2 - x/2 + C", True),
        ("sin(x)**2/2 + exp(-x)*log(x)", True),
        ("x**(-3/2)", True),
        ("2.5*x**10", True),
        ("", False),
        ("9**9**9**9", False),
        ("9**(9**9)", False),
        ("x**9999", False),
        ("x**(x+1)", False),
        ("Integral(x, x)", False),
        ("factorial(9)", False),
        ("x.__class__", False),
        ("__import__('os')", False),
        ("exit(7)", False),
        ("x if x else x", False),
        ("[x]", False),
        ("x; y", False),
        ("'x'", False),
        ("x\x00", False),
        ("1" * 101, False),
        ("x+" * 2000 + "x", False),
        ("\N{MATHEMATICAL ITALIC SMALL E}xit", False),
    ],
)
def test_formulas(text, expected):
    assert is_formula(text) is expected


@pytest.mark.parametrize(
    ("text", "integrand", "right"),
    [
        ("x**2", "2*x", True),
        ("C + x*x - 7", "2*x", True),
        ("(x**3)/x + k", "2*x", True),
        ("x**2 + x", "2*x", False),
        ("Integral(2*x, x)", "2*x", False),
        ("2*x", "2*x", False),
        ("nan", "2*x", False),
        ("", "2*x", False),
        ("0.5*x**2", "x", True),
        ("0.333333333333*x**3", "x**2", False),
        ("x**3/3", "x**2", True),
        ("log(x)", "1/x", True),
        ("log(2*x)", "1/x", True),
        ("log(x)/2 + log(x**2)/4", "1/x", True),
        ("x**(1/2)", "1/(2*sqrt(x))", True),
        ("sqrt(x**2)", "1", False),  # not for x below 0
        ("-exp(-x**2)/2", "x*exp(-x**2)", True),
        ("exp(-x**2)/2", "x*exp(-x**2)", False),
        ("sin(x)**2/2", "sin(x)*cos(x)", True),
        ("-cos(x)**2/2", "sin(x)*cos(x)", True),
        ("-log(cos(x))", "tan(x)", True),
        ("log(sec(x))", "tan(x)", True),
        ("-log(cos(x)) + pi", "sin(x)/cos(x)", True),
        ("tan(x)", "sec(x)**2", True),
        ("-cot(x)", "csc(x)**2", True),
        ("sec(x) - csc(x)", "sec(x)*tan(x) + csc(x)*cot(x)", True),
        ("asin(x) + acos(x)", "0", True),
        ("x*asin(2*x) + sqrt(1 - 4*x**2)/2", "asin(2*x)", True),
        ("3*x*atan(x) - 3*log(x**2 + 1)/2", "3*atan(x)", True),
        ("cosh(x) + sinh(x)", "exp(x)", True),
        ("log(cosh(x)) + x*tanh(x)", "2*tanh(x) + x*(1 - tanh(x)**2)", True),
        ("asinh(x) + atanh(x)", "1/sqrt(1 + x**2) + 1/(1 - x**2)", True),
        ("acosh(x)", "1/(sqrt(x - 1)*sqrt(x + 1))", True),
        ("E**x", "exp(x)", True),
        ("ln(x)", "x**-1", True),
        ("(((9**999)**999)**999)**999*x", "2*x", False),
        ("exp(exp(exp(x)**999))", "2*x", False),
        ("sin(9**999)", "0", False),
        ("1/(x - x)", "0", False),
        ("log(0)", "0", False),
    ],
)
def test_integrals(text, integrand, right):
    assert is_integral(text, integrand, "x") is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("x**2 - 1", True),
        ("-1 + x*x", True),
        ("x**2 - 1.0", True),
        ("x**(2) - 1", True),
        ("(x - 1)*(x + 1)", False),  # what was to be multiplied
        ("x**2", False),
        ("x**2 - 1 + 1/10**30", False),
        ("y**2 - 1", False),
        ("", False),
    ],
)
def test_products_are_multiplied_out(text, right):
    assert is_sum(text, "x**2 - 1") is right


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", 7),
        ("-1 + 72*(89 - 77)/1", 863),
        ("--(1+2)*3", 9),
        ("6/(1-3/4)", 24),
        ("8 - 4 - 2", 2),
        ("8/4/2", 1),
        ("2*-3", -6),
        ("-2*3", -6),
        ("1/0", None),
        ("2**3", None),
        ("2(3)", None),
        ("(2", None),
        ("2)", None),
        ("", None),
        ("1 2", None),
        ("3-", None),
        ("1.5+2", None),
        ("(" * 5000, None),
        ("9" * 200, None),
    ],
)
def test_arithmetic_of_whole_numbers(text, value):
    found = value_of(text)
    assert (None if found is None else found[0]) == value


@pytest.mark.parametrize(
    ("task", "answer", "facts", "text", "score"),
    [
        ("puzzle24", "6*4*1*1", {"numbers": [6, 4, 1, 1]}, "4*6/1/1", 1.0),
        ("puzzle24", "2*3*4*1", {"numbers": [1, 2, 3, 4]}, "6*4*1*1", 0.0),  # right for every other problem
        ("countdown", "1+2", {"numbers": [1, 2], "target": 3}, "2 + 1", 1.0),
        ("countdown", "1+2", {"numbers": [1, 2], "target": 3}, "3", 0.0),
        ("countdown", "1+2", {"numbers": [1, 2], "target": 3}, "2*1", 0.0),
        ("coin_flip", "0.03515625", {}, "9/256", 1.0),
        ("coin_flip", "0.03515625", {}, "0", 0.0),
        ("coin_flip", "0.03515625", {}, "0.035", 0.0),
        ("complex_arithmetic", "3.0 - 2.0i", {}, "(3-2j)", 1.0),
        ("complex_arithmetic", "3.0 - 2.0i", {}, "3 + 2i", 0.0),
        ("complex_arithmetic", "0.0 + 1.0i", {}, "i", 1.0),
        ("complex_arithmetic", "3.0 - 2.0i", {}, "nan", 0.0),
        ("game_of_life_halting", "True", {}, "true", 1.0),
        ("game_of_life_halting", "True", {}, "False", 0.0),
        ("game_of_life", "[[0,1],[1,0]]", {}, "[[0, 1], [1, 0]]", 1.0),
        ("game_of_life", "[[0,1],[1,0]]", {}, "[[0, 1], [1, 1]]", 0.0),
        ("number_sorting", "['1.5', '2.0']", {}, "[1.50, 2]", 1.0),
        ("number_sorting", "['1.5', '2.0']", {}, "[NaN, NaN]", 0.0),
        ("number_sorting", "['1.5', '2.0']", {}, "[1.6, 2.0]", 0.0),
        ("gsm_symbolic", "1090", {}, "It costs $1,090 in all.", 1.0),
        ("gsm_symbolic", "5", {}, "-5", 0.0),
        ("chain_sum", "1000", {}, "+01,000.00", 1.0),
        ("chain_sum", "3", {}, "13", 0.0),
        ("chain_sum", "3", {}, "1 2 3", 0.0),
        ("letter_counting", "1", {}, "-1", 0.0),
        ("acre", "on", {}, "None", 0.0),
        ("power_function", "232307.612289", {}, "2.32e5", 1.0),
        ("power_function", "232307.612289", {}, "231000", 0.0),
        ("bitwise_arithmetic", "-0x2f", {}, "-47", 1.0),
        ("bitwise_arithmetic", "0xe956", {}, "0xE956", 1.0),
        ("bitwise_arithmetic", "0xe956", {}, "e956", 0.0),
        ("fraction_simplification", "$\\frac{46}{81}$", {}, "46/81", 1.0),
        ("fraction_simplification", "$\\frac{46}{81}$", {}, "92/162", 0.0),
        ("prime_factorization", "3 \N{MULTIPLICATION SIGN} 5", {}, "5 \N{MULTIPLICATION SIGN} 3", 1.0),
        ("prime_factorization", "3 \N{MULTIPLICATION SIGN} 5", {}, "15", 0.0),
        ("string_insertion", "ABC", {}, "['A', 'B', 'C']", 0.1),
        ("n_queens", "Q _\n_ Q", {"valid_answers": ["Q _\n_ Q"]}, '[["Q", "_"], ["_", "Q"]]', 0.5),
        ("mini_sudoku", "1 2\n2 1", {}, "1|2\n2|1", 0.9),
        ("mini_sudoku", "1 2\n2 1", {}, "1 2\n2 2", 0.0),
        ("pool_matrix", "3.67 4", {}, "3.68 4.0", 1.0),
        ("pool_matrix", "3.67 4", {}, "0 0", 0.0),
        ("calendar_arithmetic", "Monday", {}, "Tuesday", 0.0),
        ("calendar_arithmetic", "22", {}, "22.0", 1.0),
        ("knights_knaves", "Ann is a sage, and Bob is a fool.", {}, "Bob is a fool and Ann a sage", 1.0),
        ("knights_knaves", "Ann is a sage, and Bob is a fool.", {}, "Ann is a fool, and Bob is a fool.", 0.0),
        ("knights_knaves", "Ann is a sage, and Bob is a fool.", {}, "Ann is a sage", 0.0),
        ("knights_knaves", "Ann is a sage, and Bob is a fool.", {}, "Ann: sage fool, Bob: fool sage", 0.0),
        ("rotate_matrix", "1 2", {}, "turn it\n1 2", 0.0),  # the prompt again
        ("rotate_matrix", "1 2", {}, "it is\n1 2", 3 / 9),
    ],
)
def test_verdicts_of_our_own_rules(task, answer, facts, text, score):
    row = {
        "prompt": "p",
        "task": task,
        "settings": {},
        "entry": {"question": "turn it\n1 2", "answer": answer, "metadata": facts},
    }
    assert scored(ReasoningGymReward(), [row], [text]) == [pytest.approx(score)]


def test_a_task_that_is_refused_says_why_and_what_to_do():
    row = {"task": "composite", "settings": {}, "entry": {"answer": "1"}}
    assert "name each of them as a source" in str(problem(ReasoningGymReward(), row))
    row["task"] = "a_task_of_tomorrow"
    assert "score it by a function of your own" in str(problem(ReasoningGymReward(), row))
    with pytest.raises(InputError, match=r"'a_task_of_tomorrow' is refused: .*absurd"):
        scored(ReasoningGymReward(), [{"prompt": "p", **row}], ["1"])


def test_a_row_made_elsewhere_that_lacks_what_its_rule_needs():
    row = {"task": "countdown", "settings": {}, "entry": {"answer": "1+2", "metadata": {}}}
    assert "'countdown': the row was not made by an rg: source: KeyError" in str(problem(ReasoningGymReward(), row))
    row["entry"] = {"answer": "1+2", "metadata": {"numbers": [1, 2], "target": 4}}
    assert "own answer is wrong by the task's rule" in str(problem(ReasoningGymReward(), row))


def test_a_row_that_cannot_be_written_down_for_a_checker():
    row = {"task": "jugs", "settings": {}, "entry": {"answer": "1", "metadata": {"x": float("nan")}}}
    assert "'jugs': the row has values other than texts" in str(problem(ReasoningGymReward(), row))


def test_without_a_sandbox_only_the_tasks_that_need_one_are_refused(monkeypatch):
    def none_here(*arguments: Any) -> Any:
        raise InputError("this machine cannot fully isolate programs: it is a toaster")

    monkeypatch.setattr(tasks, "open_sandbox", none_here)
    reward, row = ReasoningGymReward(), rows_of("chain_sum", 1)[0]
    assert problem(reward, row) is None
    assert scored(reward, [row], [row["answer"]]) == [1.0]
    with pytest.raises(
        InputError, match=r"'jugs': its checker parses .* needs a sandbox: this machine cannot fully isolate"
    ):
        problem(reward, rows_of("jugs", 1)[0])
    with pytest.raises(InputError, match=r"^reasoning-gym task 'jugs'.*toaster"):
        Scorer().problem("reasoning_gym", rows_of("jugs", 1)[0])


class Fake:
    """A sandbox whose program answers as told."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies = replies

    def session(self, program: str, function: str, limits: Any) -> Any:
        return self

    def ask(self, request: bytes) -> bytes | None:
        text = json.loads(request)["literal"]
        self.reply = next(reply for key, reply in self.replies.items() if repr(key) in text)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply if isinstance(self.reply, bytes) else None

    def finish(self) -> Any:
        return type(
            "Outcome",
            (),
            dict(zip(("ended", "cpu_seconds"), self.reply, strict=True)) if isinstance(self.reply, tuple) else {},
        )


def test_what_becomes_of_a_checker_that_does_not_answer(monkeypatch, caplog):
    row = rows_of("jugs", 1)[0]
    replies: dict[str, Any] = {
        "right": b'{"value": 1.0}',
        "form": b'{"value": 0.05}',
        "half": b'{"value": 0.5}',
        "much": b'{"value": 7.0}',
        "nan": b'{"value": NaN}',
        "true": b'{"value": true}',
        "raises": b'{"error": "ValueError: x"}',
        "noise": b"hello",
        "killed": ("signal", 0.1),
        "cpu": ("signal", 5.0),
        "clock": ("timeout", 0.1),
        "broken": SandboxError("its keeper has died"),
        row["answer"]: b'{"value": 1.0}',
    }
    monkeypatch.setattr(tasks, "open_sandbox", lambda *_: Fake(replies))
    reward = ReasoningGymReward(RewardConfig(workers=1))
    assert problem(reward, row) is None
    texts = list(replies)[:-1]
    expected = [1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None]
    assert scored(reward, [row] * len(texts), texts) == expected
    assert reward.counts == {"right": 1, "partial": 1, "wrong": 2, "crashed": 5, "timeout": 1, "unscored": 2}
    assert "its keeper has died" in caplog.text


def test_a_checker_that_does_not_know_its_own_answer_is_told_of(monkeypatch):
    row = rows_of("jugs", 1)[0]
    monkeypatch.setattr(tasks, "open_sandbox", lambda *_: Fake({row["answer"]: b'{"value": 0.01}'}))
    assert "gives the row's own answer" in str(problem(ReasoningGymReward(), row))


def test_the_table_says_who_judges():
    rows = re.findall(r"^\| (\w+) \| ([^|]+?) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {task: "refused" if by.startswith("refused") else by for task, by in rows if task != "task"}
    assert found == {task: judged_by(task) for task in RULES}


def test_a_run_whose_policy_writes_code(tmp_path, monkeypatch):
    """Rows of tasks whose checkers evaluate text, from a file, with prompts that the small tokenizer knows."""
    target = tmp_path / "written"
    texts = [payload.format(where=target) for payload in PAYLOADS]
    for name, count in (("train", 4), ("held_out", 1)):
        lines = []
        for task in ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown"):
            for i, row in enumerate(rows_of(task, count)):
                prompt = f"{1 + len(lines)}{i}{len(name)}=7:".rjust(12)
                lines.append(json.dumps({**row, "prompt": prompt, "slice": "rg"}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    said: list[str] = []

    def speak(self: Any, token_ids: Any) -> str:
        said.append(texts[len(said) % len(texts)])
        return said[-1]

    monkeypatch.setattr(prompts.Decoder, "__call__", speak)
    source = "jsonl:{}?prompt=prompt&answer=answer&reward=reasoning_gym&slice=rg"
    config = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        steps=2,
        data__train=(source.format(tmp_path / "train.jsonl"),),
        data__eval=(source.format(tmp_path / "held_out.jsonl"),),
        evaluation__every=1,
    )
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    summary = train.run(resolve(config), tiny_run.quiet())
    assert summary
    assert set(texts) <= set(said)
    assert not target.exists()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["verdicts"] for step in steps[-2:]] == [{"reasoning_gym": {"wrong": 16}}] * 2
    assert [step["reward_mean"] for step in steps[-2:]] == [0.0, 0.0]


@pytest.fixture(scope="module")
def in_sandbox() -> Iterator[ReasoningGymReward]:
    """The reward with a sandbox open, where this machine has one."""
    reward = ReasoningGymReward(RewardConfig(task_seconds=2.0))
    try:
        reward._open("jugs")
    except InputError as error:
        pytest.skip(str(error))
    yield reward
    reward.close()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("task", CHECKED)
def test_checkers_in_the_sandbox(task, in_sandbox):
    rows = rows_of(task)
    assert problem(in_sandbox, rows[0]) is None
    if isinstance(rows[0]["answer"], str):
        spaced = f"<answer>\n{rows[0]['answer']}\n</answer>"
        assert scored(in_sandbox, rows[:1], [spaced]) == [1.0]
    most, text = most_for_absurd(in_sandbox, task, rows, 1)
    assert most <= MOST_FOR_ABSURD, text
    assert not Path("/tmp/task_sweep").exists()


@pytest.mark.slow
@pytest.mark.process
def test_a_text_that_hangs_its_checker_is_wrong_and_harms_no_other(in_sandbox, tmp_path, monkeypatch):
    """With the package's checker, which evaluates, for a task that has a rule of our own."""
    monkeypatch.setitem(rules.RULES, "simple_integration", Rule(least=1.0))  # type: ignore[arg-type]
    rows = rows_of("simple_integration", 1)
    target = tmp_path / "written"
    target.touch(mode=0o666)
    poison = '[exec("import sympy; sympy.simplify = lambda *_: 0"), 1][1]'
    texts = ["9**9**9**9", "exit(7)", f"open({str(target)!r}, 'w').write('x')", poison, "x"]
    assert scored(in_sandbox, rows * 5, texts)[:3] == [0.0] * 3
    assert scored(in_sandbox, rows * 2, ["x", rows[0]["answer"].replace(" + C", "")]) == [0.0, 1.0]
    assert target.read_text() == ""

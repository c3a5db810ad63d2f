"""The reward `code`: shapes of rows, verdicts, and programs that try to pass without the answer."""

from __future__ import annotations

import base64
import json
import pickle
import secrets
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from code_programs import BACKENDS, FORGERIES_BY_VALUE, fenced, made, verdict
from steady import takes_less

from paced_fast.config import RewardConfig
from paced_fast.data.records import PromptRow
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer, load_reward
from paced_fast.rewards.code.blocks import program_in
from paced_fast.rewards.code.cases import request_of
from paced_fast.rewards.code.compare import JSON_ERRORS, read_json, same_text, same_value
from paced_fast.rewards.code.reward import CodeReward
from paced_fast.rewards.code.tests import suite_of
from paced_fast.rewards.sandbox import SandboxError


@pytest.fixture(scope="module")
def hasty() -> Iterator[CodeReward]:
    """With a limit for programs that reach it."""
    judge = made("fork_server", code_seconds=1.0)
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    judge = made("fork_server", code_seconds=60.0)
    yield judge
    judge.close()


SUM = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
ADD = "def add(a, b):\n    return a + b"
READ_AND_ADD = "print(sum(map(int, input().split())))"

SHAPES: list[tuple[str, dict[str, Any], str]] = [
    ("object of lists as text", {"input_output": json.dumps(SUM)}, READ_AND_ADD),
    ("object of lists", {"tests": SUM}, READ_AND_ADD),
    ("lines as lists", {"tests": {"inputs": [["1", "2"]], "outputs": [["1", "2"]]}}, "print(input())\nprint(input())"),
    ("ground truth", {"ground_truth": json.dumps(SUM)}, READ_AND_ADD),
    (
        "typed list",
        {"tests": json.dumps([{"type": "stdin_stdout", "input": "1 2", "output": "3"}])},
        READ_AND_ADD,
    ),
    (
        "list under test_cases",
        {
            "verification_info": {
                "language": "python",
                "test_cases": [{"type": "stdin_stdout", "input": "1 2", "output": "3"}],
            }
        },
        READ_AND_ADD,
    ),
    ("function with wrapped values", {"tests": {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}}, ADD),
    ("function with plain values", {"tests": {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}}, ADD),
    (
        "method",
        {"tests": {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}},
        "class Solution:\n    def add(self, a, b): return a + b",
    ),
    (
        "function calls in a list",
        {"tests": [{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": [3]}]},
        ADD,
    ),
    (
        "function calls with the name in each item's metadata",
        {
            "tests": json.dumps(
                [{"input": "1\n2", "output": "3", "testtype": "FUNCTIONAL", "metadata": {"func_name": "add"}}]
            )
        },
        ADD,
    ),
    (
        "function named by the row",
        {
            "tests": json.dumps([{"testtype": "functional", "input": "1\n2", "output": "3"}]),
            "metadata": {"func_name": "add"},
        },
        ADD,
    ),
    (
        "reading input beside metadata",
        {"tests": [{"input": "1 2", "output": "3"}], "metadata": "of 2024"},
        READ_AND_ADD,
    ),
    ("reading input with an empty name", {"tests": {**SUM, "fn_name": ""}}, READ_AND_ADD),
    (
        "LiveCodeBench, functional",
        {
            "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
            "private_test_cases": json.dumps([{"input": "[]\n3", "output": "3", "testtype": "functional"}]),
            "metadata": json.dumps({"func_name": "f"}),
        },
        "class Solution:\n    def f(self, xs: List[int], y: int) -> int: return sum(xs) + y",
    ),
    (
        "LiveCodeBench, stdin and packed JSON",
        {
            "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
            "private_test_cases": base64.b64encode(
                zlib.compress(json.dumps([{"input": "5 5", "output": "10", "testtype": "stdin"}]).encode())
            ).decode(),
            "metadata": "{}",
        },
        READ_AND_ADD,
    ),
]


@pytest.mark.process
@pytest.mark.parametrize(("columns", "program"), [row[1:] for row in SHAPES], ids=[row[0] for row in SHAPES])
def test_every_shape_of_tests_is_read(reward: CodeReward, columns: dict[str, Any], program: str) -> None:
    assert reward.problem(columns) is None
    assert verdict(reward, fenced(program), **columns) == "right"
    wrong = "def add(*a): return 4\nclass Solution:\n    def f(self, *a): return 4\n    add = f\nprint(4)"
    assert verdict(reward, fenced(wrong), **columns) == "wrong"


def packed_pickle() -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps([])))).decode()


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({}, "has no tests: add a column tests, "),
    ({"tests": "[]"}, "has no test cases"),
    ({"tests": {"inputs": [], "outputs": []}}, "has no test cases"),
    ({"tests": "{'inputs': ["}, "has a column 'tests' that is not JSON"),
    ({"tests": {"inputs": ["1"], "outputs": []}}, "not two lists of the same length"),
    ({"tests": {"inputs": ["1"]}}, "neither a list of cases nor an object of inputs and outputs"),
    ({"tests": {"inputs": ["1", "2"], "outputs": ["", " \n"]}}, "expects no output in any test case"),
    ({"tests": {"inputs": [1], "outputs": ["1"]}}, "test case 0 whose input or output is not text but a int"),
    ({"tests": [{"input": "1"}]}, "test case 0 without input and output"),
    ({"tests": [{"type": "browser", "input": "1", "output": "1"}]}, "test case 0 of the unknown type 'browser'"),
    ({"tests": [{"type": "functional", "input": "1", "output": "1"}]}, "does not name one: add fn_name, or func_name"),
    ({"tests": {"inputs": [[1]], "outputs": [1], "fn_name": "a b"}}, "does not name one"),
    ({"tests": {"inputs": [[1]], "outputs": [float("nan")], "fn_name": "f"}}, "are not JSON"),
    ({"tests": {"inputs": [5], "outputs": [1], "fn_name": "f"}}, "test case 0 whose arguments are not a list"),
    (
        {"tests": [{"input": "1", "output": "1"}, {"fn_name": "f", "input": [1], "output": 1}]},
        "mixes test cases that read input with test cases that call",
    ),
    ({"private_test_cases": packed_pickle()}, "'private_test_cases' that is a pickle, which can run code when read"),
    ({"tests": pickle.dumps([1])}, "'tests' that is a pickle"),
    ({"tests": base64.b64encode(zlib.compress(b"no")).decode()}, "packed but not JSON inside"),
    ({"public_test_cases": "{}"}, "'public_test_cases' that is not a list"),
    ({"test": "def check(candidate):\n    assert candidate(1) == 1"}, "no entry_point that names a function"),
    ({"test": "assert f(1) == 1", "entry_point": "f"}, "without a function check"),
    ({"test": "def check(", "entry_point": "f"}, "that is not Python"),
    ({"test": "def check(candidate): pass", "entry_point": "f"}, "has no test cases"),
    (
        {"test": "def check(candidate):\n    for i in range(9):\n        candidate(i)", "entry_point": "f"},
        "has a function check that asserts nothing",
    ),
    (
        {"tests": {"inputs": [[1]], "outputs": [["x" * 70000]], "fn_name": "f"}},
        "expects more output than --reward.code",
    ),
    (
        {"tests": '{"inputs": [[1e400]], "outputs": [1], "fn_name": "f"}'},
        "that is infinite, NaN, or has too many",
    ),
    ({"tests": '{"inputs": [[1]], "outputs": ["1e400"], "fn_name": "f"}'}, "that is infinite, NaN, or has too"),
    ({"tests": {"inputs": [[1]], "outputs": [[[1 << 50000]]], "fn_name": "f"}}, "are not JSON"),
    ({"tests": {"inputs": [[1 << 50000]], "outputs": [1], "fn_name": "f"}}, "has too many digits"),
    ({"tests": '[{"input": "1", "output": "' + "9" * 5000 + '", "type": "functional"}]'}, "are not JSON"),
    ({"tests": '{"inputs": [1], "outputs": [' + "9" * 5000 + "]}"}, "that is not JSON: Exceeds the limit"),
    ({"tests": '[{"input": "\\ud800", "output": "x"}]'}, "test case 0 whose input or output holds half a character"),
    (
        {"tests": '{"inputs": ["a"], "outputs": [["\\udfff"]]}'},
        "test case 0 whose input or output holds half a character",
    ),
    ({"test": "def check(c):\n    assert False", "entry_point": "f"}, "that never calls the program"),
    ({"test": "def check(c):\n    assert abs(c(1) - 1) < 1e999", "entry_point": "f"}, "is infinite"),
    ({"tests": {"inputs": ["1"], "outputs": ["x" * 70000]}}, "expects more output than --reward.code-output-kib"),
]


@pytest.mark.process
@pytest.mark.parametrize(("columns", "message"), PROBLEMS, ids=[message[:40] for _, message in PROBLEMS])
def test_a_row_that_cannot_be_judged_is_named(reward: CodeReward, columns: dict[str, Any], message: str) -> None:
    problem = reward.problem(columns)
    assert problem is not None
    assert problem.startswith("reward 'code': the row ")
    assert message in problem
    assert "\n" not in problem


@pytest.mark.process
def test_no_pickle_is_opened(reward: CodeReward) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle ran",))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Trap()))).decode()
    assert "pickle" in (reward.problem({"private_test_cases": packed}) or "")


ASSERTS: list[tuple[str, Any, Any]] = [
    # An assert, what `candidate` may give, and what it may not.
    ("assert candidate([1, 2]) == 3", 3, 4),
    ("assert 3 == candidate([1, 2])", 3, 4),
    ("assert candidate('a', -1) == 'b', 'message'", "b", "c"),
    ("assert candidate((1, 2)) == (1, 2)", [1, 2], [2, 1]),
    ("assert candidate({'a': 1}) == {'a': [None]}", {"a": [None]}, {"a": []}),
    ("assert candidate(1) == {1: 2}", {"1": 2}, {"2": 2}),
    ("assert candidate(3.5) == 0.5", 0.5, 0.6),
    ("assert abs(candidate(3.5) - 0.5) < 1e-2", 0.505, 0.52),
    ("assert math.fabs(candidate(3.5) - 0.5) <= 1e-2", 0.505, 0.52),
    ("assert abs(0.5 - candidate(3.5)) < 1e-2", 0.505, 0.52),
    ("assert candidate(1)", True, False),
    ("assert not candidate(1)", False, True),
    ("assert candidate(1) is True", True, False),
    ("assert candidate(1) == True", True, 1),
    ("assert candidate(1) is None", None, 0),
    ("assert candidate('') == ''", "", " "),
    ("assert candidate([-1] * 3) == 2 ** 10", 1024, 1023),
    ("assert candidate('x' * 3) == 'a' + 'b'", "ab", "ba"),
    ("assert sorted(candidate(1)) == [1, 2]", [2, 1], [1, 1]),
    ("assert tuple(candidate(1)) == tuple([1, 2])", [1, 2], [2, 1]),
    ("assert set(candidate(1)) == {1, 2}", [2, 1, 1], [1, 3]),
    ("assert set(candidate(1)) == set([1, 2])", [2, 1, 1], [1, 3]),
    ("assert len(candidate(1)) == 2", [1, 1], [1]),
    ("assert f(2) == 4", 4, 5),
]


@pytest.mark.parametrize(("text", "good", "bad"), ASSERTS, ids=[row[0] for row in ASSERTS])
def test_asserts_are_taken_apart(text: str, good: Any, bad: Any) -> None:
    from paced_fast.rewards.code.reward import _verdict

    test = f"METADATA = {{}}\n\ndef check(candidate):\n    '''doc'''\n    assert True, 'a remark'\n    {text}\n"
    suite = suite_of({"test": test, "entry_point": "f"})
    (case,) = suite.cases
    assert _verdict(json.dumps({"value": good}).encode(), case) == "right"
    assert _verdict(json.dumps({"value": bad}).encode(), case) == "wrong"


HUMAN_EVAL = {
    "prompt": "import math\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
    'def root(x: int) -> int:\n    """The whole root, halved."""\n',
    "test": "def check(candidate):\n    assert candidate(16) == 2\n    assert candidate(70) == 4\n",
    "entry_point": "root",
}


@pytest.mark.process
@pytest.mark.parametrize("where", ["column", "text", "chat"])
def test_a_completion_goes_on_from_the_prompt(reward: CodeReward, where: str) -> None:
    columns = {key: text for key, text in HUMAN_EVAL.items() if where == "column" or key != "prompt"}
    chat = [{"role": "user", "content": f"Complete this.\n\n```python\n{HUMAN_EVAL['prompt']}```"}]
    prompt = {"column": "p", "text": HUMAN_EVAL["prompt"], "chat": chat}[where]
    body = "    return half(math.isqrt(x))\n"
    if where == "column":
        columns["prompt"] = columns["prompt"].rstrip("\n")
    for completion in (body, fenced(f"def root(x):\n{body}"), fenced(HUMAN_EVAL["prompt"] + body)):
        assert verdict(reward, completion, prompt, **columns) == "right"
    assert verdict(reward, "    return half(x)\n", prompt, **columns) == "wrong"
    assert verdict(reward, "It is the root.", prompt, **columns) == "no_code"


BLOCKS: list[tuple[str, str | None]] = [
    ("```python\na\n```", "a\n"),
    ("```python\na\n```\nor\n```python\nb\n```\nThat is it.", "b\n"),
    ("```python\na\n```\nIt prints:\n```\n3\n```", "a\n"),
    ("```\na\n```", "a\n"),
    ("```Python3 title\na\n```", "a\n"),
    ("  ```py\n  a\n    b\n c\n  ```", "a\n  b\nc\n"),
    ("```python\n    a\n```", "    a\n"),
    ("```python3.11\na\n```", "a\n"),
    ("```pypy3\na\n```", "a\n"),
    ("~~~python\na\n```\nb\n~~~", "a\n```\nb\n"),
    ("````python\na\n```\nb\n````", "a\n```\nb\n"),
    ("```x = 1``` is not enough:\n```python\na\n```", "a\n"),
    ("```python\na\n```python\nb\n```", "b\n"),
    ("```python\n'''\n```\nx\n```\n'''\nprint(1)\n```\nwords", "'''\n```\nx\n```\n'''\nprint(1)\n"),
    ("```python\na = \"'''\"\n```\nwords\n```text\n3\n```", "a = \"'''\"\n"),
    ("```python\na = \"'''\"\n```\n" + "```text\n3\n```\n" * 11 + "'''\n```\n", "a = \"'''\"\n"),
    ("```python\na\n```\n" * 500, "a\n"),
    ("```python\na\n```\n" * 501, None),
    ("```python\r\na\r\n```\r\n", "a\r\n"),
    ("'''words'''\nn = input()", "'''words'''\nn = input()"),
    ("```python\ncut off", "cut off"),
    ("```cpp\nint x;\n```", None),
    ("print(1)", "print(1)"),
    ("import sys\nprint(1)", "import sys\nprint(1)"),
    ("n = int(input())\nprint(n)", "n = int(input())\nprint(n)"),
    ("The answer is 3.", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "program"), BLOCKS)
def test_the_program_is_the_last_python_block(completion: str, program: str | None) -> None:
    assert program_in(completion) == program


@pytest.mark.parametrize("unit", [" ", "\t", "`", "-", "~", "\n", "```", "```\n", "\n" + 20 * " ", "'''\n```\n", "a "])
@pytest.mark.parametrize("start", ["", "```python", "```python\n'''\n", "So"])
def test_extraction_takes_linear_time(start: str, unit: str) -> None:
    text = start + unit * (1_000_000 // len(unit))
    assert takes_less(0.4, lambda: program_in(text), time.thread_time)


@pytest.mark.process
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        (READ_AND_ADD, "right"),
        ("print(3)", "wrong"),
        ("print(3", "syntax"),
        ("  print(3)\n print(4)", "syntax"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("print(1 / 0)", "crashed"),
        (f"{READ_AND_ADD}\nraise SystemExit(1)", "crashed"),
        (f"{READ_AND_ADD}\nimport os; os.abort()", "crashed"),
        ("while True: print('x' * 1000)", "wrong"),
        ("", "wrong"),
    ],
)
def test_verdicts_of_programs(reward: CodeReward, hasty: CodeReward, program: str, kind: str) -> None:
    assert verdict(hasty if kind == "timeout" else reward, fenced(program), tests=SUM) == kind


@pytest.mark.process
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        (ADD, "right"),
        ("def add(a, b):\n    print('noise')\n    return a + b", "right"),
        ("def add(a, b): return a - b", "wrong"),
        ("def add(a, b): return str(a + b)", "wrong"),
        ("def add(a, b): return", "wrong"),
        ("def sub(a, b): return a + b", "crashed"),
        ("def add(a, b): raise KeyError", "crashed"),
        ("def add(a, b): return {1, 2}", "crashed"),
        ("def add(a, b): return bytearray(1 << 30)", "memory"),
        ("def add(a, b):\n    while True: pass", "timeout"),
        ("while True: pass", "timeout"),
        ("def add(a, b): exit(0)", "crashed"),
        ("def add(a, b) return a + b", "syntax"),
        ("1 / 0", "crashed"),
    ],
)
def test_verdicts_of_functions(reward: CodeReward, hasty: CodeReward, program: str, kind: str) -> None:
    tests = {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}
    assert verdict(hasty if kind == "timeout" else reward, fenced(program), tests=tests) == kind


@pytest.mark.process
@pytest.mark.parametrize(
    ("expected", "value", "kind"),
    [("5", 5, "right"), ("5", "5", "right"), ("5", "6", "wrong"), ("true", True, "right"), ("true", "true", "right")],
)
def test_a_text_output_is_the_value_or_the_text(reward: CodeReward, expected: str, value: Any, kind: str) -> None:
    tests = {"inputs": [[1]], "outputs": [expected], "fn_name": "f"}
    assert verdict(reward, fenced(f"def f(x): return {value!r}"), tests=tests) == kind


def test_lines_of_arguments_end_at_line_feeds_only() -> None:
    items = [{"input": '"a\u2028b\x85"\n2', "output": "1", "testtype": "functional"}]
    suite = suite_of({"public_test_cases": items, "metadata": {"func_name": "f"}})
    assert suite.cases[0].arguments == ("a\u2028b\x85", 2)


@pytest.mark.process
@pytest.mark.parametrize("function", [None, "f"])
def test_a_row_has_a_time_of_its_own(
    reward: CodeReward, hasty: CodeReward, monkeypatch: pytest.MonkeyPatch, function: str | None
) -> None:
    monkeypatch.setattr("paced_fast.rewards.code.reward._ROW_BUDGET", 1)
    tests = {"inputs": ["[1]"] * 9, "outputs": ["1"] * 9, "fn_name": function}
    slow = fenced("import time\ndef f(x):\n    time.sleep(0.3)\n    return x\nif __name__ == '__main__': print(f(1))")
    assert takes_less(2.4, lambda: verdict(hasty, slow, tests=tests), time.monotonic)
    assert verdict(hasty, slow, tests=tests) == "timeout"
    assert verdict(reward, slow, tests={**tests, "inputs": ["[1]"], "outputs": ["1"]}) == "right"


@pytest.mark.process
def test_an_empty_expected_output_makes_no_crash_a_pass(reward: CodeReward) -> None:
    tests = {"inputs": ["1", ""], "outputs": ["1", ""]}
    assert verdict(reward, fenced("import sys\nt = sys.stdin.read()\nif t: print(t)"), tests=tests) == "right"
    assert (
        verdict(reward, fenced("import sys\nt = sys.stdin.read()\nprint(t) if t else 1 / 0"), tests=tests) == "crashed"
    )


@pytest.mark.process
def test_all_tests_must_pass_and_the_first_failure_ends_it(reward: CodeReward) -> None:
    tests = {"inputs": ["1", "2", "x"], "outputs": ["1", "3", "x"]}
    assert (
        verdict(reward, fenced("import time\ns = input()\nif s == 'x': time.sleep(9)\nprint(s)"), tests=tests)
        == "wrong"
    )


@pytest.mark.process
def test_a_broken_sandbox_is_no_verdict(reward: CodeReward, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise SandboxError("gone")

    monkeypatch.setattr(reward._sandbox, "run", fail)
    assert verdict(reward, fenced(READ_AND_ADD), tests=SUM) == "unscored"
    calls = []
    monkeypatch.setattr(reward._sandbox, "session", lambda *a: calls.append(a) or fail())
    assert verdict(reward, fenced(ADD), tests={"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}) == "unscored"
    assert len(calls) == 2


FORGERIES_BY_OUTPUT = {
    "exit 0": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "words of success": "print('right'); print('PASS'); print('OK', 1.0, True)",
    "words at the end": "import atexit; atexit.register(lambda: print('all tests passed'))",
    "echo": "import sys; print(sys.stdin.read())",
    "search of the frames": """
import sys, gc
frame = sys._getframe()
while frame:
    print({k: v for k, v in list(frame.f_globals.items()) + list(frame.f_locals.items()) if isinstance(v, (str, dict))})
    frame = frame.f_back
""",
    "search of all objects": """
import gc
for thing in gc.get_objects():
    for part in (thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()):
        if isinstance(part, str) and part.startswith('answer-'):
            print(part)
""",
    "verdicts on every descriptor": """
import os
for descriptor in range(64):
    for text in (b'right\\n', b'{"value": 1}\\n', b'ready\\n', b'{"status": 0}\\n'):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
""",
    "a harness of its own": """
import sys, json
json.dumps = lambda *a, **k: '{"value": true}'
for name, module in list(sys.modules.items()):
    if 'harness' in name:
        module._answer_calls = lambda *a: None
""",
    "silence": "pass",
}


@pytest.mark.process
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_forged_verdict_is_a_pass(backend: str) -> None:
    judge = made(backend, workers=3)
    secret = f"answer-{secrets.token_hex(8)}"
    by_output = {"inputs": ["question"], "outputs": [secret]}
    by_value = {"inputs": [[1], [2]], "outputs": [secret, [secret, 5]], "fn_name": "f"}
    try:
        for programs, tests in ((FORGERIES_BY_OUTPUT, by_output), (FORGERIES_BY_VALUE, by_value)):
            completions = [fenced(program) for program in programs.values()]
            values = judge(["p"] * len(completions), completions, tests=[tests] * len(completions))
            assert dict(zip(programs, values, strict=True)) == dict.fromkeys(programs, 0.0)
        honest = [fenced(f"print('{secret}')"), fenced(f"def f(x): return '{secret}' if x == 1 else ('{secret}', 5)")]
        assert judge(["p"] * 2, honest, tests=[by_output, by_value]) == [1.0, 1.0]
    finally:
        judge.close()


def test_the_state_of_the_parent_survives_hostile_answers() -> None:
    for line in (b"[" * 100000, b"1" * 5000, b'{"value": NaN}', b'{"value": Infinity}', b"\xff", b""):
        with pytest.raises(JSON_ERRORS):
            read_json(line)


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (b"3\n", "3", True),
        (b"  3 \r\n\n\n", "3\n", True),
        (b"1 2\n3", "1 2\n3\n", True),
        (b"1  2", "1 2", True),
        (b"1\n2", "1 2", False),
        (b"1 2", "1\n2", False),
        (b"03", "3", False),
        (b"3.0", "3", False),
        (b"YES", "Yes", False),
        (b"0.3000001", "0.3", True),
        (b"0.3001", "0.3", False),
        (b".3", "0.30", True),
        (b"1", "1.0", True),
        (b"1000000.5", "1000000.1", True),
        (b"1000002.5", "1000000.1", False),
        (b"nan", "0.3", False),
        (b"0x1p3", "8.0", False),
        (b"1_0", "10.0", False),
        (b"1e999999", "1.0", False),
        (b"\xff", "x", False),
        (b"", "", True),
        (b"x", "", False),
        (b"", "x", False),
        (b"7", "9" * 330 + ".0", False),
        (b"8" * 330 + b".0", "9" * 330 + ".0", False),
        (b"9" * 330 + b".0", "9" * 330 + ".0", True),
    ],
)
def test_outputs_are_compared_word_by_word(given: bytes, expected: str, same: bool) -> None:
    assert same_text(given, expected) is same


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (1, 1, True),
        (True, 1, False),
        (1, True, False),
        (False, 0, False),
        (None, False, False),
        (2.0, 2, True),
        (2, 2.0, True),
        (2.0000001, 2, False),
        (2.0000001, 2.0, True),
        (2.1, 2.0, False),
        (10**400, 2.0, False),
        (10**400, 10**400, True),
        ("2", 2, False),
        (2, "2", False),
        ([1, [2.0]], [1, [2]], True),
        ([1], [1, 2], False),
        (5, float("inf"), False),
        (float("inf"), float("inf"), True),
        (float("inf"), 1.5, False),
        (float("nan"), float("nan"), False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ([], {}, False),
        ([], None, False),
        ("", None, False),
    ],
)
def test_values_are_compared_with_their_types(given: Any, expected: Any, same: bool) -> None:
    assert same_value(given, expected) is same


def test_arguments_that_json_would_change_go_as_python() -> None:
    suite = suite_of(
        {"test": "def check(c):\n    assert c((1, 2), {3: 4}) == 1\n    assert c([1], 'x') == 2\n", "entry_point": "f"}
    )
    assert json.loads(request_of(suite.cases[0])) == {"literal": "((1, 2), {3: 4})"}
    assert json.loads(request_of(suite.cases[1])) == {"arguments": [[1], "x"]}


@pytest.mark.process
def test_the_scorer_takes_it_by_name() -> None:
    made("auto").close()
    scorer = Scorer(["code"], RewardConfig(code_seconds=1.0, workers=1))
    rows = [PromptRow(prompt="p", token_ids=(0,), reward="code", slice="s", columns={"tests": SUM})] * 2
    assert scorer.score(rows, [fenced(READ_AND_ADD), "no"]) == [1.0, 0.0]
    assert scorer.take_counts() == {"code": {"right": 1, "no_code": 1}}
    assert "has no tests" in (scorer.problem("code", {}) or "")
    scorer.close()


def test_a_missing_sandbox_is_refused_when_the_reward_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"--reward\.sandbox bubblewrap does not work on this machine"):
        load_reward("code", RewardConfig(sandbox="bubblewrap"))


@pytest.mark.process
def test_a_row_without_tests_is_an_error_not_a_zero(reward: CodeReward) -> None:
    with pytest.raises(InputError, match="reward 'code': a row has no tests"):
        reward(["p"], [fenced("print(1)")], answer=["1"])

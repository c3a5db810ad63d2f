"""The reward for programs in short, and programs that forge a verdict."""

from __future__ import annotations

from typing import Any

import pytest

from paced_fast.config import RewardConfig
from paced_fast.errors import InputError
from paced_fast.rewards.code.reward import CodeReward

BACKENDS = ("fork_server", "bubblewrap")


def made(name: Any, **settings: Any) -> CodeReward:
    given = {"code_seconds": 1.0, "code_memory_mib": 256, "code_output_kib": 64, "workers": 2, **settings}
    try:
        return CodeReward(RewardConfig(sandbox=name, **given))
    except InputError as error:
        pytest.skip(str(error))


def fenced(program: str) -> str:
    return f"Here it is:\n\n```python\n{program}\n```\nDone."


def verdict(judge: CodeReward, completion: str, asked: Any = "p", /, **columns: Any) -> str:
    judge.counts.clear()
    (value,) = judge([asked], [completion], **{key: [column] for key, column in columns.items()})
    (kind,) = judge.counts
    assert value == (None if kind == "unscored" else float(kind == "right"))
    return kind


FORGERIES_BY_VALUE = {
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Equal()
""",
    "a list equal to everything": "class L(list):\n    __eq__ = lambda s, o: True\ndef f(x): return L([1])",
    "a text equal to everything": "class S(str):\n    __eq__ = lambda s, o: True\ndef f(x): return S('x')",
    "a number equal to everything": "class I(int):\n    __eq__ = lambda s, o: True\ndef f(x): return I(1)",
    "exit 0": "def f(x): raise SystemExit(0)",
    "exit at once": "import os\ndef f(x): os._exit(0)",
    "true": "def f(x): return True",
    "nothing": "def f(x): return None",
    "not a number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "its argument": "def f(x): return x",
    "everything at once": "def f(x): return [x, [x], True, {}, 'right']",
    "a value of megabytes": "def f(x): return 'x' * 10 ** 8",
    "a deep value": """
def f(x):
    for _ in range(900): x = [x]
    return x
""",
    "a deep line": "import os\ndef f(x):\n    os.write(4, b'[' * 20000 + b'\\n')\n    return 1",
    "a huge number": "def f(x): return 7 ** 4000",
    "no line": "import os\ndef f(x):\n    while True: os.write(4, b'x' * 1000)",
    "a verdict": 'import os\ndef f(x):\n    os.write(4, b\'{"value": true, "verdict": "right"}\\n\')\n    return 1',
    "no verdict of JSON": "import os\ndef f(x):\n    os.write(4, b'right\\n\\xff\\xfe\\n')\n    return 1",
    "answers ahead": "import os\nfor _ in range(20): os.write(4, b'{\"value\": 1}\\n')\ndef f(x): return 2",
    "another JSON": 'import json\njson.dumps = lambda *a, **k: \'{"value": "right"}\'\ndef f(x): return 1',
    "an error": "def f(x): raise AssertionError('right')",
    "closed channel": "import os\nos.close(4)\ndef f(x): return 1",
    "a harness of its own": """
import sys
harness = sys.modules['paced_fast.rewards.sandbox.harness']
harness._answer_calls = lambda *a: None
harness.json.loads = lambda *a: {'value': True}
def f(x): return 1
""",
    "the frames above": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, str) and value.startswith('answer-'): return value
        frame = frame.f_back
""",
}

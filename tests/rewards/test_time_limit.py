"""Reward functions of users that hang, leave or fail: one line that names the function and where it stands."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paced_fast.config import RewardConfig
from paced_fast.data.records import Completion, PromptRow
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer, Shaper, user_function
from paced_fast.rewards.workers import time_limit
from paced_fast.rewards.workers.time_limit import TookTooLong, limited

ROWS = [PromptRow(prompt="p", token_ids=(0,), reward="", slice="s", columns={})] * 2


def written(folder: Path, body: str, keyword: str = "def") -> str:
    """A reward function with this body, whose first line is line 5 of its file."""
    path = folder / "own.py"
    text = "import asyncio, time, json\nGO_ON = True\nclass Stop(BaseException): pass\n"
    text += f"{keyword} judge(prompts, **columns):\n"
    path.write_text(text + "".join(f"    {line}\n" for line in body.split("\n")))
    return f"{path}:judge"


def score(name: str, **settings: float) -> list[float | None]:
    scorer = Scorer(settings=RewardConfig(**settings))  # type: ignore[arg-type]
    try:
        return scorer.score([PromptRow(prompt="p", token_ids=(0,), reward=name, slice="s", columns={})] * 2, ["a", "b"])
    finally:
        scorer.close()


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("while True: pass", 5),
        ("9 ** 9 ** 9 ** 9", 5),
        ("x = 1\ntime.sleep(1000)", 6),
        ("while True:\n    try:\n        time.sleep(1000)\n    except Exception:\n        pass", 7),
        ("import threading\nthreading.Event().wait()", 6),
        ("json.loads('[1]', object_hook=1, parse_int=lambda text: time.sleep(1000))", 5),
    ],
)
def test_a_plain_function_that_hangs_ends_the_run_in_one_line(body, line, tmp_path):
    name = written(tmp_path, body)
    own = re.escape(name.removesuffix(":judge"))
    began = time.monotonic()
    with pytest.raises(
        InputError,
        match=f"^the reward function '{own}:judge' did not return within --reward.function-seconds 0.2 for 2 "
        rf"completions; it was at {own}:{line} in (judge|<lambda>): make it faster, or raise the limit$",
    ):
        score(name, function_seconds=0.2)
    assert time.monotonic() - began > 0.2


def test_a_shaping_function_has_the_same_limit(tmp_path):
    name = written(tmp_path, "while True: pass")
    shaper = Shaper(RewardConfig(shaping=(f"0.1*{name}",), function_seconds=0.2))
    empty = Completion(token_ids=[], logprobs=[], stopped=True)
    with pytest.raises(InputError, match=r"own.py:judge' did not return .*own.py:5 in judge"):
        shaper.shape(ROWS, ["a", "b"], [empty] * 2, 1)


@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("exit(7)", r"SystemExit: 7"),
        ("raise SystemExit", r"SystemExit:"),
        ("raise Stop('x')", r"Stop: x"),
        ("raise GeneratorExit", r"GeneratorExit:"),
        ("1 / 0", r"ZeroDivisionError: division by zero"),
        ("json.loads('{')", r"JSONDecodeError: .*"),
    ],
)
def test_a_function_that_fails_or_leaves_is_named_with_its_line(keyword, body, said, tmp_path):
    name = written(tmp_path, body, keyword)
    own = re.escape(name.removesuffix(":judge"))
    with pytest.raises(
        InputError,
        match=rf"^the reward function '{own}:judge' failed: {said} ?\(at {own}:5 in judge\): correct it, or",
    ):
        score(name)


def test_an_interrupt_from_the_keyboard_is_not_the_functions(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        score(written(tmp_path, "raise KeyboardInterrupt"))


def test_an_async_function_that_blocks_its_thread_has_a_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(user_function, "_LATE_SECONDS", 0.2)
    name = written(tmp_path, "while GO_ON:\n    time.sleep(0.01)", "async def")
    scorer = Scorer([name], RewardConfig(async_seconds=0.1))
    function = scorer._functions[name]
    try:
        with pytest.raises(InputError, match=r"own.py:judge' blocks its thread .*it was at .*own.py:[56] in judge"):
            scorer.score([PromptRow(prompt="p", token_ids=(0,), reward=name, slice="s", columns={})], ["a"])
    finally:
        function.__globals__["GO_ON"] = False  # type: ignore[attr-defined]
        scorer.close()


def test_functions_that_end_in_time_are_left_alone(tmp_path):
    scorer = Scorer(settings=RewardConfig(function_seconds=30.0))
    name = written(tmp_path, "return [0.5] * len(prompts)")
    rows = [PromptRow(prompt="p", token_ids=(0,), reward=name, slice="s", columns={})] * 2
    for _ in range(200):
        assert scorer.score(rows, ["a", "b"]) == [0.5, 0.5]
    signal.raise_signal(time_limit._SIGNAL)  # one that came too late
    assert scorer.score(rows, ["a", "b"]) == [0.5, 0.5]


def test_a_limit_raises_where_the_main_thread_is_and_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(TookTooLong) as caught, limited("a test", 0.1):
        asyncio.run(asyncio.sleep(1000))
    assert caught.value.stack[-1].name == "select"
    assert threading.active_count() == before


SCRIPT = """
import sys, threading
from paced_fast.data.records import PromptRow
from paced_fast.config import RewardConfig
from paced_fast.rewards import Scorer
from paced_fast.rewards.workers import time_limit
time_limit.GRACE_SECONDS = float(sys.argv[3])
row = PromptRow(prompt="p", token_ids=(0,), reward=sys.argv[1], slice="s", columns={})
scorer = Scorer(settings=RewardConfig(function_seconds=0.2))
if sys.argv[2] == "thread":
    thread = threading.Thread(target=scorer.score, args=([row], ["a"]))
    thread.start()
    thread.join()
else:
    scorer.score([row], ["a"])
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("body", "where", "line", "said", "grace"),
    [
        ("while True:\n    try:\n        time.sleep(1000)\n    except BaseException: pass", "main", 7, True, 2),
        ("while True: pass", "thread", 5, True, 5),
        ("sum(range(10**14))", "main", 5, False, 1),  # holds the interpreter's lock: only the stacks are told
    ],
)
def test_a_function_that_no_signal_ends_ends_its_process(body, where, line, said, grace, tmp_path):
    name = written(tmp_path, body)
    command = [sys.executable, "-c", SCRIPT, name, where, str(grace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    sentence = f"error: the reward function '{name}' did not end within 0.2 s: ending the run"
    assert sentence in done.stderr if said else done.stderr.startswith("Timeout (0:00:02")
    assert f'own.py", line {line} in judge' in done.stderr

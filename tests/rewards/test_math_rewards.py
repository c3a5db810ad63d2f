"""The math rewards: verdicts, hostile answers from any thread, workers that die, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from steady import LIMIT_SECONDS, Steady, takes_less, wait_for

from paced_fast.config import RewardConfig
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer, load_reward
from paced_fast.rewards.math.answers import boxes, is_absurd
from paced_fast.rewards.math.forms import as_interval, has_slips, listed, number_of, tree_of
from paced_fast.rewards.math.reward import MathReward
from paced_fast.rewards.text import tagged
from paced_fast.rewards.votes import answer_key
from paced_fast.rewards.workers.pool import WorkerPool
from paced_fast.rewards.workers.pool_loop import TURN_SECONDS, _state_of

ROOT = Path(__file__).resolve().parents[2]
TABLE = [json.loads(line) for line in (ROOT / "tests" / "verdicts" / "math.jsonl").read_text().splitlines()]
PUBLISHED = ROOT / "benchmarks" / "results" / "math_rewards.json"


@pytest.fixture(scope="module")
def judges():
    """One of each reward, hence one pool, for all the verdicts."""
    settings = RewardConfig(workers=2, math_seconds=10.0)  # as the benchmark
    made = {name: load_reward(name, settings) for name in ("math", "math_strict")}
    yield made
    for judge in made.values():
        judge.close()


def verdict(judge, gold: str, completion: str) -> float | None:
    return judge(prompts=["p"], completions=[completion], answer=[gold])[0]


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("5", "5", 1.0),
        ("43.0", r"so \boxed{43}", 1.0),
        (27.0, r"\boxed{27}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        ("1/2", r"\boxed{\frac12}", 1.0),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1.0),
        ("x^2+1", r"\boxed{1+x^2}", 1.0),
        ("x^2+1", r"\boxed{1+y^2}", 0.0),
        ("1,234", "1234", 1.0),
        ("72", "She earns $72.", 0.0),  # commits to nothing
        ("72", "The answer is $72.", 1.0),
        ("72", "so\n#### 72", 1.0),
        ("so\n#### 72", r"\boxed{72}", 1.0),
        ("72", r"#### 71 \boxed{72}", 1.0),
        ("72", r"\boxed{72 \text{ dollars}}", 1.0),
        ("5", r"\boxed{x = 5}", 1.0),
        ("5", r"\boxed{6}, no, \boxed{5}", 1.0),
        ("5", r"\boxed{5}, no, \boxed{6}", 0.0),  # the last box counts
        ("5", r"\boxed{5", 0.0),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", 1.0),
        ("(1,2)", r"\boxed{(1,2)}", 1.0),
        ("(1,2)", r"\boxed{(2,1)}", 0.0),
        ("(1,2)", r"\boxed{\{1,2\}}", 0.0),
        ("1,2", r"\boxed{2, 1}", 1.0),
        ("3\\times 10^4", r"\boxed{30000}", 1.0),
        ("30000", r"\boxed{3\times 10^4}", 1.0),
        ("Tuesday", r"\boxed{\text{tuesday}}", 1.0),
        ("Tuesday", r"\boxed{ysadTue}", 0.0),  # not a product of letters
        ("A", r"\boxed{B}", 0.0),
        # guesses, restatements and tautologies
        ("5", "1 2 3 4 5", 0.0),
        ("15", "1 2 3 4 5", 0.0),
        ("5", "might be 4, or 5, or 6, it is 5", 0.0),
        ("5", r"\boxed{4, 5}", 0.0),
        ("5", r"\boxed{4 \text{ or } 5}", 0.0),
        ("5", r"\boxed{5=5}", 0.0),
        ("5", r"\boxed{2+3}", 0.0),
        ("5", r"\boxed{5 \pm 0}", 0.0),
        ("5", r"\boxed{500\%}", 0.0),
        ("5", r"\boxed{\infty}", 0.0),
        ("5", r"\boxed{}", 0.0),
        ("5", "", 0.0),
        ("5", r"\boxed{" + "5" * 500 + "}", 0.0),
        ("5", r"\boxed{" + "x" * 5000 + "}", 0.0),
        ("5", r"\boxed{__import__('os').system('false')}", 0.0),
    ],
)
def test_lenient(judges, answer, completion, reward):
    assert verdict(judges["math"], answer, completion) == reward


def test_the_table_is_large_varied_and_has_no_row_twice():
    assert len(TABLE) >= 320
    assert len({row["kind"] for row in TABLE}) >= 30
    assert len({(row["gold"], row["completion"]) for row in TABLE}) == len(TABLE)
    assert all(row["math"] or not row["math_strict"] for row in TABLE), "what is right strictly is right"


@pytest.mark.process
@pytest.mark.parametrize("name", ["math", "math_strict"])
def test_the_table_has_no_errors_but_the_published_ones(judges, name):
    found = judges[name](
        prompts=[""] * len(TABLE),
        completions=[row["completion"] for row in TABLE],
        answer=[row["gold"] for row in TABLE],
    )
    wrong = {
        (row["gold"], row["completion"]): "unscored" if reward is None else "right" if reward else "wrong"
        for row, reward in zip(TABLE, found, strict=True)
        if reward != float(row[name])
    }
    published = json.loads(PUBLISHED.read_text())["errors"][name]
    assert wrong == {(error["gold"], error["completion"]): error["verdict"] for error in published}


def test_hedging_and_hacks_earn_nothing_in_strict_mode():
    hacks = {"several answers", "restated", "tautology", "huge"}
    assert sum(row["kind"] in hacks and not row["math_strict"] for row in TABLE) > 60
    errors = json.loads(PUBLISHED.read_text())["errors"]["math_strict"]
    assert not [error for error in errors if error["kind"] in hacks and error["verdict"] == "right"]


def test_without_workers_the_answer_is_the_same_as_theirs():
    # Numerals never reach a worker: here against plain fractions, worked by hand.
    for text, value in (
        ("1,234,567", "1234567"),
        ("0.125", "1/8"),
        (r"-\frac{2}{6}", "-1/3"),
        (r"3\frac{1}{2}", "7/2"),
        ("12.5\\%", "1/8"),
        (r"1.5\times 10^{-3}", "3/2000"),
        ("2^{-2}", "1/4"),
        ("4!", "24"),
        ("10/2", "10/2"),  # a calculation: equals no 5
        ("500\\%", "500%"),
        ("1/0", None),
        ("1,23", None),
        ("2+3", None),
        ("0^{-1}", None),
    ):
        assert number_of(text) == value, text


def test_boxes():
    assert boxes(r"a \boxed{1} b \boxed{\frac{1}{2}}") == ["1", r"\frac{1}{2}"]
    assert boxes(r"<think>\boxed{1}</think>\boxed {2}") == ["2"]
    assert boxes(r"\boxed{1} \boxed{2") == []
    assert boxes(r"\boxed{1}" * 21) == []
    assert takes_less(1.0, lambda: boxes(r"\boxed{" * 200_000))
    assert boxes(r"\boxed{" * 200_000) == []


def test_trees():
    assert tree_of(r"\left(-1, \frac12\right]") == (["(]", ["number", "-1"], ["number", "1/2"]], "")
    assert tree_of(r"5 \text{ or } 6") == (["set", ["number", "5"], ["number", "6"]], "")
    assert tree_of("x > 3") == (["relation", ["number", "3"], "<", ["expression", "x"]], "")
    assert tree_of(r"12\text{ square feet}") == (["number", "12"], "foot2")
    assert tree_of(r"5 \text{ million}") == (["text", "5 million"], "")
    assert tree_of("1 2 3") is None
    assert tree_of(r"\boxed{5}") is None
    assert tree_of("\uff15") is None  # a digit of full width


def test_slips_and_other_forms():
    assert tree_of("{3}/{8}") == tree_of(r"\frac38") == (["number", "3/8"], "")
    assert tree_of("3{:}30") == (["ratio", ["number", "3"], ["number", "30"]], "")
    assert tree_of(r"(0,y\infty)") is None
    assert number_of(r"0.58\overline{3}") == "7/12"  # 0.58 + 0.03 / 9
    assert number_of("5^1") is None
    assert has_slips("y=2x'", "y=2x")
    assert not has_slips("y'=2x", "f'=2x")  # the gold has it
    assert not has_slips(r"n2^{n-1}", "n")
    parts = ["number", "1"], ["number", "-2"]
    assert listed(tree_of("x=1, x=-2")[0]) == ["set", *parts]
    assert listed(tree_of("x=1, y=-2")[0])[1][0] == "relation"
    assert as_interval(tree_of(r"1 \le x < 3")[0]) == ["[)", ["number", "1"], ["number", "3"]]
    assert as_interval(tree_of(r"x > 3")[0]) == ["()", ["number", "3"], ["expression", r"\infty"]]


def test_the_tagged_answer():
    assert tagged("<answer>1</answer> no, <answer> 2 </answer>, </answer> <answer>3") == " 2 "
    assert tagged("<answer>1") is None
    assert tagged("1</answer>") is None


@pytest.mark.parametrize(
    "text", ["<answer>" * 12_500, "5" + " " * 100_000 + "x", " " * 100_000 + "i", r"\sqrt(" * 16_000, "|" * 100_000]
)
def test_long_texts_are_read_at_once(text):
    def work():
        tree_of(text)
        is_absurd(text[:400], text)
        for reward in ("math", "reasoning_gym"):
            answer_key(reward, text)

    assert takes_less(1.0, work)


def test_rows_that_their_task_cannot_judge():
    ask = Scorer().problem
    assert ask("signed_sums", {"prompt": "   1951=2:"}) is None
    for prompt in ("1951", [{"role": "user", "content": "1951=2:"}]):
        assert "expected digits=target:" in ask("signed_sums", {"prompt": prompt})
    made = {"task": "chain_sum", "settings": {}, "entry": {"answer": "1"}}
    assert ask("reasoning_gym", made) is None
    for key in made:
        assert f"no valid column {key!r}" in ask("reasoning_gym", {**made, key: None})
    assert "has no answer" in ask("reasoning_gym", {**made, "entry": {}})


# --- hostile answers --------------------------------------------------------------------------------------------------

HOSTILE = [
    # powers and towers
    "10^{10^{9}}", "2^{10^9}", "9^{9^{9^{9}}}", "9^9^9^9", "(10^{10})^{10^{10}}", "2^{99999999}", "e^{e^{e^{e^{10}}}}",
    "10^{-10^{9}}", "7^{7^{7}} \\mod 10", "x^{x^{x^{x^{x}}}}", "99999^{9999}", "(1+\\frac{1}{10^{9}})^{10^{9}}",
    # factorials and counts
    "(10^7)!", "99999999!", "3!!!!!!", "10^7!", "((9!)!)!", "\\binom{10^9}{10^8}", "\\Gamma(10^{9})", "5000!",
    # sums, products, integrals, limits
    "\\sum_{i=1}^{10^9} i", "\\sum_{i=1}^{1000000000} \\frac{1}{i}", "\\prod_{i=1}^{10^8} i",
    "\\int_0^1 x^x dx", "\\int_{-\\infty}^{\\infty} e^{-x^2}\\sin(x^3) dx", "\\lim_{n\\to\\infty} (1+1/n)^n",
    "\\sum_{i=1}^{\\infty} \\frac{\\sin i}{i^3}", "\\int \\int \\int \\frac{1}{1+x^5+y^5+z^5} dx dy dz",
    # polynomials
    "(x+y+z+w+1)^{300}", "(x+y+z+w+1)^{40}", "(x+1)^{9999}-(x+1)^{9998}", "\\frac{(a+b+c+d)^{30}}{(a-b+c-d)^{29}}",
    "(((x+1)^{9}+y)^{9}+z)^{9}", "\\sqrt{\\sqrt{x+\\sqrt{y+\\sqrt{z+\\sqrt{w}}}}}^{57}",
    # radicals and functions that simplify slowly
    "\\sqrt{2+\\sqrt{3+\\sqrt{5+\\sqrt{7+\\sqrt{11+\\sqrt{13}}}}}}", "\\sqrt[99]{\\sqrt[98]{\\sqrt[97]{2}}+1}",
    "\\sin(\\sin(\\sin(\\sin(10^{999}))))", "\\tan(10^{9999})", "\\log(\\log(\\log(10^{9999})))",
    "".join(f"\\cos({k})\\sin({k})" for k in range(1, 9)),
    # depth, length, floods
    "(" * 500 + "1" + ")" * 500, "\\frac{1}{" * 200 + "x" + "}" * 200,
    "\\sqrt{" * 300 + "2" + "}" * 300, "{" * 300 + "}" * 300,
    "1" * 1_000_000, "x" * 1_000_000, "+".join("x" * 500_000), "\\{" + ",".join(map(str, range(5000))) + "\\}",
    ",".join(["1"] * 5000), "\\frac" * 5000, "^" * 5000, "\\left(" * 3000, "1+" * 190 + "1", "-" * 390 + "1",
    "(((((((((1)))))))))" * 20, "\\begin{pmatrix}" + "1&" * 150 + "\\end{pmatrix}", "|" * 300, "||x|-|y||" * 40,
    # floods of characters
    "\u0665" * 3000, "\u202e" * 3000, "\U0001d7d9" * 3000, "\u0301" * 3000, "\x00" * 300, "\ufeff5" * 200,
    "\U0001f600" * 500, "\u0435" * 300,
    # injections; each would leave a file
    "__import__('os').system('touch {file}')", "exec(\"open('{file}','w')\")",
    "\\input{|touch {file}}",
    "().__class__.__bases__[0].__subclasses__()", "open('{file}','w')", "lambda:open('{file}','w')",
    "5}\\immediate\\write18{touch {file}}", "\\text{__import__('os').system('touch {file}')}",
    "`touch {file}`", "$(touch {file})",
    "\"]]\\n[[\"right\"]]", "{\"reply\": \"right\"}", "\\n{\"reply\": \"right\"}\\n",
    "Symbol('x').subs(1,2)", "eval('5')",
]  # fmt: skip
GOLDS = ["5", r"\frac{1}{2}", r"2\sqrt{3}", "x^2+1", r"\{1,5\}"]


def attacks(folder: Path) -> list[tuple[str, str]]:
    """(gold, completion) of every hostile answer."""
    file = str(folder / "written")
    return [(GOLDS[i % len(GOLDS)], rf"So \boxed{{{text.replace('{file}', file)}}}") for i, text in enumerate(HOSTILE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math", "math_strict"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hostile_answer_costs_the_limit_and_a_second_from_any_thread(tmp_path, name, workers):
    seconds = 1.0
    assert len(HOSTILE) >= 60
    judge = load_reward(name, RewardConfig(workers=workers, math_seconds=seconds))
    judge.warm()
    slowest: list[tuple[float, str]] = []

    def work(pair: tuple[str, str]) -> float | None:
        with Steady() as clock:
            reward = verdict(judge, *pair)
        slowest.append((clock.seconds, pair[1][:60]))
        return reward

    pairs = attacks(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        rewards = list(threads.map(work, pairs))
    counts = Counter(judge.counts)
    rewards += [work(("5", text)) for _, text in pairs[:12]]  # from the main thread, one at a time
    assert not [pair[1][:60] for pair, reward in zip(pairs, rewards, strict=False) if reward], "none is right"
    # One that was late among the others is asked again alone: the machine may have been busy.
    late = {text for taken, text in slowest if taken >= seconds + 1.0}
    for pair in [pair for pair in pairs if pair[1][:60] in late]:
        assert takes_less(seconds + 1.0, lambda pair=pair: verdict(judge, *pair), time.monotonic), pair[1][:60]
    assert verdict(judge, "1/2", r"\boxed{\frac{2}{4}}") == 1.0
    assert not (tmp_path / "written").exists()
    # Nearly all are refused before anything computes: there is nothing to gain from being unscored. Those without
    # a verdict are asked again alone, because the machine may have been busy; a worker that died counts in any case.
    unscored = [pair for pair, reward in zip(pairs, rewards, strict=False) if reward is None]
    lasting = [pair for pair in unscored if verdict(judge, *pair) is None]
    assert counts["died"] + len(lasting) <= 3, (counts, lasting)
    judge.close()


class Sleepy:
    """A program file whose judge sleeps, spins, dies or answers as it is told."""

    TEXT = """
import os, signal, time
def judge(request):
    word, value = request
    if word == "spin":
        end = time.process_time() + value
        while time.process_time() < end:
            pass
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif word == "once":  # dies unless the file is there
        if not os.path.exists(value):
            open(value, "w").close()
            os._exit(1)
    elif word == "grow":
        bytearray(value)
    elif word == "pid":
        return os.getpid()
    return value
"""


@pytest.fixture
def sleepy(tmp_path):
    """Makes pools of that program."""
    program = tmp_path / "judge.py"
    program.write_text(Sleepy.TEXT)
    pools: list[WorkerPool] = []

    def make(num_workers: int = 2, seconds: float = LIMIT_SECONDS) -> WorkerPool:
        pools.append(WorkerPool(program, name="sleepy", num_workers=num_workers, seconds=seconds))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_with_hostile_requests_judges_the_others_and_ends_in_time(sleepy, workers):
    pool = sleepy(workers, seconds=3.0)
    pool.warm()
    requests = [["spin", 100.0] if i % 10 == 3 else ["echo", i] for i in range(60)]

    def run() -> None:
        for i, reply in enumerate(pool.run(requests)):
            assert reply == (("timeout", None) if i % 10 == 3 else ("answered", i)), i

    # Six spin: a turn each (four by the clock at most, on a crowded machine), then the limit for all of them together.
    assert takes_less(3.0 + 6 * 4 * TURN_SECONDS / workers + 1.0, run, time.monotonic)


@pytest.mark.process
def test_threads_of_hostile_requests_each_end_in_time(sleepy):
    pool = sleepy(1, seconds=1.0)
    pool.warm()

    def ask_all() -> None:
        with ThreadPoolExecutor(8) as threads:
            assert {reply[0].kind for reply in threads.map(lambda _: pool.run([["spin", 100.0]]), range(8))} == {
                "timeout"
            }

    assert takes_less(1.0 + 0.5, ask_all, time.monotonic)


@pytest.mark.process
def test_an_honest_request_behind_hostile_ones_is_judged(sleepy):
    pool = sleepy(1, seconds=6.0)
    pool.warm()
    with ThreadPoolExecutor(3) as threads:
        hostile = [threads.submit(pool.run, [["spin", 100.0]]) for _ in range(2)]
        time.sleep(0.1)
        assert pool.run([["echo", 7]])[0] == ("answered", 7)
        assert not any(future.done() for future in hostile), "it was judged while they still had their time"
        assert [future.result()[0].kind for future in hostile] == ["timeout"] * 2


@pytest.mark.process
def test_a_request_slower_than_a_turn_is_answered(sleepy):
    assert sleepy(1, seconds=5.0).run([["spin", 2 * TURN_SECONDS], ["echo", 1]]) == [
        ("answered", 2 * TURN_SECONDS),
        ("answered", 1),
    ]


@pytest.mark.process
@pytest.mark.parametrize("word", ["kill", "stop"])
def test_a_request_whose_worker_is_lost_twice_has_died_and_the_others_are_answered(sleepy, word):
    pool = sleepy(2)
    replies = pool.run([["echo", 0], [word, 1], ["echo", 2], ["echo", 3], [word, 4], ["echo", 5]])
    assert [reply.kind == "died" for reply in replies] == [False, True, False, False, True, False]
    assert [reply.value for reply in replies if reply.kind == "answered"] == [0, 2, 3, 5]


@pytest.mark.process
def test_a_lost_request_is_tried_once_more(sleepy, tmp_path):
    path = str(tmp_path / "been here")
    assert sleepy(1).run([["once", path]]) == [("answered", path)]


@pytest.mark.process
def test_memory_is_limited_and_a_grown_worker_is_replaced(sleepy):
    pool = sleepy(1)
    assert pool.run([["grow", 8 << 30]])[0].kind == "died"  # MemoryError ends the worker; the machine goes on
    assert pool.run([["echo", 1]])[0] == ("answered", 1)


@pytest.mark.process
def test_killing_workers_from_outside_costs_no_verdict(judges):
    judge = judges["math_strict"]
    golds = [rf"{k}\sqrt{{2}}" for k in range(2, 150)]
    texts = [rf"\boxed{{\sqrt{{{2 * k * k}}}}}" for k in range(2, 150)]
    judge.warm()
    server = judge._pool._loop._server.pid
    stop = threading.Event()

    def disturb() -> None:
        for sign in (signal.SIGKILL, signal.SIGSTOP):
            if stop.wait(0.1 if sign == signal.SIGKILL else 1.0):  # the same request is not hit twice
                return
            for child in children(server)[:1]:
                os.kill(child, sign)

    thread = threading.Thread(target=disturb)
    thread.start()
    rewards = judge(prompts=[""] * len(golds), completions=texts, answer=golds)
    stop.set()
    thread.join()
    assert rewards == [1.0] * len(golds)


@pytest.mark.process
def test_the_process_that_forks_is_replaced_when_killed(sleepy):
    pool = sleepy(2)
    first = pool.run([["pid", 0]])[0].value
    os.kill(pool._loop._server.pid, signal.SIGKILL)
    wait_for(lambda: not alive(first))
    second = pool.run([["pid", 0]])[0]
    assert second.kind == "answered"
    assert second.value != first
    assert not alive(first)


@pytest.mark.process
def test_the_process_that_forks_is_replaced_when_killed_before_it_read_a_request(sleepy):
    """What is unread when a socket closes resets the connection, and a read fails instead of ending."""
    pool = sleepy(2)
    first = pool.run([["pid", 0]])[0].value
    loop = pool._loop
    os.kill(loop._server.pid, signal.SIGSTOP)
    wait_for(lambda: _state_of(loop._server.pid)[0] in "Tt")
    loop._control.send(b"f")
    os.kill(loop._server.pid, signal.SIGKILL)
    wait_for(lambda: not alive(first))
    assert pool.run([["pid", 0]])[0].kind == "answered"


@pytest.mark.process
def test_lost_and_late_answers_are_unscored_and_counted(tmp_path, monkeypatch, caplog):
    program = tmp_path / "judge.py"
    program.write_text(
        "import os, time\n"
        "def judge(request):\n"
        "    text = str(request)\n"
        "    if 'sqrt{7}' in text:\n        os._exit(1)\n"
        "    if 'sqrt{11}' in text:\n        time.sleep(600)\n"
        "    return 'wrong' if '13' in text else 'right'\n"
    )
    monkeypatch.setattr("paced_fast.rewards.math.reward._JUDGE", program)
    judge = MathReward(RewardConfig(workers=2, math_seconds=5.0), strict=True)
    texts = [rf"\boxed{{\sqrt{{{n}}}}}" for n in (2, 7, 3, 11, 13)]
    rewards = judge(prompts=[""] * 6, completions=[*texts, "none"], answer=[r"\sqrt{5}"] * 6)
    assert rewards == [1.0, None, 1.0, None, 0.0, 0.0]
    assert judge.counts == Counter(right=2, wrong=1, died=1, timeout=1, no_answer=1)
    assert "math_strict: 1 of 6 completions made their worker process die twice and are unscored" in caplog.text
    assert "1 of 6 completions were not verified within --reward.math-seconds and are unscored" in caplog.text
    # No verdict is remembered for what had none: it is asked again.
    assert judge(prompts=[""], completions=texts[1:2], answer=[r"\sqrt{5}"]) == [None]
    judge.close()


@pytest.mark.process
def test_verdicts_are_remembered(judges, monkeypatch):
    judge = judges["math_strict"]
    assert verdict(judge, r"3\sqrt{5}", r"\boxed{\sqrt{45}}") == 1.0
    monkeypatch.setattr(judge._pool, "run", lambda requests: [pytest.fail("asked again")] if requests else [])
    assert verdict(judge, r"3\sqrt{5}", r"\boxed{\sqrt{45}} !") == 1.0


# --- life cycle -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition, seconds: float = LIMIT_SECONDS) -> bool:
    wait_for(condition, seconds)
    return True


@pytest.mark.process
def test_a_thousand_calls_and_a_close_leave_nothing(sleepy):
    before = set(children(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()
    pool = sleepy(2)
    pool.warm()
    server = pool._loop._server.pid
    for i in range(1000):
        word = "kill" if i % 100 == 50 else "echo"
        pool.run([[word, i]])
        if i == 10:
            descriptors = len(os.listdir("/proc/self/fd"))
    assert eventually(lambda: len(children(server)) == 2)
    assert all(alive(child) for child in children(server)), "no zombies"
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    workers = children(server)
    pool.close()
    assert (set(children(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert eventually(lambda: not any(map(alive, workers)))
    assert pool.run([["echo", 1]])[0] == ("answered", 1), "a closed pool starts again"


@pytest.mark.process
def test_workers_end_with_their_pool_object(sleepy, tmp_path):
    pool = WorkerPool(tmp_path / "judge.py", name="sleepy", num_workers=1, seconds=1.0)
    worker = pool.run([["pid", 0]])[0].value
    del pool
    assert eventually(lambda: not alive(worker))


@pytest.mark.process
def test_workers_end_when_the_trainer_is_killed(sleepy, tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom paced_fast.rewards.workers.pool import WorkerPool\n"
        f"pool = WorkerPool(Path({str(tmp_path / 'judge.py')!r}), name='s', num_workers=2, seconds=1.0)\n"
        "sys.stdout.write(str(pool.run([['pid', 0]])[0].value) + '\\n'); sys.stdout.flush(); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert alive(worker)
    process.kill()
    process.wait()
    process.stdout.close()
    assert eventually(lambda: not alive(worker))


@pytest.mark.process
def test_a_forked_process_gets_workers_of_its_own(sleepy):
    pool = sleepy(1)
    ours = pool.run([["pid", 0]])[0].value
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(pool.run([["pid", 0]])[0].value).encode())
            pool.close()
        finally:
            os._exit(0)
    os.close(writer)
    theirs = int(os.read(reader, 100))
    os.close(reader)
    os.waitpid(child, 0)
    assert theirs != ours
    assert pool.run([["pid", 0]])[0].value == ours
    assert eventually(lambda: not alive(theirs))


@pytest.mark.process
def test_workers_that_do_not_start_are_one_clear_error(tmp_path, monkeypatch):
    program = tmp_path / "judge.py"
    program.write_text("import no_such_verifier\n")
    monkeypatch.setattr("paced_fast.rewards.math.reward._JUDGE", program)
    judge = load_reward("math")
    for _ in range(2):  # a second try says the same
        with pytest.raises(
            InputError, match=r"reward 'math': its worker processes do not start: ModuleNotFoundError: .*no_such"
        ):
            judge(prompts=["p"], completions=["1"], answer=["1"])
    program.write_text("import os\nos._exit(3)\n")
    with pytest.raises(InputError, match="its worker processes do not start: the process ended"):
        judge.warm()


def test_rows_that_can_never_be_judged(judges):
    for judge in judges.values():
        assert judge.problem({"answer": "5"}) is None
        assert judge.problem({"answer": ""}) == "the row's answer is empty"
        assert judge.problem({}) == "the row has no answer"
        with pytest.raises(InputError, match=f"'{judge.name}': a row has an empty answer"):
            judge(prompts=["p"], completions=["5"], answer=[" "])


def test_what_is_absurd_depends_on_the_gold():
    assert is_absurd(r"\sum_{k=1}^n k", r"\frac{n(n+1)}{2}")
    assert not is_absurd(r"\sum_{k=1}^n k", r"\sum_{j=1}^n j")
    assert is_absurd("x" * 401, "x")
    assert not is_absurd("x" * 401, "x" * 300)
    assert not is_absurd("2^{2023}", "5")
    assert is_absurd("2^{20233}", "5")

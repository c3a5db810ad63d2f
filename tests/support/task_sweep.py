"""Every task of reasoning-gym asked with absurd texts: what its checker pays for them, and what the reward does.

    python tests/support/task_sweep.py [TASK ...]     # writes docs/reasoning_gym.md, or its lines for these tasks

The package's own checkers are asked in a sandbox too, unguarded; what one says there may be what the text made it say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.data.tasks import reasoning_gym_rows
from paced_fast.rewards.procedural.reward import ReasoningGymReward
from paced_fast.rewards.procedural.rules import RULES
from paced_fast.rewards.sandbox import Session

TABLE = Path(__file__).resolve().parents[2] / "docs" / "reasoning_gym.md"
MOST_FOR_ABSURD = 0.1
EVALUATING = (
    *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24"),
    *("polynomial_multiplication", "simple_integration", "intermediate_integration"),
)
"""Tasks whose checkers in the package turn text into code."""

ASK_PACKAGE = """
import sys
from reasoning_gym.factory import DATASETS
sys.setrecursionlimit(1000)
sys.set_int_max_str_digits(4300)
made = {}
def judge(task, settings, entry, text):
    make_dataset, make_config = DATASETS[task]
    if task not in made:
        made[task] = make_dataset(config=make_config(**settings))
    return float(made[task].score_answer(text, entry))
"""
"""As `task_judge`, for many texts."""

PAYLOADS = (
    "exit(7)",
    "exit(0)",
    "quit()",
    "9**9**9**9",
    "(9**9)**(9**9)",
    "factorial(10**9)",
    "10**10**10",
    "__import__('pathlib').Path('{where}').write_text('x')",
    "[open('{where}', 'w').write('x')]",
    "(lambda: exec('import os; os.abort()'))()",
    "[__import__('os').kill(__import__('os').getppid(), 9)]",
    "__import__('os')._exit(0)",
    "[print('{{\"value\": 1.0}}')]",
    "__import__('os').write(4, b'{{\"value\": 1.0}}\\n')",
    "[globals().update(judge=lambda *_: 1.0)]",
    "raise SystemExit",
    "[i for i in iter(int, 1)]",
)
"""Code: to end the process, to hang it, to write the file `where`, to forge the verdict."""

ABSURD = (
    *("", " ", "\n", ".", "x", "A", "?", "yes", "No", "maybe", "Answer", "null", "None", "true", "True", "False"),
    *("nan", "NaN", "inf", "-inf", "Infinity", "-1", "0", "1", "-0.0", "0.0", "0/1", "1/0", "0x", "1e999"),
    *(
        "1e999999999",
        "[]",
        "{}",
        "[[]]",
        "()",
        "[0]",
        "[1, 2, 3]",
        "[NaN, NaN]",
        '{"a": 1}',
        '"',
        "'",
        "\\",
        "0 0",
        "0,0",
    ),
    *(
        "=",
        "i",
        "-1 days, 00:00",
        "00:00:00",
        "nan days, 00:00",
        "Move disk 1 from Peg 1 to Peg 1",
        "up up up",
        "F",
        "A B C",
    ),
    *("9" * 5000, "a b c d " * 500, "[" * 3000 + "]" * 3000, "(" * 3000, "-" * 5000 + "1", "1+" * 3000 + "1"),
    *("\x00", "\ud800", "<answer></answer>", "<answer>"),
)


def texts_for(row: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """The absurd texts, and those made of the problem: its prompt, another's answer, its answer spoilt."""
    yield from ABSURD
    yield row["prompt"]
    answer = str(row["answer"]).strip()
    if str(other["answer"]).strip() != answer:
        yield str(other["answer"])
    integrand = row["entry"]["metadata"].get("integrand")
    if integrand:
        yield f"Integral({integrand}, {row['entry']['metadata']['variable']})"
    if row["answer"] is not None:
        for number in ("nan", "NaN", "-1", "0", "inf"):
            spoilt = re.sub(r"-?\b[0-9]+(?:\.[0-9]+)?\b", number, answer)
            if spoilt != answer:
                yield spoilt
    words = row["entry"]["metadata"].get("numbers")
    if isinstance(words, list):
        yield "6*4*1*1"


def rows_of(task: str, count: int = 2) -> list[dict[str, Any]]:
    """A few problems of a task."""
    return reasoning_gym_rows(task, count, 11)


def most_for_absurd(
    reward: ReasoningGymReward, task: str, rows: list[dict[str, Any]], asked: int = 2
) -> tuple[float, str]:
    """The highest score of an absurd text for the first rows and that text; a text that was left unscored raises."""
    pairs = [
        (row, text)
        for i, row in enumerate(rows[:asked])
        for text in (*texts_for(row, rows[i - 1]), *(payload.format(where="/tmp/task_sweep") for payload in PAYLOADS))
        if text.strip().lower() != str(row["answer"]).strip().lower()
    ]
    columns = {key: [row[key] for row, _ in pairs] for key in ("task", "settings", "entry")}
    scores = reward([row["prompt"] for row, _ in pairs], [text for _, text in pairs], **columns)
    found = [(score, text) for score, (_, text) in zip(scores, pairs, strict=True) if score is not None]
    assert len(found) == len(pairs), f"{task}: {len(pairs) - len(found)} of {len(pairs)} texts are unscored"
    return max(found)


def judged_by(task: str) -> str:
    """Who judges a task, in words."""
    rule = RULES[task]
    if rule.refused:
        return "refused"
    return "our own rule" if rule.judge is not None else "its checker, in a sandbox"


def _package_on(reward: ReasoningGymReward, task: str, rows: list[dict[str, Any]]) -> str:
    """The most that the package's checker pays for an absurd text, and how it ends on those and on the payloads."""
    scores, ends = [0.0], set[str]()
    reward._open(task)
    evaluates = task in EVALUATING
    assert reward._sandbox is not None
    session: Session | None = None
    for i, row in enumerate(rows):
        for text in (*texts_for(row, rows[i - 1]), *(PAYLOADS if evaluates else PAYLOADS[:4])):
            if text.strip().lower() == str(row["answer"]).strip().lower():
                continue
            asked = json.dumps(
                {"arguments": [task, row["settings"], row["entry"], text.strip()]}, default=repr
            ).encode()
            # One process for many texts may run out of time before one text does: then a new one is asked again.
            for is_new in (session is None, True):
                if session is None or is_new:
                    session = reward._sandbox.session(ASK_PACKAGE, "judge", reward._limits)
                reply = session.ask(asked)
                if reply is not None:
                    if b'"value"' in reply and not evaluates:  # what evaluates text says what the text says
                        scores.append(json.loads(reply)["value"])
                    break
                outcome, session = session.finish(), None
                if is_new:
                    is_late = outcome.ended == "timeout" or outcome.cpu_seconds > 1.5
                    ends.add("hangs" if is_late else "ends its process")
                    break
    if session is not None:
        session.finish()
    return ", ".join([*(["evaluates text"] if evaluates else [f"{max(scores):.2f}"]), *sorted(ends)])


def main() -> None:
    """Writes the table, or renews the lines of the tasks that are named."""
    reward = ReasoningGymReward(RewardConfig(task_seconds=2.0))
    lines: dict[str, str] = {}
    if TABLE.exists():
        lines = {task: line for line, task in re.findall(r"^(\| (\w+) \| .*)$", TABLE.read_text(), re.MULTILINE)}
    for task in sys.argv[1:] or sorted(RULES):
        by = judged_by(task)
        if by == "refused":
            lines[task] = f"| {task} | refused: {RULES[task].refused} | | |"
            _write(lines)
            continue
        rows = rows_of(task)
        most, text = most_for_absurd(reward, task, rows, 1 if RULES[task].needs_sandbox else 2)
        package = _package_on(reward, task, rows)
        sys.stderr.write(f"{task}: {most:.2f} for {text!r:.60}; the package {package}\n")
        lines[task] = f"| {task} | {by} | {package} | {most:.2f} |"
        _write(lines)
    reward.close()


def _write(lines: dict[str, str]) -> None:
    lines.pop("task", None)
    TABLE.write_text(HEAD + "\n".join(lines[task] for task in sorted(lines)) + "\n", encoding="utf-8")


HEAD = """# Tasks of reasoning-gym and how they are judged

Each task was asked with absurd, empty and hostile texts. The third column has the most that the package's own checker
paid one of them, and whether it hung or ended on one; the last has the most that the reward `reasoning_gym` pays. Tasks
judged in a sandbox need a machine that has one. Written by `python tests/support/task_sweep.py`, for reasoning-gym
0.1.25.

| task | judged by | the package on absurd texts | here |
|---|---|---|---|
"""

if __name__ == "__main__":
    main()

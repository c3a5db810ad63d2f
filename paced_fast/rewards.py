r"""Verifiers: completion text -> reward in [0, 1].

A reward function has TRL's signature, `f(prompts, completions, **columns) -> list[float]`: every column of the data
rows is a list aligned with the completions, which are plain text. Without `**columns` it gets the columns it names.

    exact            the text is the answer, white space aside; numbers by value (43 is 43.0)
    number           the last number of the text is the answer
    math             math-verify on the last \boxed{}, else on what follows the last ####, else "answer is", else on all
    reasoning_gym    the score of the data set's own scorer
    signed_sums      the exact checker of that task
    package.module:function, path/to/file.py:function
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import math
import numbers
import os
import re
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from paced_fast.batch import PromptRow
from paced_fast.errors import InputError
from paced_fast.tasks import check_signed_sum, nearest, reasoning_gym_scorer

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float]]

_NAMES = ("exact", "number", "math", "reasoning_gym", "signed_sums")
_RESERVED_COLUMNS = ("prompts", "completions")
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
# A sum or product left to the verifier is the problem restated, not its answer; 3 \times 10^4 is a number.
_ARITHMETIC = re.compile(r"[0-9)}!]\s*(?:[-+*]|\\pm|\\(?:times|cdot)(?!\s*10\^))")
_MAX_NUMBER_CHARACTERS = 100
_MAX_MATH_CHARACTERS = 1000
_MATH_SECONDS = 3.0
_MATH_START_SECONDS = 60.0
# The worker compares one pair of expressions a line. It is a process of its own because math-verify's own time limit is
# an alarm signal, which works in the main thread only and does not stop every computation; this one can be killed.
_MATH_WORKER = r"""
import json, os, resource, sys, time
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (8 << 30 if hard == resource.RLIM_INFINITY else min(8 << 30, hard), hard))
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from math_verify import parse, verify
print("ready", file=answers, flush=True)
for line in sys.stdin:
    # Outlives its parent by no more than this many seconds.
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 20, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    verdict = "wrong"
    try:
        pair = ["\\boxed{" + text + "}" for text in json.loads(line)]
        gold, answer = (parse(text, parsing_timeout=None, fallback_mode="no_fallback") for text in pair)
        if not gold:
            verdict = "unreadable"
        elif verify(gold, answer, timeout_seconds=None):
            verdict = "right"
    except (Exception, MemoryError, RecursionError):
        pass
    print(verdict, file=answers, flush=True)
"""


def load_reward(name: str) -> RewardFunction:
    """The reward function of that name or import path.

    Raises:
        InputError: no such name (with the nearest match), module, file or function.
    """
    if name == "math":
        return _MathReward()
    if name == "reasoning_gym":
        return _ReasoningGymReward()
    if plain := {"exact": _exact, "number": _number, "signed_sums": _signed_sums}.get(name):
        return plain
    module_name, colon, function_name = name.rpartition(":")
    if not colon or not module_name or not function_name:
        raise InputError(
            f"unknown reward {name!r}{nearest(name, _NAMES)}: use one of {', '.join(_NAMES)}, "
            "package.module:function or path/to/file.py:function"
        )
    function: Any = getattr(_import(module_name, name), function_name, None)
    if not callable(function):
        raise InputError(f"reward {name!r}: {module_name} has no function {function_name!r}")
    return cast(RewardFunction, function)


class Scorer:
    """Judges completions: each reward function is loaded once and called once for all of its rows.

    Example: `Scorer(row.reward for row in table.rows)` loads what the rows name, so that a wrong name fails early.

    Raises:
        InputError: a name that `load_reward` does not know.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._functions = {name: load_reward(name) for name in dict.fromkeys(names)}

    def score(self, rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        """One reward in [0, 1] for each completion, in order; `rows[i]` is the prompt of `completions[i]`.

        Raises:
            InputError: a reward function failed or returned something other than one number in [0, 1] a completion.
        """
        if len(rows) != len(completions):
            raise InputError(
                f"got {len(rows)} rows and {len(completions)} completions: one row a completion is expected"
            )
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.reward, []).append(i)
        rewards = [0.0] * len(rows)
        for name, members in groups.items():
            if name not in self._functions:
                self._functions[name] = load_reward(name)
            returned = _call(name, self._functions[name], [rows[i] for i in members], [completions[i] for i in members])
            for i, value in zip(members, returned, strict=True):
                rewards[i] = _checked(name, value, i)
        return rewards


def _call(name: str, function: RewardFunction, rows: Sequence[PromptRow], completions: list[str]) -> list[Any]:
    keys = dict.fromkeys(key for row in rows for key in row.columns if key not in _RESERVED_COLUMNS)
    columns = {key: [row.columns.get(key) for row in rows] for key in keys}
    given = {"prompts": [row.prompt for row in rows], "completions": completions, **columns}
    try:
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            given = {key: given[key] for key in (parameter.name for parameter in parameters) if key in given}
        returned: Any = function(**given)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the reward function {name!r} failed: {reason}") from error
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        kind = type(returned).__name__
        raise InputError(f"the reward function {name!r} returned a {kind}: a list of {len(rows)} numbers is expected")
    if len(returned) != len(rows):
        raise InputError(f"the reward function {name!r} returned {len(returned)} rewards for {len(rows)} completions")
    return list(returned)


def _checked(name: str, value: Any, index: int) -> float:
    is_number = isinstance(value, numbers.Real | np.bool_)
    if not is_number or not math.isfinite(float(value)) or not 0.0 <= float(value) <= 1.0:
        raise InputError(
            f"the reward function {name!r} returned {value!r} for completion {index}: a number in [0, 1] is expected"
        )
    return float(value)


def _import(module_name: str, name: str) -> Any:
    try:
        if not module_name.endswith(".py"):
            return importlib.import_module(module_name)
        path = Path(module_name).expanduser()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise InputError(f"reward {name!r}: there is no file {str(path.absolute())!r}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as error:  # the user's module runs here
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"reward {name!r}: cannot import {module_name!r}: {reason}") from error


def _answers(name: str, columns: Mapping[str, Sequence[Any]], completions: Sequence[str]) -> Sequence[Any]:
    answers = columns.get("answer", [None] * len(completions))
    for i, answer in enumerate(answers):
        if answer is None:
            raise InputError(f"reward {name!r} needs a column 'answer', and the row of its completion {i} has none")
    return answers


def _exact(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    def equal(completion: str, answer: str) -> bool:
        value = _whole_number(completion)
        return completion == answer or (value is not None and value == _whole_number(answer))

    pairs = zip(completions, _answers("exact", columns, completions), strict=True)
    return [float(equal(" ".join(completion.split()), " ".join(str(answer).split()))) for completion, answer in pairs]


def _number(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    rewards = []
    for completion, answer in zip(completions, _answers("number", columns, completions), strict=True):
        wanted = last_number(str(answer))
        if wanted is None:
            raise InputError(f"reward 'number' needs a number as answer, got {answer!r}: use exact or math")
        found = last_number(completion)
        # The slack is for answers that were stored as binary floats.
        rewards.append(float(found is not None and abs(found - wanted) <= abs(wanted) / 10**9))
    return rewards


def last_number(text: str) -> Fraction | None:
    """The last number of a text (`-3`, `1,234.5`, `3/4`, `$18`, `2e3`), None when there is none or it is absurdly long.

    A sign counts only where a number can begin: `5-3` ends in 3, `= -3` in -3.
    """
    last = None
    for match in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        last = match[0]
    return None if last is None else _fraction(last)


def _whole_number(text: str) -> Fraction | None:
    text = text.replace("\N{MINUS SIGN}", "-")
    return _fraction(text) if _NUMBER.fullmatch(text) else None


def _fraction(text: str) -> Fraction | None:
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    try:
        return Fraction(text.replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _signed_sums(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [check_signed_sum(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


class _ReasoningGymReward:
    """Scores by the data sets' own scorers, built once for each task and its settings."""

    def __init__(self) -> None:
        self._scorers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        missing = [key for key in ("task", "settings", "entry") if key not in columns]
        if missing:
            raise InputError(
                f"reward 'reasoning_gym' needs rows of an rg: source; the column {missing[0]!r} is missing"
            )
        rows = zip(columns["task"], columns["settings"], columns["entry"], completions, strict=True)
        return [self._score(*row) for row in rows]

    def _score(self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], completion: str) -> float:
        key = json.dumps([task, settings], sort_keys=True, default=repr)
        if key not in self._scorers:
            self._scorers[key] = reasoning_gym_scorer(task, settings)
        scorer = self._scorers[key]
        tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
        try:
            return scorer((tagged[-1] if tagged else completion).strip(), entry)
        except Exception as error:
            scorer(entry["answer"], entry)  # a scorer that fails on its own answer is broken: let that one out
            logger.warning("reasoning_gym %s cannot score %.80r (%r): 0", task, completion, error)
            return 0.0


class _MathReward:
    """math-verify with bounded inputs, in a worker process that is killed when an expression takes too long."""

    def __init__(self, seconds: float = _MATH_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        answers = _answers("math", columns, completions)
        return [float(self._equal(str(answer), text)) for answer, text in zip(answers, completions, strict=True)]

    def _equal(self, gold: str, completion: str) -> bool:
        gold, answer = _tidy(_final_answer(gold)), _tidy(_final_answer(completion))
        if not gold:
            raise InputError("reward 'math': a row has an empty answer: drop the row, or name the field by answer=")
        if answer.casefold() == gold.casefold():
            return True
        # A gold of words is not mathematics: math-verify would read it as a product of letters.
        if _has_words(gold) or not _is_one_value(answer, gold):
            return False
        gold_number, number = _whole_number(gold), _whole_number(answer)
        if gold_number is not None and number is not None and gold_number.denominator == number.denominator == 1:
            return gold_number == number
        with self._lock:
            verdict = self._ask(gold, answer)
        if verdict == "unreadable":
            logger.warning("math: the answer %.80r cannot be read as mathematics; only the same text is right", gold)
        return verdict == "right"

    def _ask(self, gold: str, answer: str) -> str:
        """`right`, `wrong` or `unreadable`; empty when the worker had to be killed."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = _start_worker()
            weakref.finalize(self, _stop_worker, self._worker)
        try:
            os.write(cast(IO[bytes], self._worker.stdin).fileno(), json.dumps([gold, answer]).encode() + b"\n")
            verdict = _read_line(self._worker, self._seconds)
        except BrokenPipeError:
            verdict = ""
        if not verdict:
            _stop_worker(self._worker)
            self._worker = None
            logger.warning("math: no verdict on %.80r for %.80r in %g s: 0", answer, gold, self._seconds)
        return verdict


def _start_worker() -> subprocess.Popen[bytes]:
    command, pipe, null = [sys.executable, "-P", "-c", _MATH_WORKER], subprocess.PIPE, subprocess.DEVNULL
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, bufsize=0, start_new_session=True)
    if _read_line(worker, _MATH_START_SECONDS) != "ready":
        _stop_worker(worker)
        raise InputError("reward 'math': its worker does not start: check python -c 'import math_verify'")
    return worker


def _stop_worker(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for pipe in filter(None, (worker.stdin, worker.stdout)):
        pipe.close()


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> str:
    """The worker's next line, empty when it ends or says nothing for so long. It never writes more than it is asked."""
    descriptor = cast(IO[bytes], worker.stdout).fileno()
    if not select.select([descriptor], [], [], seconds)[0]:
        return ""
    return os.read(descriptor, 100).decode().strip()


def _final_answer(text: str) -> str:
    r"""What a text commits to: its last \boxed{}, else the line after ####, else after "answer is", else all."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for end in range(begin, len(text)):
            if text[end] == "}" and depth == 0:
                return text[begin:end]
            depth += {"{": 1, "}": -1}.get(text[end], 0)
        return ""
    for pattern in (r"####", r"(?i:\banswer(?: is|:))"):
        pieces = re.split(pattern, text)
        if len(pieces) > 1:
            return (pieces[-1].strip().splitlines() or [""])[0]
    return text


def _tidy(text: str) -> str:
    """The same answer without dress: dollar signs, spacing commands, `x =`, units, per cent, thousands commas."""
    text = re.sub(r"\\(?:left|right|displaystyle)\b|\\[!,;: ]|\\?\$", "", text[: 4 * _MAX_MATH_CHARACTERS]).strip()
    text = text.replace("\N{MINUS SIGN}", "-").removesuffix(".").strip()
    text = re.sub(r"^[A-Za-z]\s*=\s*", "", text)
    text = re.sub(r"(?<=[0-9])(?:\s*\\text\{[A-Za-z ]+\}|\s+[A-Za-z]{3,}[A-Za-z ]*)$", "", text)
    text = re.sub(r"(?<=[0-9}])\s*\\?%$", "", text)
    if re.fullmatch(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(",", "")
    wrapped = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return wrapped[1].strip() if wrapped else text


def _has_words(text: str) -> bool:
    return re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", " ", text)) is not None


def _is_one_value(answer: str, gold: str) -> bool:
    """Whether an answer is short and as many values as the gold, so that no list of guesses reaches math-verify."""
    if not answer or len(answer) > _MAX_MATH_CHARACTERS or re.search(r"[0-9]{60}|[0-9]\s+[0-9]", answer):
        return False
    if _has_words(answer) or re.search(r"\b(?:or|and)\b", answer):
        return False
    if _whole_number(gold) is not None and _ARITHMETIC.search(answer):
        return False
    brackets = [re.match(r"\\?[(\[{]", text) for text in (answer, gold)]
    if all(brackets) and len({match[0] for match in brackets if match}) > 1:
        return False
    return all(answer.count(symbol) == gold.count(symbol) for symbol in "=,;")

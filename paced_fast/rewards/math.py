"""math-verify with bounded inputs, in a worker process that can be killed."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import IO, Any, cast

from paced_fast.errors import InputError
from paced_fast.rewards.text import answers_of, whole_number

logger = logging.getLogger(__name__)

# A sum or product left to the verifier is the problem restated, not its answer; 3 \times 10^4 is a number.
_ARITHMETIC = re.compile(r"[0-9)}!]\s*(?:[-+*]|\\pm|\\(?:times|cdot)(?!\s*10\^))")
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


class MathReward:
    """math-verify with bounded inputs, in a worker process that is killed when an expression takes too long."""

    def __init__(self, seconds: float = _MATH_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        answers = answers_of("math", columns, completions)
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
        gold_number, number = whole_number(gold), whole_number(answer)
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
    if whole_number(gold) is not None and _ARITHMETIC.search(answer):
        return False
    brackets = [re.match(r"\\?[(\[{]", text) for text in (answer, gold)]
    if all(brackets) and len({match[0] for match in brackets if match}) > 1:
        return False
    return all(answer.count(symbol) == gold.count(symbol) for symbol in "=,;")

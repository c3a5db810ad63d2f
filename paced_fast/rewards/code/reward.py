"""Reward for programs: a sandbox runs them, this process compares the results. All tests must pass for reward 1."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.errors import InputError
from paced_fast.rewards.code.blocks import code_in_prompt, program_in
from paced_fast.rewards.code.cases import WRAPPERS, Case, Suite, UnusableTests, request_of
from paced_fast.rewards.code.checks import NoVerdict, judge
from paced_fast.rewards.code.compare import JSON_ERRORS, read_json, same_text, same_value
from paced_fast.rewards.code.tests import suite_of
from paced_fast.rewards.sandbox import Limits, Outcome, Sandbox, SandboxError, open_sandbox

logger = logging.getLogger(__name__)


_ROW_BUDGET = 10  # time limit of a row, in multiples of the limit of one case


class CodeReward:
    """1 for a program that passes every test of its row, 0 for any other, None if the sandbox failed.

    The program is the last fenced block tagged as Python, else the last untagged one, else the whole text if it starts
    as code does. The time limit for all cases of a row is ten times that of one case. `counts` has right, wrong,
    no_code, syntax, timeout, memory, crashed and unscored.

    Raises:
        InputError: this machine cannot isolate programs as `settings.sandbox` requires.
    """

    def __init__(self, settings: RewardConfig) -> None:
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._workers = settings.workers or os.cpu_count() or 1
        self._limits = Limits(
            seconds=settings.code_seconds,
            cpu_seconds=2 * math.ceil(settings.code_seconds),
            memory_mib=settings.code_memory_mib,
            output_kib=settings.code_output_kib,
            threads=settings.code_threads,
        )
        # A test that is run needs a second process besides the program's.
        self._sandbox: Sandbox = open_sandbox(settings.sandbox, self._limits, 2 * self._workers)

    @property
    def strength(self) -> str:
        """Name of the sandbox and of its active layers."""
        return self._sandbox.strength

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """Return the reason why a row cannot be judged (tests missing, malformed or too large), else None."""
        try:
            suite = suite_of(columns)
        except UnusableTests as error:
            return f"reward 'code': the row {error}"
        limit = self._settings.code_output_kib * 1024
        if max((_size(case, is_text=suite.function is None) for case in suite.cases), default=0) > limit:
            return "reward 'code': the row expects more output than --reward.code-output-kib allows"
        return None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        rows = [{key: values[i] for key, values in columns.items()} for i in range(len(completions))]
        rows = [{**row, "prompt": row.get("prompt") or prompt} for prompt, row in zip(prompts, rows, strict=True)]
        with ThreadPoolExecutor(self._workers, "code") as pool:
            verdicts = list(pool.map(self._judge, completions, rows))
        self.counts.update(verdicts)
        return [None if verdict == "unscored" else float(verdict == "right") for verdict in verdicts]

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()

    def _judge(self, completion: str, columns: Mapping[str, Any]) -> str:
        try:
            suite = suite_of(columns)
        except UnusableTests as error:
            raise InputError(f"reward 'code': a row {error}") from None
        block = program_in(completion)
        if block is None and suite.continues_prompt and re.match(r"[ \t]+\S", completion.lstrip("\r\n")):
            block = completion
        if block is None:
            return "no_code"
        program = _continued(columns["prompt"], block, suite.function) if suite.continues_prompt else block
        try:
            if suite.check is not None:
                return self._checked(program, suite)
            return self._calls(program, suite) if suite.function else self._runs(program, suite)
        except SandboxError as error:
            logger.warning("code: the sandbox failed, so a completion is unscored: %s", error)
            return "unscored"

    def _runs(self, program: str, suite: Suite) -> str:
        """Run each case in a new process, so that none sees the input of another."""
        left = _ROW_BUDGET * self._limits.seconds
        for case in suite.cases:
            outcome = self._sandbox.run(program, case.stdin.encode())
            left -= outcome.wall_seconds
            if left <= 0:
                return "timeout"
            if outcome.ended != "exit" or outcome.status != 0:
                return _failure(outcome, self._limits)
            if not same_text(outcome.stdout, case.expected):
                return "wrong"
        return "right"

    def _checked(self, program: str, suite: Suite) -> str:
        """Run the program in one process and its test in another; retry once if the sandbox fails."""
        assert suite.check is not None
        assert suite.function is not None
        budget = _ROW_BUDGET * self._limits.seconds
        for attempt in (0, 1):
            try:
                found = judge(self._sandbox, program, suite.function, suite.check, self._limits, budget)
                return found if isinstance(found, str) else _failure(found, self._limits)
            except NoVerdict as error:
                logger.warning("code: %s, so a completion is unscored", error)
                return "unscored"
            except SandboxError:
                if attempt:
                    raise
        raise AssertionError

    def _calls(self, program: str, suite: Suite) -> str:
        """Run all cases in one process, one call after the other; retry once if the sandbox fails."""
        for attempt in (0, 1):
            try:
                return self._call_each(program, suite)
            except SandboxError:
                if attempt:
                    raise
        raise AssertionError

    def _call_each(self, program: str, suite: Suite) -> str:
        assert suite.function is not None
        left = _ROW_BUDGET * self._limits.seconds
        seconds = math.ceil(self._limits.seconds * min(len(suite.cases), _ROW_BUDGET))
        limits = (
            self._limits
            if seconds < self._limits.cpu_seconds
            else dataclasses.replace(self._limits, cpu_seconds=seconds)
        )
        session, verdict = self._sandbox.session(program, suite.function, limits), "right"
        try:
            for case in suite.cases:
                began = time.monotonic()
                answer = session.ask(request_of(case))
                left -= time.monotonic() - began
                if left <= 0:
                    return "timeout"
                verdict = "" if answer is None else _verdict(answer, case)
                if verdict != "right":
                    break
        finally:
            outcome = session.finish()
        return verdict or _failure(outcome, limits)


def _size(case: Case, *, is_text: bool) -> int:
    """Return the size of the right answer in bytes."""
    return len(case.expected.encode()) if is_text else len(json.dumps({"value": case.expected})) + 1


def _verdict(answer: bytes, case: Case) -> str:
    """Return the verdict on one answer of a function. The line is only parsed as JSON and compared."""
    try:
        read = read_json(answer)
        if not isinstance(read, dict):
            return "wrong"
        if "value" not in read:
            return "memory" if str(read.get("error", "")).startswith("MemoryError") else "crashed"
        value = read["value"] if case.wrapper is None else WRAPPERS[case.wrapper](read["value"])
        same = same_value(value, case.expected, case.tolerance)
        same = same or (case.or_text is not None and value == case.or_text)
        same = same or (case.or_first and same_value(value, case.expected[0], case.tolerance))
    except JSON_ERRORS:
        return "wrong"
    return "right" if same else "wrong"


def _failure(outcome: Outcome, limits: Limits) -> str:
    """Return the kind of failure of a program. A program can fake the kind, but not that it failed."""
    if outcome.ended == "timeout" or (outcome.ended == "signal" and outcome.cpu_seconds >= 0.9 * limits.cpu_seconds):
        return "timeout"
    if outcome.ended == "output":
        return "wrong"
    last = outcome.stderr[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
    kinds = {"MemoryError": "memory", "SyntaxError": "syntax", "IndentationError": "syntax", "TabError": "syntax"}
    return kinds.get(last.partition(":")[0], "crashed")


def _continued(prompt: Any, block: str, function: str | None) -> str:
    """Return the prompt's code (imports and helpers) followed by the completion: a whole function, or its body."""
    assert function is not None
    is_whole = re.search(rf"^def {function}\b", block, re.MULTILINE) is not None
    code = code_in_prompt(prompt, function, whole=is_whole)
    return f"{code}\n{block}" if is_whole else f"{code.rstrip()}\n{block}"

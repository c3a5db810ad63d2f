"""Rewards of procedural tasks: signed_sums by its exact checker, reasoning-gym by the rules in `rules`."""

from __future__ import annotations

import ast
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.data.tasks import check_signed_sum
from paced_fast.errors import InputError
from paced_fast.rewards.code.compare import JSON_ERRORS, read_json
from paced_fast.rewards.procedural.plain import Judge
from paced_fast.rewards.procedural.rules import Rule, rule_of
from paced_fast.rewards.sandbox import Limits, Sandbox, SandboxError, open_sandbox
from paced_fast.rewards.text import tagged
from paced_fast.rewards.user_function import reason

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("judge.py").read_text(encoding="utf-8")
_MEMORY_MIB = 1024
_START_SECONDS = 60.0
_WALL_FACTOR = 10


class SignedSumsReward:
    """1 for a completion that solves its prompt, a problem of the task signed_sums; else 0."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [check_signed_sum(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """Return a message if the prompt is not a problem of this task; None if it is, or if there is no prompt."""
        prompt = columns.get("prompt")
        if prompt is None:
            return None
        try:
            check_signed_sum(prompt if isinstance(prompt, str) else repr(prompt), "")
        except InputError as error:
            return str(error)
        return None


signed_sums = SignedSumsReward()


class ReasoningGymReward:
    """1 for a right answer by the rule of its task; a few tasks give partial credit (see `rules`).

    Most rules are our own. A checker of the package runs in a sandbox, in a separate process for each text; the sandbox
    opens with the first row that needs it. An answer whose check takes more than `settings.task_seconds` of processor
    time is wrong. `counts` has right, partial, wrong; timeout and crashed, which score 0 too; and unscored, for a
    failure of the sandbox or no result in time by the clock.
    """

    def __init__(self, settings: RewardConfig | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._settings = settings or RewardConfig()
        self._workers = self._settings.workers or os.cpu_count() or 1
        seconds = self._settings.task_seconds
        self._limits = Limits(
            seconds=_WALL_FACTOR * max(seconds, 1.0),
            cpu_seconds=math.ceil(seconds),
            memory_mib=_MEMORY_MIB,
            start_seconds=_START_SECONDS,
        )
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        self._tried: dict[str, str | None] = {}

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        missing = [key for key in ("task", "settings", "entry") if key not in columns]
        if missing:
            raise InputError(
                f"reward 'reasoning_gym' needs rows of an rg: source: the column {missing[0]!r} is missing"
            )
        rows = list(zip(columns["task"], columns["settings"], columns["entry"], completions, strict=True))
        found: list[tuple[float | None, str] | None] = [self._judged_here(*row) for row in rows]
        asked = [i for i, verdict in enumerate(found) if verdict is None]
        if asked:
            for i in asked:
                if problem := self._flaw(*rows[i][:3]):
                    raise InputError(problem)
            with ThreadPoolExecutor(self._workers, "reasoning_gym") as pool:
                for i, verdict in zip(asked, pool.map(lambda i: self._checked(*rows[i]), asked), strict=True):
                    found[i] = verdict
        self.counts.update(verdict[1] for verdict in found if verdict is not None)
        return [None if verdict is None else verdict[0] for verdict in found]

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """Return the reason why the row cannot be judged (missing field of an rg: source, unusable task), or None.

        Raises:
            InputError: the task needs a sandbox, and none works on this machine.
        """
        for key, kind in (("task", str), ("settings", Mapping), ("entry", Mapping)):
            if not isinstance(columns.get(key), kind):
                return f"reward 'reasoning_gym' needs rows of an rg: source: the row has no valid column {key!r}"
        if "answer" not in columns["entry"]:
            return "reward 'reasoning_gym' needs rows of an rg: source: the entry of the row has no answer"
        return self._flaw(columns["task"], columns["settings"], columns["entry"])

    def close(self) -> None:
        """End the sandbox's processes."""
        if self._sandbox is not None:
            self._sandbox.close()

    def _judged_here(
        self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], completion: str
    ) -> tuple[float, str] | None:
        """Return score and verdict by our own rule, or None if only the package's checker can decide."""
        rule, text = rule_of(task), _text(completion)
        if rule.refused:
            raise InputError(f"reasoning-gym task {task!r} is refused: {rule.refused}")
        if text == str(entry.get("question", "")).strip():
            return _named(0.0)  # a repeated prompt, which may contain its answer at the end
        if rule.judge is not None:
            try:
                return _named(rule.score(rule.judge(text, entry, settings)))
            except RecursionError:  # lists nested too deeply
                return _named(0.0)
        return _named(1.0) if text and text == entry["answer"] else None

    def _checked(
        self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], completion: str
    ) -> tuple[float | None, str]:
        """Return score and verdict by the package's checker."""
        try:
            score, verdict = self._ask(task, settings, entry, _text(completion))
        except SandboxError as error:
            logger.warning("reasoning_gym %s: the sandbox failed, so a completion is unscored: %s", task, error)
            return None, "unscored"
        if verdict == "unscored":
            logger.warning(
                "reasoning_gym %s: the checker gave no verdict in time on %.80r, which is unscored", task, completion
            )
            return None, verdict
        return _named(rule_of(task).score(score)) if verdict == "answered" else (0.0, verdict)

    def _ask(self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any], text: str) -> tuple[float, str]:
        """Return the checker's score and `answered`, else 0 and crashed, timeout (CPU limit) or unscored (wall clock).

        If the checker raises an error, the text is not an answer: the score is 0.
        """
        assert self._sandbox is not None
        request = json.dumps({"literal": repr([task, dict(settings), dict(entry), text])}).encode()
        session = self._sandbox.session(_PROGRAM, "judge", self._limits)
        try:
            reply = session.ask(request)
        finally:
            outcome = session.finish()
        if reply is None:
            if outcome.ended == "timeout":
                return 0.0, "unscored"
            is_late = outcome.ended == "signal" and outcome.cpu_seconds >= 0.9 * self._limits.cpu_seconds
            return 0.0, "timeout" if is_late else "crashed"
        try:
            read = read_json(reply)
        except JSON_ERRORS:
            return 0.0, "crashed"
        if isinstance(read, dict) and "error" in read:
            return 0.0, "answered"
        score = read.get("value") if isinstance(read, dict) else None
        if isinstance(score, float) and 0.0 <= score <= 1.0:
            return score, "answered"
        return 0.0, "crashed"

    def _flaw(self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any]) -> str | None:
        """Return why rows like this one cannot be judged, or None; the checker is tried once on such a row's answer."""
        rule = rule_of(task)
        if rule.refused:
            return f"reasoning-gym task {task!r} is refused: {rule.refused}"
        if rule.judge is not None:
            return _own_answer_flaw(rule.judge, rule, task, settings, entry)
        try:
            ast.literal_eval(repr([dict(settings), dict(entry)]))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return f"reasoning-gym task {task!r}: the row has values other than texts, numbers, lists and mappings"
        key = repr((task, sorted(settings.items())))
        with self._lock:
            if key not in self._tried:
                self._open(task)
                self._tried[key] = self._trial(task, settings, entry)
            return self._tried[key]

    def _open(self, task: str) -> None:
        if self._sandbox is not None:
            return
        try:
            self._sandbox = open_sandbox(self._settings.sandbox, self._limits, self._workers, ("reasoning_gym",))
        except InputError as error:
            raise InputError(
                f"reasoning-gym task {task!r}: its checker parses the model's text, so it needs a sandbox: {error}"
            ) from None

    def _trial(self, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any]) -> str | None:
        answer = entry["answer"] if isinstance(entry["answer"], str) else None
        try:
            score, verdict = self._ask(task, settings, entry, (answer or "").strip())
        except SandboxError as error:
            return f"reasoning-gym task {task!r}: its checker does not start in the sandbox: {error}"
        if answer is not None and score < 1.0:
            return (
                f"reasoning-gym task {task!r}: its checker gives the row's own answer {answer!r:.80} "
                f"{score:g} ({verdict}) instead of 1"
            )
        return None


def _own_answer_flaw(
    judge: Judge, rule: Rule, task: str, settings: Mapping[str, Any], entry: Mapping[str, Any]
) -> str | None:
    """Return a message if a row lacks what its rule needs (rows made elsewhere may), or its own answer is not right."""
    try:
        score = judge(str(entry["answer"]).strip(), entry, settings)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return f"reasoning-gym task {task!r}: the row was not made by an rg: source: {reason(error)}"
    is_known = rule.is_readable is None or rule.is_readable(str(entry["answer"]))
    return (
        None
        if score >= 1.0 or not is_known
        else f"reasoning-gym task {task!r}: the row's own answer is wrong by the task's rule"
    )


def _text(completion: str) -> str:
    """Return the text inside a completion's last closed <answer> tag, else all of it, stripped."""
    inside = tagged(completion)
    return (completion if inside is None else inside).strip()


def _named(score: float) -> tuple[float, str]:
    return score, "right" if score >= 1.0 else "partial" if score > 0.0 else "wrong"

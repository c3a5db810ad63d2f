r"""Rewards for mathematics, judged in workers that can be killed: the lenient `math` and the strict `math_strict`.

`math` extracts the final answer of a completion (`endings.final_answer`) and compares it exactly and by math-verify;
formatting and units are ignored.

`math_strict` requires that the last \boxed{} (after the last </think>, if there is one) holds one value, written out:

* all boxes hold the same, none is nested or unclosed; text outside the boxes is ignored
* as many values as the gold: no "A or B", no list of guesses; a tuple is not a set, nor an interval of other brackets
* a numeral if the gold is a rational number: no unevaluated sum, product, root or binomial, no `10/2` for 5
* the value, not an equation: no `x = 5` for 5 (5 for `x = 5` is right)
* exact: 0.333 is not 1/3, 3.141593 is not \pi; 5\% is 5/100
* units may be omitted or added, but two different units make the answer wrong

An answer that is too long, nested or large (`answers.is_absurd`) is wrong before anything is computed with it, so that
an intractable answer earns no more than a wrong one. An answer that passes this test but cannot be verified within the
time limit may be right; it is unscored.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.errors import InputError
from paced_fast.rewards.math import forms
from paced_fast.rewards.math.answers import TIME, boxes, has_words, in_form, is_absurd, is_one_value, key_text, tidy
from paced_fast.rewards.math.endings import final_answer
from paced_fast.rewards.math.notation import spelled
from paced_fast.rewards.math.roundings import is_rounding
from paced_fast.rewards.text import answers_of
from paced_fast.rewards.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_JUDGE = Path(__file__).with_name("judge.py")
_MAX_VERDICTS = 1 << 15
# math-verify compares decimals by their first six digits after the point.
_ROUNDING = Fraction(1, 10**5)
_REWARDS = {"right": 1.0, "timeout": None, "died": None}

_SPANS = forms.INTERVALS | {"union"}

Request = list[Any]
"""`[trees, texts]`: two trees for the exact comparison and two texts for math-verify; None skips that comparison."""


class MathReward:
    """The reward `math`, or `math_strict`. Its workers start with the first call and end with `close`.

    `counts` has verdicts by kind. Reward 1: right. Reward 0: wrong, no_answer (nothing boxed, or several different
    boxes), absurd, unreadable (the parser cannot read the gold, and the texts differ). Unscored: timeout, died.
    """

    def __init__(self, settings: RewardConfig | None = None, *, strict: bool = False) -> None:
        settings = settings or RewardConfig()
        self.name = "math_strict" if strict else "math"
        self.counts: Counter[str] = Counter()
        self._decide = _decide_strictly if strict else _decide
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[tuple[str, str], str] = OrderedDict()
        num_workers = settings.workers or len(os.sched_getaffinity(0))
        self._pool = WorkerPool(_JUDGE, name=self.name, num_workers=num_workers, seconds=settings.math_seconds)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Return one value per completion: 1 if it is right, 0 if it is wrong, None if it could not be judged."""
        pairs = [
            self._pair(answer, text)
            for answer, text in zip(answers_of(self.name, columns, completions), completions, strict=True)
        ]
        self.warm()  # before the first hard answer, so that a trial call before the run shows that workers start
        known = self._known(pairs)
        asked: dict[tuple[str, str], Request] = {}
        for pair in pairs:
            if pair not in known and pair not in asked:
                decided = self._decide(*pair)
                if isinstance(decided, str):
                    known[pair] = decided
                else:
                    asked[pair] = decided
        replies = self._pool.run(list(asked.values()))
        for pair, reply in zip(asked, replies, strict=True):
            known[pair] = reply.value if reply.kind == "answered" else reply.kind
        verdicts = [known[pair] for pair in pairs]
        self._note(pairs, known, verdicts)
        return [_REWARDS.get(verdict, 0.0) for verdict in verdicts]

    def problem(self, columns: Mapping[str, Any]) -> str | None:
        """Return the reason why a row can never be judged: its answer is missing or empty; else None."""
        answer = columns.get("answer")
        if answer is None:
            return "the row has no answer"
        return None if tidy(_gold(answer)) else "the row's answer is empty"

    def warm(self) -> None:
        """Start the workers, so that the first answer does not wait for them.

        Raises:
            InputError: the workers do not start.
        """
        self._pool.warm()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _pair(self, answer: Any, completion: str) -> tuple[str, str]:
        gold = _gold(answer)
        if not gold.strip():
            raise InputError(
                f"reward {self.name!r}: a row has an empty answer: drop the row, or name another field, as in "
                "answer=FIELD"
            )
        if self.name == "math":
            return gold, final_answer(completion)
        found = boxes(completion)
        return gold, found[-1] if found and len({"".join(box.split()) for box in found}) == 1 else ""

    def _known(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
        with self._lock:
            known = {pair: self._verdicts[pair] for pair in set(pairs) if pair in self._verdicts}
            for pair in known:
                self._verdicts.move_to_end(pair)
        return known

    def _note(
        self, pairs: Sequence[tuple[str, str]], known: Mapping[tuple[str, str], str], verdicts: Sequence[str]
    ) -> None:
        with self._lock:
            self.counts.update(verdicts)
            for pair, verdict in known.items():
                if _REWARDS.get(verdict, 0.0) is not None:
                    self._verdicts[pair] = verdict
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        for kind, what in (
            ("timeout", "were not verified within --reward.math-seconds and are unscored"),
            ("died", "made their worker process die twice and are unscored"),
            (
                "unreadable",
                "have an answer key that is not readable as mathematics, so that only the same text is right",
            ),
        ):
            found = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict == kind]
            if found:
                gold, answer = found[0]
                logger.warning(
                    "%s: %d of %d completions %s; the first is %.80r for the answer key %.80r",
                    self.name, len(found), len(pairs), what, answer, gold,
                )  # fmt: skip


def _gold(answer: Any) -> str:
    return key_text(str(answer))


def _decide(gold: str, answer: str) -> str | Request:
    """Return the verdict of `math`, or a request to a worker, which accepts if either comparison finds equality."""
    answer = in_form(answer, gold)
    strictly = _decide_strictly(gold, answer)
    if strictly in ("right", "absurd", "no_answer"):
        return strictly
    times = [tidy(one) for one in (gold, answer)]
    if all(map(TIME.fullmatch, times)):
        return "right" if times[0] == times[1] else "wrong"
    trees = None if isinstance(strictly, str) else strictly[0]
    if _is_settled(gold, answer):
        return [trees, None] if trees else "wrong"
    gold, answer = spelled(tidy(gold)), spelled(tidy(answer))
    if answer.casefold() == gold.casefold():
        return "right"
    numbers = [forms.number_of(text) for text in (gold, answer)]
    if None not in numbers and "%" not in f"{numbers}":
        values = [Fraction(str(number)) for number in numbers]
        if values[0] == values[1]:
            return "right"
        if "." not in gold + answer or abs(values[0] - values[1]) > _ROUNDING or not is_rounding(*values):
            return "wrong"
    # A gold of words is not mathematics; math-verify would read it as a product of letters.
    texts = None if has_words(gold) or not is_one_value(answer, gold) else [gold, answer]
    return [trees, texts] if trees or texts else "wrong"


def _is_settled(gold: str, answer: str) -> bool:
    """Return True if the exact comparison decides in `math` too: math-verify would ignore the difference."""
    read, other = forms.tree_of(gold), forms.tree_of(answer)
    if read is None:
        return False
    if other is None:
        return "infty" in answer or (read[0][0] not in _SPANS and forms.has_slips(answer, gold))
    (tree, unit), (answered, answered_unit) = read, other
    if unit != answered_unit and {unit.rstrip("23"), answered_unit.rstrip("23")} <= forms.KNOWN_UNITS:
        return True
    kinds = tree[0], answered[0]
    if kinds[0] == kinds[1] and kinds[0] in ("base", "ratio", "relation"):
        return True
    if kinds == ("number", "base"):
        return True
    if "set" in kinds and set(kinds) & forms.INTERVALS:
        return True
    return kinds[0] not in _SPANS and kinds[1] not in ("number", "base", "text") and forms.has_slips(answer, gold)


def _decide_strictly(gold: str, answer: str) -> str | Request:
    """Return the verdict of `math_strict`, or a request to a worker."""
    if not answer.strip():
        return "no_answer"
    if is_absurd(answer, gold):
        return "absurd"
    read, other = forms.tree_of(gold), forms.tree_of(answer)
    if other is None:
        return "wrong"
    (tree, unit), (answered, answered_unit) = read or (["text", gold.casefold()], ""), other
    if unit and answered_unit and unit != answered_unit:
        return "wrong"
    tree, answered = forms.listed(tree), forms.listed(answered)
    kinds = tree[0], answered[0]
    if kinds[0] in _SPANS and kinds[1] in ("relation", "set"):
        answered = forms.as_interval(answered)
    elif kinds[1] in _SPANS and kinds[0] in ("relation", "set"):
        tree = forms.as_interval(tree)
    if answered[0] != "relation" and (value := forms.value_of_assignment(tree)):
        tree = value
    if tree == answered:
        return "right"
    if forms.is_calculation(answer) and not forms.is_calculation(gold):
        return "wrong"
    if answered[0] not in ("number", "base", "text") and forms.has_slips(answer, gold):
        return "wrong"
    if tree[0] == "number" or "text" in (tree[0], answered[0]) or not _may_equal(tree[0], answered[0]):
        return "wrong"
    return [[tree, answered], None]


def _may_equal(kind: str, other: str) -> bool:
    return kind == other or {kind, other} <= {"number", "expression"}

r"""Layouts of known data sets: which fields of a row are its prompt, its answer or its tests.

    gsm8k          question, and answer whose last line is `#### 72`
    math           problem, and answer or else the last \boxed{} of solution (MATH, MATH-500, AIME, AMC)
    deepscaler     problem, answer, solution
    dapo           prompt (text or messages), and reward_model.ground_truth or else solution (DAPO-Math-17k)
    deepcoder      problem, tests
    taco           question, input_output (TACO, APPS)
    livecodebench  question_content, public_test_cases, private_test_cases
    humaneval      prompt, test, entry_point
    plain          prompt, question, problem, instruction, input, query or messages; answer, target, ground_truth,
                   output, solution, final_answer, expected_answer, label or reference

Rows of the four with tests are programs, which `reward=code` judges by all of their fields; code to start from
(`starter_code`) follows the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from paced_fast.data.sources.spec import FORMAT_NAMES, Source
from paced_fast.errors import InputError

_PROMPTS = ("prompt", "question", "problem", "instruction", "input", "query", "messages")
_ANSWERS = (
    *("answer", "target", "ground_truth", "output", "solution"),
    *("final_answer", "expected_answer", "label", "reference"),
)
_REWARDS_OF_ANSWERS = ("exact", "number", "math")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Fields of a row that hold its parts."""

    name: str
    prompt: str
    answers: tuple[str, ...] = ()
    """Fields with the answer; the first that a row has counts."""
    answer_after: str | None = None
    boxed: str | None = None
    r"""Field whose last \boxed{} is the answer of a row without any of `answers`."""
    tests: tuple[str, ...] = ()
    """Fields with the tests of a program; a row needs one of them."""
    reward: str = "math"


FORMATS = {
    layout.name: layout
    for layout in (
        Layout(name="gsm8k", prompt="question", answers=("answer",), answer_after="####"),
        Layout(name="math", prompt="problem", answers=("answer",), boxed="solution"),
        Layout(name="deepscaler", prompt="problem", answers=("answer",)),
        Layout(name="dapo", prompt="prompt", answers=("reward_model.ground_truth", "solution")),
        Layout(name="deepcoder", prompt="problem", tests=("tests",), reward="code"),
        Layout(name="taco", prompt="question", tests=("input_output",), reward="code"),
        Layout(
            name="livecodebench",
            prompt="question_content",
            tests=("public_test_cases", "private_test_cases"),
            reward="code",
        ),
        Layout(name="humaneval", prompt="prompt", tests=("test",), reward="code"),
    )
}


def layout_of(source: Source, row: Mapping[str, Any], *, imitated: bool = False) -> tuple[Layout, bool]:
    """The layout of the source's rows, of which `row` is one, and whether it was recognised by the fields.

    Rows whose demonstration is `imitated` and that nothing judges need no answer.

    Raises:
        InputError: the fields are of no known layout, or the reward does not go with it.
    """
    given = source.prompt is not None or source.answer is not None
    if source.format != "auto":
        layout, recognised = FORMATS.get(source.format) or _plain(row), False
    elif source.kind in ("task", "rg") or {"prompt", "answer"} <= row.keys():
        layout, recognised = Layout(name="plain", prompt="prompt", answers=("answer",)), False
    elif given:
        layout, recognised = _plain(row), False
    else:
        found = _recognised(row)
        needs_none = imitated or judges_without_answer(source.reward) or "messages" in row
        if found is None and row.keys() & set(_PROMPTS) and needs_none:
            return _plain(row), True
        if found is None:
            what, query = "field of the answer", f"answer={_alike(row, _ANSWERS)}"
            if not row.keys() & set(_PROMPTS):
                what, query = "fields of prompt and answer", f"prompt={_alike(row, _PROMPTS)}&{query}"
            raise InputError(
                f"source {source.spec!r}: no known format has the fields {', '.join(map(str, row))}: name the {what}, "
                f"as in '{source.title}?{query}', or give format=NAME, one of "
                f"{', '.join(FORMAT_NAMES)}"
            )
        layout, recognised = found, True
    if layout.tests and source.reward in _REWARDS_OF_ANSWERS:
        raise InputError(
            f"source {source.spec!r}: rows of the format {layout.name} have tests for programs, which the reward "
            f"'code' judges and {source.reward!r} cannot: give this source reward=code, or name no reward at all"
        )
    return layout, recognised


def _alike(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The field that has one of the names but for capitals and blanks, as a source writes it; else `FIELD`."""
    written = {str(field).strip().lower(): quote(str(field)) for field in row}
    return next((written[name] for name in names if name in written), "FIELD")


def judges_without_answer(reward: str | None) -> bool:
    """Whether rows may lack an answer: their reward is the user's own function, or makes or reads what it needs."""
    return ":" in (reward or "") or reward in ("signed_sums", "reasoning_gym", "code")


def _recognised(row: Mapping[str, Any]) -> Layout | None:
    fields = row.keys()
    model = row.get("reward_model")
    programs = (
        ("livecodebench", "question_content" in fields and bool(fields & {"public_test_cases", "private_test_cases"})),
        ("humaneval", {"prompt", "test", "entry_point"} <= fields),
        ("taco", {"question", "input_output"} <= fields),
        ("deepcoder", {"problem", "tests"} <= fields),
    )
    answers = (
        ("dapo", "prompt" in fields and isinstance(model, Mapping) and "ground_truth" in model),
        ("dapo", {"prompt", "solution"} <= fields),
        ("gsm8k", {"question", "answer"} <= fields and "####" in str(row["answer"])),
        ("deepscaler", fields == {"problem", "answer", "solution"}),
        ("math", {"problem", "answer"} <= fields or ("problem" in fields and boxed(row.get("solution")) is not None)),
    )
    name = next((name for name, fits in (*programs, *answers) if fits), None)
    if name is not None:
        return FORMATS[name]
    plain = _plain(row)
    return plain if plain.prompt in fields and plain.answers[0] in fields else None


def _plain(row: Mapping[str, Any]) -> Layout:
    prompt = next((name for name in _PROMPTS if name in row), "prompt")
    answer = next((name for name in _ANSWERS if name in row), "answer")
    return Layout(name="plain", prompt=prompt, answers=(answer,))


def boxed(text: Any) -> str | None:
    r"""Content of the last \boxed{} of a text; None without one that closes."""
    if not isinstance(text, str):
        return None
    starts = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]
    depth = 1
    for end in range(starts[-1] if starts else len(text), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[starts[-1] : end].strip()
    return None

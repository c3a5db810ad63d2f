"""The rows that a source selects, each with its prompt, its answer and what else its reward reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paced_fast.data.sources.demonstrations import demonstration_of, noisy
from paced_fast.data.sources.faults import BadRow, BadRows, MissingColumn, check_text, checked_answer, checked_prompt
from paced_fast.data.sources.fields import find_field, lack_of, lookup
from paced_fast.data.sources.formats import Layout, boxed, judges_without_answer, layout_of
from paced_fast.data.sources.read import Reader, Row, find_file, open_source
from paced_fast.data.sources.spec import Messages, Source, parse_source
from paced_fast.errors import InputError, counted

logger = logging.getLogger(__name__)

_NAMES_FOR_COMPLETIONS = frozenset(("completion", "response", "responses", "output", "outputs", "text", "texts"))
_NAMES_OF_VERL = frozenset(("data_source", "solution_str", "extra_info"))
Check = Callable[[str, Mapping[str, Any]], str | MissingColumn | None]
"""Function of a reward's name and a row's columns; returns why the row could never be scored, or None."""

_FIRST_ROWS = 100
_LARGE_BYTES = 1 << 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A row before its prompt is encoded; `where` names it in errors."""

    where: str
    prompt: str | Messages
    reward: str
    slice: str
    columns: dict[str, Any]
    demonstration: str | None


def read_drafts(
    spec: str,
    data_dir: str | None,
    *,
    bad_rows: BadRows | None = None,
    check: Check | None = None,
    reward: str | None = None,
) -> tuple[Source, list[Draft]]:
    """The rows of one source, each with what names it in errors.

    `reward` judges the rows of a source that names none. Without a `check` nothing judges the rows, so that those with
    a demonstration in a field of theirs need no answer.

    Raises:
        InputError: the source has no rows, or a bad one (`bad_rows` may count those instead).
    """
    source = parse_source(spec)
    if source.reward is None:
        source = dataclasses.replace(source, reward=reward)
    bad_rows = bad_rows or BadRows()
    reader = open_source(source, data_dir)
    start, stop = source.rows[0] or 0, source.rows[1]
    total = reader.count(stop)
    if stop is not None and total < stop:
        raise InputError(
            f"source {spec!r} asks for rows up to {stop}, but has {total} rows: rows= stops at {total} at most"
        )
    candidates = range(start, max(start, total))
    imitated = check is None and source.demonstration not in (None, "@answer", "@equation")
    layout = _layout(source, reader, candidates[:_FIRST_ROWS], imitated=imitated)
    order = _selected(source, reader, layout, bad_rows, candidates)
    drafts: list[Draft | None] = [None] * len(order)
    # A file is read in its own order, whatever the order of the rows drawn from it.
    places = sorted(range(len(order)), key=order.__getitem__)
    streamed = reader.stream(order if isinstance(order, range) else sorted(order))
    ids = _Ids()
    for place, (where, raw) in zip(places, streamed, strict=True):
        try:
            row = reader.decode(where, raw)
            draft = _checked_draft(source, layout, where, row, check, imitated=imitated)
        except BadRow as bad:
            bad_rows.add(bad)
            continue
        drafts[place] = draft
        ids.add(row, where)
    ids.tell(spec)
    kept = [draft for draft in drafts if draft is not None]
    if not drafts:
        raise InputError(f"data source {spec!r} has no rows: check its file, and rows= and share= if given")
    return source, kept


def check_first_row(spec: str, data_dir: str | None, *, check: Check, reward: str | None = None) -> None:
    """Try the first row of a file that the source selects, as `read_drafts` tries all; nothing else is read or logged.

    Nothing is said of an absent file, of large ones that are read as a whole, and where chance chooses the rows.

    Raises:
        InputError: `read_drafts` would refuse the row.
    """
    source = parse_source(spec)
    path = find_file(source, data_dir) if source.kind in ("jsonl", "csv", "parquet") else None
    if path is None or (source.seed is not None and source.size is not None) or _is_slow(source, path):
        return
    source = source if source.reward is not None else dataclasses.replace(source, reward=reward)
    reader, start = open_source(source, data_dir), source.rows[0] or 0
    first = range(start, max(start, reader.count(min(start + _FIRST_ROWS, source.rows[1] or sys.maxsize))))
    layout = _layout(source, reader, first, imitated=False, tell=False)
    for where, raw in reader.stream(first):
        row = reader.decode(where, raw)
        low, high = source.share
        if low <= _place(_prompt(source, row, source.prompt or layout.prompt, where)) < high:
            _checked_draft(source, layout, where, row, check, imitated=False)
            return


def _is_slow(source: Source, path: Path) -> bool:
    """Whether a file takes long to read up to its first rows."""
    is_whole = source.kind == "csv" or path.name.removesuffix(".gz").endswith(".json")
    return (is_whole and path.stat().st_size > _LARGE_BYTES) or (source.rows[0] or 0) > _FIRST_ROWS


def _checked_draft(
    source: Source, layout: Layout, where: str, row: Row, check: Check | None, *, imitated: bool
) -> Draft:
    """The row as a draft. Raises BadRow for one that cannot be used, or never judged."""
    draft = _draft(source, layout, where, row, imitated=imitated)
    problem = None if check is None else check(draft.reward, {**draft.columns, "prompt": draft.prompt})
    if isinstance(problem, MissingColumn):
        raise BadRow(_lacks(source, layout, where, row, problem))
    if problem is not None:
        raise BadRow(f"{where}: {problem}")
    return draft


def _lacks(source: Source, layout: Layout, where: str, row: Row, missing: MissingColumn) -> str:
    """What a row lacks that the function of its reward asks for, and the fields that it has."""
    if missing.column in _NAMES_FOR_COMPLETIONS:
        return (
            f"the reward {missing.reward!r} has the parameter {missing.column!r}, and {where} has no such field: what "
            "the policy wrote comes as `completions`, a list of texts beside the lists `prompts` and one of each field"
        )
    name, remedy = missing.column, "complete the row"
    if name == "answer":  # which may have another name in the row
        name, remedy = source.answer or layout.answers[0], f"{remedy}, name the field by answer="
    elif name in _NAMES_OF_VERL and ":" in missing.reward and not missing.reward.startswith(("trl:", "verl:")):
        remedy = f"write verl:{missing.reward} if it is a function for verl, {remedy}"
    lack = lack_of(row, name)
    return (
        f"{where} has {lack}: the reward {missing.reward!r} has the "
        f"parameter {missing.column!r} without a default: {remedy}, or give the parameter a default"
    )


def _layout(source: Source, reader: Reader, first: range, *, imitated: bool, tell: bool = True) -> Layout:
    """The layout of the first row that can be read; `tell`: log what it is."""
    for where, raw in reader.stream(first):
        try:
            row = reader.decode(where, raw)
        except BadRow:
            continue  # it is read again when its turn comes
        layout, recognised = layout_of(source, row, imitated=imitated)
        if recognised and tell:
            judged = f"tests from `{'` and `'.join(layout.tests)}`" if layout.tests else _told_answer(layout, row)
            known = "" if layout.name == "plain" else f" (format {layout.name})"
            logger.info("%s: prompt from `%s`, %s%s", source.spec, layout.prompt, judged, known)
        if tell and source.slice is not None and source.slice in row and source.kind not in ("task", "rg"):
            logger.warning(
                "%s: slice=%s puts every row into one slice of that name; slice_by=%s makes one of each value",
                *(source.spec, source.slice, source.slice),
            )
        return layout
    return Layout(name="plain", prompt=source.prompt or "prompt", answers=("answer",))


def _told_answer(layout: Layout, row: Row) -> str:
    """Where the answer of a row without tests comes from, in words."""
    if all(find_field(row, name) is None for name in layout.answers):
        if layout.prompt == "messages" and _ends_in_reply(row["messages"]):
            return "answer from the reply that ends it"
        if not layout.boxed and not any(name in row for name in layout.answers):
            return "no answer"
    places = [f"`{name}`" for name in layout.answers]
    if layout.boxed:
        places.append(f"\\boxed{{}} of `{layout.boxed}`")
    return f"answer from {' or '.join(places)}"


def _ends_in_reply(chat: Any) -> bool:
    last = chat[-1] if isinstance(chat, list) and chat else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _selected(
    source: Source, reader: Reader, layout: Layout, bad_rows: BadRows, candidates: Sequence[int]
) -> Sequence[int]:
    """The numbers of the rows that the source selects among the candidates, in their order."""
    order = candidates
    if source.share != (0.0, 1.0):
        order = array("q", _share(source, reader, layout, bad_rows, candidates))
    if source.kind in ("task", "rg"):
        return order  # seed and size went into making them
    if source.seed is not None:
        drawn = array("q", order)
        random.Random(source.seed).shuffle(drawn)  # type: ignore[arg-type]  # any mutable sequence will do
        order = drawn
    if source.size is not None and len(order) < source.size:
        raise InputError(
            f"source {source.spec!r} asks for size={source.size}, but has {len(order)} rows: give that size at most"
        )
    return order[: source.size]


def _share(
    source: Source, reader: Reader, layout: Layout, bad_rows: BadRows, candidates: Sequence[int]
) -> Iterator[int]:
    low, high = source.share
    name = source.prompt or layout.prompt
    for number, (where, raw) in zip(candidates, reader.stream(candidates, name), strict=True):
        try:
            if low <= _place(_prompt(source, reader.decode(where, raw), name, where)) < high:
                yield number
        except BadRow as bad:
            bad_rows.add(bad)


def _prompt(source: Source, row: Row, name: str, where: str) -> Any:
    """The row's prompt; of a text the part that the source keeps."""
    prompt = lookup(row, name, where, "prompt")
    if source.keep is None:
        return prompt
    if not isinstance(prompt, str):
        raise BadRow(f"{where}: keep= needs a prompt that is one text: leave it out")
    kept = "".join(match[0] for match in re.finditer(source.keep, prompt))
    if not kept:
        raise BadRow(
            f"{where}: keep={source.keep} matches nothing in the prompt {prompt[:80]!r}: change the expression"
        )
    return kept


def _place(prompt: Any) -> float:
    """A number in [0, 1) that depends on the prompt and nothing else."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class _Ids:
    """Ids that several rows of a source have: more often than not, a file that was put together twice."""

    def __init__(self) -> None:
        self._first: dict[str | int, str] = {}
        self._repeated: list[str] = []

    def add(self, row: Row, where: str) -> None:
        name = row.get("id")
        if not isinstance(name, str | int):
            return
        first = self._first.setdefault(name, where)
        if first is not where:
            self._repeated.append(f"{where} and {first} have the id {name!r}")

    def tell(self, spec: str) -> None:
        if self._repeated:
            logger.warning(
                "%s: %s %s the id of an earlier row (%s)",
                *(spec, counted(len(self._repeated), "row"), "has" if len(self._repeated) == 1 else "have"),
                self._repeated[0],
            )


def _draft(source: Source, layout: Layout, where: str, data: Row, *, imitated: bool) -> Draft:
    made = source.kind in ("task", "rg")
    reward = source.reward or (data["reward"] if made else layout.reward)
    check_text(data, where)
    name = source.prompt or layout.prompt
    prompt = checked_prompt(_prompt(source, data, name, where), name, where)
    if name == "messages" and source.prompt is None and not isinstance(prompt, str):
        prompt, data = _without_reply(prompt, layout, data, where)
    columns = {key: value for key, value in data.items() if key not in ("prompts", "completions", name)}
    if made:
        columns = {key: value for key, value in columns.items() if key not in ("reward", "slice", "demonstration")}
        demonstration = data.get("demonstration")
    elif layout.tests and source.answer is None:
        if not any(data.get(tests) for tests in layout.tests):
            raise BadRow(f"{where} has no tests in {' or '.join(layout.tests)}: drop the row")
        prompt = _with_starter(prompt, data.get("starter_code"))
        demonstration = None
    else:
        columns["answer"] = _answer(source, layout, data, where, imitated=imitated)
        demonstration = None
    if source.demonstration is not None:
        demonstration = demonstration_of(source.demonstration, data, prompt, columns.get("answer"), where)
        demonstration = noisy(demonstration, source.noise, where)
    slice_name = source.slice or (data["slice"] if made else source.slice_name)
    if source.slice_by is not None:
        slice_name = _slice(lookup(data, source.slice_by, where, "slice_by"), source.slice_by, where)
    return Draft(
        where=where, prompt=prompt, reward=reward, slice=slice_name, columns=columns, demonstration=demonstration
    )


def _without_reply(prompt: Messages, layout: Layout, data: Row, where: str) -> tuple[Messages, Row]:
    """A chat of a data set for supervised learning: without the reply it ends with, which is the answer if no column
    has one."""
    if not _ends_in_reply(prompt):
        return prompt, data
    if len(prompt) == 1:
        raise BadRow(
            f"{where}: the prompt in 'messages' is a reply only: name the prompt's field, as in prompt=FIELD (the "
            f"fields are {', '.join(map(str, data))})"
        )
    if all(find_field(data, name) is None for name in layout.answers):
        data = {**data, layout.answers[0]: prompt[-1]["content"]}
    return prompt[:-1], data


def _slice(value: Any, column: str, where: str) -> str:
    """The slice that a column's value names: a text as it is, a number with the column's name."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    if isinstance(value, bool | int | float):
        return f"{column} {value}"
    raise BadRow(
        f"{where}: {column!r} is {value!r:.80}, which names no slice: name a field of texts or numbers, as in "
        "slice_by=FIELD"
    )


def _with_starter(prompt: str | Messages, code: Any) -> str | Messages:
    if not isinstance(prompt, str) or not isinstance(code, str) or not code.strip():
        return prompt
    return f"{prompt}\n\nStart from this code:\n```python\n{code.rstrip()}\n```"


def _answer(source: Source, layout: Layout, data: Row, where: str, *, imitated: bool) -> Any:
    names = layout.answers if source.answer is None else (source.answer,)
    name = next((name for name in names if find_field(data, name) is not None), names[0])
    found = find_field(data, name)
    if found is None and source.answer is None and imitated:
        return None
    if found is None and source.answer is None and layout.boxed is not None:
        found = boxed(data.get(layout.boxed))
        if found is None:
            raise BadRow(f"{where} has neither a field {name!r} nor a \\boxed{{}} in {layout.boxed!r}: drop the row")
        return checked_answer(found, layout.boxed, where)
    if source.answer is None and found is None and judges_without_answer(source.reward):
        return None
    answer = lookup(data, name, where, "answer")
    after = source.answer_after or (layout.answer_after if source.answer is None else None)
    if after is not None:
        if not isinstance(answer, str) or after not in answer:
            raise BadRow(
                f"{where}: the answer in {name!r} is {answer!r:.80}, without {after!r}: name the mark before the "
                "answer, as in answer_after=MARK, or a field with the answer alone, as in answer=FIELD"
            )
        answer = answer.rpartition(after)[2].strip()
    if judges_without_answer(source.reward):
        return answer  # what the user's own function is given is between the two
    return checked_answer(answer, name, where)

"""The first row of the data as the model and the reward will see it, shown before anything runs."""

from __future__ import annotations

import dataclasses
import logging
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from paced_fast.config import Config
from paced_fast.config.resolve import resolve
from paced_fast.data.distributed import ALONE
from paced_fast.data.prompts import num_ids
from paced_fast.data.records import PromptRow
from paced_fast.errors import counted
from paced_fast.policy import check_kind
from paced_fast.policy.families import check_positions, check_taught
from paced_fast.policy.loading import model_settings
from paced_fast.policy.shape import positions, text_settings
from paced_fast.policy.warm_start import read_demonstrations
from paced_fast.rewards import Scorer
from paced_fast.rewards.loading import TARGETS
from paced_fast.run.start.tables import Data, read_data, read_table, without_missing

logger = logging.getLogger(__name__)

_LONGEST = 1500
"""Characters of a prompt that are shown before training; `--check` shows all of them."""
_WIDTH = 110
NEW_OR_PACKED = ("tiny", "smollm2")
"""Models that need no check of their kind: one is made here, one comes from a package."""
_FORMS = {"inside \\boxed{}": "\\boxed{%s}", "inside <answer> tags": "<answer>%s</answer>"}
"""Forms that many rewards ask for, tried where the bare answer earns less than 1."""


def show_first_row(data: Data, console: Console) -> None:
    """Print the first training row: its text, its length, its expected answer, and the reward of that answer."""
    console.print(_text([data.table.rows[0]], data, longest=_LONGEST), markup=False, highlight=False, soft_wrap=True)
    if not data.eval_table.rows and data.config.evaluation.every:
        console.print(
            "no held-out prompts, so accuracy is not measured: give --eval-data FILE, or divide the data, as in "
            "--data 'FILE?share=0:0.9' --eval-data 'FILE?share=0.9:1'",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def check_data(config: Config, console: Console) -> None:
    """Read the data of a run and print the first row of every file or data set; nothing is trained or written.

    Raises InputError for what cannot be read or does not go together.
    """
    config = without_missing(resolve(config))
    if config.model.name not in NEW_OR_PACKED:
        check_kind(config.model.name)
    data = read_data(config, Path(config.run_dir or config.label), ALONE)
    limit = positions(
        text_settings(model_settings(dataclasses.replace(config.model, name=data.path), num_ids(data.tokenizer)))
    )
    longest, held_out = (_longest(table.rows) for table in (data.table, data.eval_table))
    check_positions(limit, data.config, longest=longest, longest_held_out=held_out)
    try:
        for kind, table in (("training", data.table), ("held-out", data.eval_table)):
            if table.rows:
                shown = _text(_one_of_each(table.rows), data, longest=None, kind=kind)
                console.print(shown, markup=False, highlight=False, soft_wrap=True)
    finally:
        data.scorer.close()
    warm = config.warm_start
    for phase in (warm.first, warm.second):
        if phase.steps > 0:
            table, completions = read_demonstrations(
                phase.sources,
                data.tokenizer,
                load=lambda sources: read_table(sources, data.tokenizer, data.config),
                stops=data.stops,
            )
            for row, completion in zip(table.rows, completions, strict=True):
                check_taught(limit, len(row.token_ids), len(completion.token_ids))
            row = table.rows[0]
            console.print(
                f"first row of the warm start, {row.where}\n  is taught to answer with: {row.demonstration}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    slices = ", ".join(dict.fromkeys(row.slice for row in data.table.rows))
    console.print(
        f"{counted(len(data.table), 'training prompt')} (slices: {slices}), "
        f"{counted(len(data.eval_table), 'held-out prompt')}; template: {data.config.data.template}; stop tokens: "
        f"{data.stops}. Nothing was trained.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _longest(rows: Sequence[PromptRow]) -> int:
    return max((len(row.token_ids) for row in rows), default=0)


def _one_of_each(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The first row of every file, data set or task, which is what stands before the number in a row's name."""
    first: dict[str, PromptRow] = {}
    for row in rows:
        name = row.where.rpartition(" row ")[0] or row.where.rpartition(":")[0]
        first.setdefault(name, row)
    return list(first.values())


def _text(rows: Sequence[PromptRow], data: Data, *, longest: int | None, kind: str = "training") -> str:
    return "\n".join(line for row in rows for line in _lines(row, data, longest, kind))


def _lines(row: PromptRow, data: Data, longest: int | None, kind: str) -> Iterator[str]:
    yield f"first {kind} row, {row.where} (slice {row.slice})"
    yield f"  the model reads {len(row.token_ids)} tokens:"
    text = str(data.tokenizer.decode(list(row.token_ids), skip_special_tokens=False))
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters, which --check shows ...]\n{text[-half:]}"
    for line in text.split("\n"):
        for part in textwrap.wrap(line, _WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]:
            yield "  | " + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in part)
    answer = _written(row.columns.get("answer"))
    if answer is None:
        fields = [name for name in row.columns if name != "answer"]
        given = ", ".join(["the prompt", *fields])
        yield f"  expected answer: none in the data; the reward {row.reward} is given {given}"
        return
    if row.reward in TARGETS:
        yield f"  a right completion comes to {answer}, by the reward {row.reward}"
        return
    yield f"  expected answer: {answer if len(answer) <= _LONGEST else answer[:_LONGEST] + '...'}"
    yield f"  {_verdict(row, answer, data.scorer)}"


def _written(answer: object) -> str | None:
    """The answer as a completion would say it."""
    if answer is None:
        return None
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _verdict(row: PromptRow, answer: str, scorer: Scorer) -> str:
    """What the reward gives for the expected answer itself, and what that means."""
    (earned,) = scorer.try_out([row], [answer])
    told = f"reward {row.reward} of this answer: {_number(earned)}"
    other = None
    if earned != 1.0:
        found = scorer.try_out([row] * len(_FORMS), [form % answer for form in _FORMS.values()])
        other = next((name for name, value in zip(_FORMS, found, strict=True) if value == 1.0), None)
    if earned == 1.0:
        return f"{told}, as it should be"
    as_text = dataclasses.replace(row, columns={**row.columns, "answer": answer})
    if other is None and not isinstance(row.columns["answer"], str) and scorer.try_out([as_text], [answer]) == [1.0]:
        return (
            f"WARNING: {told}; it is 1 with the text {answer!r} in place of {row.columns['answer']!r}: compare with "
            "str(answer) in the reward, or write answers as text"
        )
    if other is not None:
        return f"{told}; {other} it is 1, so the prompt should ask for that (--data.system-prompt, or --data.template)"
    return (
        f"WARNING: {told}, where 1 is expected: either the reward wants more than the answer, or the wrong column is "
        "taken for the answer (name it, as in answer=FIELD of the source), or the wrong reward is named (--reward NAME)"
    )


def _number(earned: float | None) -> str:
    return "no verdict (None)" if earned is None else f"{earned:g}"

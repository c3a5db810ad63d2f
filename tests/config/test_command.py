"""Command lines beside `train`: what they read, what they refuse in one line, and help whose examples are read."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

import pytest

from paced_fast.config import command
from paced_fast.config.foreign_names import NAMES
from paced_fast.errors import InputError
from paced_fast.evaluate.arguments import COMMAND as EVALUATE
from paced_fast.evaluate.arguments import EvaluateArguments
from paced_fast.export.arguments import COMMAND as EXPORT
from paced_fast.export.arguments import ExportArguments
from paced_fast.report.__main__ import COMMAND as REPORT
from paced_fast.report.__main__ import ReportArguments

COMMANDS: list[tuple[command.Command, Any]] = [
    (EVALUATE, EvaluateArguments),
    (EXPORT, ExportArguments),
    (REPORT, ReportArguments),
]


def refused(told: command.Command, kind: Any, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        command.read(told, kind, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_are_read_by_the_types_of_their_fields() -> None:
    words = "--limit 5 runs/a --data a.jsonl b.csv --top-p=0.5 --temperature 0 --dtype bfloat16 --save_samples s"
    found = command.read(EVALUATE, EvaluateArguments, [*words.split(), "--seed=-1"])
    given = {"limit": 5, "run_or_model": "runs/a", "data": ("a.jsonl", "b.csv"), "top_p": 0.5, "temperature": 0.0}
    given |= {"dtype": "bfloat16", "save_samples": "s", "seed": -1}
    assert found == EvaluateArguments(**given)  # pyright: ignore[reportArgumentType]
    assert isinstance(found.temperature, float)
    assert command.read(REPORT, ReportArguments, ["a", "b", "--page-only", "--out=c"]) == ReportArguments(
        run_dirs=("a", "b"), page_only=True, out="c"
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "RUN_OR_MODEL is missing: paced-fast evaluate RUN_OR_MODEL [--option value ...]; --help says more"),
        ("a b", "unexpected word 'b': paced-fast evaluate RUN_OR_MODEL [--option value ...]; --help lists the options"),
        ("a --samples two", "--samples 'two' is not a whole number"),
        ("a --top-p much", "--top-p 'much' is not a number"),
        ("a --dtype bfloat", "--dtype 'bfloat': did you mean bfloat16? the choices are float32, bfloat16"),
        ("a --samples", "--samples needs a value: --help says what it takes"),
        ("a --data --samples 3", "--data needs a value: --help says what it takes"),
        ("a --seed 1 --seed 2", "--seed is given twice: give it once"),
        ("a --sampels 3", "unknown option --sampels: did you mean --samples?"),
        ("a --zzz 3", "unknown option --zzz: paced-fast evaluate --help lists all options"),
        (
            "a --zz 3 --sampels 3 --yy 3",
            "unknown options: --zz, --yy (paced-fast evaluate --help lists all options); --sampels (did you mean "
            "--samples?)",
        ),
        # what other trainers, other evaluations, and `train` call it
        ("a --max_new_tokens 3", "unknown option --max_new_tokens: did you mean --max-completion-tokens?"),
        ("a --eval-data b", "unknown option --eval-data: did you mean --data?"),
        ("a --sources b", "unknown option --sources: did you mean --data?"),
        ("a --tasks gsm8k", "unknown option --tasks: did you mean --benchmarks?"),
        ("a --num-generations 3", "unknown option --num-generations: did you mean --samples?"),
        ("a --per-device-eval-batch-size 3", "unknown option --per-device-eval-batch-size: did you mean --max-batch-"),
        ("a --generation.temperature 1", "unknown option --generation.temperature: did you mean --temperature?"),
        (
            "--model a",
            "unknown option --model: RUN_OR_MODEL is given without an option: paced-fast evaluate RUN_OR_MODEL ",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_cure(words: str, complaint: str) -> None:
    assert refused(EVALUATE, EvaluateArguments, *words.split()).startswith(complaint)


def test_a_switch_takes_no_value() -> None:
    told = refused(REPORT, ReportArguments, "a", "--page-only=yes")
    assert told == "--page-only is a switch and takes no value: give --page-only alone"


def test_where_nothing_stands_for_an_option_the_reason_is_said() -> None:
    assert refused(EXPORT, ExportArguments, "a", "b", "--push-to-hub") == (
        f"unknown option --push-to-hub: {NAMES['push-to-hub'].note}"
    )
    assert refused(EXPORT, ExportArguments, "a", "--output-dir", "b").startswith(
        "unknown option --output-dir: FOLDER is given without an option: "
    )


@pytest.mark.parametrize(("told", "kind"), COMMANDS, ids=lambda one: getattr(one, "name", ""))
def test_help_has_every_option_and_examples_that_are_read(
    capsys: pytest.CaptureFixture[str], told: command.Command, kind: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.read(told, kind, ["x", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "None" not in text
    for field in dataclasses.fields(kind):
        shown = told.words.get(field.name) or f"--{field.name.replace('_', '-')}"
        (line,) = re.findall(rf"^  {re.escape(shown)}(?= |$).*", text, re.MULTILINE)
        if field.default in ("auto", 16, 0) and field.default is not False:
            assert line.endswith(f"(default: {field.default})")
    assert told.examples
    for example in told.examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("paced-fast", told.name)
        command.read(told, kind, words)
    known = {field.name for field in dataclasses.fields(kind)}
    assert {*told.synonyms.values(), *told.metavars, *told.words} <= known
    assert not {option.replace("-", "_") for option in told.synonyms} & known, "what there is needs no synonym"

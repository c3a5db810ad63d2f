"""Lines of metrics.jsonl: those that runs write today, beside those kept from before records had a type."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import recorded_lines

from paced_fast.data.step_record import ABSENT, KEYS, StartRecord, StepRecord

KEPT: dict[str, list[str]] = json.loads(Path(__file__).with_name("metrics_lines.json").read_text())


def kinds(value: Any) -> Any:
    """The JSON value with its keys in order, and "number" for every number; null counts as one, lists as their kind."""
    if isinstance(value, dict):
        return [(key, kinds(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return "list"
    return "text" if isinstance(value, str) else "number"


@pytest.mark.parametrize("case", recorded_lines.CASES)
def test_a_run_writes_the_same_keys_in_the_same_order_as_ever(case: str, tmp_path: Path) -> None:
    found = recorded_lines.lines_of(case, tmp_path)
    assert [kinds(json.loads(line)) for line in found] == [kinds(json.loads(line)) for line in KEPT[case]]
    for line, kept in zip(map(json.loads, found), map(json.loads, KEPT[case]), strict=True):
        for key in ("step", "rollouts", "trained_sequences", "unknown_ids", "skipped_steps", "replay_size", "overlap"):
            assert line.get(key) == kept.get(key), key


@pytest.mark.parametrize("case", KEPT)
def test_a_line_becomes_a_record_and_the_same_line_again(case: str) -> None:
    for text in KEPT[case]:
        line = json.loads(text)
        record = StepRecord(**line) if line["step"] else StartRecord(**line)
        assert json.dumps(record.line()) == text
        absent = {field.name for field in dataclasses.fields(record)} - set(line)
        assert all(getattr(record, name) is ABSENT for name in absent)


def test_the_kept_lines_have_every_key_that_a_line_can_have() -> None:
    assert {key for lines in KEPT.values() for line in lines for key in json.loads(line)} == KEYS

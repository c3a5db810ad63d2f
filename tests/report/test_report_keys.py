"""The keys that reports read from metrics.jsonl are those that a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from paced_fast.data.step_record import KEYS
from paced_fast.errors import InputError
from paced_fast.report import read_run
from paced_fast.report.compare_page import compare
from paced_fast.report.run_page import make_report

KEPT: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "run" / "metrics_lines.json").read_text())


class Asked(dict[str, Any]):
    """A record that notes the keys it is asked for."""

    keys_asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)


def complete_lines(steps: int = 12) -> list[str]:
    """A run whose every step has every key: the kept lines together."""
    found = [item for lines in KEPT.values() for line in lines for item in json.loads(line).items()]
    whole = {key: value for key, value in found if value}
    clocks = [{"step": step, "rollouts": 8 * step, "train_seconds": 0.5 * step} for step in range(steps)]
    return [json.dumps(whole | clock) for clock in clocks]


@pytest.mark.process
def test_reports_read_no_key_that_is_no_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    monkeypatch.setattr(Asked, "keys_asked", asked)
    parsed = read_run._metrics
    monkeypatch.setattr(read_run, "_metrics", lambda path: [Asked(record) for record in parsed(path)])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(line + "\n" for line in complete_lines()))
        make_report(tmp_path / name)
    compare([tmp_path / "one", tmp_path / "two"], tmp_path / "compared.html")
    assert {"loss", "value_fresh", "replay_ages", "eval", "overlap", "seconds", "parity", "verdicts"} <= asked
    assert asked <= KEYS


def test_a_key_that_no_record_has_is_left_out_and_a_torn_line_too(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0, "of_another_version": 3}', '{"step": 2, "loss": "damaged"}', '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run.read_run(tmp_path).records == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "damaged"}]
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n' + lines[0])
    with pytest.raises(InputError, match=r"metrics\.jsonl:1 is not a metrics record: it has no step"):
        read_run.read_run(tmp_path)

"""Three groups of the last steps that are worth reading: the best, the worst, and the most surprising.

They are written to groups.json with every completion, the expected answer and the estimate, for the report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paced_fast.data.records import Group, PromptTable
from paced_fast.run.record.files import write_json_atomic

GROUPS_FILE = "groups.json"
KINDS = ("best", "worst", "surprising")
_MOST_COMPLETIONS = 32
_MOST_CHARACTERS = 4000
_ANSWERS = ("answer", "solution", "ground_truth", "reference", "target")
"""Columns that hold the expected answer, the first that a row has."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    step: int
    group: Group
    accuracy: float
    value: float | None

    @property
    def gap(self) -> float:
        return 0.0 if self.value is None else abs(self.value - self.accuracy)


class GroupsFile:
    """Keeps candidates of the newest steps and writes the groups chosen among them; nothing is decoded before."""

    def __init__(
        self, folder: Path, table: PromptTable, decode: Callable[[list[int]], str], *, steps: int = 25
    ) -> None:
        self._path, self._table, self._decode = folder / GROUPS_FILE, table, decode
        self._steps: deque[dict[str, _Candidate]] = deque(maxlen=steps)

    def see(self, step: int, groups: Sequence[Group], values: Sequence[float] | None) -> None:
        """Consider the groups of a step; `values` are the estimates of those with a scored completion, or None."""
        scored = [group for group in groups if group.accuracy is not None]
        known = values if values is not None and len(values) == len(scored) else [None] * len(scored)
        candidates = [
            _Candidate(step, group, group.accuracy or 0.0, value) for group, value in zip(scored, known, strict=True)
        ]
        if candidates:
            self._steps.append({kind: _choose(kind, candidates) for kind in KINDS})

    def write(self) -> None:
        """Write the groups of the steps seen last; without any, what is there stays. Raises OSError."""
        chosen: dict[str, _Candidate] = {}
        for kind in reversed(KINDS):  # the surprising one first: the others have many that are as good
            taken = {(c.step, c.group.prompt_index) for c in chosen.values()}
            found = [seen[kind] for seen in self._steps]
            rest = [c for c in found if (c.step, c.group.prompt_index) not in taken]
            if rest and (kind != "surprising" or any(c.value is not None for c in rest)):
                chosen[kind] = _choose(kind, rest)
        if chosen:
            write_json_atomic(self._path, [self._row(kind, chosen[kind]) for kind in KINDS if kind in chosen])

    def _row(self, kind: str, found: _Candidate) -> dict[str, Any]:
        row, group = self._table.rows[found.group.prompt_index], found.group
        answer = next((row.columns[name] for name in _ANSWERS if row.columns.get(name) is not None), None)
        pairs = list(zip(group.completions, group.rewards, strict=True))
        return {
            "kind": kind,
            "step": found.step,
            "slice": row.slice,
            "prompt": row.prompt,
            "answer": None if answer is None else _cut(str(answer)),
            "value": found.value,
            "accuracy": found.accuracy,
            "size": len(pairs),
            "completions": [
                {"text": _cut(self._decode(completion.token_ids)), "reward": reward, "stopped": completion.stopped}
                for completion, reward in pairs[:_MOST_COMPLETIONS]
            ],
        }


def _choose(kind: str, candidates: Sequence[_Candidate]) -> _Candidate:
    """Among equals, the one whose estimate was further off, then the newer one."""
    if kind == "best":
        return max(candidates, key=lambda c: (c.accuracy, c.gap, c.step))
    if kind == "worst":
        return max(candidates, key=lambda c: (-c.accuracy, c.gap, c.step))
    return max(candidates, key=lambda c: (c.gap, c.step))


def _cut(text: str) -> str:
    """The beginning and the end of a long text; the answer stands at the end."""
    half = _MOST_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} ... {left_out:,} more characters ... {text[-half:]}"

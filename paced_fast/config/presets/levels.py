"""Tables of graded difficulty: tasks of reasoning-gym, each at several levels, as sources of rows."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

TRAIN, HELD_OUT, TAUGHT = "0.7:0.92", "0.92:1", "0:0.7"
"""Shares of the rows, by their hash, so that no prompt is in two of the splits."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the questions of a task become short prompts, and how an answer is judged."""

    keep: str
    """Regular expression: what of the question is kept."""
    template: str
    """Prompt around what is kept; it tells the task to the policy."""
    reward: str = "exact"
    """Name of the reward."""


@dataclass(frozen=True)
class Level:
    """One difficulty of a task; a slice of the tables."""

    task: str
    """Name of the task, one of reasoning-gym's."""
    name: str
    """Name of the level; the slice is `task_name`."""
    rows: int
    """Prompts to train on, about."""
    parameters: str
    """Parameters of the task, as in a source."""
    noise: float = 0.0
    """Share of wrong characters in the demonstrations of a second warm-start phase."""
    taught: bool = True
    """Whether the warm start shows demonstrations."""

    @property
    def slice(self) -> str:
        """Name of the slice."""
        return f"{self.task}_{self.name}"


@dataclass(frozen=True, kw_only=True)
class Graded:
    """Tasks and levels of a preset, from which its sources are made."""

    tasks: dict[str, Task]
    """Every task by its name."""
    levels: tuple[Level, ...]
    """Every level; its place decides its seed, so new levels come last."""
    held_out: int
    """Held-out prompts of a noisy level, about; half as many of the others, because all of them are answered often."""
    demonstrations: int
    """Rows of a level from which demonstrations are drawn."""

    @property
    def headline(self) -> tuple[str, ...]:
        """Slices that the policy knows and does not do reliably."""
        return tuple(level.slice for level in self.levels if level.noise)

    def train(self) -> tuple[str, ...]:
        """Sources to train on."""
        return self._sources(TRAIN, [(level, level.rows) for level in self.levels])

    def eval(self) -> tuple[str, ...]:
        """Sources that are held out."""
        return self._sources(
            HELD_OUT, [(level, self.held_out if level.noise else self.held_out // 2) for level in self.levels]
        )

    def taught(self, *, noisy: bool = False) -> tuple[str, ...]:
        """Sources of demonstrations, as many of every level that is taught; of wrong ones too if `noisy`."""
        low, high = map(float, TAUGHT.split(":"))
        rows = round(self.demonstrations * (high - low))
        return self._sources(TAUGHT, [(level, rows) for level in self.levels if level.taught], noisy)

    def _sources(self, share: str, wanted: list[tuple[Level, int]], noisy: bool | None = None) -> tuple[str, ...]:
        low, high = map(float, share.split(":"))
        sources: list[str] = []
        for level, rows in wanted:
            task = self.tasks[level.task]
            shown = "" if noisy is None else f"&demonstration=@answer&noise={level.noise if noisy else 0}"
            # Seeds far apart: reasoning-gym makes row i of seed s like row 0 of seed s + i.
            sources.append(
                f"rg:{level.task}?slice={level.slice}&seed={(self.levels.index(level) + 1) * 1_000_000}"
                f"&size={round(rows / (high - low))}&share={share}&{level.parameters}"
                f"&keep={quote(task.keep)}&template={task.template}&reward={task.reward}{shown}"
            )
        return tuple(sources)

"""Progress of a run as a person sees it: what is under way, how long it has taken, how much time is left.

On a terminal one live line; else plain log lines. It takes plain records and depends on nothing else in the package.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from paced_fast.evaluation.forgetting import Fall, fallen_slices, recovered_slices

logger = logging.getLogger(__name__)

_STEPS = 50
"""Newest steps whose median is the time of a step."""
_SLOW_SECONDS = 30.0
"""Time without a line after which a phase that begins gets its own, where there is no terminal."""
_PHASES = {
    "generate": "generating",
    "reward": "scoring",
    "old_logprobs": "computing log-probs",
    "update": "updating the policy",
    "sync": "handing weights to the generator",
    "parity": "checking the engine",
    "evaluate": "evaluating",
    "checkpoint": "saving",
}
"""Words for the phases of a step that can take long."""


class Progress:
    """Progress of a run: live on a terminal, else one log line every `interval_s` seconds.

    Use as a context manager and feed every metrics record to `update`. The first, the last and every evaluation record
    are always logged, so a slow run logs each step; a slice that falls below its first evaluation by more than its
    noise is a warning. `start_step` is the step a resumed run continues after, and `evaluations` are those so far. The
    time left is that of the remaining steps by the median of the last ones, and of evaluations at their pace so far.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        evaluations: Sequence[Mapping[str, object]] = (),
        console: Console | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._start_step = self._step = start_step
        self._interval_s = interval_s
        self._clock = clock
        self._step_began = clock()
        self._last_line = float("-inf")
        self._record: dict[str, object] = {}
        self._accuracies: list[float] = []
        self._first_evaluation: Mapping[str, object] | None = None
        self._fallen: frozenset[str] = frozenset()
        """Slices of which a fall was told, and that have not been back at their first evaluation since."""
        for evaluation in evaluations:
            self._evaluated(evaluation)
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._evaluating = 0.0
        """Seconds by which steps with an evaluation were longer than the median."""
        self._phase: tuple[str, float] | None = None
        self._phase_seconds: dict[str, float] = {}
        self._console = console or Console()
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Progress:
        self._step_began = self._clock()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._phase = None  # what stays on the screen is no work in progress
            self._live.stop()

    def update(self, record: Mapping[str, object]) -> None:
        """Update with a metrics record, or part of one; missing keys keep their last value.

        A key `status` shows its text until the next step ends: what a long start-up is doing, for example.
        """
        step, before = record.get("step"), self._step
        self._record = {**self._record, "status": None, **record}
        self._step = step if isinstance(step, int) else self._step
        evaluation = record.get("eval")
        falls = self._evaluated(evaluation) if isinstance(evaluation, Mapping) else []
        if falls:
            told = "; ".join(map(str, falls))
            logger.warning(
                "step %d, forgetting: %s since the first evaluation; lower --optimizer.learning-rate", self._step, told
            )
        if "status" not in record:
            self._time_step(self._step > before, evaluation is not None)
        seconds = record.get("seconds")
        if isinstance(seconds, Mapping):
            self._phase_seconds = {str(name): float(spent) for name, spent in seconds.items()}
        if self._live is not None:
            return
        due = self._clock() - self._last_line >= self._interval_s
        if due or evaluation is not None or "status" in record or self._step >= self._num_steps:
            self._last_line = self._clock()
            logger.info("%s", self.line())

    def _evaluated(self, evaluation: Mapping[str, object]) -> list[Fall]:
        """Note an evaluation; returns the slices that have fallen since the first one and are not among `_fallen`."""
        accuracy = evaluation.get("accuracy")
        if not isinstance(accuracy, float):
            return []
        self._accuracies.append(accuracy)
        if self._first_evaluation is None:
            self._first_evaluation = evaluation
            return []
        falls = fallen_slices(self._first_evaluation, evaluation)
        new = [fall for fall in falls if fall.slice not in self._fallen]
        self._fallen = (self._fallen | {fall.slice for fall in falls}) - recovered_slices(
            self._first_evaluation, evaluation
        )
        return new

    def phase(self, name: str) -> None:
        """The step under way enters a phase; in a slow step it gets a line of its own where there is no terminal."""
        if name not in _PHASES:
            return
        now = self._clock()
        self._phase = (name, now)
        if self._live is None and now - max(self._last_line, self._step_began) >= _SLOW_SECONDS:
            self._last_line = now
            so_far = duration(now - self._step_began)
            at = f"step {min(self._step + 1, self._num_steps)}/{self._num_steps}"
            logger.info("%s, %s, %s into the step", at, _PHASES[name], so_far)

    def sample(self, row: Mapping[str, object]) -> None:
        """Show one completion with its prompt, reward and estimated accuracy, cut to the width of the terminal."""
        for line in sample_lines(row, self._console.width):
            self._console.print(Text(line), no_wrap=True, crop=True, highlight=False)

    def line(self) -> str:
        """The current state as one plain line."""
        return ", ".join([f"step {self._step}/{self._num_steps}", *self._fields(), f"eta {self._eta()}"])

    def _time_step(self, is_step: bool, evaluated: bool) -> None:
        now = self._clock()
        took, self._step_began = now - self._step_began, now
        self._phase = None
        if not is_step:
            return
        if evaluated and self._durations:
            self._evaluating += max(0.0, took - statistics.median(self._durations))
        else:
            self._durations.append(took)

    def _fields(self) -> list[str]:
        show = self._record
        fields = [show["status"]] if isinstance(show.get("status"), str) else []
        if (reward := _number(show, "reward_mean")) is not None:
            fields.append(f"reward {reward:.3f}")
        if self._accuracies:
            before = f" (first {self._accuracies[0]:.3f})" if len(self._accuracies) > 1 else ""
            fields.append(f"accuracy {self._accuracies[-1]:.3f}{before}")
        brier, rank = _number(show, "value_brier"), _number(show, "value_rank_correlation")
        if brier is not None:
            fields.append(f"value brier {brier:.3f}" + (f" rank {rank:.2f}" if rank is not None else ""))
        if (mixed := _number(show, "mixed_group_share")) is not None:
            fields.append(f"mixed groups {mixed:.0%}")
        if (rate := _number(show, "tokens_per_second")) is not None:
            fields.append(f"{rate:,.0f} tokens/s")
        return [str(field) for field in fields]

    def _eta(self) -> str:
        done, left = self._step - self._start_step, max(0, self._num_steps - self._step)
        if done <= 0 or not self._durations:
            return "-:--"
        median = statistics.median(self._durations)
        spent = min(self._clock() - self._step_began, median) if left else 0.0
        return duration(left * (median + self._evaluating / done) - spent)

    def _under_way(self) -> str:
        """The phase that runs now, the time it has taken, and how long it took in the last step."""
        if self._phase is None:
            return ""
        name, since = self._phase
        usual = self._phase_seconds.get(name, 0.0)
        of = f" of about {duration(usual)}" if usual >= 1.0 else ""
        return f"{_PHASES[name]} {duration(self._clock() - since)}{of}"

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {self._step}/{self._num_steps}", style="bold"),
            ProgressBar(total=max(1, self._num_steps), completed=self._step, width=40),
            Text(f"eta {self._eta()}", style="dim"),
            Text(self._under_way(), style="dim"),
        )
        return Group(head, Text("  ".join(self._fields())))


class Waiting:
    """A wait of known length before the first step, such as a warm start: live on a terminal, else a log line about
    every `interval_s` seconds.

    Use as a context manager and call `update` often.
    """

    def __init__(
        self, console: Console | None = None, *, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock, self._interval_s = console or Console(), clock, interval_s
        self._began = self._last_line = clock()
        self._text, self._done, self._total = "", 0, 0
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, text: str, done: int, total: int) -> None:
        """`done` of `total` parts are complete; the clock starts with the first call."""
        now = self._clock()
        if not self._text:
            self._began = self._last_line = now
            if self._live is not None:
                self._live.start()
        self._text, self._done, self._total = text, done, total
        if self._live is None and (done == total or now - self._last_line >= self._interval_s):
            self._last_line = now
            logger.info("%s, %s", text, self._left())

    def _left(self) -> str:
        took, done = self._clock() - self._began, self._done
        if done >= self._total:
            return f"done after {duration(took)}"
        return f"{duration(took / done * (self._total - done))} left" if done > 0 else "time left unknown"

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, self._total), completed=self._done, width=24)
        grid.add_row(Spinner("dots"), Text(self._text, style="bold"), bar, Text(self._left(), style="dim"))
        return grid


def sample_lines(row: Mapping[str, object], width: int) -> list[str]:
    """Three lines of at most `width` cells: what the completion was worth, its prompt, and the completion.

    Characters that would move the cursor, such as control characters, are written as escapes.
    """
    reward, value = _number(row, "reward"), _number(row, "value")
    facts = ["no reward" if reward is None else f"reward {reward:g}"]
    facts += [f"estimated accuracy {value:.2f}"] if value is not None else []
    facts += [f"slice {printable(str(row['slice']))}"] if row.get("slice") else []
    head = f"sample of step {row.get('step', '?')}: {', '.join(facts)}"
    prompt = row.get("prompt")
    if isinstance(prompt, list):  # the last message is the one that is answered
        prompt = prompt[-1].get("content", "") if prompt and isinstance(prompt[-1], Mapping) else ""
    texts = {"prompt": prompt, "completion": row.get("completion")}
    lines = [f"  {name:<10}  {printable('' if text is None else str(text))}" for name, text in texts.items()]
    return [cut_middle(line, width) for line in (head, *lines)]


def printable(text: str) -> str:
    """The text on one line: what cannot be printed as it is, line ends among them, becomes an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def cut_middle(text: str, width: int) -> str:
    """The text in at most `width` cells of a terminal: its beginning and its end, where an answer stands."""
    if cell_len(text) <= width:
        return text
    dots = " ... "
    front = max(0, (width - len(dots)) * 2 // 3)
    back, room = "", max(0, width - len(dots) - front)
    for char in reversed(text[-room:] if room else ""):
        if cell_len(char + back) > room:
            break
        back = char + back
    return set_cell_size((set_cell_size(text, front) + dots + back), width)


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _number(record: Mapping[str, object], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and value == value else None

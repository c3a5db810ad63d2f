"""What the functions of `paced_fast.api` return: a run, an evaluation, a comparison.

Everything is read from the run folder when it is asked for, so a result can be made of any run folder, and of a run
that is still going.
"""

from __future__ import annotations

import functools
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paced_fast.api.tables import table
from paced_fast.errors import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paced_fast.config import Config

Messages = Sequence[Mapping[str, str]]


METRICS = (
    *("step", "rollouts", "reward_mean", "eval.accuracy", "loss", "mixed_group_share", "truncated_share"),
    *("grad_norm", "value_rank_correlation", "mean_length", "entropy", "learning_rate", "train_seconds"),
)
"""Columns of the table of metrics that are shown where not all have room, as `main` of `tables.table`."""
_ROLLOUTS = ("step", "prompt", "completion", "answer", "reward", "value", "slice")
_EVALUATED = ("slice", "prompts", "accuracy", "accuracy_interval", "pass_at_8", "truncated_share", "tokens_mean")


_WIDTH = 100
"""Characters of a line of the tables of an evaluation, as in the output of the command."""


def run_path(run: str | Path | Result) -> Path:
    """Return the folder of a run."""
    return run.folder if isinstance(run, Result) else Path(run).expanduser()


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart as PNG, which a notebook shows."""

    png: bytes = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the picture and return its path."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def _repr_png_(self) -> bytes:
        return self.png


class Result:
    """A run: its figures, charts, sample rollouts and policy."""

    def __init__(
        self,
        folder: str | Path,
        *,
        stopped: str = "",
        reward: str | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        """Read the run in `folder`; `functions` are rewards in memory by the names that its sources have for them."""
        self.folder = Path(folder)
        self.stopped = stopped
        """Why the run ended early and how to go on; empty for a run that reached its last step."""
        self.reward = reward
        """Name of the reward that `train` was given; None: each source says its own."""
        self.functions = dict(functions or {})

    @property
    def metrics(self) -> Any:
        """The table of metrics, one row per step: columns with dots are figures of a part, such as `eval.accuracy`.

        A pandas.DataFrame where pandas is installed, else a list of dictionaries. Lists of figures are left out.
        Printed are the main columns that have room; all of them are in the table.
        """
        from paced_fast.report.read_run import flatten, read_run

        rows = [flatten(record) for record in read_run(self.folder).records]
        return table([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows], METRICS)

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of the run as a whole; those so far if it has not ended."""
        from paced_fast.config.saved import load_config
        from paced_fast.run.record.summary import summarise

        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else summarise(self.folder, load_config(self.folder))

    @property
    def rollouts(self) -> Any:
        """The sample rollouts of the run, as a table: step, prompt, completion, reward, value."""
        from paced_fast.report.read_run import read_run

        return table(read_run(self.folder).rollouts, _ROLLOUTS)

    @property
    def config(self) -> Config:
        """The settings of the run."""
        from paced_fast.config.saved import load_config

        return load_config(self.folder)

    def plot(self, name: str | None = None) -> Picture:
        """Draw charts of the report as one picture.

        Args:
            name: learning_curve, train_reward, calibration, value_quality, value_histogram, mixed_groups, health,
                replay_priorities or seconds_by_phase; None: the learning curve on held-out prompts, or the reward in
                training where there are none.

        Raises:
            InputError: there is no such picture, or the run has no figures for it.
        """
        from paced_fast.report.picture import picture
        from paced_fast.report.read_run import read_run

        name = name or ("learning_curve" if read_run(self.folder).evaluations else "train_reward")
        return Picture(picture(self.folder, name))

    def report(self) -> Path:
        """Write report.html in the run folder, and return its path."""
        from paced_fast.report import make_report

        return make_report(self.folder)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The policy as it was last saved, read from the run folder when it is first asked for."""
        from paced_fast.api.policy import load_policy

        return load_policy(self.folder)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the policy."""
        from paced_fast.api.policy import load_tokenizer

        return load_tokenizer(self.folder)

    def generate(
        self,
        prompt: str | Messages | Sequence[str],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_completion_tokens: int | None = None,
        seed: int = 0,
    ) -> Any:
        """Let the trained policy answer, in the template in which it was trained.

        Args:
            prompt: a text, a chat as a list of messages, or a list of texts.
            samples: completions per prompt.
            temperature: divides the logits; 0 takes the likeliest token.
            max_completion_tokens: length at which a completion is cut; None: that of the run.
            seed: the same seed and weights give the same text.

        Returns:
            The completion of a single prompt; a list of them for `samples` above 1; a list of those for a list of
            texts.
        """
        from paced_fast.api.policy import complete
        from paced_fast.generation.interface import Sampling

        sampling = Sampling(
            samples=samples,
            max_completion_tokens=max_completion_tokens or self.config.generation.max_completion_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return complete(self.model, self.tokenizer, self.config, prompt, sampling)

    def export(self, folder: str | Path, *, dtype: str = "auto") -> Path:
        """Write the policy as a folder that transformers, vLLM and others load, and return its path.

        Args:
            dtype: data type of the weights, bfloat16 or float32; auto: the most exact that the run has, which is
                float32 for weights that were trained.

        Raises:
            InputError: the folder holds something already, or cannot be written.
        """
        from paced_fast.api.run import export_run

        return export_run(self.folder, folder, dtype)

    def __repr__(self) -> str:
        """Say in a few lines what came out."""
        try:
            summary = self.summary
        except (OSError, ValueError, LookupError):
            return f"Result({str(self.folder)!r}), no figures yet"
        done = f"{counted(summary['steps'], 'step')}, {counted(summary['rollouts'], 'rollout')}"
        lines = [f"Result({str(self.folder)!r}): {done}"]
        before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
        if before is not None and after is not None:
            lines.append(f"held-out accuracy {before:.3f} -> {after:.3f}")
        if self.stopped:
            lines.append(self.stopped)
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation: figures with their intervals, overall and by slice, and every completion; it prints its tables."""

    figures: dict[str, Any]
    """Everything that the command writes with --json."""
    samples: Any = field(repr=False)
    """The completions with their rewards, as a table."""

    @property
    def accuracy(self) -> float | None:
        """Mean over prompts of the share of right completions; None if nothing was scored."""
        return self.figures["accuracy"]

    @property
    def table(self) -> Any:
        """The main figures by slice, as a table."""
        rows = {"all": self.figures, **self.figures.get("slices", {})}
        names = (*_EVALUATED[1:], "unscored")
        return table(
            [{"slice": name, **{key: row.get(key) for key in names}} for name, row in rows.items()], _EVALUATED
        )

    def __repr__(self) -> str:
        """Say the accuracy and its interval, then the tables that the command prints."""
        accuracy, interval = self.figures["accuracy"], self.figures.get("accuracy_interval")
        shown = "nothing was scored" if accuracy is None else f"accuracy {accuracy:.3f}"
        limits = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        first = f"Evaluated({self.figures['model']!r}): {shown}{limits}, {counted(self.figures['prompts'], 'prompt')}"
        return "\n".join([first, *_tables(self.figures)])


def _tables(figures: Mapping[str, Any]) -> list[str]:
    """The tables of the command as lines without trailing blanks."""
    from rich.console import Console

    from paced_fast.run.record.terminal import evaluation_tables

    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_jupyter=False)
    with console.capture() as shown:
        for one in evaluation_tables(figures):
            console.print(one)
    return [line.rstrip() for line in shown.get().rstrip().splitlines()]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of runs."""

    page: Path
    """The page with their curves laid over each other."""
    table: Any
    """Their summaries, one row per run."""

    def __repr__(self) -> str:
        """Give the page and every figure, one line each, with a column per run."""
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([f"Comparison of {len(lines[0]) - 1} runs, {self.page}", *(line.rstrip() for line in shown)])

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell in line] for line in self._lines()]
        rows = "".join(
            f"<tr><th>{line[0]}</th>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>" for line in body
        )
        titles = "".join(f"<th>{cell}</th>" for cell in head)
        page = html.escape(str(_from_here(self.page)))
        return f'<p>Curves: <a href="{page}">{page}</a></p><table><tr>{titles}</tr>{rows}</table>'

    def _lines(self) -> list[list[str]]:
        """Figures by run, as text; the first line has the folders."""
        rows = self.table if isinstance(self.table, list) else self.table.to_dict("records")
        return [
            [name, *(_figure(row.get(name)) for row in rows)] for name in dict.fromkeys(k for row in rows for k in row)
        ]


def _from_here(path: Path) -> Path:
    """The path from the working directory, which links of a notebook begin at; one outside of it as it is."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _figure(value: Any) -> str:
    """A figure with four digits; a dash for one that a run does not have."""
    if value is None or value != value:  # a frame has NaN there
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

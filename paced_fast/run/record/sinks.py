"""The loggers that a run can mirror its figures to: wandb, TensorBoard, trackio and MLflow, behind one interface.

Each is opened for a run folder, where it keeps the id with which a resumed run goes on with the same run there.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a logger is told of a run."""

    folder: Path
    config: Any = None
    """Settings by dotted name, in JSON's own types."""
    project: str = "paced_fast"
    group: str | None = None
    tags: Sequence[str] = ()


class Sink(Protocol):
    """An open logger. Every method may raise what its package raises; `loggers.Logger` handles it."""

    def log(self, figures: Mapping[str, float], histograms: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the figures of a step, and histograms as counts in bins of equal width from 0 to 1."""
        ...

    def table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """Log rows of one kind; the keys of the first are the columns."""
        ...

    def artifact(self, path: Path, kind: str) -> None:
        """Keep a file with the run, where the logger can."""
        ...

    def close(self) -> None:
        """Finish the run."""
        ...


class _OwnTypes:
    """Figures, histograms and tables for a module that has classes of its own for the last two."""

    _module: Any
    _run: Any

    def log(self, figures: Mapping[str, float], histograms: Mapping[str, Sequence[float]], step: int) -> None:
        """See `Sink.log`."""
        drawn = {
            name: self._module.Histogram(np_histogram=(list(counts), _edges(counts)))
            for name, counts in histograms.items()
        }
        self._run.log({**figures, **drawn}, step=step)

    def table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """See `Sink.table`."""
        columns = list(rows[0])
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        self._run.log({name: self._module.Table(columns=columns, data=data)}, step=step)


class Wandb(_OwnTypes):
    """A wandb run; group, tags and the id of a resumed run are given where this version takes them."""

    def __init__(self, module: Any, info: RunInfo) -> None:
        self._module = module
        known = run_id(info.folder, "wandb")
        more: dict[str, Any] = {"group": info.group, "tags": list(info.tags)}
        if known is not None and not _takes(module.init, "resume"):
            logger.warning("this version of wandb cannot resume a run: metrics go to a new wandb run")
            known = None
        if known is not None:
            more |= {"id": known, "resume": "allow"}
        more = {name: value for name, value in more.items() if value and _takes(module.init, name)}
        folder = info.folder
        self._run = module.init(project=info.project, name=folder.name, dir=str(folder), config=info.config, **more)
        if known is None:
            remember(folder, "wandb", str(getattr(self._run, "id", "")))

    def artifact(self, path: Path, kind: str) -> None:
        """See `Sink.artifact`."""
        made = self._module.Artifact(f"{kind}-{self._run.id}", type=kind)
        made.add_file(str(path))
        self._run.log_artifact(made)

    def close(self) -> None:
        """See `Sink.close`."""
        self._run.finish()


class Tensorboard:
    """Event files in the run folder; a resumed run goes on in the same place. It keeps no files, and its projects are
    folders."""

    def __init__(self, module: Any, info: RunInfo) -> None:
        self._writer = module.SummaryWriter(str(info.folder / "tensorboard"))

    def log(self, figures: Mapping[str, float], histograms: Mapping[str, Sequence[float]], step: int) -> None:
        """See `Sink.log`."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)
        for name, counts in histograms.items():
            edges, total = _edges(counts), sum(counts)
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            self._writer.add_histogram_raw(
                name,
                min=0.0,
                max=1.0,
                num=total,
                sum=sum(count * at for count, at in zip(counts, middles, strict=True)),
                sum_squares=sum(count * at * at for count, at in zip(counts, middles, strict=True)),
                bucket_limits=edges[1:],
                bucket_counts=list(counts),
                global_step=step,
            )

    def table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """See `Sink.table`: a table of Markdown."""
        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns), *([_markdown(row.get(column)) for column in columns] for row in rows)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def artifact(self, path: Path, kind: str) -> None:
        """See `Sink.artifact`: TensorBoard keeps none, and report.html lies beside its folder."""

    def close(self) -> None:
        """See `Sink.close`."""
        self._writer.close()


class Trackio(_OwnTypes):
    """A trackio run. Its runs are continued by name, so the name gets a suffix that no other folder has."""

    def __init__(self, module: Any, info: RunInfo) -> None:
        self._module = module
        known = run_id(info.folder, "trackio")
        name = known or f"{info.folder.name}-{uuid.uuid4().hex[:6]}"
        config = {**(info.config or {}), **({"tags": list(info.tags)} if info.tags else {})}
        more = {"group": info.group, "resume": "allow" if known else "never"}
        more = {key: value for key, value in more.items() if value and _takes(module.init, key)}
        self._run = module.init(project=info.project, name=name, config=config, **more)
        if known is None:
            remember(info.folder, "trackio", name)

    def artifact(self, path: Path, kind: str) -> None:
        """See `Sink.artifact`; versions before 0.30 keep none."""
        keep = getattr(self._run, "log_artifact", None)
        if keep is not None:
            keep(str(path), name=kind, type=kind)

    def close(self) -> None:
        """See `Sink.close`."""
        self._run.finish()


_MLFLOW_PARAMETERS = 100
"""Most parameters that one call takes."""


class Mlflow:
    """An MLflow run in the experiment named like the project. It has no histograms; completions are files of JSON."""

    def __init__(self, module: Any, info: RunInfo) -> None:
        self._client, self._entities = module.MlflowClient(), module.entities
        self._id = run_id(info.folder, "mlflow")
        if self._id is not None:
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(info.project)
        experiment = self._client.create_experiment(info.project) if found is None else found.experiment_id
        tags = {f"tag.{tag}": "true" for tag in info.tags} | ({"group": info.group} if info.group else {})
        self._id = self._client.create_run(experiment, tags=tags, run_name=info.folder.name).info.run_id
        remember(info.folder, "mlflow", self._id)
        settings = [self._entities.Param(_mlflow_name(k), str(v)[:500]) for k, v in (info.config or {}).items()]
        for start in range(0, len(settings), _MLFLOW_PARAMETERS):
            self._client.log_batch(self._id, params=settings[start : start + _MLFLOW_PARAMETERS])

    def log(self, figures: Mapping[str, float], histograms: Mapping[str, Sequence[float]], step: int) -> None:
        """See `Sink.log`."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_mlflow_name(key), value, now, step) for key, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """See `Sink.table`."""
        self._client.log_dict(self._id, {"rows": [dict(row) for row in rows]}, f"{name}/step_{step:06d}.json")

    def artifact(self, path: Path, kind: str) -> None:
        """See `Sink.artifact`."""
        self._client.log_artifact(self._id, str(path))

    def close(self) -> None:
        """See `Sink.close`."""
        self._client.set_terminated(self._id)


@dataclass(frozen=True, slots=True)
class Kind:
    """A logger by name: the module to import, and what opens it."""

    module: str
    open: Callable[[Any, RunInfo], Sink]


KINDS: dict[str, Kind] = {
    "wandb": Kind("wandb", Wandb),
    "tensorboard": Kind("torch.utils.tensorboard", Tensorboard),
    "trackio": Kind("trackio", Trackio),
    "mlflow": Kind("mlflow", Mlflow),
}
"""Every logger, by the name in `--run.loggers`."""

ID_FILES = ("wandb.json", "trackio.json", "mlflow.json")
"""Files of a run folder with the id of its run at each logger."""


def run_id(folder: Path, name: str) -> str | None:
    """Id with which the logger continues the run of `folder`; None for a new one, or if the file cannot be read."""
    try:
        return str(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def remember(folder: Path, name: str, known: str) -> None:
    """Keep the id of the run at a logger; an empty one is none."""
    path = folder / f"{name}.json"
    try:
        path.write_text(json.dumps({"id": known}) if known else "{}")
    except OSError as error:
        logger.warning("%s cannot be written (%s): after a resume, metrics go to a new %s run", path, error, name)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not to be read: then it is asked
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _edges(counts: Sequence[float]) -> list[float]:
    return [i / len(counts) for i in range(len(counts) + 1)]


def _cell(value: object) -> object:
    """A cell of a table: numbers and None as they are, anything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _markdown(value: object) -> str:
    text = "" if value is None else str(_cell(value))
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.replace(old, new)
    return text


def _mlflow_name(name: str) -> str:
    """Name of a metric or parameter with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)[:250]

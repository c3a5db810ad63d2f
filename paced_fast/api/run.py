"""Runs, evaluations and exports that Python asks for, by the functions behind the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from paced_fast.api import given
from paced_fast.api.process import as_found
from paced_fast.api.result import Evaluated, Result
from paced_fast.api.settings import base, foreign_option, in_python, with_settings
from paced_fast.api.tables import table
from paced_fast.config import Config
from paced_fast.config.given import FOLDER, MODEL
from paced_fast.config.saved import load_config
from paced_fast.errors import InputError, StopRequested, TrainingError, nearest
from paced_fast.evaluate import EvaluateArguments, evaluate_target
from paced_fast.evaluation.held_out import Sample
from paced_fast.export import ExportArguments, export
from paced_fast.run.record import terminal
from paced_fast.run.record.summary import summarise
from paced_fast.run.start.run_folder import LOCK_NAME, OWN_NAMES
from paced_fast.train import loop as training

logger = logging.getLogger(__name__)

_OF_THE_COMMAND = {"run_or_model", "benchmarks", "data", "reward", "json", "save_samples"}
"""Options of the command that are arguments of `evaluate`, or files in place of what it returns."""
_SAMPLES = ("slice", "prompt", "completion", "reward", "answer", "tokens")
"""Columns of the completions of an evaluation that are shown where not all have room, the most important first."""
_ARGUMENTS = {"data.train": "data", "data.eval": "eval_data", "model.name": "model", "resume": "resume=True"}
_ARGUMENTS["reward.name"] = "reward"
"""Settings that are arguments of `train`."""


@contextlib.contextmanager
def _told_in_python() -> Iterator[list[Path]]:
    """Tell wrong input, and why a run stopped, in the words of `train`, without the calls that led to it.

    The list takes the folders that rows were written into, which messages do not name.
    """
    folders: list[Path] = []
    try:
        yield folders
    except InputError as error:
        raise InputError(_in_words(str(error), folders)) from None
    except TrainingError as error:
        raise TrainingError(_in_words(str(error), folders)) from None


def _in_words(told: str, folders: Sequence[Path]) -> str:
    """A message or a line of progress in the words of Python."""
    for folder in folders:
        told = given.in_rows(told, folder)
    return in_python(told)


def train_given(
    model: Any,
    data: Any,
    *,
    reward: Any,
    eval_data: Any,
    tokenizer: Any,
    run_dir: str | Path | None,
    resume: bool,
    progress: bool,
    settings: Mapping[str, Any],
) -> Result:
    """Train; see `paced_fast.api.train`."""
    with (
        _told_in_python() as written,
        as_found(progress=progress, words=lambda text: _in_words(text, written)) as console,
    ):
        config = _configured(settings, model, resume=resume)
        name, functions = given.reward_of(reward)
        summary: dict[str, Any] = {}
        stopped = ""
        with _folder(config, run_dir, resume=resume) as folder:
            written.append(folder / FOLDER)
            config = _with_data(config, data, eval_data, name, folder)
            config = _with_model(config, model, tokenizer, folder)
            try:
                summary = training.run(config, console, functions=functions, is_interactive=True)
            except StopRequested as stop:
                stopped = _stopped(folder) or str(stop)
            finally:
                given.drop_weights(folder / FOLDER / MODEL)
            if stopped and not (folder / "metrics.jsonl").is_file():
                raise KeyboardInterrupt(stopped)
        if stopped:
            logger.warning("%s", stopped)
        elif summary:
            console.print(terminal.final_table(summary, run_dir=str(folder), held_out="eval_data=ROWS"))
    return Result(folder, stopped=stopped, reward=name, functions=functions)


def _configured(settings: Mapping[str, Any], model: Any, *, resume: bool) -> Config:
    """The settings of a run, without its data and its folder."""
    for name, argument in _ARGUMENTS.items():
        if name in settings:
            raise InputError(f"the setting {name!r} is an argument of train: give {argument}")
    others = dict(settings)
    config = with_settings(base(others.pop("preset", None)), others)
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
    return dataclasses.replace(config, resume="auto") if resume else config


@contextlib.contextmanager
def _folder(config: Config, run_dir: str | Path | None, *, resume: bool) -> Iterator[Path]:
    """The folder of the run, which is there from now on; removed again if the run does not get as far as to use it."""
    if resume and run_dir is None:
        raise InputError('resume=True continues a run: give its folder, as in run_dir="runs/first"')
    folder = _free(config) if run_dir is None else Path(run_dir).expanduser()
    if not resume and not config.run.overwrite and (found := _taken(folder)):
        raise InputError(
            f"run_dir {folder} already holds a run (it has {found[0]}): resume=True continues it, "
            "{'run.overwrite': True} replaces it, another run_dir keeps both"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir {folder} cannot be created ({error.strerror}): give another folder") from error
    try:
        yield folder
    finally:
        if not _taken(folder):
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            (folder / LOCK_NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty: there was something before
                folder.rmdir()


def _stopped(folder: Path) -> str:
    """How far a run got that was interrupted, and how it goes on; empty for one that has not begun."""
    if not (folder / "metrics.jsonl").is_file():
        return ""
    step = summarise(folder, load_config(folder))["steps"]
    return f"interrupted after step {step}: train(..., run_dir={str(folder)!r}, resume=True) continues"


def _taken(folder: Path) -> list[str]:
    return [name for name in OWN_NAMES if (folder / name).exists()]


def _free(config: Config) -> Path:
    """Make and return a new folder, named after the model, the algorithm and the seed."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model.name).name).strip(".-") or "model"
    base_name, number = f"{model}-{config.algorithm}-{config.seed}", 1
    while True:
        folder = Path("runs", base_name if number == 1 else f"{base_name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(
                f'{folder} cannot be created ({error.strerror}): give another folder, as in run_dir="FOLDER"'
            ) from error


def _with_data(config: Config, data: Any, eval_data: Any, reward: str | None, folder: Path) -> Config:
    """The settings with the data, of which rows in memory are written into the run folder."""
    place = folder / FOLDER
    sources = given.sources_of("data", data, reward, place)
    held_out = () if eval_data is None else given.sources_of("eval_data", eval_data, reward, place)
    of_rewards = config.reward if reward is None else dataclasses.replace(config.reward, name=reward)
    data_settings = dataclasses.replace(config.data, train=sources, eval=held_out)
    return dataclasses.replace(config, run_dir=str(folder), data=data_settings, reward=of_rewards)


def _with_model(config: Config, model: Any, tokenizer: Any, folder: Path) -> Config:
    """The settings with the model, of which an object is written into the run folder."""
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise InputError("tokenizer= is for a model object, and a model's name brings its own: leave it out")
        path = str(Path(model).expanduser()) if isinstance(model, Path) else model
    else:
        place = folder / FOLDER / MODEL
        if not (config.resume == "auto" and _taken(folder)):  # else its weights are those of the checkpoint
            given.save_given_model(model, tokenizer, place)
        path = str(place.absolute())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=path))


def evaluate_given(
    model: Any,
    data: Any,
    *,
    reward: Any,
    tokenizer: Any,
    benchmarks: Sequence[str],
    progress: bool,
    options: Mapping[str, Any],
) -> Evaluated:
    """Evaluate; see `paced_fast.api.evaluate`."""
    known = {item.name for item in dataclasses.fields(EvaluateArguments)} - _OF_THE_COMMAND
    if wrong := [f"{name!r}{_nearest_option(name, known)}" for name in options if name not in known]:
        raise InputError(f"evaluate has no option {', '.join(wrong)}: the options are {', '.join(sorted(known))}")
    name, functions = given.reward_of(reward)
    if isinstance(model, Result):
        functions = {**model.functions, **functions}
        name = name or model.reward
    with (
        _told_in_python() as written,
        as_found(progress=progress, words=lambda text: _in_words(text, written)),
        tempfile.TemporaryDirectory(prefix="paced_fast-") as place,
    ):
        written.append(Path(place))
        if isinstance(model, str | Path | Result):
            target = str(model.folder if isinstance(model, Result) else model)
        else:
            given.save_given_model(model, tokenizer, Path(place, "model"))
            target = str(Path(place, "model"))
        sources = () if data is None else given.sources_of("data", data, name, Path(place))
        samples: list[Sample] = []
        fields: dict[str, Any] = {key: str(it) if isinstance(it, Path) else it for key, it in options.items()}
        arguments = EvaluateArguments(
            run_or_model=target, benchmarks=tuple(benchmarks), data=sources, reward=name, **fields
        )
        figures = evaluate_target(arguments, samples.extend, functions=functions)
    return Evaluated(figures=figures, samples=table([_row(sample) for sample in samples], _SAMPLES))


def _nearest_option(name: str, known: set[str]) -> str:
    """Option of `evaluate` that stands for another trainer's, else the nearest one."""
    foreign = foreign_option(name)
    names = [in_python(option).rpartition(".")[2] for option in foreign.options] if foreign is not None else []
    same = next((option for option in names if option in known), None)
    return nearest(name, sorted(known)) if same is None else f" (did you mean {same!r}?)"


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "slice": sample.row.slice,
        "prompt": sample.row.prompt,
        "completion": sample.text,
        "reward": sample.reward,
        "answer": sample.vote,
        "tokens": sample.tokens,
        "stopped": sample.stopped,
    }


def export_run(run: Path, folder: str | Path, dtype: str) -> Path:
    """Export; see `Result.export`."""
    if dtype not in ("auto", "bfloat16", "float32"):
        raise InputError(f"dtype is {dtype!r}: give auto, bfloat16 or float32")
    kind = cast(Literal["auto", "bfloat16", "float32"], dtype)
    with _told_in_python(), as_found(progress=False, words=in_python):
        return export(ExportArguments(run_or_checkpoint=str(run), folder=str(folder), dtype=kind))

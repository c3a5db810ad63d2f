"""Arguments of an evaluation, and what is wrong with them before anything is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from paced_fast.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArguments:
    """Evaluate a run's checkpoint, or any model, on benchmarks or other sources of prompts."""

    run_or_model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Run folder written by `python -m paced_fast.train`, or a model: a Hugging Face folder or hub id, or `smollm2`."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks by name, separated by commas or spaces: gsm8k, math500, aime24, aime25, amc23."""
    sources: tuple[str, ...] = ()
    """Sources of prompts, as in `--data.eval`; default, without benchmarks: the held-out prompts of the run."""
    samples: int = 16
    """Completions per prompt."""
    temperature: float | None = None
    """Sampling temperature; 0: always the likeliest token; default: that of the run's evaluations, or 1 for a model."""
    top_p: float | None = None
    """Share of the probability mass to sample from, likeliest tokens first; default: that of the run's evaluations, or
    1 for a model."""
    max_completion_tokens: int | None = None
    """Maximum length of a completion, in tokens; default: that of the run's evaluations, or 1024 for a model."""
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt, in tokens; default: the run's limit for the run's own prompts, otherwise as many as
    fit into the model."""
    template: str | None = None
    """Text that the model reads for a prompt: a text with {prompt} in it, `plain` (the prompt alone), or `chat`;
    default: that of the run; for a model, `chat` if it has a chat template, otherwise `plain`."""
    system_prompt: str | None = None
    """System message added to every chat without one; default: that of the run."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template, each `name=value` or a JSON object; default: those of the run."""
    date: str | None = None
    """Today's date for the chat template, as YYYY-MM-DD; default: that of the run, or today for a model."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, by text or id; `auto`: those that the model declares; default: those of the run, or
    `auto` for a model."""
    keep_special_tokens: tuple[str, ...] = ()
    """Special tokens that stay in the text that rewards read, as in `--data.keep-special-tokens`; default: those of the
    run, or `tags` for a model."""
    limit: int | None = None
    """Maximum number of prompts per slice, chosen by the seed; default: all."""
    seed: int = 0
    """Seed of the completions and of the choice of prompts."""
    step: int | None = None
    """Step of the run's checkpoint to evaluate; 0: the policy before training; default: the newest checkpoint."""
    device: Literal["cpu", "cuda"] | None = None
    """Device of the model; default: that of the run; for a model, a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the weights; default: that of the run; for a model, bfloat16 on a GPU and float32 on a CPU."""
    max_batch_sequences: int | None = None
    """Maximum number of sequences decoded at once; default: that of the run, or 256 for a model."""
    data_dir: str | None = None
    """Folder in which files are looked up first; default: that of the run, or the working directory, then `data`, then
    the folders in PACED_FAST_DATA."""
    json: str | None = None
    """File to which the figures are written, as one JSON object; `-`: standard output, and everything else goes to
    standard error; default: none."""
    save_samples: str | None = None
    """File to which every completion is written with its reward, one JSON object per line; default: none."""


def check(arguments: EvaluateArguments) -> None:
    """Raises InputError for the first number that is out of range, and for a file that has no folder to be in."""
    for name, low, high in (
        *(("samples", 1, None), ("temperature", 0.0, 100.0), ("top_p", 1e-6, 1.0), ("max_completion_tokens", 1, None)),
        *(("max_prompt_tokens", 1, None), ("limit", 1, None), ("seed", 0, None), ("step", 0, None)),
        ("max_batch_sequences", 1, None),
    ):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= (value if high is None else high):
            bounds = f"{low:g} or more" if high is None else f"a value from {low:g} to {high:g}"
            raise InputError(f"--{name.replace('_', '-')} is {value}: give {bounds}")
    for name in ("json", "save_samples"):
        path = getattr(arguments, name)
        if path is not None and (name, path) != ("json", "-"):
            _check_file(f"--{name.replace('_', '-')} {path}", Path(path).absolute())


def _check_file(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{option}: no such folder {path.parent}: create it, or give another place")
    if path.is_dir():
        raise InputError(f"{option} is a folder: give the name of a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} is not a regular file: give another name")
    try:  # permissions are not enough: file systems can be read-only, and root passes every check
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise InputError(f"{option} cannot be written ({error.strerror}): give another place") from error

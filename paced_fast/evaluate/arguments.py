"""Arguments of an evaluation, and what is wrong with them before anything is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paced_fast.config.command import Command
from paced_fast.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArguments:
    """Evaluate a run's checkpoint, or any model, on benchmarks or other sources of prompts."""

    run_or_model: str
    """Folder of a run, folder of a model, hub id of a model, or `smollm2` (SmolLM2-135M from a package)."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks by name, separated by commas or spaces: gsm8k, math500, aime24, aime25, amc23. They are read from
    files, or else from the hub; `paced-fast list benchmarks` names both."""
    data: tuple[str, ...] = ()
    """Prompts of your own: files (.jsonl, .json, .csv, .parquet), folders or data sets of the hub, in the same form as
    for `train --data`. Default, without benchmarks: the held-out prompts of the run."""
    reward: str | None = None
    """Reward of the data whose source names none by `reward=`: a built-in one (math, exact, number, ...), or your
    function as file.py:function. Default: that of the run; for a model, by the format of the rows."""
    samples: int = 16
    """Number of completions per prompt."""
    temperature: float | None = None
    """Sampling temperature; 0 takes the likeliest token every time. Default: that of the run's evaluations; for a
    model, 1."""
    top_p: float | None = None
    """Sample from the likeliest tokens only, as many as have this probability together. Default: that of the run's
    evaluations; for a model, 1, which is all tokens."""
    max_completion_tokens: int | None = None
    """Maximum length of a completion, in tokens. Default: that of the run's evaluations; for a model, 1024."""
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt, in tokens; a longer one is an error. Default: what the model has room for, but for
    the run's own held-out prompts its limit."""
    template: str | None = None
    """Text that the model reads for a prompt: `chat` (the chat template of the tokenizer), `plain` (the prompt alone),
    or a text with {prompt} in it. Default: that of the run; for a model, `chat` if it has a chat template, otherwise
    `plain`."""
    system_prompt: str | None = None
    """System message that is added to every chat without one. Default: that of the run; for a model, none."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template, each `name=value` or a JSON object. Default: those of the run; for a model,
    none."""
    date: str | None = None
    """Today's date for the chat template, as YYYY-MM-DD. Default: that of the run; for a model, today."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, by text or id; `auto` stands for those that the model declares. Default: those of
    the run; for a model, `auto`."""
    keep_special_tokens: tuple[str, ...] = ()
    """Special tokens that stay in the text that is judged: `tags` (tokens of an answer, such as <think>, but not those
    that frame a chat), `all`, `none`, or single tokens by their text. Default: those of the run; for a model,
    `tags`."""
    limit: int | None = None
    """Number of prompts to take from each slice, chosen by the seed. Default: all."""
    seed: int = 0
    """Seed of the completions and of the choice of prompts."""
    step: int | None = None
    """Checkpoint of the run, by its step; 0 is the policy before training. Default: the newest one."""
    device: Literal["cpu", "cuda"] | None = None
    """Device of the model. Default: that of the run; for a model, a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the weights. Default: that of the run; for a model, bfloat16 on a GPU and float32 on a CPU."""
    max_batch_sequences: int | None = None
    """Number of sequences that are decoded at once; fewer take less memory. Default: that of the run; for a model,
    256."""
    data_dir: str | None = None
    """Folder in which files are looked up first, before the working directory. Default: that of the run; for a model,
    none: the working directory, then its folder `data`, then the folders in PACED_FAST_DATA."""
    json: str | None = None
    """Write the figures to this file, as one JSON object; `-` prints them, and the tables go to standard error."""
    save_samples: str | None = None
    """Write every completion with its reward to this file, one JSON object per line."""


COMMAND = Command(
    name="evaluate",
    purpose="Measure how often a run's policy, or any model, answers right: on the run's held-out prompts, on prompts "
    "of your own, or on benchmarks.",
    words={"run_or_model": "RUN_OR_MODEL"},
    examples={
        "paced-fast evaluate runs/first --samples 8": "a run, on the held-out prompts that it was given in training",
        "paced-fast evaluate runs/first --step 0": "the same policy before it was trained",
        "paced-fast evaluate runs/first --data test.jsonl": "a run on other prompts, with the reward of its training",
        "paced-fast evaluate exported --data test.jsonl --reward reward.py:last_number": "a model's folder",
        "paced-fast evaluate smollm2 --benchmarks gsm8k --limit 20 --samples 4": "20 prompts of a benchmark",
    },
    metavars={"benchmarks": "NAME", "data": "SOURCE", "reward": "REWARD", "date": "DATE", "data_dir": "FOLDER"}
    | dict.fromkeys(("json", "save_samples"), "FILE"),
    synonyms=dict.fromkeys(("sources", "eval-data", "dataset", "test-file"), "data")
    | dict.fromkeys(("tasks", "task", "benchmark"), "benchmarks")
    | dict.fromkeys(("model", "run", "run-dir", "pretrained", "checkpoint-path"), "run_or_model")
    | dict.fromkeys(("output", "out", "output-path", "output-file", "run-name"), "json")
    | dict.fromkeys(("batch-size", "micro-batch-tokens", "max-num-seqs"), "max_batch_sequences")
    | {"checkpoint": "step", "log-samples": "save_samples", "n": "samples", "group-size": "samples"},
)


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

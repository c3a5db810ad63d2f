"""The help that fits on a page: how to begin, the presets, and the settings that most users change."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

from paced_fast.config import Config, flatten
from paced_fast.config.bounds import settings
from paced_fast.config.files import SHORT
from paced_fast.config.modes import HELP
from paced_fast.config.presets import BASES

MOST_USED = (
    *("model.name", "data.train", "data.eval", "reward.name", "algorithm", "steps", "seed", "run_dir", "resume"),
    *("generation.prompts_per_step", "generation.group_size", "generation.max_completion_tokens"),
    *("generation.temperature", "data.max_prompt_tokens", "data.template", "data.system_prompt", "data.template_args"),
    *("optimizer.learning_rate", "optimizer.minibatches", "optimizer.micro_batch_tokens", "loss.beta"),
    *("scheduler.tau", "lora.rank", "model.device", "model.dtype", "model.gradient_checkpointing", "generator"),
    *("evaluation.every", "evaluation.samples", "run.checkpoint_every", "run.loggers"),
)
"""Settings in the short help."""

_WIDTH = 100
_OPTIONS = {full: f"--{name.replace('_', '-')}" for name, full in SHORT.items()}


def text(default: Config, prog: str) -> str:
    """The short help, with the values of `default` for what is not given."""
    flat = flatten(default)
    lines = [
        f"usage: {prog} --model NAME --data FILE [--reward REWARD] [--eval-data FILE] [--option value ...]",
        f"       {prog} [PRESET] [--option value ...]",
        f"       {prog} --resume {_METAVARS['resume']}",
        "",
        "Post-train a language model by PACED-RL.",
        "",
        "Presets (default: tiny, or own with --model):",
        *_entries({name: first_line(make) for name, make in BASES.items()}),
        "",
        f"Settings that most users change, with those of the preset {default.preset}:",
    ]
    sentences = sentences_of(Config)
    for name in MOST_USED:
        option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
        lines.append(f"  {option}{_kind(name)}  (default: {_shown(flat[name])})")
        lines += wrapped(_first_sentence(sentences[name]))
    lines += ["", "Modes:"]
    for option, told in HELP.items():
        lines += [f"  {option}", *wrapped(told)]
    return "\n".join(lines) + f"\n\nAll {len(flat)} settings: {prog} --help-all, or docs/settings.md.\n"


def first_line(make: Callable[..., Any]) -> str:
    """First line of a function's docstring."""
    return (inspect.getdoc(make) or "").splitlines()[0]


@lru_cache
def sentences_of(group: Any, prefix: str = "") -> dict[str, str]:
    """The text below each field of a settings class, by dotted name, those of the classes inside it too."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(body, ast.ClassDef)
    below: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            below[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    found: dict[str, str] = {}
    for name, kind in typing.get_type_hints(group).items():
        if dataclasses.is_dataclass(kind):
            found |= sentences_of(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = below[name]
    return found


def _first_sentence(told: str) -> str:
    return re.split(r"(?<=[a-z`)])\. (?=[A-Z])", told)[0].rstrip(".") + "."


def _kind(name: str) -> str:
    kind = settings(Config)[name].kind
    many = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if many else kind
    if item is bool:
        return ""
    if name in _METAVARS:
        word = _METAVARS[name]
    elif typing.get_origin(item) is Literal:
        word = "|".join(map(str, typing.get_args(item)))
    else:
        word = {int: "N", float: "X"}.get(item, "TEXT")
    return f" {word}{' ...' if many else ''}"


_METAVARS = {
    "model.name": "NAME",
    "data.train": "SOURCE",
    "data.eval": "SOURCE",
    "reward.name": "REWARD",
    "run_dir": "FOLDER",
    "resume": "auto|never|RUN_DIR",
}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, (), ""):
        return "none"
    words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return words if len(words) <= 60 else f"{words[:57]}..."


def _entries(told: dict[str, str]) -> Iterator[str]:
    width = max(map(len, told)) + 2
    for name, words in told.items():
        first, *more = textwrap.wrap(words, _WIDTH - 2 - width) or [""]
        yield f"  {name:<{width}}{first}"
        yield from (f"  {'':<{width}}{line}" for line in more)


def wrapped(words: str, indent: int = 6) -> list[str]:
    """The words in lines of the help's width."""
    return textwrap.wrap(words, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)

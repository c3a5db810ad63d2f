"""Syntax of source strings, `kind:name?key=value&key=value`; the package's docstring explains each key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote, unquote

from paced_fast.errors import InputError, nearest

FORMAT_NAMES = (
    *("plain", "gsm8k", "math", "dapo", "deepscaler"),
    *("deepcoder", "livecodebench", "humaneval", "taco"),
)
ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, str]]

_SHARED_KEYS = ("reward", "slice", "size", "seed", "rows", "share", "template")
_FIELD_KEYS = ("format", "prompt", "keep", "answer", "answer_after", "demonstration", "noise", "slice_by")
_KEYS = {
    "task": (*_SHARED_KEYS, "split", "flip_probability"),
    "rg": (*_SHARED_KEYS, "keep", "demonstration", "noise"),
    "jsonl": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "csv": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "parquet": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "hf": (*_SHARED_KEYS, *_FIELD_KEYS, "split", "config"),
}
KINDS = {
    "jsonl": "a file with one JSON object per line, or (.json) one list of objects; .gz is unpacked on the way",
    "csv": "a file of comma-separated (.csv) or tab-separated (.tsv) values, whose first line names the columns",
    "parquet": "a parquet file",
    "hf": "a data set of the Hugging Face hub, or a folder, such as one that save_to_disk of datasets wrote",
    "rg": "a task of reasoning-gym; keys that are not listed are parameters of the task",
    "task": "a task of this package; the only one is signed_sums",
}
"""Kinds of sources, and what each reads."""
KEYS = {
    "prompt": "column with the prompt, a text or a list of messages; a dot reaches into structures",
    "answer": "column with the expected answer; a dot reaches into structures",
    "reward": "reward that judges the rows; default: --reward, or else that of the format",
    "slice": "name of the slice of all rows, under which evaluations list them; default: the name of the source",
    "slice_by": "column whose values divide the rows into slices",
    "rows": "start:stop keeps those rows, counted from 0, stop excluded",
    "share": "low:high keeps the rows whose prompt hashes into that part of [0, 1); disjoint shares have no prompt in "
    "common, so 0:0.9 is to train on and 0.9:1 to evaluate on",
    "seed": "seed by which the rows are shuffled, or by which a task is made",
    "size": "number of rows that are kept, or that a task makes",
    "template": "chat, plain or a text with {prompt} in it; default: --data.template",
    "answer_after": "mark in the answer's column behind which the answer stands, such as ####",
    "keep": "regular expression; the prompt is what it matches in the text, one match after the other",
    "demonstration": "column with a text to imitate in the warm start, @answer, or @equation",
    "noise": "share of the letters and digits of a demonstration that are replaced by others",
    "format": "layout of the rows, where their columns do not tell it",
    "split": "split of a data set, or train, eval or demonstrations of a task",
    "config": "configuration of a data set of the hub",
    "flip_probability": "share of demonstrations of a task with one wrong sign",
    "optional": "true: continue without the file where it is absent",
}
"""Keys of sources, and what each says."""
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Endings of file names that tell the kind of a source without one."""
_TASK_SPLITS = ("train", "eval", "demonstrations")
_COMPUTED = ("@answer", "@equation")
_WANTED = {
    "slice": "a name of printable characters",
    "slice_by": "the name of a column",
    "rows": "start:stop with 0 <= start < stop",
    "share": "low:high with 0 <= low < high <= 1",
    "optional": "true or false",
    "size": "a whole number >= 1 of up to 12 digits",
    "seed": "a whole number >= 0 of up to 18 digits",
    "flip_probability": "a number from 0 to 1",
    "noise": "a number from 0 to 1",
    "keep": "a regular expression",
    "template": "chat, plain or text with {prompt} in it",
    "demonstration": f"the name of a field, {' or '.join(_COMPUTED)}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One parsed source string; `rows` is (start, stop) and None means open."""

    spec: str
    """The string itself."""
    kind: str
    name: str
    format: str = "auto"
    """Name of the layout of the rows; `auto` recognises it by the fields, unless prompt or answer is given."""
    prompt: str | None = None
    keep: str | None = None
    """Regular expression; a prompt is what it matches in the text, one match after the other."""
    answer: str | None = None
    """Field with the answer; the layout's unless given, and then a row may lack it when its reward needs none."""
    answer_after: str | None = None
    demonstration: str | None = None
    noise: float = 0.0
    """Share of the letters and digits of a demonstration that are replaced by others."""
    reward: str | None = None
    slice: str | None = None
    slice_by: str | None = None
    """Column whose value is the slice of a row."""
    size: int | None = None
    seed: int | None = None
    rows: tuple[int | None, int | None] = (None, None)
    share: tuple[float, float] = (0.0, 1.0)
    split: str | None = None
    config: str | None = None
    template: str | None = None
    flip_probability: float = 0.0
    optional: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of a reasoning-gym task."""

    @property
    def title(self) -> str:
        """The source as the user typed it, without its keys; the name of it in messages."""
        return self.spec.partition("?")[0]

    @property
    def slice_name(self) -> str:
        """The slice of rows that name none themselves."""
        return self.slice or PurePath(self.name.removesuffix(".gz")).stem


def parse_source(spec: str) -> Source:
    """The source that `kind:name?key=value&...` describes.

    Raises:
        InputError: unknown kind or key (with the nearest match), a repeated key, or a value that cannot be read.
    """
    kind, rest = _kind(spec)
    name, _, query = rest.partition("?")
    if not name.strip():
        raise InputError(f"source {spec!r} has no name after {kind}:")
    values: dict[str, Any] = {}
    params: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, equals, text = pair.partition("=")
        try:
            text = unquote(text, errors="strict")
        except UnicodeDecodeError:
            raise InputError(f"source {spec!r}: {pair!r} is not percent-encoded UTF-8") from None
        if not equals or not key or not text.strip():
            raise InputError(f"source {spec!r}: {pair!r} is not key=value")
        if key in values or key in params:
            raise InputError(f"source {spec!r} gives {key!r} twice")
        if key in _KEYS[kind]:
            values[key] = _value(spec, kind, key, text)
        elif kind == "rg" and key == "name":
            raise InputError(f"source {spec!r}: a task of reasoning-gym has no parameter 'name'")
        elif kind == "rg":
            params[key] = _literal(text)
        else:
            raise InputError(
                f"source {spec!r} has the unknown key {key!r}{nearest(key, _KEYS[kind])}: "
                f"the keys of {kind} are {', '.join(_KEYS[kind])}"
            )
    if values.get("noise") and "demonstration" not in values:
        raise InputError(
            f"source {spec!r} has noise= without the demonstration whose characters it replaces: "
            f"give demonstration=FIELD, {' or '.join(_COMPUTED)}"
        )
    if "slice" in values and "slice_by" in values:
        raise InputError(f"source {spec!r} has both slice= and slice_by=: give one of them")
    return Source(spec=spec, kind=kind, name=name, params=params, **values)


def _kind(spec: str) -> tuple[str, str]:
    """The kind of a source and what follows it; without a kind, the ending of a file or a folder tells it.

    What has neither and a slash in its name is a data set of the hub.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in _KEYS:
        return kind, rest
    name = spec.partition("?")[0]
    ending = PurePath(name.removesuffix(".gz")).suffix.lower()
    if not (colon and re.fullmatch(r"\w+", kind)):  # else a kind that is mistyped
        if ending in _ENDINGS:
            return _ENDINGS[ending], spec
        if "/" in name or Path(name).is_dir():
            return "hf", spec
    near = nearest(kind, list(_KEYS)) or (f" (did you mean {name}.jsonl?)" if Path(f"{name}.jsonl").is_file() else "")
    raise InputError(
        f"source {spec!r} must start with one of {', '.join(f'{k}:' for k in _KEYS)}, or end in one of "
        f"{', '.join(_ENDINGS)}{near}"
    )


def keys_of(key: str) -> list[str]:
    """The kinds of sources that have a key."""
    return [kind for kind, keys in _KEYS.items() if key in keys]


def rewarded(spec: str, reward: str) -> str:
    """The source with that reward, unless it names one, or cannot be read."""
    try:
        if parse_source(spec).reward is not None:
            return spec
    except InputError:
        return spec  # refused where its option is named
    return f"{spec}{'&' if '?' in spec else '?'}reward={quote(reward, safe='/:*+.,@~ ')}"


def _value(spec: str, kind: str, key: str, text: str) -> Any:
    try:
        return _read(kind, key, text)
    except (ValueError, KeyError):
        if key == "format":
            known = ("auto", *FORMAT_NAMES)
            raise InputError(
                f"source {spec!r} has the unknown format {text!r}{nearest(text, known)}: use one of {', '.join(known)}"
            ) from None
        if key == "split":
            raise InputError(
                f"source {spec!r} has the unknown split {text!r}: the splits are train, eval and demonstrations"
            ) from None
        raise InputError(f"source {spec!r}: {key}={text} must be {_WANTED[key]}") from None


def _read(kind: str, key: str, text: str) -> Any:
    """The value of a key. Raises ValueError or KeyError when the text is none."""
    if key == "size":
        return _whole(text, low=1, digits=12)
    if key == "seed":
        return _whole(text, low=0, digits=18)
    if key in ("flip_probability", "noise"):
        return _bounded(float(text), low=0.0, high=1.0)
    if key == "rows":
        start, stop = (_whole(part, low=0, digits=12) if part else None for part in text.split(":"))
        if stop is not None and stop <= (start or 0):
            raise ValueError
        return start, stop
    if key == "share":
        low, high = (_bounded(_decimal(part), low=0.0, high=1.0) for part in text.split(":"))
        if not low < high:
            raise ValueError
        return low, high
    if key == "keep":
        return _pattern(text)
    if key == "optional":
        return {"true": True, "false": False}[text]
    allowed = (
        (key != "format" or text in ("auto", *FORMAT_NAMES))
        and (key != "template" or is_template(text))
        and (key not in ("slice", "slice_by") or text.isprintable())
        and (key != "demonstration" or text[0] != "@" or text in _COMPUTED)
        and (key != "split" or kind != "task" or text in _TASK_SPLITS)
    )
    if not allowed:
        raise ValueError
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError from error
    return text


def is_template(text: str) -> bool:
    """Whether a text is a valid prompt template."""
    return text in ("chat", "plain") or "{prompt}" in text


def _whole(text: str, *, low: int, digits: int) -> int:
    if not re.fullmatch(f"[0-9]{{1,{digits}}}", text) or int(text) < low:
        raise ValueError
    return int(text)


def _decimal(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE]-?[0-9]+)?|\.[0-9]+", text):
        raise ValueError
    return float(text)


def _bounded(number: float, *, low: float, high: float) -> float:
    if not low <= number <= high:  # nor is NaN
        raise ValueError
    return number


def _literal(text: str) -> Any:
    """A JSON value when the text is one (2, 0.5, true, ["+"]), else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or a number of too many digits
        return text

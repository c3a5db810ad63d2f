"""Data sources: compact source strings, and rows from many formats.

A source is `kind:name?key=value&key=value` (values may be percent-encoded):

    task:signed_sums?split=train&size=4000&seed=42         split is train, eval or demonstrations
    rg:chain_sum?size=500&seed=1&min_terms=2               other keys are parameters of the reasoning-gym task
    jsonl:gsm8k_train.jsonl?prompt=question&answer=answer&answer_after=####&reward=math&rows=0:400&slice=gsm8k
    parquet:train.parquet?answer=reward_model.ground_truth&reward=math&template=chat
    hf:openai/gsm8k?config=main&split=train&prompt=question&answer=answer&answer_after=####

`rows=start:stop` keeps those rows (from 0, stop excluded), `share=low:high` those of them whose prompt hashes into that
part of [0, 1), then `seed` shuffles and `size` keeps the first. Shares that do not overlap have no prompt in common,
repeated prompts included: `share=0:0.8` to train on and `share=0.8:1` to evaluate on. `demonstration` is a field with
text to imitate, `@answer` for the bare answer, or `@equation` for one line of arithmetic that ends in it. A file with
`optional=true` may be absent (`drop_missing`). `reward` is math unless given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from paced_fast.errors import InputError
from paced_fast.tasks import equation, nearest, reasoning_gym_rows, signed_sums_demonstrations, signed_sums_rows

_SHARED_KEYS = ("reward", "slice", "size", "seed", "rows", "share", "template")
_FIELD_KEYS = ("prompt", "answer", "answer_after", "demonstration")
_KEYS = {
    "task": (*_SHARED_KEYS, "split", "flip_probability"),
    "rg": (*_SHARED_KEYS, "demonstration"),
    "jsonl": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "parquet": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "hf": (*_SHARED_KEYS, *_FIELD_KEYS, "split", "config"),
}
_REWARDS_WITHOUT_ANSWER = ("signed_sums", "reasoning_gym")
_DATA_FOLDERS = ("data", "../shared/data")
_ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One parsed source string; `rows` is (start, stop) and None means open."""

    kind: str
    name: str
    prompt: str = "prompt"
    answer: str | None = None
    """Field with the answer; `answer` unless given, and then a row may lack it when its reward needs none."""
    answer_after: str | None = None
    demonstration: str | None = None
    reward: str | None = None
    slice: str | None = None
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
    def slice_name(self) -> str:
        """The slice of rows that name none themselves."""
        return self.slice or Path(self.name).stem


def parse_source(spec: str) -> Source:
    """The source that `kind:name?key=value&...` describes.

    Raises:
        InputError: unknown kind or key (with the nearest match), a repeated key, or a value that cannot be read.
    """
    kind, colon, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if not colon or kind not in _KEYS:
        raise InputError(
            f"source {spec!r} must start with one of {', '.join(f'{k}:' for k in _KEYS)}{nearest(kind, list(_KEYS))}"
        )
    if not name:
        raise InputError(f"source {spec!r} has no name after {kind}:")
    values: dict[str, Any] = {}
    params: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, equals, text = pair.partition("=")
        text = unquote(text)
        if not equals or not key or not text:
            raise InputError(f"source {spec!r}: {pair!r} is not key=value")
        if key in values or key in params:
            raise InputError(f"source {spec!r} gives {key!r} twice")
        if key in _KEYS[kind]:
            values[key] = _value(spec, key, text)
        elif kind == "rg":
            params[key] = _literal(text)
        else:
            raise InputError(
                f"source {spec!r} has the unknown key {key!r}{nearest(key, _KEYS[kind])}: "
                f"{kind} knows {', '.join(_KEYS[kind])}"
            )
    return Source(kind=kind, name=name, params=params, **values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A row before its prompt is encoded; `where` names it in errors."""

    where: str
    prompt: str | Messages
    reward: str
    slice: str
    columns: dict[str, Any]
    demonstration: str | None


def read_drafts(spec: str, data_dir: str | None) -> tuple[Source, list[Draft]]:
    """The rows of one source, each with what names it in errors; InputError when there is none."""
    source = parse_source(spec)
    drafts = [_draft(source, where, data) for where, data in _read(source, spec, data_dir)]
    if not drafts:
        raise InputError(f"data source {spec!r} has no rows")
    return source, drafts


def drop_missing(sources: Sequence[str], data_dir: str | None) -> tuple[tuple[str, ...], tuple[Source, ...]]:
    """The sources without the optional ones whose file is absent, and those."""
    parsed = [(spec, parse_source(spec)) for spec in sources]
    missing = [item for item in parsed if item[1].optional and find_file(item[1], data_dir) is None]
    return tuple(spec for spec, _ in parsed if spec not in dict(missing)), tuple(source for _, source in missing)


def find_file(source: Source, data_dir: str | None) -> Path | None:
    """The file that a jsonl or parquet source names, None when it is absent."""
    return next((place for place in _places(source.name, data_dir) if place.is_file()), None)


def _value(spec: str, key: str, text: str) -> Any:
    try:
        if key in ("size", "seed"):
            number = int(text)
            if number < (1 if key == "size" else 0):
                raise ValueError
            return number
        if key == "flip_probability":
            return float(text)
        if key == "rows":
            start, stop = (int(part) if part else None for part in text.split(":"))
            if min(start or 0, stop or 0) < 0 or (stop is not None and stop <= (start or 0)):
                raise ValueError
            return start, stop
        if key == "share":
            low, high = (float(part) for part in text.split(":"))
            if not 0 <= low < high <= 1:
                raise ValueError
            return low, high
        if key == "optional":
            return {"true": True, "false": False}[text]
    except (ValueError, KeyError):
        wanted = {
            "rows": "start:stop with 0 <= start < stop",
            "share": "low:high with 0 <= low < high <= 1",
            "optional": "true or false",
            "size": "a whole number >= 1",
            "seed": "a whole number >= 0",
        }
        raise InputError(f"source {spec!r}: {key}={text} must be {wanted.get(key, 'a number')}") from None
    return text


def _literal(text: str) -> Any:
    """A JSON value when the text is one (2, 0.5, true, ["+"]), else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read(source: Source, spec: str, data_dir: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The rows that a source selects, each with the words that name it."""
    if source.kind in ("task", "rg"):
        made = _made_rows(source)
        rows: Iterator[tuple[str, dict[str, Any]]] = ((f"{spec} row {i}", row) for i, row in enumerate(made))
    elif source.kind == "hf":
        rows = _hf_rows(source)
    else:
        path = _find(source, data_dir)
        rows = _jsonl_rows(path) if source.kind == "jsonl" else _parquet_rows(path)
    start, stop = source.rows
    chosen = list(itertools.islice(rows, start or 0, stop))
    if stop is not None and len(chosen) < stop - (start or 0):
        raise InputError(
            f"source {spec!r} asks for rows up to {stop} and has {(start or 0) + len(chosen)}: lower rows="
        )
    if source.share != (0.0, 1.0):
        low, high = source.share
        chosen = [(where, row) for where, row in chosen if low <= _place(row, source.prompt, where) < high]
    if source.kind in ("task", "rg"):
        return chosen  # seed and size went into making them
    if source.seed is not None:
        random.Random(source.seed).shuffle(chosen)
    if source.size is not None and len(chosen) < source.size:
        raise InputError(f"source {spec!r} asks for size={source.size} and has {len(chosen)} rows: lower size=")
    return chosen[: source.size]


def _place(row: Mapping[str, Any], name: str, where: str) -> float:
    """A number in [0, 1) that depends on the row's prompt and nothing else."""
    text = json.dumps(_lookup(row, name, where, "prompt"), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _made_rows(source: Source) -> list[dict[str, Any]]:
    if source.kind == "rg":
        return reasoning_gym_rows(source.name, source.size or 500, source.seed or 0, **source.params)
    if source.name != "signed_sums":
        raise InputError(f"no task {source.name!r}{nearest(source.name, ['signed_sums'])}: the tasks are signed_sums")
    split, seed = source.split or "train", 42 if source.seed is None else source.seed
    if split == "demonstrations":
        return signed_sums_demonstrations(size=source.size or 4000, seed=seed, flip_probability=source.flip_probability)
    if split not in ("train", "eval"):
        raise InputError(f"task signed_sums has no split {split!r}: use train, eval or demonstrations")
    return signed_sums_rows(split, size=source.size, seed=seed)


def _places(name: str, data_dir: str | None) -> list[Path]:
    """Where a file is looked up, in this order."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return [path]
    if data_dir is not None:
        return [Path(data_dir).expanduser() / path, path]
    return [path, *(Path(folder, path) for folder in _DATA_FOLDERS)]


def _find(source: Source, data_dir: str | None) -> Path:
    found = find_file(source, data_dir)
    if found is not None:
        return found
    looked = " and ".join(str(place.absolute()) for place in _places(source.name, data_dir))
    raise InputError(f"source {source.kind}:{source.name}: no such file (looked at {looked}); set data_dir or the path")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number} is not JSON ({error}): one object a line is expected") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number} is a JSON {type(row).__name__}, not an object with fields")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow: install the extra, pip install 'paced-fast[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {' '.join(str(error).split())}") from error
    rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _hf_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"hf:{source.name} needs datasets: install the extra, pip install 'paced-fast[data]'"
        ) from error
    split = source.split or "train"
    try:
        rows = datasets.load_dataset(source.name, source.config, split=split)
    except Exception as error:  # the hub client fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load hf:{source.name} split {split!r}: {type(error).__name__}: {reason}") from error
    for number, row in enumerate(rows):
        yield f"hf:{source.name} row {number}", dict(row)


def _draft(source: Source, where: str, data: dict[str, Any]) -> Draft:
    made = source.kind in ("task", "rg")
    reward = source.reward or (data["reward"] if made else "math")
    prompt = _checked_prompt(_lookup(data, source.prompt, where, "prompt"), source.prompt, where)
    columns = {key: value for key, value in data.items() if key not in ("prompts", "completions", source.prompt)}
    if made:
        columns = {key: value for key, value in columns.items() if key not in ("reward", "slice", "demonstration")}
        demonstration = data.get("demonstration")
    else:
        columns["answer"] = _answer(source, data, where)
        demonstration = None
    if source.demonstration is not None:
        demonstration = _demonstration(source.demonstration, data, prompt, columns["answer"], where)
    slice_name = source.slice or (data["slice"] if made else source.slice_name)
    return Draft(
        where=where, prompt=prompt, reward=reward, slice=slice_name, columns=columns, demonstration=demonstration
    )


def _answer(source: Source, data: dict[str, Any], where: str) -> Any:
    name = source.answer or "answer"
    needless = ":" in (source.reward or "") or source.reward in _REWARDS_WITHOUT_ANSWER
    if source.answer is None and needless and data.get(name) is None:
        return None
    answer = _lookup(data, name, where, "answer")
    if source.answer_after is None:
        return answer
    if not isinstance(answer, str) or source.answer_after not in answer:
        raise InputError(f"{where}: the answer in {name!r} has no {source.answer_after!r}: change answer_after=")
    return answer.rpartition(source.answer_after)[2].strip()


def _demonstration(name: str, data: dict[str, Any], prompt: str | Messages, answer: Any, where: str) -> str:
    if name in ("@answer", "@equation"):
        text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
        return text if name == "@answer" else equation(str(prompt), text)
    text = _lookup(data, name, where, "demonstration")
    if not isinstance(text, str):
        raise InputError(f"{where}: the demonstration in {name!r} is not text: {text!r}")
    return text


def _lookup(data: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    """The field `name`, which may be dotted; never None."""
    value: Any = data.get(name)
    if value is None:
        value = data
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        raise InputError(f"{where} has no field {name!r}: it has {', '.join(map(str, data))}; name the field by {key}=")
    return value


def _checked_prompt(prompt: Any, name: str, where: str) -> str | Messages:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt in {name!r} is empty")
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        messages = [{"role": message.get("role"), "content": message.get("content")} for message in prompt]
        # A role comes out of the template between control tokens, so only known ones are let through.
        if all(message["role"] in _ROLES and isinstance(message["content"], str) for message in messages):
            return messages
    raise InputError(
        f"{where}: the prompt in {name!r} is neither text nor a list of messages, "
        f"each with a role ({', '.join(_ROLES)}) and text as content"
    )

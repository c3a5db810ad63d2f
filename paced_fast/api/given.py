"""What Python hands over in memory, as files and names that a run can keep: rows, models, reward functions."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paced_fast.config import given
from paced_fast.data.sources import parse_source
from paced_fast.errors import InputError

_PROMPTS = ("prompt", "question", "problem", "instruction", "input", "query", "messages")
"""Columns of prompts, the likeliest first."""
_ROW = 'give one dictionary per row, such as {"prompt": "2+3=", "answer": "5"}'
_KINDS = {".jsonl": "jsonl", ".parquet": "parquet"}


def sources_of(name: str, data: Any, reward: str | None, folder: Path) -> tuple[str, ...]:
    """Sources of `data`; rows in memory are written into `folder`, in a file that is named after their content.

    Args:
        name: argument that the data comes from, for messages and for the file.
        data: a source or several, or rows.
        reward: name of the reward, if there is one: rows for a function of the user's may have any columns.

    Raises:
        InputError: the data is nothing of the kind, or a row cannot be written.
    """
    if isinstance(data, str | Path):
        return (_source(data),)
    if isinstance(data, Sequence) and data and all(isinstance(one, str | Path) for one in data):
        if _is_text(data[0]):
            raise InputError(f"{name}[0] is the text {data[0]!r:.60}, which names no source: {_ROW}")
        return tuple(_source(one) for one in data)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        what = "a dictionary" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        hint = f": give one split of it, such as {name}['train']" if "train" in _keys(data) else ""
        raise InputError(f"{name} is {what}{hint or ': give a source, or rows as a list of dictionaries'}")
    return (_written(name, data, folder, reward),)


def _is_text(one: str | Path) -> bool:
    """Whether this is a prompt where a source or a row is asked for."""
    if isinstance(one, Path):
        return False
    try:
        source = parse_source(one)
    except InputError:
        return re.match(r"\w+:", one) is None  # else a kind that is mistyped
    return source.kind == "hf" and not one.startswith("hf:") and " " in one and not Path(source.name).exists()


def in_rows(message: str, folder: Path) -> str:
    """The message with the names of files in `folder`, which Python's rows were written into, as those of the rows.

    `data, row 61` is the sixty-first. Remedies that change a source become such that change a row.
    """
    place = re.escape(str(folder.absolute()))
    file = rf"(?:jsonl:)?{place}/{given.ROWS}"
    message = re.sub(rf"{place}/{given.MODEL}\b", "from Python", message)
    message = re.sub(rf"\b{given.REWARD}(\w+)", r"\1", message)
    if re.search(file, message) is None:
        return message
    formats = "or give format=NAME, one of .*"
    message = re.sub(rf", as in '{file}\?prompt=FIELD&answer=FIELD', {formats}", " 'prompt' and 'answer'", message)
    message = re.sub(rf", as in '{file}\?answer=FIELD', {formats}", " 'answer'", message)
    message = re.sub(rf"{file}:(\d+)", r"\1, row \2", message)
    message = re.sub(rf"(['\"]?){file}(?:\?[^'\"\s]*[^'\"\s:,)])?\1", r"\2", message)
    message = re.sub(
        r"\S+ was (\w+) in that run and is \1 now: leave it out .*",
        r"\1 has other rows than in that run: give the same to continue it, or another run_dir for a new run",
        message,
    )
    message = re.sub(r"name a part of it with a dot, as in answer=\S+", "give one of its parts", message)
    return re.sub(r"name (?:the field by (?=\w+=)|another, as in )(\w+)=(?:FIELD)?", r"name its column '\1'", message)


def _keys(data: Any) -> tuple[Any, ...]:
    return tuple(data) if isinstance(data, Mapping) else ()


def _source(one: str | Path) -> str:
    """A source string; of a path to a file or folder, its kind by the ending."""
    if isinstance(one, Path):
        name = one.name.removesuffix(".gz")
        return f"{_KINDS.get(Path(name).suffix, 'hf' if one.is_dir() else 'jsonl')}:{one}"
    return one


def _written(name: str, rows: Iterable[Any], folder: Path, reward: str | None) -> str:
    """Write rows as JSON lines, and return the source."""
    if hasattr(rows, "to_dict") and not hasattr(rows, "column_names"):  # a frame of pandas iterates over its columns
        rows = rows.to_dict("records")  # pyright: ignore[reportAttributeAccessIssue]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}.partial"
    digest, count, first = hashlib.sha256(), 0, {}
    try:
        with partial.open("wb") as file:
            for count, row in enumerate(rows, start=1):
                if not isinstance(row, Mapping):
                    raise InputError(f"{name}[{count - 1}] is a {type(row).__name__}: {_ROW}")
                first = first or dict(row)
                line = _line(f"{name}[{count - 1}]", row)
                digest.update(line)
                file.write(line)
        if not count:
            raise InputError(f"{name} has no rows: give at least one")
        path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    keys = [f"slice={name}"]
    if "prompt" not in first and ":" in (reward or ""):  # no layout of a known data set has to fit
        column = next((column for column in _PROMPTS if column in first), None)
        if column is None:
            raise InputError(
                f"{name} has no column with the prompt (its columns are {', '.join(map(str, first))}): name it 'prompt'"
            )
        keys.append(f"prompt={column}")
    return f"jsonl:{path.absolute()}?{'&'.join(keys)}"


def _line(where: str, row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(dict(row), default=_plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        column = next((key for key, value in row.items() if not _is_json(value)), "")
        raise InputError(
            f"{where}: column {column!r} holds a {type(row.get(column)).__name__}, which is no text, number, list or "
            f"dictionary ({error}): leave the column out, or turn it into text"
        ) from None
    return f"{text}\n".encode("utf-8", "surrogatepass")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_plain, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: Any) -> Any:
    """A number or list for one of NumPy or PyTorch; text for a date or a path."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def reward_of(reward: str | Callable[..., Any] | None) -> tuple[str | None, dict[str, Callable[..., Any]]]:
    """The name by which sources name a reward, and the functions by such names.

    A function of an imported module is named so that a command finds it too; one of a notebook or a script is not in a
    file that could be imported without running it, so that only this process has it.

    Raises:
        InputError: the reward is neither a name nor something to call.
    """
    if reward is None or isinstance(reward, str):
        return reward, {}
    if isinstance(reward, type) or not callable(reward):
        hint = "create an instance of it" if isinstance(reward, type) else "give a name, or a function"
        raise InputError(f"reward is {reward!r:.80}: {hint}")
    name = getattr(reward, "__name__", type(reward).__name__)
    module = getattr(reward, "__module__", None)
    is_importable = inspect.isfunction(reward) and getattr(sys.modules.get(str(module)), name, None) is reward
    if is_importable and module != "__main__":
        return f"{module}:{name}", {f"{module}:{name}": reward}
    full = given.REWARD + ("".join(c for c in name if c.isalnum() or c == "_") or "reward")
    return full, {full: reward}


def save_given_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model object and its tokenizer as a folder, from which a run reads its own copy.

    Raises:
        InputError: the model is no whole causal language model, or has no tokenizer.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise InputError(
            f"model is a {type(model).__name__}: give a causal language model of transformers, or its name"
        )
    if hasattr(model, "peft_config") or hasattr(model, "merge_and_unload"):
        raise InputError(
            "model has adapters of PEFT: give model.merge_and_unload(), and the setting lora.rank to train new ones"
        )
    if tokenizer is None:
        raise InputError(
            "model is an object, which has no tokenizer: give tokenizer=AutoTokenizer.from_pretrained(NAME)"
        )
    if not hasattr(tokenizer, "save_pretrained"):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}: give a tokenizer of transformers")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def drop_weights(folder: Path) -> None:
    """Remove the weights of a model that `save_given_model` wrote; the run has a copy of its own by then."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink(missing_ok=True)

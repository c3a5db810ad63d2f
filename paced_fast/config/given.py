"""What Python hands over in memory: the names that settings have for it, and how people read them."""

from __future__ import annotations

import re
from urllib.parse import unquote

REWARD = "given:"
"""Before the name of a function that is in memory only."""
FOLDER = "given"
"""Folder inside a run folder with rows and models that Python handed over."""
MODEL = "model"
"""Folder of a model in that folder."""

ROWS = r"(data|eval_data)-[0-9a-f]{16}\.jsonl"
"""Name of a file of rows; its first group is the argument that they came by."""
_SOURCE = re.compile(rf"jsonl:[^?]*?/{FOLDER}/({ROWS})(?:\?(.*))?")
_MODEL = re.compile(rf".*/{FOLDER}/{MODEL}")
_FUNCTION = re.compile(rf"(^|\breward=){REWARD}(\w+)")


def in_words(value: object) -> object:
    """The value of a setting, with what Python handed over in words in place of files and names made for it.

    Rows become `rows from Python`, with their file in the run folder and their reward; a model, `a model from Python`.
    """
    if isinstance(value, list | tuple):
        return [in_words(one) for one in value]
    if not isinstance(value, str):
        return value
    if _MODEL.fullmatch(value):
        return "a model from Python"
    match = _SOURCE.fullmatch(value)
    if match is None:
        return _FUNCTION.sub(r"\1\2 (a function from Python)", value)
    query: str = match[3] or ""
    rewards = [pair.removeprefix("reward=") for pair in query.split("&") if pair.startswith("reward=")]
    reward = unquote(rewards[-1]).removeprefix(REWARD) if rewards else ""
    return f"rows from Python, {FOLDER}/{match[1]} in the run folder{f', reward {reward}' if reward else ''}"

"""Rollouts recorded in a file, and read again as the groups of a step, so that a run can be trained without sampling.

`rollouts_full.jsonl` has one object per completion, in the order of the batch:

    step, group, position           where it belongs; groups and positions count from 0 within a step
    prompt_index                    its row of the training data
    prompt, prompt_ids              hashes of the prompt's text and of its token ids
    dropped                         whether it was sampled and left out of the batch
    reward, shaping, stopped        null for a completion without a verdict, and where nothing shapes
    num_tokens, token_ids, logprobs

The long fields come last, so that a reader finds its way without decoding them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paced_fast.config import Config
from paced_fast.data.records import Completion, Group, PromptTable
from paced_fast.errors import InputError
from paced_fast.run.record.journal import Journal

logger = logging.getLogger(__name__)

FILE_NAME = "rollouts_full.jsonl"
_KEPT_BYTES = 1 << 28
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_LONG = b', "token_ids": '
_COUNTS = ("step", "group", "position", "prompt_index", "num_tokens")
_HEAD = {*_COUNTS, "prompt", "prompt_ids", "dropped", "reward", "shaping", "stopped"}


class Recorder:
    """Appends the completions of every step to `rollouts_full.jsonl` of a run folder."""

    def __init__(self, folder: Path, table: PromptTable) -> None:
        self.path, self._table = folder / FILE_NAME, table
        self._file = Journal(self.path, keep_bytes=_KEPT_BYTES)

    def write(self, step: int, groups: Sequence[Group], dropped: Sequence[Group]) -> None:
        """Append the completions of one step."""
        lines, position = [], 0
        for number, group in enumerate((*groups, *dropped)):
            text, ids = _hashes(self._table, group.prompt_index)
            for k, completion in enumerate(group.completions):
                row = {
                    "step": step,
                    "group": number,
                    "position": position,
                    "prompt_index": group.prompt_index,
                    "prompt": text,
                    "prompt_ids": ids,
                    "dropped": number >= len(groups),
                    "reward": group.rewards[k],
                    "shaping": group.shaping[k] if group.shaping else None,
                    "stopped": completion.stopped,
                    "num_tokens": len(completion.token_ids),
                    "token_ids": completion.token_ids,
                    # Nine digits represent every float32 exactly.
                    "logprobs": [float(f"{value:.9g}") for value in completion.logprobs],
                }
                lines.append(json.dumps(row))
                position += 1
        self._file.append(lines)

    def close(self) -> None:
        """Try the unwritten lines a last time."""
        self._file.close()

    def drop_from(self, step: int) -> None:
        """Cut off the records of `step` and later, and a torn last line, for a run that resumes there."""
        if not self.path.exists():
            return
        keep = 0
        for _, start, line in _lines(self.path):
            head = _head(line)
            if head is None or head["step"] >= step:
                break
            keep = start + len(line)
        os.truncate(self.path, keep)


def replayed_settings(config: Config, path: Path) -> Config:
    """The settings of a run that replays the rollouts at `path`: it samples nothing, so it needs no engine.

    Raises InputError when the file lies in the run's own folder, which a new run clears.
    """
    folder = config.run_dir and Path(config.run_dir).resolve()
    if folder and (path.resolve() == folder or folder in path.resolve().parents):
        raise InputError(
            f"--replay-rollouts {path} is in --run-dir {config.run_dir}: give the replay another --run-dir"
        )
    logger.info("rollouts are replayed from %s: nothing is sampled, so nothing is evaluated", path)
    return dataclasses.replace(config, generator="transformers")


class RecordedRollouts:
    """The groups of a run that was recorded, step by step."""

    def __init__(self, path: Path, config: Config, table: PromptTable, vocabulary: int) -> None:
        """Open the rollouts of a file or run folder for a run of these settings and prompts, ids below `vocabulary`.

        Raises InputError, in one line, for a file that is absent, cut off, of other groups, prompts or tokenizer, or
        that lacks a step.
        """
        self.path = path / FILE_NAME if path.is_dir() else path
        self._config, self._table, self.vocabulary = config, table, vocabulary
        self._starts: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # of a step's first line
        self._sizes: dict[int, int] = {}  # lines of a step
        if not self.path.is_file():
            raise InputError(
                f"--replay-rollouts {path}: there is no such file: a run with --run.save-rollouts writes {FILE_NAME}"
            )
        self._check()

    def groups(self, step: int, round_: int = 0) -> list[Group]:
        """See `GroupSource`."""
        if round_ > 0:
            return []
        rows = list(self._rows(step))
        size = self._config.generation.group_size
        groups: list[Group] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            shaping = [row["shaping"] for row in part]
            completions = [
                Completion(token_ids=row["token_ids"], logprobs=row["logprobs"], stopped=row["stopped"]) for row in part
            ]
            rewards = [row["reward"] for row in part]
            groups.append(Group(part[0]["prompt_index"], completions, rewards, [] if None in shaping else shaping))
        return groups

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        lines = itertools.islice(_lines(self.path, self._starts[step]), self._sizes[step])
        for number, (_, _, line) in enumerate(lines, start=self._numbers[step]):
            yield self._row(number, line)

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        """Parse and check the whole record of a line."""
        try:
            row = json.loads(line)
        except ValueError as error:
            raise self._wrong(f"line {number} is not JSON ({error})") from error
        count, ids, logprobs = row["num_tokens"], row.get("token_ids"), row.get("logprobs")
        if not all(isinstance(values, list) and len(values) == count for values in (ids, logprobs)):
            raise self._wrong(f"line {number} does not have {count} token ids and {count} log-probs")
        unknown = [i for i in ids if type(i) is not int or not 0 <= i < self.vocabulary]
        if unknown:
            told = json.dumps(unknown[0])[:80]
            raise self._wrong(
                f"line {number} has the token id {told}, but the vocabulary is 0 to {self.vocabulary - 1}: give the "
                "tokenizer and model that it was recorded with"
            )
        bad = [value for value in logprobs if not _is_number(value)]
        if bad:
            raise self._wrong(f"line {number} has the log-prob {json.dumps(bad[0])[:80]}, which is not a finite number")
        return row

    def _check(self) -> None:
        """Read the heads of all lines, so that errors are found before training starts."""
        known: dict[int, tuple[str, str]] = {}
        settings = self._config.generation
        step = position = in_batch = 0
        group = (-1, -1)
        for number, start, line in _lines(self.path):
            head = _head(line)
            if head is None and step == self._config.steps and in_batch == self._config.rollouts_per_step:
                break  # a torn last line is not needed
            if head is None:
                raise self._wrong(f"line {number} is cut off or is not a record" + self._whole(step, in_batch))
            if head["step"] > max(self._config.steps, step):
                break
            if head["step"] != step:
                self._check_step(step, position, in_batch)
                if head["step"] != step + 1 and step:
                    raise self._wrong(f"step {step + 1} is missing: step {step} is followed by step {head['step']}")
                step, position, in_batch = head["step"], 0, 0
                self._starts[step], self._numbers[step] = start, number
            if head["position"] != position:
                raise self._wrong(f"line {number} has position {head['position']} of step {step} instead of {position}")
            if (head["group"], head["prompt_index"]) != group:
                group = head["group"], head["prompt_index"]
                self._check_prompt(head, known, number)
            if head["group"] != position // settings.group_size:
                raise self._wrong(
                    f"line {number} is in group {head['group']}, but --generation.group-size {settings.group_size} "
                    f"puts it in group {position // settings.group_size}: give the group size of the run that wrote it"
                )
            if head["num_tokens"] > settings.max_completion_tokens:
                raise self._wrong(
                    f"line {number} has {head['num_tokens']} tokens, but --generation.max-completion-tokens is "
                    f"{settings.max_completion_tokens}: raise it"
                )
            position += 1
            in_batch += not head["dropped"]
        if in_batch < self._config.rollouts_per_step and len(self._starts) > 1:
            raise self._wrong(f"step {step} is cut off after {in_batch} completions: give --steps {step - 1}")
        self._check_step(step, position, in_batch)
        self._check_range(step)
        for _ in self._rows(1):  # the first step in full, which reveals another tokenizer
            pass

    def _check_step(self, step: int, position: int, in_batch: int) -> None:
        settings, wanted = self._config.generation, self._config.rollouts_per_step
        if step == 0:
            return
        self._sizes[step] = position
        if position % settings.group_size:
            raise self._wrong(
                f"step {step} has {position} completions, not a multiple of --generation.group-size "
                f"{settings.group_size}"
            )
        if in_batch != wanted:
            raise self._wrong(
                f"step {step} has a batch of {in_batch} completions, but these settings make {wanted}: give the "
                "--generation.prompts-per-step and --generation.group-size of the run that wrote it"
            )

    def _check_prompt(self, head: dict[str, Any], known: dict[int, tuple[str, str]], number: int) -> None:
        index = head["prompt_index"]
        if not isinstance(index, int) or not 0 <= index < len(self._table):
            raise self._wrong(
                f"line {number} has prompt {index}, but there are {len(self._table)}: give the same --data"
            )
        if index not in known:
            known[index] = _hashes(self._table, index)
        text, ids = known[index]
        if head["prompt"] != text:
            raise self._wrong(f"line {number} has another prompt {index} than the training data: give the same --data")
        if head["prompt_ids"] != ids:
            raise self._wrong(
                f"line {number} has other tokens for prompt {index}: give the tokenizer and --data.template that it "
                "was recorded with"
            )

    def _check_range(self, last: int) -> None:
        if not self._starts:
            raise self._wrong("the file is empty")
        first = min(self._starts)
        if first != 1:
            raise self._wrong(f"the file begins at step {first}: steps 1 to {first - 1} were not recorded")
        if last < self._config.steps:
            raise self._wrong(f"step {last + 1} is missing: the file ends at step {last}: give --steps {last}")

    def _whole(self, step: int, in_batch: int) -> str:
        """Remedy for a file that ends in `step`."""
        whole = step if in_batch == self._config.rollouts_per_step else step - 1
        if whole > 0:
            return f": give --steps {whole} to use the complete steps"
        return f": give a {FILE_NAME} that --run.save-rollouts wrote"

    def _wrong(self, words: str) -> InputError:
        return InputError(f"--replay-rollouts {self.path}: {words}")


def _hashes(table: PromptTable, index: int) -> tuple[str, str]:
    row = table.rows[index]
    prompt, ids = json.dumps(row.prompt, sort_keys=True), json.dumps(row.token_ids)
    first, second = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (prompt, ids))
    return first, second


def _lines(path: Path, offset: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, place in the file, and bytes of each line from `offset` on."""
    with path.open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, start=1):
            yield number, offset, line
            offset += len(line)


def _head(line: bytes) -> dict[str, Any] | None:
    """The short fields of a record; None for a line that is no whole record."""
    start, found, _ = line.partition(_LONG)
    if not found or not line.endswith(b"]}\n"):
        return None
    try:
        head = json.loads(start + b"}")
    except ValueError:
        return None
    if not isinstance(head, dict) or not head.keys() >= _HEAD:
        return None
    numbers = all(type(head[name]) is int for name in _COUNTS)
    flags = all(type(head[name]) is bool for name in ("stopped", "dropped"))
    scores = all(head[name] is None or _is_number(head[name]) for name in ("reward", "shaping"))
    return head if numbers and flags and scores else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _FLOAT32_MAX

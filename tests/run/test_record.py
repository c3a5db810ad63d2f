"""Rollouts as they are shown: tokens as pieces of the text, whatever the tokenizer cuts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_run

from paced_fast import train
from paced_fast.run.record.shown_rollouts import shown_tokens


def _bytes(token_ids: Sequence[int]) -> str:
    """A byte-level tokenizer whose token 0 is the end of a text."""
    return bytes(token for token in token_ids if token).decode("utf-8", errors="replace")


def _pieces(text: str) -> list[str]:
    ids = list(text.encode())
    return shown_tokens(ids, [0.0] * len(ids), _bytes)["tokens"]


def test_a_character_belongs_to_the_token_that_ends_it() -> None:
    assert _pieces("a\u00e9\u20acb") == ["a", "", "\u00e9", "", "", "\u20ac", "b"]
    assert shown_tokens([97, 0], [-0.123456, -1.0], _bytes) == {"tokens": ["a", ""], "logprobs": [-0.1235, -1.0]}


def test_pieces_make_the_text_again() -> None:
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choice("ab \n\u00e9\u20ac\U0001f600\u05d0") for _ in range(rng.randrange(40)))
        assert "".join(_pieces(text)) == text


def test_a_text_that_ends_within_a_character_shows_it() -> None:
    ids = list("x\u20ac".encode())[:-1]
    assert "".join(shown_tokens(ids, [0.0] * len(ids), _bytes)["tokens"]) == "x\ufffd"


def test_bytes_that_are_no_text_come_to_an_end() -> None:
    ids = [0xFF] * 100
    assert len(shown_tokens(ids, [0.0] * 100, _bytes)["tokens"]) == 100


def test_a_space_that_a_tokenizer_drops_at_the_beginning_is_kept() -> None:
    words = ["_one", "_two", "s", "_three"] * 10
    decode = lambda ids: "".join(words[i] for i in ids).replace("_", " ").removeprefix(" ")  # noqa: E731
    tokens = shown_tokens(range(len(words)), [0.0] * len(words), decode)["tokens"]
    assert "".join(tokens) == decode(range(len(words)))
    assert tokens[:4] == ["one", " two", "s", " three"]


def test_only_the_first_tokens_are_kept_and_nan_stays() -> None:
    found = shown_tokens([97] * 2000, [math.nan] * 2000, _bytes)
    assert len(found["tokens"]) == len(found["logprobs"]) == 512
    assert math.isnan(found["logprobs"][0])


@pytest.mark.slow
def test_a_run_writes_tokens_memory_and_ages(tmp_path: Path) -> None:
    config = tiny_run.config(tiny_run.write_rewards(tmp_path), steps=4, evaluation__every=0)
    train.train(tiny_run.build(config, tmp_path / "run"), tiny_run.quiet())
    rows, lines = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("rollouts.jsonl", "metrics.jsonl")
    )
    assert any(row["replayed"] for row in rows)
    for row in rows:
        assert "".join(row["tokens"]) == row["completion"]
        assert len(row["logprobs"]) == len(row["tokens"]) > 0
        assert all(logprob <= 0 for logprob in row["logprobs"])
        assert (row["age"] is not None) == row["replayed"]
        assert row["age"] is None or row["age"] >= 1
    for line in lines[1:]:
        assert set(line["memory"]) == set(line["seconds"])
        assert min(line["memory"].values()) > 1 << 20
        assert len(line["replay_ages"]) == line["replay_size"]

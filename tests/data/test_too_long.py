"""Prompts over the limit: cut by ids at one side of their text, the template whole, refused where nothing is left."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from tiny_bytes import END, START, THINK, byte_tokenizer, plain_ids
from transformers import PreTrainedTokenizerFast

from paced_fast.data.prompts import load_table
from paced_fast.errors import InputError


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def load(prompts: list, tokenizer, folder: Path, *, limit: int, too_long: str, template: str = "plain"):
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(prompts)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_table(
        ["jsonl:a.jsonl"],
        tokenizer=tokenizer,
        template=template,
        max_prompt_tokens=limit,
        data_dir=str(folder),
        too_long=too_long,
    ).rows


@pytest.mark.parametrize(("too_long", "kept"), [("keep_start", "abcde"), ("keep_end", "fghij")])
def test_text_is_cut_and_the_template_is_not(too_long, kept, chat, tmp_path, caplog) -> None:
    template = "<|im_start|>Q: {prompt}<think>A:"
    overhead = 1 + 3 + 1 + 2
    cut, short = load(["abcdefghij", "abc"], chat, tmp_path, limit=overhead + 5, too_long=too_long, template=template)
    assert list(cut.token_ids) == [START, *plain_ids(chat, f"Q: {kept}"), THINK, *plain_ids(chat, "A:")]
    assert (cut.prompt, short.prompt) == (kept, "abc")  # what a reward is told is what the policy read
    side = "end" if too_long == "keep_start" else "beginning"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"jsonl:a.jsonl: cut the {side} of 1 of 2 prompts"


@pytest.mark.parametrize(("too_long", "kept"), [("keep_start", "x<|im_"), ("keep_end", "<think>")])
def test_a_cut_makes_no_control_token(too_long, kept, chat, tmp_path) -> None:
    """What is left of text that reads like a token is text, and so is a whole one that is left."""
    text = "x<|im_end|>" if too_long == "keep_start" else "<|im_end|><think>"
    template = "a {prompt}|b"
    (row,) = load([text], chat, tmp_path, limit=4 + len(kept), too_long=too_long, template=template)
    assert list(row.token_ids) == plain_ids(chat, f"a {kept}|b")


@pytest.mark.parametrize("too_long", ["keep_start", "keep_end"])
def test_of_a_chat_the_longest_user_message_is_cut(too_long, chat, tmp_path) -> None:
    messages = [
        {"role": "system", "content": "S" * 30},
        {"role": "user", "content": "0123456789"},
        {"role": "assistant", "content": "A" * 20},
        {"role": "user", "content": "last"},
    ]
    whole = load([messages], chat, tmp_path, limit=1000, too_long="error", template="chat")[0].token_ids
    (row,) = load([messages], chat, tmp_path, limit=len(whole) - 7, too_long=too_long, template="chat")
    kept = "012" if too_long == "keep_start" else "789"
    assert [m["content"] for m in row.prompt] == ["S" * 30, kept, "A" * 20, "last"]
    assert len(row.token_ids) == len(whole) - 7
    controls = [token for token in row.token_ids if token >= START]
    assert controls == [token for token in whole if token >= START] == [START, END] * 4 + [START]
    assert messages[1]["content"] == "0123456789"


def test_characters_are_not_parted(chat, tmp_path) -> None:
    """Each is three bytes, hence three tokens: of 10 tokens three whole ones fit."""
    text = "\u4e00\u4e8c\u4e09\u56db\u4e94"
    (start,) = load([text], chat, tmp_path, limit=10, too_long="keep_start")
    (end,) = load([text], chat, tmp_path, limit=10, too_long="keep_end")
    assert (start.prompt, end.prompt) == (text[:3], text[2:])
    assert list(end.token_ids) == plain_ids(chat, text[2:])


def test_text_that_stands_twice_in_the_template(chat, tmp_path) -> None:
    (row,) = load(["abcdefghij"], chat, tmp_path, limit=9, too_long="keep_start", template="{prompt} {prompt}")
    assert list(row.token_ids) == plain_ids(chat, "abcd abcd")


@pytest.mark.parametrize("too_long", ["keep_start", "keep_end"])
def test_a_template_over_the_limit_is_refused(too_long, chat, tmp_path) -> None:
    words = r"a\.jsonl:1: the prompt has more than --data.max-prompt-tokens 5 even without its longest text: raise it"
    with pytest.raises(InputError, match=words):
        load(["abcdef"], chat, tmp_path, limit=5, too_long=too_long, template="Question {prompt}")


def test_skip_and_error_are_what_they_were(chat, tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert [row.prompt for row in load(["abc", "a"], chat, tmp_path, limit=2, too_long="skip")] == ["a"]
    assert "skipped 1 of 2 rows whose prompt has more than 2 tokens" in caplog.text
    words = "a.jsonl:1: the prompt has 3 tokens, above --data.max-prompt-tokens 2: "
    words += "raise it, or give --data.too-long skip, keep_start"
    with pytest.raises(InputError, match=re.escape(words)):
        load(["abc", "a"], chat, tmp_path, limit=2, too_long="error")


def test_limits_of_every_size(chat, tmp_path) -> None:
    """From one character of text to all of it: never over the limit, never a token short of it."""
    text = "The quick brown fox"
    for limit in range(4, 4 + len(text)):
        for too_long in ("keep_start", "keep_end"):
            (row,) = load([text], chat, tmp_path, limit=limit, too_long=too_long, template="Q {prompt}?")
            kept = row.prompt
            assert len(row.token_ids) == limit == 3 + len(kept)
            assert text.startswith(kept) if too_long == "keep_start" else text.endswith(kept)

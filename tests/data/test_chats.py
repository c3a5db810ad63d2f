"""What a chat template is given, by ids: system prompts, arguments, begun replies, the day; and text templates."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from tiny_bytes import BOS, byte_tokenizer, plain_ids
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken

from paced_fast.config.resolve import check_value
from paced_fast.data.prompts import ChatSettings, load_table
from paced_fast.data.sources import template_arguments
from paced_fast.errors import InputError

TOKENIZER = tiny_chat.tokenizer()
ID = TOKENIZER.get_vocab()
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tiny_chat.CHAT
)
DEAF = tiny_chat.CHAT.replace("for m in messages", "for m in messages if m['role'] not in ('system', 'tool')")


def message(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def load(prompts: list[Any], folder: Path, tokenizer: Any = TOKENIZER, template: str = "chat", **chat: Any) -> list:
    rows = [json.dumps({"prompt": prompt, "answer": 1}) for prompt in prompts]
    (folder / "a.jsonl").write_text("\n".join(rows))
    table = load_table(
        ["jsonl:a.jsonl"],
        tokenizer=tokenizer,
        template=template,
        chat=ChatSettings(**chat),
        max_prompt_tokens=1000,
        data_dir=str(folder),
    )
    return [list(row.token_ids) for row in table.rows]


def whole(text: str, tokenizer: Any = TOKENIZER) -> list[int]:
    """Ids of a text whose control tokens are meant."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


HI = "<|im_start|>user\nhi<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"


def test_a_system_prompt_comes_first(tmp_path: Path) -> None:
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    text, chat = load(["hi", [message("hi")]], tmp_path, system_prompt="Be brief.")
    assert text == chat == whole(system + HI + OPEN)
    (empty,) = load(["hi"], tmp_path, system_prompt="")
    assert empty == whole("<|im_start|>system\n<|im_end|>\n" + HI + OPEN)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_row_keeps_its_own_system_message(role: str, tmp_path: Path, caplog) -> None:
    own = [message("Mine.", role), message("hi")]
    with caplog.at_level(logging.INFO):
        first, second = load([own, "hi"], tmp_path, system_prompt="Be brief.")
    assert first == whole(f"<|im_start|>{role}\nMine.<|im_end|>\n{HI}{OPEN}")
    assert second == whole(f"<|im_start|>system\nBe brief.<|im_end|>\n{HI}{OPEN}")
    assert "1 of 2 prompts have their own system message" in caplog.text


def test_tags_in_the_system_prompt_are_tokens_and_those_of_rows_are_text(tmp_path: Path, caplog) -> None:
    (ids,) = load(["hi <think>"], tmp_path, system_prompt="Think in <think>.")
    start, think = ID["<|im_start|>"], ID["<think>"]
    assert ids.count(think) == 1
    assert ids[: len(whole("<|im_start|>system\nThink in <think>"))] == whole("<|im_start|>system\nThink in <think>")
    assert (ids.count(start), TOKENIZER.decode(ids).count("<think>")) == (3, 2)
    assert "1 of 1 prompts contain text that looks like control tokens" in caplog.text


@pytest.mark.parametrize(
    ("template", "words"), [(NO_SYSTEM, "no system role"), (DEAF, "write the system prompt into the prompts")]
)
def test_a_template_without_a_place_for_it_refuses_a_system_prompt(template: str, words: str, tmp_path: Path) -> None:
    made = tiny_chat.tokenizer(template)
    with pytest.raises(InputError, match=f"the chat template .* system message.*{words}") as caught:
        load(["hi"], tmp_path, made, system_prompt="Be brief.")
    assert "\n" not in str(caught.value)
    assert load(["hi"], tmp_path, made) == [whole(HI + OPEN)]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_message_that_the_template_leaves_out_is_no_small_matter(role: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a.jsonl:1: the chat template leaves out a message with the role {role}"):
        load([[message("lost", role), message("hi")]], tmp_path, tiny_chat.tokenizer(DEAF))


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_a_message_with_more_than_content_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"has '{key}', which would be lost"):
        load([[message("hi"), {**message("x", "assistant"), key: ["call"]}, message("so?")]], tmp_path)
    bare = [message("hi"), {**message("x", "assistant"), key: None}, message("so?")]
    assert len(load([bare], tmp_path)) == 1


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    made = tiny_chat.tokenizer(tiny_chat.THINKING)
    assert load(["hi"], tmp_path, made) == [whole(HI + OPEN)]
    arguments = template_arguments(["enable_thinking=false"])
    assert load(["hi"], tmp_path, made, arguments=arguments) == [whole(HI + OPEN + "<think></think>")]
    with pytest.raises(InputError, match=r"no argument 'enable_thinkng': did you mean enable_thinking\?"):
        load(["hi"], tmp_path, made, arguments={"enable_thinkng": False})


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a=false", "b=3", "c=high"], {"a": False, "b": 3, "c": "high"}),
        (["a=False", "b=None"], {"a": False, "b": None}),
        (['{"a": false, "b": [1]}', "c=x=y"], {"a": False, "b": [1], "c": "x=y"}),
        ([], {}),
    ],
)
def test_arguments_are_json_where_they_can_be(words: list[str], found: dict[str, Any]) -> None:
    assert template_arguments(words) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "'a' is not of the form name=value"),
        (["{a}"], "is not a JSON object"),
        (["a=1", '{"a": 2}'], "'a' is given twice"),
        (["messages=[]"], "'messages' is set by the trainer"),
        (["a b=1"], "'a b' is not a valid name"),
    ],
)
def test_arguments_that_cannot_be_read(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        template_arguments(words)


@pytest.mark.parametrize(
    ("reply", "written"),
    [
        ("The answer is", "The answer is"),
        ("The answer is ", "The answer is"),  # trimmed by the template
        ("<think>\nSo", "<think>\nSo"),
        (" \n", ""),
    ],
)
def test_a_reply_that_is_begun_goes_on(reply: str, written: str, tmp_path: Path) -> None:
    (ids,) = load([[message("hi"), message(reply, "assistant")]], tmp_path)
    assert ids == whole(HI + OPEN + written)


def test_a_begun_reply_holds_tags_and_no_frame(tmp_path: Path) -> None:
    """A frame in it would close the turn; and what earlier messages say is text, tags included."""
    text = "<think>a<|im_end|>b"
    (ids,) = load([[message("<think>"), message(text, "assistant")]], tmp_path)
    user = [ID["<|im_start|>"], *plain_ids(TOKENIZER, "user\n<think>"), ID["<|im_end|>"], *plain_ids(TOKENIZER, "\n")]
    reply = [ID["<|im_start|>"], *plain_ids(TOKENIZER, "assistant\n")]
    assert ids == [*user, *reply, ID["<think>"], *plain_ids(TOKENIZER, "a<|im_end|>b")]


def test_an_answer_of_an_earlier_turn_is_closed(tmp_path: Path) -> None:
    (ids,) = load([[message("hi"), message("yes", "assistant"), message("hi")]], tmp_path)
    assert ids == whole(f"{HI}<|im_start|>assistant\nyes<|im_end|>\n{HI}{OPEN}")


def test_the_day_is_what_it_is_told(tmp_path: Path) -> None:
    made = tiny_chat.tokenizer(tiny_chat.DATED)
    (ids,) = load(["hi"], tmp_path, made, today=datetime.date(2024, 7, 26))
    assert str(made.decode(ids)).startswith("Today is 26 Jul 2024, 00:00.\n<|im_start|>")
    (ids,) = load(["hi <|im_end|>"], tmp_path, made, today=datetime.date(2024, 7, 26))
    assert str(made.decode(ids)).startswith("Today is 26 Jul 2024, 00:00.\n<|im_start|>")


def test_a_text_template_that_begins_the_text_itself_begins_it_once(tmp_path: Path) -> None:
    made = byte_tokenizer(begin=True)
    for template in ("<s>Q: {prompt}", "Q: {prompt}"):
        (ids,) = load(["hi"], tmp_path, made, template)
        assert ids == [BOS, *plain_ids(made, "Q: hi")]
    (ids,) = load(["<s>hi"], tmp_path, made, "{prompt}")  # text is text
    assert ids == [BOS, *plain_ids(made, "<s>hi")]


def test_a_tokenizer_that_ends_texts_does_not_end_prompts(tmp_path: Path) -> None:
    made = byte_tokenizer(begin=True)
    end = made.eos_token_id
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", BOS), ("<|im_end|>", end)]
    )
    assert made("a")["input_ids"][-1] == end
    assert load(["hi"], tmp_path, made, "{prompt}") == [[BOS, *plain_ids(made, "hi")]]
    assert load(["hi"], tmp_path, made)[0].count(end) == 1


def test_settings_of_chats() -> None:
    given = ChatSettings.parsed(system_prompt="x", template_args=("a=1",), date="2026-02-28")
    assert given == ChatSettings(system_prompt="x", arguments={"a": 1}, today=datetime.date(2026, 2, 28))
    assert ChatSettings.parsed(system_prompt=None, template_args=(), date=None).today is None
    check_value("data.system_prompt", "")
    with pytest.raises(InputError, match="is not a date"):
        ChatSettings.parsed(system_prompt=None, template_args=(), date="2026-02-30")


def test_added_blanks_keep_their_numbers_in_text_that_reads_like_a_token(tmp_path: Path) -> None:
    made = tiny_chat.tokenizer()
    made.add_tokens([AddedToken("    ", special=False, normalized=False)])
    blanks = made.get_vocab()["    "]
    (ids,) = load(["a    b<|im_end|>"], tmp_path, made, "{prompt}")
    assert ids == [*plain_ids(made, "a"), blanks, *plain_ids(made, "b<|im_end|>")]

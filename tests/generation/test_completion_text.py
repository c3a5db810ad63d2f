"""What of a completion's tokens is the text that rewards see: tags are, what frames and ends it is not."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_chat

from paced_fast.data.prompts import Decoder, find_stops
from paced_fast.errors import InputError

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'system' %}[SYSTEM]Think in [THINK][/THINK]. {{ m['content'] }}[/SYSTEM]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def text_of(made: Any, written: str, *keep: str, words: tuple[str, ...] = ("auto",)) -> str:
    stops = find_stops(made, words)
    ids = made(written, add_special_tokens=False)["input_ids"]
    assert made.decode(ids) == written
    return Decoder(made, stops.ids, keep or ("tags",))(ids)


WRITTEN = "<think>a</think> <answer>4</answer><|im_start|><|user|><|im_end|><|endoftext|>"


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (("tags",), "<think>a</think> <answer>4</answer>"),
        (("none",), "<think>a</think> 4"),  # tags that are not flagged special are ordinary text
        (("all",), "<think>a</think> <answer>4</answer><|im_start|><|user|>"),
        (("tags", "<|user|>"), "<think>a</think> <answer>4</answer><|user|>"),
        (("<answer>",), "<think>a</think> <answer>4"),
        (("tags", "<|im_end|>"), "<think>a</think> <answer>4</answer><|im_end|>"),
    ],
)
def test_tags_stay_and_frames_go(keep: tuple[str, ...], text: str) -> None:
    assert text_of(tiny_chat.tokenizer(), WRITTEN, *keep) == text


def test_tags_in_square_brackets_stay_although_a_system_message_shows_them() -> None:
    special = ("<|endoftext|>", "[INST]", "[/INST]", "[SYSTEM]", "[/SYSTEM]", "[THINK]", "[/THINK]")
    made = tiny_chat.tokenizer(MISTRAL, special=special)
    assert text_of(made, "[THINK]a[/THINK]4[/INST][INST]<|endoftext|>") == "[THINK]a[/THINK]4"


def test_a_frame_by_other_names_is_known_from_the_template() -> None:
    template = tiny_chat.CHAT.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")
    special = ("<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<answer>")
    made = tiny_chat.tokenizer(template, special=special)
    assert text_of(made, "<answer>4<end_of_turn>\n<start_of_turn>") == "<answer>4\n"


def test_a_stop_token_that_is_a_tag_goes_unless_it_is_kept() -> None:
    made = tiny_chat.tokenizer()
    words = ("auto", "</answer>")
    assert text_of(made, "<answer>4</answer>", words=words) == "<answer>4"
    assert text_of(made, "<answer>4</answer>", "tags", "</answer>", words=words) == "<answer>4</answer>"


@pytest.mark.parametrize(
    ("keep", "message"),
    [(("<thinks>",), r"did you mean <think>\?"), (("tags", "none"), "give only one of tags, all and none")],
)
def test_what_is_no_token_cannot_be_kept(keep: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_of(tiny_chat.tokenizer(), "4", *keep)


def test_the_first_blank_of_a_completion_is_its_own() -> None:
    """A tokenizer of words drops the blank before a text's first word; behind a prompt there is one."""
    made = tiny_chat.words(["<unk>", "</s>", "\u2581x", "y", "\u2581"])
    decode = Decoder(made, find_stops(made).ids)
    assert made.decode([2, 3]) == "xy"
    assert decode([2, 3, 1]) == " xy"
    assert decode([3, 2]) == "y x"
    assert decode([4, 2]) == "  x"
    assert decode([]) == decode([1]) == ""

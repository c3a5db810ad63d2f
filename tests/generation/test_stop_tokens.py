"""Where completions end: what a model's files, its tokenizer, its chat template and the settings say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from transformers import AutoModelForCausalLM

from paced_fast.data.prompts import declared_stop_ids, find_stops, stop_token_ids
from paced_fast.errors import InputError
from paced_fast.evaluate import EvaluateArguments, evaluate_target
from paced_fast.generation import Sampling, TransformersGenerator

TOKENIZER = tiny_chat.tokenizer()
ID = TOKENIZER.get_vocab()


def ids(*tokens: str) -> list[int]:
    return [ID[token] for token in tokens]


@pytest.mark.parametrize(
    ("declared", "also"),
    [
        (None, []),
        (ID["<|user|>"], ["<|user|>"]),
        (ids("<|endoftext|>", "<|user|>", "<|observation|>"), ["<|user|>", "<|observation|>"]),
        ([10_000], []),  # a row of padding, which no tokenizer makes
    ],
)
def test_generation_settings_add_to_the_end_of_text_and_of_turn(declared, also, tmp_path: Path) -> None:
    tiny_chat.save(tmp_path, TOKENIZER, stops=declared)
    stops = find_stops(TOKENIZER, declared=declared_stop_ids(str(tmp_path)))
    assert set(stops.ids) == set(ids("<|endoftext|>", "<|im_end|>", *also))
    assert (stops.text_end, stops.turn_end) == (ID["<|endoftext|>"], ID["<|im_end|>"])
    # What config.json keeps reads back to the same.
    assert find_stops(TOKENIZER, stops.names).ids == stops.ids


def test_the_configuration_and_its_text_part_count(tmp_path: Path) -> None:
    settings = {"eos_token_id": 1, "text_config": {"eos_token_id": [1, 106]}, "vision_config": {"eos_token_id": 7}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert declared_stop_ids(str(tmp_path)) == (1, 106)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [106, 50]}))
    assert declared_stop_ids(str(tmp_path)) == (106, 50, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{no", "is damaged"), ('{"eos_token_id": "</s>"}', "is not a token id"), ('{"eos_token_id": [true]}', "no")],
)
def test_damaged_settings_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        declared_stop_ids(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_completion_ends_where_transformers_ends_it(tmp_path: Path) -> None:
    """Greedy, so that both write the same: at each of the declared tokens, the first that comes."""
    made = tiny_chat.tokenizer(None)
    prompt = tuple(made("2+2=")["input_ids"])
    free = TransformersGenerator(_model(tiny_chat.save(tmp_path / "free", made)), stop_ids=[], max_batch_sequences=4)
    (endless,) = _greedy(free, prompt)
    later = list(dict.fromkeys(endless))[3]  # a token that comes first at a place of its own
    folder = tiny_chat.save(tmp_path / "model", made, stops=[ID["<|endoftext|>"], later, ID["<|user|>"]])
    stops = find_stops(made, declared=declared_stop_ids(folder))
    model = _model(folder)
    (own,) = _greedy(TransformersGenerator(model, stop_ids=stops.ids, max_batch_sequences=4), prompt)
    wanted = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0)[0]
    assert own == wanted[len(prompt) :].tolist()
    assert (own[-1], own.count(later), len(own)) == (later, 1, endless.index(later) + 1)


def _model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _greedy(generator: TransformersGenerator, prompt: tuple[int, ...]) -> list[list[int]]:
    found = generator.generate([prompt], Sampling(samples=1, max_completion_tokens=24, temperature=0.0))
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize("names", [("<|eot_id|>", "<|eom_id|>"), ("<turn|>",), ("<end_of_turn>",), ("<|end|>",)])
def test_names_that_say_so_end_a_turn(names: tuple[str, ...]) -> None:
    made = tiny_chat.tokenizer(None, special=("<|endoftext|>", *names))
    assert set(stop_token_ids(made)) == {made.get_vocab()[name] for name in ("<|endoftext|>", *names)}


def test_the_end_of_a_message_is_no_end_of_a_turn_of_several() -> None:
    special = ("<|endoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>")
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    )
    made = tiny_chat.tokenizer(template, special=special)
    assert set(stop_token_ids(made)) == {made.get_vocab()[name] for name in ("<|endoftext|>", "<|return|>")}


def test_what_the_chat_template_closes_an_answer_with_is_found_by_no_name() -> None:
    made = tiny_chat.tokenizer(tiny_chat.CHAT.replace("im_end", "user"))
    stops = find_stops(made)
    assert ID["<|user|>"] in stops.ids
    assert stops.turn_end == ID["<|user|>"]
    assert stops.text_end == ID["<|endoftext|>"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("</answer>",), ["</answer>"]),
        (("auto", "</answer>"), ["<|endoftext|>", "<|im_end|>", "</answer>"]),
        ((str(ID["<|user|>"]), "<|im_end|>"), ["<|user|>", "<|im_end|>"]),
    ],
)
def test_settings_replace_or_add(words: tuple[str, ...], found: list[str]) -> None:
    assert set(find_stops(TOKENIZER, words).ids) == set(ids(*found))


def test_one_byte_is_a_token_too() -> None:
    (newline,) = find_stops(TOKENIZER, ("\n",)).ids
    assert TOKENIZER.decode([newline]) == "\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("<|im_ends|>", r"'<\|im_ends\|>' is not a single token .*did you mean <\|im_end\|>\?"),
        ("Question:", "'Question:' is not a single token .*give the text or the id of a token"),
        ("9999", "stop token 9999: the tokenizer has no token with this id"),
        ("9" * 40, "no token with this id"),
    ],
)
def test_unknown_stop_tokens_are_refused_in_one_line(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_stops(TOKENIZER, ("auto", word))
    assert "\n" not in str(caught.value)


def test_a_model_may_say_what_its_tokenizer_does_not() -> None:
    made = tiny_chat.tokenizer(None)
    made.eos_token = None
    with pytest.raises(InputError, match="no eos_token"):
        find_stops(made)
    assert find_stops(made, declared=[ID["<|user|>"]]).text_end == ID["<|user|>"]
    assert find_stops(made, ("<|im_end|>",)).ids == (ID["<|im_end|>"],)


def test_evaluate_ends_where_the_model_says_and_rewards_do_not_see_it(tmp_path: Path, caplog) -> None:
    made = tiny_chat.tokenizer(None)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "2+2=", "answer": "4"}))
    free = TransformersGenerator(_model(tiny_chat.save(tmp_path / "free", made)), stop_ids=[], max_batch_sequences=4)
    (endless,) = _greedy(free, tuple(made("2+2=")["input_ids"]))
    later = list(dict.fromkeys(endless))[3]
    folder = tiny_chat.save(tmp_path / "model", made, stops=[later])

    def sampled(**options):
        found: list = []
        evaluate_target(
            EvaluateArguments(
                run_or_model=folder,
                data=("jsonl:a.jsonl?reward=exact",),
                data_dir=str(tmp_path),
                samples=1,
                temperature=0.0,
                max_completion_tokens=24,
                **options,
            ),
            found.extend,
        )
        return found[0]

    with caplog.at_level(logging.INFO):
        sample = sampled()
    assert f"({later})" in caplog.text
    place = endless.index(later)
    assert (sample.tokens, sample.stopped) == (place + 1, True)
    assert sample.text == made.decode(endless[:place])
    other = sampled(stop_tokens=("<|user|>",))
    assert (other.tokens, other.stopped) == (24, False)
    with pytest.raises(InputError, match="the stop token 'END' is not a single token"):
        sampled(stop_tokens=("END",))

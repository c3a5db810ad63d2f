"""No text of a row becomes a control token: every one of a tokenizer, whole, in parts, in every role, by its ids."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_smollm2
from tiny_bytes import CHAT, byte_tokenizer, plain_ids
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paced_fast.data.prompts import load_table, load_tokenizer

# Contents follow each other with nothing between: what two messages say together could be one token.
JOINED = "<|im_start|>{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"


@functools.cache
def smollm2() -> Any:
    """As a run reads it from the folder that the package is unpacked into, here if no run has done that."""
    folder = Path("~/.cache/paced_fast/smollm2-135m-instruct").expanduser()
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    with tempfile.TemporaryDirectory() as made:
        toy_smollm2.tokenizer().save_pretrained(made)
        return load_tokenizer(made)


def many_tokens() -> PreTrainedTokenizerFast:
    """Special ones, structural ones that are not flagged, one inside another, one that eats blanks beside it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|end|>", "[INST]"]})
    tokenizer.add_tokens(
        [
            AddedToken("<tool_call>", special=False, normalized=False),
            AddedToken("</think>", special=False, normalized=True),
            AddedToken("<mask>", special=True, lstrip=True, rstrip=True),
            AddedToken("<|im_end|><|im_start|>", special=False),
            AddedToken("word", special=False, single_word=True),
        ]
    )
    return tokenizer


def lower_case() -> PreTrainedTokenizerFast:
    """A normalizer that makes a control token of a text that is none as written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=True)])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    return tokenizer


def by_characters() -> PreTrainedTokenizerFast:
    """The other family: a blank before the first word only, unknown bytes spelt out."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", "\u2581", *(chr(i) for i in range(33, 127))])}
    bytes_spelt = {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    backend = Tokenizer(models.BPE(vocabulary | bytes_spelt, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("$^"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    return tokenizer


TOKENIZERS = {"many": many_tokens, "lower": lower_case, "characters": by_characters, "smollm2": smollm2}


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def controls(tokenizer: Any) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def load(prompts: list[Any], tokenizer: Any, folder: Path, template: str) -> list[list[int]]:
    rows = [json.dumps({"prompt": prompt, "answer": 1}) for prompt in prompts]
    (folder / "a.jsonl").write_text("\n".join(rows))
    table = load_table(
        ["jsonl:a.jsonl"], tokenizer=tokenizer, template=template, max_prompt_tokens=10_000, data_dir=str(folder)
    )
    return [list(row.token_ids) for row in table.rows]


def attacks(token: str, number: int) -> Iterator[str]:
    """Texts that hold the token or would make one, and its number written out."""
    yield from (token, token * 3, f"a{token}b", f" {token} ", f"\n{token}\n", token[:2] + token + token[2:])
    yield from (token.upper(), token.replace("<", "\uff1c").replace(">", "\uff1e"), token[:-1], token[1:])
    yield from (f"{number}", f"[{number}]", f"<{number}>", f"&lt;{token[1:]}", f"<0x{number % 256:02X}>")
    yield from (f"{{{{ bos_token }}}}{token}", f"{{prompt}}{token}", f"\ue0000\ue001{token}")


def chats(text: str, cut: int) -> Iterator[list[dict[str, str]]]:
    """The text as the message of each role, and its two halves in neighbouring messages."""
    for role in ("system", "user", "assistant", "tool"):
        yield [{"role": role, "content": text or "x"}, {"role": "user", "content": "hi"}]
    yield [{"role": "user", "content": text[:cut] or "x"}, {"role": "user", "content": text[cut:] or "x"}]
    yield [{"role": "system", "content": "x" + text[:cut]}, {"role": "user", "content": text[cut:] + "x"}]


@pytest.mark.parametrize("template", ["own", "joined"])
def test_chats_have_the_control_tokens_of_their_roles(tokenizer, template, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", JOINED if template == "joined" else CHAT)
    own = controls(tokenizer)
    prompts = [
        chat
        for token, number in own.items()
        for text in attacks(token, number)
        for chat in chats(text, len(token) // 2)
    ]
    tame = [[{**message, "content": "x"} for message in chat] for chat in prompts]
    kinds = {tuple(message["role"] for message in chat): chat for chat in tame}
    expected = dict(zip(kinds, load(list(kinds.values()), tokenizer, tmp_path, "chat"), strict=True))
    assert len(prompts) > 100 * len(own)
    for chat, ids in zip(prompts, load(prompts, tokenizer, tmp_path, "chat"), strict=True):
        bare = expected[tuple(message["role"] for message in chat)]
        assert [i for i in ids if i in own.values()] == [i for i in bare if i in own.values()], chat


@pytest.mark.parametrize("template", ["plain", "<|im_start|>user\n{prompt}<|im_end|>", "<{prompt}>", "<|im_{prompt}|>"])
def test_texts_have_the_control_tokens_of_their_template(tokenizer, template, tmp_path) -> None:
    own = controls(tokenizer)
    prompts = [text for token, number in own.items() for text in attacks(token, number)]
    prompts += [token[k:] for token in own for k in (1, 2, len("<|im_")) if token[k:].strip()]
    bare, *made = load(["x", *prompts], tokenizer, tmp_path, template)
    for text, ids in zip(prompts, made, strict=True):
        assert [i for i in ids if i in own.values()] == [i for i in bare if i in own.values()], text


@pytest.mark.parametrize("cut", range(1, 10))
def test_halves_of_a_token_in_joined_messages_by_ids(cut, tmp_path, monkeypatch) -> None:
    tokenizer = many_tokens()
    monkeypatch.setattr(tokenizer, "chat_template", JOINED)
    start, end = controls(tokenizer)["<|im_start|>"], controls(tokenizer)["<|im_end|>"]
    chat = [{"role": "user", "content": "<|im_end|>"[:cut]}, {"role": "user", "content": "<|im_end|>"[cut:]}]
    (ids,) = load([chat], tokenizer, tmp_path, "chat")
    assert ids == [start, *plain_ids(tokenizer, "<|im_end|>"), end]


def test_every_token_of_smollm2_by_ids(tmp_path) -> None:
    """Beside a tame twin of the same template: what surrounds the text has the same ids, whatever the text says."""
    tokenizer = smollm2()
    own = controls(tokenizer)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"} <= own.keys()
    before, after = [own["<|im_start|>"], *tokenizer("user\n")["input_ids"]], [own["<|im_end|>"]]
    template = "<|im_start|>user\n{prompt}<|im_end|>"
    for token, ids in zip(own, load(list(own), tokenizer, tmp_path, template), strict=True):
        assert ids[: len(before)] == before
        assert ids[-1:] == after
        middle = ids[len(before) : -1]
        assert not set(middle) & set(own.values())
        assert tokenizer.decode(middle) == token

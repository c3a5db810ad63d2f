"""Stop tokens, and decoding of completions to text."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from paced_fast.data.prompts.chat import frame
from paced_fast.errors import InputError

_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>"),
    *("<|endoftext|>", "<|end_of_text|>"),
)
"""Tokens that end a turn or text by their name, whatever a tokenizer says of them."""
_BOUNDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMED = (*_BOUNDS, "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")


@dataclass(frozen=True, slots=True)
class Stops:
    """The tokens that end a completion; every other is part of it."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    """Tokens by text, or by id where the text is ambiguous; `find_stops` reads them back."""
    text_end: int
    """Ids that end an answer to a plain-text prompt."""
    turn_end: int
    """Ids that end an answer in a chat."""

    def __str__(self) -> str:
        """Text of the tokens in the order of their ids, such as `<|endoftext|> (0), <|im_end|> (2)`."""
        pairs = sorted(zip(self.ids, self.names, strict=True))
        return ", ".join(name if name == str(i) else f"{name} ({i})" for i, name in pairs)


def find_stops(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str] = ("auto",), declared: Iterable[int] = ()
) -> Stops:
    """The stop tokens that `words` name, each a token's text or id.

    `auto` stands for the tokenizer's end of text, for `declared` (what the model's own settings say), for what the chat
    template closes an answer with, and for tokens whose name says so.

    Raises:
        InputError: a word is no token, or there is no stop token at all.
    """
    known, own = set(tokenizer.get_vocab().values()), frame(tokenizer).turn_end
    ends = _as_list(tokenizer.eos_token_id)
    ends += [token for token in declared if token in known and token not in ends]  # others are padding of the model's
    ids: list[int] = []
    for word in words:
        if word == "auto":
            ids += [*ends, *([] if own is None else [own]), *_named_ends(tokenizer)]
        else:
            ids.append(token_named(tokenizer, word, "the stop token"))
    if not ids or (not ends and tuple(words) == ("auto",)):
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token and the model declares no end token, so that "
            "no completion could end: set an eos_token, or name stop tokens"
        )
    ids = list(dict.fromkeys(ids))
    text_end = next((token for token in ends if token in ids), ids[0])
    return Stops(tuple(ids), tuple(_name(tokenizer, token) for token in ids), text_end, own if own in ids else text_end)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The stop tokens of a tokenizer by itself, its end-of-text token first. Raises InputError where it has none."""
    return find_stops(tokenizer).ids


def token_named(tokenizer: PreTrainedTokenizerBase, word: str, what: str) -> int:
    """The id of a token given by its text, or by its id in digits.

    Raises:
        InputError: there is no such token; the message begins with `what` it is to be.
    """
    if word.isascii() and word.isdigit():
        if len(word) > 12 or int(word) not in tokenizer.get_vocab().values():
            raise InputError(f"{what} {word[:80]}: the tokenizer has no token with this id")
        return int(word)
    vocabulary = tokenizer.get_vocab()
    if word in vocabulary:
        return vocabulary[word]
    try:
        ids: Any = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # the Rust library raises plain Exception for text that it cannot encode
        ids = []
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    near = difflib.get_close_matches(word, [token.content for token in tokenizer.added_tokens_decoder.values()], n=1)
    hint = f"did you mean {near[0]}?" if near else "give the text or the id of a token"
    raise InputError(f"{what} {word[:80]!r} is not a single token of the tokenizer {tokenizer.name_or_path!r}: {hint}")


class Decoder:
    """Token ids of a completion to the text that rewards see.

    Stop tokens and what frames a chat are left out, tags such as <think> stay; `keep` says which special tokens do.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], keep: Sequence[str] = ("tags",)
    ) -> None:
        """Raises InputError when a word of `keep` is neither `tags`, `all`, `none` nor a token."""
        self.tokenizer = tokenizer
        self.hidden = hidden_ids(tokenizer, stop_ids, keep)

    def __call__(self, token_ids: Sequence[int]) -> str:
        """The text; white space at its beginning is that of its tokens."""
        kept = [token for token in token_ids if token not in self.hidden]
        text = self._decode(kept)
        # A tokenizer of words takes the blank before its first word for its own, and drops it. Behind another token it
        # does not, and what is behind a prompt begins no text.
        if kept and str(self.tokenizer.convert_ids_to_tokens(kept[0])).startswith("\u2581"):
            first, double = self._decode(kept[:1]), self._decode([kept[0], *kept])
            if double.startswith(first):
                return double[len(first) :]
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a completion by the tokenizer's own stop tokens; a `Decoder` is faster for many."""
    return Decoder(tokenizer, stop_token_ids(tokenizer))(token_ids)


def hidden_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], keep: Sequence[str]) -> frozenset[int]:
    """Tokens that are not part of a completion's text, given `Decoder`'s words; blank tokens are text.

    A token that `keep` names by its text is text even where it ends the completion.
    """
    bounds, named = (
        {token for name in names for token in _as_list(getattr(tokenizer, name, None))} for names in (_BOUNDS, _NAMED)
    )
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {i: str(tokenizer.convert_ids_to_tokens(i)) for i in (*tokenizer.all_special_ids, *named)}
    modes = set(keep) & {"tags", "all", "none"}
    if len(modes) > 1:
        raise InputError(f"special tokens to keep are {' '.join(keep)}: give only one of tags, all and none")
    if "all" in modes:
        hidden = bounds
    elif "tags" in modes:
        hidden = named | frame(tokenizer).tokens | {i for i, text in special.items() if _is_control(text)}
    else:
        hidden = set(special) | frame(tokenizer).tokens
    hidden = {i for i in hidden if special.get(i, "x").strip()} | set(stop_ids)
    words = [word for word in keep if word not in modes]
    return frozenset(hidden - {token_named(tokenizer, word, "the kept special token") for word in words})


def _named_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    # Where a turn has several messages, as in harmony, <|end|> closes one of them and <|return|> the turn.
    names = [name for name in _TURN_ENDS if name != "<|end|>" or "<|return|>" not in added]
    return [added[name] for name in names if name in added]


def _is_control(text: str) -> bool:
    """Whether a special token is written as what frames turns and texts, <|name|>, rather than as a tag."""
    return text.startswith(("<|", "<\uff5c")) or text.endswith(("|>", "\uff5c>"))


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = str(tokenizer.convert_ids_to_tokens(token))
    plain = text.isprintable() and text.strip() and text != "auto" and not (text.isascii() and text.isdigit())
    return text if plain and tokenizer.get_vocab().get(text) == token else str(token)


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]

"""Tokenizers: made from an alphabet or loaded, where completions end, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from paced_fast.errors import InputError

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")


def character_tokenizer(alphabet: str, *, pad: str, stop: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character, ids in the order of `alphabet`; `pad` and `stop` are two of them.

    Raises:
        InputError: a character occurs twice, or `pad` or `stop` is not one character of the alphabet.
    """
    if len(set(alphabet)) != len(alphabet):
        twice = next(c for i, c in enumerate(alphabet) if c in alphabet[:i])
        raise InputError(f"the alphabet {alphabet!r} has {twice!r} twice")
    for name, character in (("pad", pad), ("stop", stop)):
        if len(character) != 1 or character not in alphabet:
            raise InputError(f"{name} {character!r} must be one character of the alphabet {alphabet!r}")
    # No unknown token: text outside the alphabet is an error, not a guess.
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(alphabet)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=stop, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub name; code of the repository is never run.

    Raises:
        InputError: there is none, or it needs its own code.
    """
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise InputError(f"no tokenizer at {name_or_path!r}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load the tokenizer {name_or_path!r}: {reason}") from error


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The end-of-text token first, then the end-of-turn tokens that the tokenizer knows.

    Raises:
        InputError: the tokenizer names no end-of-text token.
    """
    first: Any = tokenizer.eos_token_id
    if first is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token: set one, completions must be able to end"
        )
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids = [*(first if isinstance(first, list) else [first]), *(added[token] for token in _TURN_ENDS if token in added)]
    return tuple(dict.fromkeys(ids))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a completion without stop and other special tokens; a special token that is a space stays a space."""
    special = {token for token in tokenizer.all_special_ids if str(tokenizer.convert_ids_to_tokens(token)).strip()}
    hidden = special | set(stop_token_ids(tokenizer))
    kept = [token for token in token_ids if token not in hidden]
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

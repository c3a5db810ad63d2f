"""Tokenizers, made from an alphabet or loaded, and the stop tokens that a model's settings declare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from paced_fast.data import hub, tasks
from paced_fast.errors import InputError

_READ = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that a tokenizer is read from."""


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Characters of a model that reads and writes them one by one, in the order of their token ids."""

    characters: str
    pad: str
    stop: str


ALPHABETS = {
    "signed_sums": Alphabet(tasks.SIGNED_SUMS_ALPHABET, pad=tasks.SIGNED_SUMS_PAD, stop=tasks.SIGNED_SUMS_STOP),
    # NUL, which no prompt may contain, and the end of a line.
    "ascii": Alphabet("\0\n" + "".join(map(chr, range(32, 127))), pad="\0", stop="\n"),
}
"""Alphabets by the names that `--model.alphabet` knows."""


def character_tokenizer(alphabet: str, *, pad: str, stop: str) -> PreTrainedTokenizerFast:
    """Tokenizer with one token per character, ids in the order of `alphabet`; `pad` and `stop` are two of them.

    Raises:
        InputError: a character occurs twice, or `pad` or `stop` is not one character of the alphabet.
    """
    if len(set(alphabet)) != len(alphabet):
        twice = next(c for i, c in enumerate(alphabet) if c in alphabet[:i])
        raise InputError(f"the alphabet {alphabet!r} contains {twice!r} twice")
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


def alphabet_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Tokenizer of one of the `ALPHABETS`."""
    alphabet = ALPHABETS[name]
    return character_tokenizer(alphabet.characters, pad=alphabet.pad, stop=alphabet.stop)


def load_tokenizer(name_or_path: str, what: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub name; code of the repository is never run.

    `what` names the setting in an error about a model that is not there, such as `--model x`.

    Raises:
        InputError: there is none, or it needs its own code.
    """
    what = what or f"the tokenizer {name_or_path!r}"
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise InputError(f"{what}: {hub.no_folder(name_or_path)}: give the folder of a model or its hub id")
    place = path if path.is_dir() else hub.place_of(name_or_path, what)
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.suffix in _READ and (what := hub.pointer(file)):
            raise InputError(f"cannot load the tokenizer {name_or_path!r}: {file.name} is {what}")
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except hub.UNREADABLE as error:
        inside = [*sorted(path.glob("checkpoints/step_*/policy"), reverse=True), *path.glob("policy")]
        if inside:
            raise InputError(
                f"{name_or_path!r} is a run or a checkpoint, not a model: give the model in it, {inside[0]}"
            ) from error
        if not path.is_dir() and isinstance(error, OSError):  # no such repository, or none while offline
            raise InputError(
                f"{what}: {hub.no_folder(name_or_path)}, and the hub's client finds no such model "
                f"({hub.told(error)}): give the folder of a model or its hub id"
            ) from error
        raise InputError(
            f"cannot load the tokenizer {name_or_path!r} ({hub.told(error)}): give the folder of a complete model, "
            "with config.json, tokenizer.json and tokenizer_config.json"
        ) from error
    if not found.get_vocab().keys() - set(found.all_special_tokens):  # what some classes are without their files
        raise InputError(
            f"cannot load the tokenizer {name_or_path!r}: it has only special tokens, because its files are missing: "
            "download tokenizer.json and tokenizer_config.json of the model too"
        )
    return found


def declared_stop_ids(path: str) -> tuple[int, ...]:
    """Stop token ids that the model in a folder, or of a hub id, declares in its generation settings and configuration.

    Raises:
        InputError: a file is damaged, or names something that is no token id.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        try:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{found} is damaged ({error}): download the model again") from error
        parts = [settings, settings.get("text_config")] if isinstance(settings, dict) else []
        for part in parts:
            value = part.get("eos_token_id") if isinstance(part, dict) else None
            for token in value if isinstance(value, list) else [value]:
                if token is not None and (type(token) is not int or token < 0):
                    raise InputError(f"{found}: eos_token_id {json.dumps(value)[:80]} is not a token id: fix the file")
                ids += [] if token is None else [token]
    return tuple(dict.fromkeys(ids))


def check_embedded(
    sequences: Iterable[tuple[str, Sequence[int]]], tokenizer: PreTrainedTokenizerBase, rows: int
) -> None:
    """Refuse token ids that a model of `rows` embeddings cannot read; ids beyond them that never occur are fine.

    `sequences` are token ids, each with what names it in a message.

    Raises:
        InputError: naming both sizes, the first such token, and where it is.
    """
    size = num_ids(tokenizer)
    if size <= rows:
        return
    for where, ids in sequences:
        beyond = next((token for token in ids if token >= rows), None)
        if beyond is not None:
            raise InputError(
                f"the tokenizer has {size} ids, the model has {rows} embeddings, and {where or 'a prompt'} contains "
                f"the token {tokenizer.convert_ids_to_tokens(beyond)} ({beyond}): give the tokenizer that belongs to "
                "the model, or resize the model's embeddings to the tokenizer and save it"
            )


def num_embedded(model: PreTrainedModel) -> int:
    """Number of token ids that a model has an embedding for."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One above the largest id; more than `len(tokenizer)` where ids were left out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1

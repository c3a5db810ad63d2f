"""Prompts as the policy reads them: rows of data sources, templates and token ids.

Text of users is never encoded into control tokens: those of every row are compared with those of its bare template.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from paced_fast.batch import PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.sources import Draft, Messages, read_drafts

logger = logging.getLogger(__name__)

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
_ENCODE_CHUNK = 4096


def load_table(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_tokens: int,
    data_dir: str | None = None,
    too_long: Literal["error", "skip"] = "error",
) -> PromptTable:
    """All rows of all sources, in order, with the token ids that the policy reads.

    `template` is `chat` (the tokenizer's chat template with a generation prompt), `plain`, or text with
    `{prompt}` in it; a source's own `template=` comes first. Relative paths are looked up in `data_dir`, then in the
    working directory; without a `data_dir` also in `data` and `../shared/data`.

    Raises:
        InputError: a source, file, field, template or prompt length is wrong; the message names it and the remedy.
    """
    if not sources:
        raise InputError("no data source given: name at least one, such as rg:chain_sum?size=500")
    repeated = [spec for i, spec in enumerate(sources) if spec in sources[:i]]
    if repeated:
        raise InputError(
            f"data source {repeated[0]!r} is given twice: remove one, or give it another seed or other rows"
        )
    encoder = _Encoder(tokenizer)
    rows: list[PromptRow] = []
    for spec in sources:
        source, drafts = read_drafts(spec, data_dir)
        ids = encoder.encode([d.prompt for d in drafts], source.template or template, [d.where for d in drafts])
        kept = _within_limit(drafts, ids, max_prompt_tokens, too_long)
        if not kept:
            raise InputError(f"every row of {spec!r} is longer than max_prompt_tokens={max_prompt_tokens}: raise it")
        if len(kept) < len(drafts):
            skipped = len(drafts) - len(kept)
            logger.warning("%s: skipped %d of %d rows over %d tokens", spec, skipped, len(drafts), max_prompt_tokens)
        rows += kept
    return PromptTable(rows=tuple(rows))


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


def _within_limit(
    drafts: Sequence[Draft], ids: Sequence[list[int]], limit: int, too_long: Literal["error", "skip"]
) -> list[PromptRow]:
    rows = []
    for draft, token_ids in zip(drafts, ids, strict=True):
        if len(token_ids) <= limit:
            rows.append(
                PromptRow(
                    prompt=draft.prompt,
                    token_ids=tuple(token_ids),
                    reward=draft.reward,
                    slice=draft.slice,
                    columns=draft.columns,
                    where=draft.where,
                    demonstration=draft.demonstration,
                )
            )
        elif too_long == "error":
            raise InputError(
                f"{draft.where}: the prompt has {len(token_ids)} tokens and max_prompt_tokens is {limit}: "
                "raise it, or set too_long=skip"
            )
    return rows


class _Encoder:
    """Prompts to ids. Control tokens (added tokens that are not blank) come from templates only, never from a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.control = added
        self.control_ids = set(added.values())
        self.control_pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        begin = tokenizer.bos_token_id
        self.begins = begin is not None and tokenizer("", verbose=False)["input_ids"][:1] == [begin]
        self._bare: dict[tuple[str, ...], tuple[list[str | int], list[int]]] = {}
        self._plain: Tokenizer | None = None

    def encode(self, prompts: Sequence[str | Messages], template: str, wheres: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt in the template.

        The usual path is the tokenizer's own, in bulk. A row whose control tokens are not those of its bare template
        has text that reads like one; it is encoded again with that text as plain text.
        """
        template = "{prompt}" if template == "plain" else template
        if template == "chat" and not self.tokenizer.chat_template:
            name = self.tokenizer.name_or_path
            raise InputError(
                f"the tokenizer {name!r} has no chat template: give a template with {{prompt}} in it, or plain"
            )
        if template != "chat" and "{prompt}" not in template:
            raise InputError(f"template {template!r} must be chat, plain or text with {{prompt}} in it")
        texts = [self._render(prompt, template, where) for prompt, where in zip(prompts, wheres, strict=True)]
        result: list[list[int]] = []
        for start in range(0, len(texts), _ENCODE_CHUNK):
            result += self._bulk(texts[start : start + _ENCODE_CHUNK], wheres[start : start + _ENCODE_CHUNK])
        for i, ids in enumerate(result):
            parts, expected = self._bare_template(prompts[i], template)
            if self._controls(ids) != expected:
                result[i] = self._encode_plainly(prompts[i], texts[i], parts, expected, wheres[i])
        if template != "chat" and self.begins:
            begin = cast(int, self.tokenizer.bos_token_id)
            return [[begin, *ids] for ids in result]
        return result

    def _render(self, prompt: str | Messages, template: str, where: str) -> str:
        if template != "chat":
            if not isinstance(prompt, str):
                raise InputError(f"{where}: the prompt is a chat of {len(prompt)} messages: use template=chat")
            return template.replace("{prompt}", prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of their own
            raise InputError(
                f"{where}: the chat template refuses the prompt: {' '.join(str(error).split())}"
            ) from error
        return str(text)

    def _bulk(self, texts: Sequence[str], wheres: Sequence[str]) -> list[list[int]]:
        try:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
            return cast(list[list[int]], encoded["input_ids"])
        except Exception as error:  # the Rust library raises plain Exception
            if len(texts) == 1:
                raise InputError(f"{wheres[0]}: the tokenizer cannot encode {texts[0]!r}: {error}") from error
            middle = len(texts) // 2
            return self._bulk(texts[:middle], wheres[:middle]) + self._bulk(texts[middle:], wheres[middle:])

    def _bare_template(self, prompt: str | Messages, template: str) -> tuple[list[str | int], list[int]]:
        """The template as pieces of text and message numbers, and the control tokens of its pieces."""
        roles = ("user",) if isinstance(prompt, str) else tuple(message["role"] for message in prompt)
        key = (template, *roles)
        if key not in self._bare:
            if template == "chat":
                marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
                pieces = re.split("\ue000([0-9]+)\ue001", self._render(marked, template, "the bare template"))
            else:
                pieces = re.split(r"\{(prompt)\}", template)
            parts = [piece if i % 2 == 0 else int(piece.replace("prompt", "0")) for i, piece in enumerate(pieces)]
            texts = [part for part in parts if isinstance(part, str)]
            controls = [
                token
                for ids in self._bulk(texts, [f"template {template!r}"] * len(texts))
                for token in self._controls(ids)
            ]
            self._bare[key] = parts, controls
        return self._bare[key]

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control_ids]

    def _encode_plainly(
        self, prompt: str | Messages, text: str, parts: Sequence[str | int], expected: list[int], where: str
    ) -> list[int]:
        """The ids with control tokens from the template's pieces only."""
        contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        for users in (contents, [content.strip() for content in contents]):
            if text == "".join(part if isinstance(part, str) else users[part] for part in parts):
                break
        else:
            raise InputError(
                f"{where}: the text holds a control token and the chat template rewrites it: clean the row"
            )
        ids: list[int] = []
        pending = ""
        for part in parts:
            if isinstance(part, int):
                pending += users[part]
                continue
            begin = 0
            for match in self.control_pattern.finditer(part):
                ids += [*self._encode_text(pending + part[begin : match.start()]), self.control[match[0]]]
                pending, begin = "", match.end()
            pending += part[begin:]
        ids += self._encode_text(pending)
        if self._controls(ids) != expected:
            raise InputError(f"{where}: the tokenizer can only read some of the text as a control token: clean the row")
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""
        if self._plain is None:
            backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None:
                encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
                return cast(list[int], encoded["input_ids"])
            state = json.loads(backend.to_str())
            state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].strip()]
            state["truncation"] = state["padding"] = None
            self._plain = Tokenizer.from_str(json.dumps(state))
        return cast(Any, self._plain).encode(text, add_special_tokens=False).ids if text else []

"""Encode prompts with a template into token ids. Control tokens come from templates only, never from the text of a
row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from paced_fast.data.prompts.chat import ChatSettings, check_chat_settings, is_begun_reply, render, with_system
from paced_fast.data.prompts.stop_tokens import hidden_ids
from paced_fast.data.sources import BadRow, Messages, is_template
from paced_fast.errors import InputError

_ENCODE_CHUNK = 4096


class Encoder:
    """Encodes prompts into ids. Control tokens (added tokens that are not blank) come from templates only, never from a
    row.

    One exception: where the last message of a chat begins the reply, tags such as <think> in it are the tokens that the
    policy writes itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatSettings | None = None) -> None:
        self.tokenizer, self.chat = tokenizer, chat or ChatSettings()
        self.read_as_text = 0
        """Prompts so far whose text reads like a control token."""
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.control = added
        self.control_ids = set(added.values())
        self.control_pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        begin = tokenizer.bos_token_id
        self.begins = begin is not None and tokenizer("", verbose=False)["input_ids"][:1] == [begin]
        frame = hidden_ids(tokenizer, (), ("tags",))
        self.tags = {content for content, i in added.items() if i not in frame}
        self._is_checked = False
        self._bare: dict[tuple[str | bool, ...], tuple[list[str | int], list[int]]] = {}
        self._plain: dict[bool, Tokenizer] = {}
        self._numbers: dict[bool, dict[int, int]] = {}

    def encode(
        self,
        prompts: Sequence[str | Messages],
        template: str,
        wheres: Sequence[str],
        *,
        refuse: Callable[[BadRow], None],
    ) -> list[list[int] | None]:
        """Encode each prompt in the template; None for one that cannot be encoded, after `refuse` was called with it.

        The usual path is the tokenizer's own, in bulk. A row whose control tokens differ from those of its bare
        template has text that looks like one; it is encoded again with that text as plain text.
        """
        template = "{prompt}" if template == "plain" else template
        if template == "chat" and not self.tokenizer.chat_template:
            name = self.tokenizer.name_or_path
            raise InputError(
                f"the tokenizer {name!r} has no chat template: give a template with {{prompt}} in it, or plain"
            )
        if template == "chat" and not self._is_checked:
            check_chat_settings(self.tokenizer, self.chat)
            self._is_checked = True
        if not is_template(template):
            raise InputError(f"template {template!r} must be chat, plain or text with {{prompt}} in it")
        result: list[list[int] | None] = []
        for start in range(0, len(prompts), _ENCODE_CHUNK):
            end = start + _ENCODE_CHUNK
            result += self._chunk(prompts[start:end], template, wheres[start:end], refuse)
        return result

    def shorten(
        self, prompt: str | Messages, ids: list[int], template: str, *, limit: int, keep: str, where: str
    ) -> tuple[str | Messages, list[int]]:
        """The prompt with its text cut to at most `limit` tokens, and its ids; `keep` is `start` or `end`.

        Of a chat the longest user message is cut. The template, and with it every control token, stays whole.

        Raises:
            InputError: too little would be left.
        """
        index = 0 if isinstance(prompt, str) else _longest_user_message(prompt)
        text = prompt if isinstance(prompt, str) else prompt[index]["content"]
        while len(ids) > limit:
            excess = -(-(len(ids) - limit) // max(1, template.count("{prompt}")))
            text = _cut(text, self._spans(text), excess, keep)
            if not text.strip():
                raise InputError(
                    f"{where}: the prompt has more than --data.max-prompt-tokens {limit} even without its longest "
                    "text: raise it, or give --data.too-long skip"
                )
            prompt = text if isinstance(prompt, str) else _with_content(prompt, index, text)
            (shorter,) = self.encode([prompt], template, [where], refuse=_raise)
            assert shorter is not None
            ids = shorter
        return prompt, ids

    def _chunk(
        self,
        prompts: Sequence[str | Messages],
        template: str,
        wheres: Sequence[str],
        refuse: Callable[[BadRow], None],
    ) -> list[list[int] | None]:
        texts: dict[int, str] = {}
        for i, (prompt, where) in enumerate(zip(prompts, wheres, strict=True)):
            try:
                texts[i] = self._render(prompt, template, where)
            except BadRow as bad:
                refuse(bad)
        result: list[list[int] | None] = [None] * len(prompts)
        encoded = self._bulk(list(texts.values()), [wheres[i] for i in texts], refuse)
        for i, ids in zip(texts, encoded, strict=True):
            if ids is None:
                continue
            try:
                ids = self._with_controls_of_template(prompts[i], template, texts[i], ids, wheres[i])
            except BadRow as bad:
                refuse(bad)
                continue
            begin = self.tokenizer.bos_token_id
            if template != "chat" and self.begins and ids[:1] != [begin]:  # unless the template wrote it
                ids = [cast(int, begin), *ids]
            result[i] = ids
        return result

    def _with_controls_of_template(
        self, prompt: str | Messages, template: str, text: str, ids: list[int], where: str
    ) -> list[int]:
        """Encode a rendered prompt; encoded again if its text looks like control tokens."""
        parts, expected = self._bare_template(prompt, template, where)
        messages = prompt if template != "chat" else self._messages(prompt)
        has_begun = is_begun_reply(messages, template)
        if has_begun:
            begun = self._encode_text(cast(Messages, messages)[-1]["content"], with_tags=True)
            expected = [*expected, *self._controls(begun)]
        if self._controls(ids) == expected:
            return ids
        self.read_as_text += 1
        return self._encode_plainly(messages, text, parts, expected, where, has_begun=has_begun)

    def _render(self, prompt: str | Messages, template: str, where: str) -> str:
        if template != "chat":
            if not isinstance(prompt, str):
                cure = "give --data.template chat"
                if not self.tokenizer.chat_template:
                    cure = (
                        "the tokenizer has no chat template: give a model that has one, or name the text of one "
                        "message, as in prompt=messages.0.content"
                    )
                count = f"{len(prompt)} message{'' if len(prompt) == 1 else 's'}"
                raise InputError(f"{where}: the prompt is a chat of {count}: {cure}")
            return template.replace("{prompt}", prompt)
        return render(self.tokenizer, self._messages(prompt), self.chat, where)

    def _messages(self, prompt: str | Messages) -> Messages:
        """A prompt as the chat template gets it: a system prompt first, and no blank reply, which begins nothing."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            messages = messages[:-1]
        return with_system(messages, self.chat.system_prompt)

    def _bulk(
        self, texts: Sequence[str], wheres: Sequence[str], refuse: Callable[[BadRow], None]
    ) -> Sequence[list[int] | None]:
        if not texts:
            return []
        try:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
            return cast(list[list[int]], encoded["input_ids"])
        except Exception as error:  # the Rust library raises plain Exception
            if len(texts) == 1:
                refuse(BadRow(f"{wheres[0]}: the tokenizer cannot encode {texts[0][:200]!r}: {error}"))
                return [None]
            middle = len(texts) // 2
            return [
                *self._bulk(texts[:middle], wheres[:middle], refuse),
                *self._bulk(texts[middle:], wheres[middle:], refuse),
            ]

    def _bare_template(self, prompt: str | Messages, template: str, where: str) -> tuple[list[str | int], list[int]]:
        """The template as pieces of text and message numbers, and the control tokens of its pieces.

        Raises BadRow when the template leaves a message out.
        """
        messages = self._messages(prompt) if template == "chat" else []
        # The system prompt of the settings is part of the template, one of a row is text of the row.
        is_own = bool(messages) and messages[0]["role"] == "system" and not self._has_system(prompt)
        key = (template, is_own, *(message["role"] for message in messages))
        if key not in self._bare:
            if template == "chat":
                marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
                marked[: int(is_own)] = messages[: int(is_own)]
                bare = render(self.tokenizer, marked, self.chat, "the bare template")
                pieces = re.split("\ue000([0-9]+)\ue001", bare)
            else:
                pieces = re.split(r"\{(prompt)\}", template)
            parts = [piece if i % 2 == 0 else int(piece.replace("prompt", "0")) for i, piece in enumerate(pieces)]
            texts = [part for part in parts if isinstance(part, str)]
            controls = [
                token
                for ids in self._bulk(texts, [f"template {template!r}"] * len(texts), _raise)
                for token in self._controls(ids or [])
            ]
            self._bare[key] = parts, controls
        parts, controls = self._bare[key]
        for i, message in enumerate(messages):
            if i >= int(is_own) and i not in parts and message["content"].strip():
                raise BadRow(
                    f"{where}: the chat template leaves out a message with the role {message['role']}: fix the row"
                )
        return parts, controls

    @staticmethod
    def _has_system(prompt: str | Messages) -> bool:
        return not isinstance(prompt, str) and prompt[0]["role"] == "system"

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control_ids]

    def _encode_plainly(
        self,
        prompt: str | Messages,
        text: str,
        parts: Sequence[str | int],
        expected: list[int],
        where: str,
        *,
        has_begun: bool,
    ) -> list[int]:
        """The ids with control tokens from the template's pieces only, and tags from a reply that `has_begun`."""
        contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        for users in (contents, [content.strip() for content in contents]):
            if text == "".join(part if isinstance(part, str) else users[part] for part in parts):
                break
        else:
            raise BadRow(
                f"{where}: the text contains a control token, and the chat template rewrites the text: fix the row"
            )
        ids: list[int] = []
        pending = ""
        for part in parts:
            if isinstance(part, int):
                if has_begun and part == len(contents) - 1:
                    ids += [*self._encode_text(pending), *self._encode_text(users[part], with_tags=True)]
                    pending = ""
                else:
                    pending += users[part]
                continue
            begin = 0
            for match in self.control_pattern.finditer(part):
                ids += [*self._encode_text(pending + part[begin : match.start()]), self.control[match[0]]]
                pending, begin = "", match.end()
            pending += part[begin:]
        ids += self._encode_text(pending)
        if self._controls(ids) != expected:
            raise BadRow(f"{where}: the tokenizer reads part of the text only as a control token: fix the row")
        return ids

    def _encode_text(self, text: str, *, with_tags: bool = False) -> list[int]:
        """Ids of text in which nothing is a control token, `with_tags` but for those that a policy writes itself."""
        plain = self._plain_tokenizer(with_tags=with_tags)
        if plain is None:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            return cast(list[int], encoded["input_ids"])
        numbers = self._numbers[with_tags]
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids if text else []
        return [numbers.get(token, token) for token in ids]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """First and last character of each token of a text as plain text; single characters where the tokenizer does
        not report offsets."""
        plain = self._plain_tokenizer()
        if plain is None:
            return [(i, i + 1) for i in range(len(text))]
        return plain.encode(text, add_special_tokens=False).offsets

    def _plain_tokenizer(self, *, with_tags: bool = False) -> Any:
        """The tokenizer without control tokens, None when it is not one of the Rust library."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if with_tags not in self._plain and backend is not None:
            kept = self.tags if with_tags else set[str]()
            state = json.loads(backend.to_str())
            state["added_tokens"] = [
                token for token in state["added_tokens"] if not token["content"].strip() or token["content"] in kept
            ]
            state["truncation"] = state["padding"] = None
            self._plain[with_tags] = plain = Tokenizer.from_str(json.dumps(state))
            # Tokens behind one that is left out move up: these are their own numbers.
            names = [(token["id"], token["content"]) for token in state["added_tokens"]]
            self._numbers[with_tags] = {cast(int, plain.token_to_id(name)): number for number, name in names}
        return self._plain.get(with_tags)


def _cut(text: str, spans: Sequence[tuple[int, int]], excess: int, keep: str) -> str:
    """The text without its last (`keep` is start) or first `excess` tokens; empty when it has no more than those.

    A character whose tokens would be parted goes as a whole, and at least one goes.
    """
    if len(spans) <= excess:
        return ""
    if keep == "start":
        return text[: min(spans[len(spans) - excess][0], len(text) - 1)]
    return text[max(spans[excess - 1][1], 1) :]


def _longest_user_message(messages: Messages) -> int:
    users = [i for i, message in enumerate(messages) if message["role"] == "user"] or [len(messages) - 1]
    return max(users, key=lambda i: (len(messages[i]["content"]), i))


def _with_content(messages: Messages, index: int, text: str) -> Messages:
    return [message if i != index else {**message, "content": text} for i, message in enumerate(messages)]


def _raise(bad: BadRow) -> None:
    raise bad

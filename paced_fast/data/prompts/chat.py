"""The chat template of a tokenizer: its arguments besides the messages, and the tokens that it writes around them."""

from __future__ import annotations

import datetime
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from paced_fast.data.sources import BadRow, Messages, parse_day, template_arguments
from paced_fast.errors import InputError

_FIRST, _SECOND, _THIRD = "\ue010", "\ue011", "\ue012"  # private characters, which no template writes by itself

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
"""A template's question for the present time in a form that it writes down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSettings:
    """Arguments of a chat template besides the messages of a row."""

    system_prompt: str | None = None
    """System message of chats that have none of their own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the template by name."""
    today: datetime.date | None = None
    """Date that the template sees as today, at midnight; None for the real date."""

    @classmethod
    def parsed(cls, *, system_prompt: str | None, template_args: Sequence[str], date: str | None) -> ChatSettings:
        """Parse a run's settings. Raises InputError for an argument or a day that cannot be read."""
        today = None if date is None else parse_day(date)
        return cls(system_prompt=system_prompt, arguments=template_arguments(template_args), today=today)

    def template_options(self, template: str) -> dict[str, Any]:
        """Keyword arguments for `apply_chat_template`: the template's arguments, and the template with its clock fixed
        at `today`.

        Its questions for the time are answered in its text, since transformers from 5.24 on hands it plain data only;
        before, one that it puts together itself is answered by a function.
        """
        if self.today is None or "strftime_now" not in template:
            return dict(self.arguments)
        midnight = datetime.datetime.combine(self.today, datetime.time())
        stopped = _CLOCK.sub(lambda found: f"{found[1]}{midnight.strftime(found[2])}{found[1]}", template)
        return {**self.arguments, "chat_template": stopped, "strftime_now": midnight.strftime}


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template itself, the one called default where there are several; empty where there is none."""
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def reads_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the present time."""
    return "strftime_now" in template_text(tokenizer)


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """Prepend the system prompt to messages that have neither a system nor a developer message."""
    if system_prompt is None or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def check_chat_settings(tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> None:
    """Check that the chat template uses the arguments and the system message.

    Raises:
        InputError: the template never reads an argument, refuses a system message, or leaves it out.
    """
    names = sorted(set(re.findall(r"[A-Za-z_]\w*", template_text(tokenizer))))
    for name in settings.arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise InputError(f"the chat template has no argument {name!r}: {hint}")
    if settings.system_prompt is not None:
        chat = [{"role": "system", "content": _FIRST}, {"role": "user", "content": _SECOND}]
        try:
            text = render(tokenizer, chat, settings, "it")
        except BadRow as error:
            raise InputError(
                f"the chat template refuses a system message ({error}): leave the system prompt out, or write it into "
                "the prompts"
            ) from error
        if _FIRST not in text:
            raise InputError(
                "the chat template leaves out the system message: write the system prompt into the prompts"
            )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, settings: ChatSettings, where: str, *, reply: bool = True
) -> str:
    """Render a chat, open for a reply where there is to be one.

    A chat whose last message is the assistant's stays open at its end, so that the reply goes on with it.

    Raises:
        BadRow: the template refuses the messages.
    """
    is_begun = reply and messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=reply and not is_begun,
            continue_final_message=is_begun,
            **settings.template_options(template_text(tokenizer)),
        )
    except Exception as error:  # templates are programs of their own
        raise BadRow(f"{where}: the chat template refuses the prompt: {' '.join(str(error).split())[:300]}") from error
    return str(text)


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens that a chat template puts around messages."""

    turn_end: int | None
    """Token that closes a message of the assistant."""
    tokens: frozenset[int]
    """That token, and those that open and close a message of the user."""


def frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Added tokens that the chat template writes around messages; empty without a template, or when it refuses a plain
    chat.

    The opening of a reply does not count: templates may begin an answer there, as with <think>.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    if not template_text(tokenizer) or not added:
        return Frame(None, frozenset())
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
    show = functools.partial(render, tokenizer, settings=ChatSettings(), where="", reply=False)
    turn_end, tokens = None, set[int]()
    user, answer = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _SECOND}
    try:
        behind = show([user, answer]).rpartition(_SECOND)[2].lstrip()
        if first := pattern.match(behind):
            turn_end = added[first[0]]
            tokens.add(turn_end)
        between, _, after = show([user, answer, {"role": "user", "content": _THIRD}]).rpartition(_THIRD)
        between = between.rpartition(_SECOND)[2]
        tokens.update(added[found] for found in pattern.findall(between + after))
    except BadRow:
        return Frame(turn_end, frozenset(tokens))  # raised by templates that need more than a plain chat
    return Frame(turn_end, frozenset(tokens))


def is_begun_reply(prompt: str | Sequence[Mapping[str, str]], template: str) -> bool:
    """Whether the prompt ends with the beginning of its reply."""
    if template != "chat" or isinstance(prompt, str):
        return False
    return prompt[-1]["role"] == "assistant"

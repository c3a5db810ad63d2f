"""The prompt table of a run: rows of all sources, encoded, within the token limit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from paced_fast.data.prompts.chat import ChatSettings, with_system
from paced_fast.data.prompts.encoder import Encoder
from paced_fast.data.records import PromptRow, PromptTable
from paced_fast.data.sources import BadRows, Check, Draft, Messages, read_drafts
from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

TooLong = Literal["error", "skip", "keep_start", "keep_end"]


def load_table(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    chat: ChatSettings | None = None,
    max_prompt_tokens: int,
    data_dir: str | None = None,
    too_long: TooLong = "error",
    bad_rows: Literal["error", "skip"] = "error",
    max_bad_share: float = 0.01,
    check: Check | None = None,
    reward: str | None = None,
    limit_option: str = "--data.max-prompt-tokens",
) -> PromptTable:
    """All rows of all sources, in order, with the token ids that the policy reads.

    `template` is `chat` (the tokenizer's chat template with a generation prompt), `plain`, or text with
    `{prompt}` in it; a source's own `template=` comes first. `chat` is what the chat template gets beside the messages;
    a row's own system message comes before that of `chat`. Relative paths are looked up in `data_dir`, then in the
    working directory; without a `data_dir` also in `data` and in the folders of PACED_FAST_DATA.

    A prompt of more than `max_prompt_tokens` is refused, left out, or its text is cut at the end (`keep_start`) or at
    the beginning (`keep_end`); of a chat the longest user message is cut. The template stays whole.

    `check(reward, columns)` says what keeps a row from ever being judged, and so makes it a bad row. The first bad row
    is an error, or such rows are left out and counted up to `max_bad_share` of each source. `reward` judges the
    rows of the sources that name none; without it, the format of the rows says which. `limit_option` is the
    option of `max_prompt_tokens` in errors.

    Raises:
        InputError: a source, file, field, template, row or prompt length is wrong; the message names it and the remedy.
    """
    if not sources:
        raise InputError("no data source is given: give at least one, such as rg:chain_sum?size=500")
    repeated = [spec for i, spec in enumerate(sources) if spec in sources[:i]]
    if repeated:
        raise InputError(
            f"data source {repeated[0]!r} is given twice: remove one, or give it another seed or other rows"
        )
    encoder = Encoder(tokenizer, chat)
    bad = BadRows(bad_rows, max_bad_share)
    rows: list[PromptRow] = []
    for spec in sources:
        source, drafts = read_drafts(spec, data_dir, bad_rows=bad, check=check, reward=reward)
        prompts, wheres = [draft.prompt for draft in drafts], [draft.where for draft in drafts]
        written, before = source.template or template, encoder.read_as_text
        encoded = encoder.encode(prompts, written, wheres, refuse=bad.add)
        _tell(spec, prompts, encoder.read_as_text - before, chat if written == "chat" else None)
        good = [(draft, ids) for draft, ids in zip(drafts, encoded, strict=True) if ids is not None]
        bad.settle(spec, len(good))
        if not good:
            raise InputError(f"every row of {spec!r} is bad: fix the rows, or name the right fields")
        kept = _within_limit(encoder, good, written, max_prompt_tokens, too_long, limit_option)
        if not kept:
            raise InputError(f"every row of {spec!r} is longer than {limit_option} {max_prompt_tokens}: raise it")
        if len(kept) < len(good):
            skipped = len(good) - len(kept)
            logger.warning(
                "%s: skipped %d of %d rows whose prompt has more than %d tokens",
                *(spec, skipped, len(good), max_prompt_tokens),
            )
        cut = sum(len(ids) > max_prompt_tokens for _, ids in good)
        if cut and too_long in ("keep_start", "keep_end"):
            side = "end" if too_long == "keep_start" else "beginning"
            logger.warning("%s: cut the %s of %d of %d prompts", spec, side, cut, len(good))
        rows += [_row(draft, ids, in_chat=written == "chat") for draft, ids in kept]
    return PromptTable(rows=tuple(rows))


def _tell(spec: str, prompts: Sequence[str | Messages], as_text: int, chat: ChatSettings | None) -> None:
    """Log facts about a source's prompts that a user may not expect."""
    if as_text:
        logger.warning(
            "%s: %d of %d prompts contain text that looks like control tokens, which is encoded as plain text; for "
            "prompts that already include a chat template, give the messages and --data.template chat instead",
            *(spec, as_text, len(prompts)),
        )
    if chat is not None and chat.system_prompt is not None:
        own = sum(with_system(prompt, "") is prompt for prompt in prompts if not isinstance(prompt, str))
        if own:
            logger.info(
                "%s: %d of %d prompts have their own system message, which is used instead of --data.system-prompt",
                *(spec, own, len(prompts)),
            )


def _within_limit(
    encoder: Encoder,
    drafts: Sequence[tuple[Draft, list[int]]],
    template: str,
    limit: int,
    too_long: TooLong,
    option: str,
) -> list[tuple[Draft, list[int]]]:
    """The rows of at most `limit` tokens, those that were cut included."""
    kept: list[tuple[Draft, list[int]]] = []
    for draft, ids in drafts:
        if len(ids) <= limit:
            kept.append((draft, ids))
        elif too_long == "error":
            others = ", or give --data.too-long skip, keep_start or keep_end" if option.startswith("--data.") else ""
            raise InputError(
                f"{draft.where}: the prompt has {len(ids)} tokens, above {option} {limit}: raise it{others}"
            )
        elif too_long != "skip":
            prompt, ids = encoder.shorten(
                draft.prompt, ids, template, limit=limit, keep=too_long.removeprefix("keep_"), where=draft.where
            )
            kept.append((dataclasses.replace(draft, prompt=prompt), ids))
    return kept


def _row(draft: Draft, ids: Sequence[int], *, in_chat: bool) -> PromptRow:
    return PromptRow(
        prompt=draft.prompt,
        token_ids=tuple(ids),
        reward=draft.reward,
        slice=draft.slice,
        columns=draft.columns,
        where=draft.where,
        demonstration=draft.demonstration,
        in_chat=in_chat,
    )

"""Rollouts of a step that are recorded for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paced_fast.data.records import PromptTable, StepResult

_SHOWN_TOKENS = 512
"""Number of first tokens of a shown completion that are kept one by one."""
_WINDOW = 8
"""Tokens decoded together to find the text that the last one adds: enough for any character and for spaces between
words."""


def shown_rollouts(
    result: StepResult,
    host: dict[str, Any],
    values: Sequence[float] | None,
    table: PromptTable,
    *,
    step: int,
    limit: int,
    decode: Callable[[list[int]], str],
) -> list[dict[str, Any]]:
    """Up to `limit` rollouts of the step, spread over its groups, and one replayed rollout if there is one.

    `values` are the estimates of the fresh groups' prompts, None where the head does not predict accuracy.
    """
    groups = result.fresh.groups
    total = sum(len(group.completions) for group in groups)
    size = total // max(1, len(groups))
    shown = []
    number = min(limit, total)
    for k in range(number):
        g, j = divmod(k * total // number, size)
        group, value = groups[g], None if values is None else values[g]
        ids, logprobs = group.completions[j].token_ids, group.completions[j].logprobs
        shown.append((group.prompt_index, ids, logprobs, group.rewards[j], value, None))
    if "replayed_ids" in host and limit > 0:
        value = host["replayed_value"] if values is not None else None
        age = step - host["replayed_version"]
        logprobs, reward = host["replayed_logprobs"], host["replayed_reward"]
        shown.append((host["replayed_prompt"], host["replayed_ids"], logprobs, reward, value, age))
    return [
        {
            "step": step,
            "prompt": table.rows[i].prompt,
            "completion": decode(ids),
            "reward": reward,
            "value": value,
            "slice": table.rows[i].slice,
            "replayed": age is not None,
            "age": age,
            **shown_tokens(ids, logprobs, lambda part: decode(list(part))),
        }
        for i, ids, logprobs, reward, value, age in shown
    ]


def shown_tokens(
    token_ids: Sequence[int], logprobs: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> dict[str, list[Any]]:
    """The first tokens of a completion as `tokens`, pieces of its text, and their `logprobs` in nats, to four digits.

    A piece is the text that its token adds: "" for a stop token, and for one that ends within a character.
    """
    count = min(len(token_ids), len(logprobs), _SHOWN_TOKENS)
    return {
        "tokens": _pieces(token_ids[:count], decode),
        "logprobs": [round(float(logprob), 4) for logprob in logprobs[:count]],
    }


def _pieces(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    pieces: list[str] = []
    start, known = 0, ""  # the text of token_ids[start:i] that pieces hold already
    for i in range(len(token_ids)):
        text = decode(token_ids[start : i + 1])
        cut = text.endswith("\ufffd") and i + 1 < len(token_ids)  # the next token may complete the character
        if cut and i + 1 - start < 2 * _WINDOW:
            pieces.append("")
            continue
        pieces.append(text[len(known) :] if text.startswith(known) else decode(token_ids[i : i + 1]))
        known = text
        if i + 1 - start >= _WINDOW:
            start, known = i, decode(token_ids[i : i + 1])
    return pieces

"""What a run starts from and samples: model, data, warm start, rewards, generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import MAY_BE_EMPTY, Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Prompts: where they come from and how they are written down for the policy."""

    train: tuple[str, ...] = ()
    """Sources of training prompts, each `kind:name?key=value&...`; kinds are task, rg, jsonl, parquet, hf."""
    eval: tuple[str, ...] = ()
    """Sources of held-out prompts, same form."""
    headline: tuple[str, ...] = ()
    """Slices of the held-out prompts whose accuracy is the headline figure; none means all of them."""
    template: str = "{prompt}"
    """How a prompt is written: text with {prompt} in it, or `chat` for the tokenizer's chat template."""
    system_prompt: Annotated[str | None, MAY_BE_EMPTY] = None
    """System message of every chat that has none of its own; an empty text stands for an empty message."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template, each `name=value` (the value is JSON where it is that) or a JSON object."""
    date: str | None = None
    """Day that a chat template takes for today, as YYYY-MM-DD; without one, that on which the run began."""
    keep_special_tokens: tuple[str, ...] = ("tags",)
    """Special tokens that rewards see in the text of a completion: `tags` (those that are part of an answer, such as
    <think>, and not of the chat's frame), `all` (but what begins, ends and pads), `none`, and tokens by their text."""
    dir: str | None = None
    """Folder in which relative paths of jsonl and parquet sources are looked up before the working directory; without
    one, the working directory, then `data` and `../shared/data` below it."""
    max_prompt_tokens: Annotated[int, Bounds(1, 10**7)] = 1024
    """Longest prompt, in tokens."""
    too_long: Literal["error", "skip", "keep_start", "keep_end"] = "error"
    """What to do with a longer prompt: stop, leave it out, or cut the end (`keep_start`) or the beginning (`keep_end`)
    of its text, in a chat of the longest user message; the template stays whole."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read or never be judged: stop, or leave it out and count it."""
    max_bad_share: Annotated[float, Bounds(0.0, 1.0)] = 0.01
    """`skip`: share of a source's rows that may be bad; above it the run does not start."""
    overlap: Literal["warn", "error", "drop"] = "warn"
    """What to do with training prompts that are held-out prompts, by their text without case, white space and
    punctuation: say so, stop, or leave them out of training."""

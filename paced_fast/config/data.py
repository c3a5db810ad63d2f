"""What a run starts from and samples: model, data, warm start, rewards, generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import MAY_BE_EMPTY, Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Prompts: their sources, and how they are written as text for the policy."""

    train: tuple[str, ...] = ()
    """Sources of training prompts: files (.jsonl, .json, .csv, .parquet), folders, or data sets of the hub; keys after
    the name say more, as in `train.jsonl?answer=target&rows=0:500`, and `paced-fast list sources` has all kinds and
    keys."""
    eval: tuple[str, ...] = ()
    """Sources of held-out prompts, in the same form; none: no evaluation."""
    headline: tuple[str, ...] = ()
    """Held-out slices over whose prompts the headline accuracy is computed; none: all slices."""
    template: str = "{prompt}"
    """Text that the policy reads for a prompt: a text with {prompt} in it, `plain` (the prompt alone), `chat` (the
    tokenizer's chat template), or `auto` (`chat` if the tokenizer has a chat template, otherwise `plain`)."""
    system_prompt: Annotated[str | None, MAY_BE_EMPTY] = None
    """System message added to every chat without one; an empty text adds an empty message; none: nothing is added."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template, each `name=value` or a JSON object; a value is read as JSON if it is valid JSON,
    otherwise as text."""
    date: str | None = None
    """Today's date for the chat template, as YYYY-MM-DD; none: the day on which the run began."""
    keep_special_tokens: tuple[str, ...] = ("tags",)
    """Special tokens that stay in the text that rewards read: `tags` (tokens of an answer, such as <think>, but not
    those that frame a chat), `all` (all except begin, end and padding tokens), `none`, and single tokens by their
    text."""
    dir: str | None = None
    """Folder in which relative paths of jsonl and parquet sources are looked up first, before the working directory;
    none: the working directory, then `data`, then the folders in PACED_FAST_DATA."""
    max_prompt_tokens: Annotated[int, Bounds(1, 10**7)] = 1024
    """Maximum length of a prompt, in tokens, template included."""
    too_long: Literal["error", "skip", "keep_start", "keep_end"] = "error"
    """Treatment of a prompt above `max_prompt_tokens`: `error` stops before training, `skip` leaves the prompt out,
    `keep_start` cuts the end of its text, `keep_end` the beginning. In a chat the longest user message is cut. The
    template stays whole."""
    bad_rows: Literal["error", "skip"] = "error"
    """Treatment of a row that cannot be read or judged: `error` stops before training, `skip` leaves it out and counts
    it."""
    max_bad_share: Annotated[float, Bounds(0.0, 1.0)] = 0.01
    """Largest share of bad rows per source that `bad_rows skip` accepts; above it the run does not start."""
    overlap: Literal["warn", "error", "drop"] = "warn"
    """Treatment of training prompts that are also held-out prompts (compared without case, white space and
    punctuation): `warn` logs them, `error` stops before training, `drop` leaves them out of training."""

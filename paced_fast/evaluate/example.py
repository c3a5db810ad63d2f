"""An example of prompts to evaluate on, for a message to a user who gave none."""

from __future__ import annotations

from paced_fast.data.sources import parse_source
from paced_fast.errors import InputError
from paced_fast.rewards.loading import GIVEN

_CHOOSING = ("rows", "share", "size", "seed", "split", "config", "slice", "optional")
"""Keys that choose among the rows of one file or task."""
_OF_TRAINING = ("demonstration", "noise", "flip_probability")
_OTHER_ROWS = {"task": "split=eval", "rg": "seed={}"}
"""How other rows than those for training are made, for the kinds of sources that make them."""


def held_out_like(spec: str) -> str:
    """A source of held-out rows that are read and judged as those of the training source `spec`.

    Rows of a file or the hub: a file `held_out` of the same layout. Rows that are made: others of the kind. Without
    a training source, "": a file of questions and numbers.
    """
    try:
        source = parse_source(spec)
    except InputError:
        return "held_out.jsonl?reward=number"
    pairs = [pair for pair in spec.partition("?")[2].split("&") if pair and _is_kept(pair)]
    if source.kind in _OTHER_ROWS:
        pairs += [_OTHER_ROWS[source.kind].format((source.seed or 0) + 1), "size=50"]
        place = f"{source.kind}:{source.name}"
    else:
        place = f"held_out.{'jsonl' if source.kind == 'hf' else source.kind}"
    return "?".join(filter(None, (place, "&".join(pairs))))


def _is_kept(pair: str) -> bool:
    key, _, value = pair.partition("=")
    return key not in (*_CHOOSING, *_OF_TRAINING) and not value.startswith(GIVEN)

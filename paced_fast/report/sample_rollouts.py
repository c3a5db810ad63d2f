"""Sample rollouts as HTML: every token in the colour of its probability, to be filtered by outcome without a script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from paced_fast.report.read_run import Record, number

__all__ = ["chosen", "outcome", "rollouts_section", "visible"]

_OF_EACH = 10
_MAX_TEXT = 2000
"""Characters of a prompt, and of a completion without tokens, that are shown."""
_MAX_SHORT = 90
"""Characters of a prompt in the line that stands for a closed rollout."""
_OPEN = 3
"""Rollouts of each outcome that are open at first, and all short ones."""
_SHORT = 300
"""Characters of prompt and completion together."""


def outcome(row: Record) -> str:
    """`right`, `wrong` or `unscored`."""
    reward = number(row.get("reward"))
    return "unscored" if reward is None else "right" if reward > 0.5 else "wrong"


def chosen(rows: Sequence[Record]) -> list[Record]:
    """The newest fresh rollouts of each outcome and the newest replayed ones, newest first."""
    kinds = [("replayed" if row.get("replayed") is True else outcome(row), i) for i, row in enumerate(rows)]
    kept: list[int] = []
    for kind in dict.fromkeys(kind for kind, _ in kinds):
        kept += [i for other, i in kinds if other == kind][-_OF_EACH:]
    return [rows[i] for i in sorted(kept, reverse=True)]


def visible(text: str) -> str:
    """Text as HTML that shows what it holds: control characters, half characters and changes of direction by name."""
    out = []
    for char in text:
        code = ord(char)
        hidden = (code < 32 and char not in "\n\t") or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000
        hidden = (
            hidden or code in (0x61C, 0x200E, 0x200F, 0xFEFF) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
        )
        out.append(f'<i class="code">U+{code:04X}</i>' if hidden else html.escape(char))
    return "".join(out)


def rollouts_section(rows: Sequence[Record]) -> str:
    """The newest rollouts of each outcome, with a choice of which to see."""
    if not rows:
        return '<p class="none">none recorded yet</p>'
    shown = chosen(rows)
    kinds = [name for name in ("right", "wrong", "unscored") if any(outcome(row) == name for row in shown)]
    kinds += ["replayed"] if any(row.get("replayed") is True for row in shown) else []
    choices = "".join(
        f'<input type="radio" name="show" id="show-{name}"{" checked" if name == "all" else ""}>'
        f'<label for="show-{name}">{name}</label>'
        for name in ("all", *kinds)
    )
    seen: dict[str, int] = {}
    items = []
    for row in shown:
        seen[outcome(row)] = seen.get(outcome(row), 0) + 1
        length = len(_plain(row.get("prompt"))) + len(_plain(row.get("completion")))
        items.append(_rollout(row, is_open=seen[outcome(row)] <= _OPEN or length <= _SHORT))
    scale = "".join(f'<span class="p{level}">{text}</span>' for level, text in enumerate(_SCALE))
    legend = f'<p class="scale">probability of a token when it was sampled: {scale}</p>' if _any_tokens(shown) else ""
    return f'<div class="rollouts">{choices}{legend}<div class="list">{"".join(items)}</div></div>'


_SCALE = ("above 90%", "50%", "20%", "5%", "1%", "below 1%")


def _any_tokens(rows: Sequence[Record]) -> bool:
    return any(isinstance(row.get("tokens"), list) for row in rows)


def _level(probability: float) -> int:
    """Which of the shades of `_SCALE`."""
    return next((i for i, least in enumerate((0.9, 0.5, 0.2, 0.05, 0.01)) if probability >= least), 5)


def _rollout(row: Record, *, is_open: bool) -> str:
    kind, replayed = outcome(row), row.get("replayed") is True
    reward, value, age = (number(row.get(key)) for key in ("reward", "value", "age"))
    step = number(row.get("step"))
    facts = [f"step {step:.0f}" if step is not None else ""]
    facts.append(visible(str(row["slice"])) if row.get("slice") else "")
    facts.append(f"value {value:.2f}" if value is not None else "")
    facts.append(
        f"replayed, {age:.0f} step{'' if age == 1 else 's'} old"
        if replayed and age is not None
        else "replayed" * replayed
    )
    badge = "unscored" if reward is None else f"{kind} {reward:g}"
    prompt = _plain(row.get("prompt"))
    short = prompt.strip().replace("\n", " ")
    short = visible(short if len(short) <= _MAX_SHORT else short[:_MAX_SHORT] + " ...")
    return (
        f'<details class="card r {kind}{" replayed" if replayed else ""}"{" open" if is_open else ""}>'
        f'<summary><b class="badge {kind}">{badge}</b><span class="facts">'
        f'{" &middot; ".join(fact for fact in facts if fact)}</span><bdi class="short">{short}</bdi></summary>'
        f'<pre class="prompt" dir="auto">{visible(_cut(prompt))}</pre>'
        f'<pre dir="auto">{_completion(row)}</pre></details>'
    )


def _completion(row: Record) -> str:
    text = _plain(row.get("completion"))
    tokens, logprobs = row.get("tokens"), row.get("logprobs")
    if not (isinstance(tokens, list) and isinstance(logprobs, list)):
        return visible(_cut(text))
    spans = []
    for piece, value in zip(tokens, logprobs, strict=False):
        logprob = number(value)
        shown = visible(str(piece)) or "&#9633;"  # an end of the text, or a part of a character
        if logprob is None:
            spans.append(f"<span>{shown}</span>")
            continue
        p = math.exp(min(0.0, logprob))
        spans.append(f'<span class="p{_level(p)}" title="{100 * p:.3g}%, log-prob {logprob:.3g}">{shown}</span>')
    said = "".join(str(piece) for piece in tokens)
    rest = text[len(said) :] if len(said) < len(text) and text.startswith(said) else ""
    return "".join(spans) + visible(_cut(rest))


def _plain(text: object) -> str:
    if isinstance(text, list):  # chat messages
        return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in text)
    return "" if text is None else str(text)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + f" ... and {len(text) - _MAX_TEXT:,} characters more"

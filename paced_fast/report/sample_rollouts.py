"""Sample rollouts as HTML: tokens coloured by probability, and a filter by outcome that needs no script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from paced_fast.report.charts.chart import percent
from paced_fast.report.html import part
from paced_fast.report.read_run import HIDDEN, Record, number

_OF_EACH = 10
_MAX_TEXT = 2000
"""Most characters shown of a prompt, or of a completion without token data."""
_SLICES = 12
"""Most slices with a filter of their own, as the style sheet has them."""
_MAX_SHORT = 90
"""Most characters of the prompt in the summary line of a collapsed rollout."""
_OPEN = 3
"""Rollouts per outcome that are initially expanded; short ones always are."""
_SHORT = 300
"""Most characters of prompt and completion together for a rollout to count as short."""


def outcome(row: Record) -> str:
    """Return `right`, `wrong` or `unscored`."""
    reward = number(row.get("reward"))
    return "unscored" if reward is None else "right" if reward > 0.5 else "wrong"


def chosen(rows: Sequence[Record]) -> list[Record]:
    """Select the newest fresh rollouts of each outcome and the newest replayed ones, newest first."""
    kinds = [("replayed" if row.get("replayed") is True else outcome(row), i) for i, row in enumerate(rows)]
    kept: list[int] = []
    for kind in dict.fromkeys(kind for kind, _ in kinds):
        kept += [i for other, i in kinds if other == kind][-_OF_EACH:]
    return [rows[i] for i in sorted(kept, reverse=True)]


def visible(text: str) -> Markup:
    """Text as HTML, with control characters, lone surrogates and changes of text direction shown by name."""
    pieces = HIDDEN.split(text)
    codes = [Markup('<i class="code">U+{:04X}</i>').format(ord(char)) for char in HIDDEN.findall(text)]
    return Markup().join(piece for pair in zip(pieces, [*codes, ""], strict=True) for piece in pair)


def rollouts_section(rows: Sequence[Record]) -> Markup:
    """Section with the newest rollouts of each outcome and a filter."""
    if not rows:
        return part("absent", "none recorded yet")
    found = chosen(rows)
    kinds = [name for name in ("right", "wrong", "unscored") if any(outcome(row) == name for row in found)]
    kinds += ["replayed"] if any(row.get("replayed") is True for row in found) else []
    slices = [name for name in dict.fromkeys(_slice(row) for row in found) if name][:_SLICES]
    slices = sorted(slices) if len(slices) > 1 else []
    seen: Counter[str] = Counter()
    shown = []
    for row in found:
        seen[outcome(row)] += 1
        length = len(_plain(row.get("prompt"))) + len(_plain(row.get("completion")))
        place = slices.index(_slice(row)) if _slice(row) in slices else len(slices)
        shown.append(_rollout(row) | {"open": seen[outcome(row)] <= _OPEN or length <= _SHORT, "slice": place})
    has_tokens = any(isinstance(row.get("tokens"), list) for row in found)
    return part("rollouts", kinds, list(map(visible, slices)), _SCALE if has_tokens else (), shown)


_GROUPS = {
    "best": "Best",
    "worst": "Worst",
    "surprising": "Most surprising",
}


def groups_section(groups: Sequence[Record]) -> Markup:
    """Section with whole groups: prompt, expected answer, estimate, and every completion with its verdict."""
    items = []
    for group in groups:
        rows = (
            [row for row in found if isinstance(row, dict)]
            if isinstance(found := group.get("completions"), list)
            else []
        )
        value, accuracy, step, size = (number(group.get(key)) for key in ("value", "accuracy", "step", "size"))
        facts: list[str] = [f"step {step:.0f}"] if step is not None else []
        facts += [visible(str(group["slice"]))] if group.get("slice") else []
        facts += [f"accuracy {percent(accuracy)}"] if accuracy is not None else []
        facts += [f"estimate before {percent(value)}"] if value is not None else []
        answer = group.get("answer")
        items.append(
            {
                "title": _GROUPS.get(str(group.get("kind")), "Group"),
                "facts": facts,
                "prompt": visible(_cut(_plain(group.get("prompt")))),
                "answer": None if answer is None else visible(_cut(str(answer))),
                "completions": [_of_group(row) for row in rows],
                "more": max(0, int(size or 0) - len(rows)),
            }
        )
    return part("groups", items) if items else Markup("")


def _of_group(row: Record) -> dict[str, object]:
    kind, reward = outcome(row), number(row.get("reward"))
    text = _plain(row.get("text"))
    end = " ".join(text.split())
    cut = ", cut" if row.get("stopped") is False else ""
    return {
        "kind": kind,
        "badge": (kind if reward is None else f"{kind} {reward:g}") + cut,
        "short": visible(end if len(end) <= _MAX_SHORT else "... " + end[-_MAX_SHORT:]),
        "text": visible(text),
    }


def _slice(row: Record) -> str:
    return str(row.get("slice") or "")


_SCALE = ("above 90%", "50%", "20%", "5%", "1%", "below 1%")


def _level(probability: float) -> int:
    """Return the index of the shade in `_SCALE`."""
    return next((i for i, least in enumerate((0.9, 0.5, 0.2, 0.05, 0.01)) if probability >= least), 5)


def _rollout(row: Record) -> dict[str, object]:
    """Return the fields of a rollout that the template shows."""
    kind, replayed = outcome(row), row.get("replayed") is True
    reward, value, age, step = (number(row.get(key)) for key in ("reward", "value", "age", "step"))
    facts: list[str] = [f"step {step:.0f}"] if step is not None else []
    facts += [visible(str(row["slice"]))] if row.get("slice") else []
    facts += [f"value {value:.2f}"] if value is not None else []
    old = f", {age:.0f} step{'' if age == 1 else 's'} old" if age is not None else ""
    facts += [f"replayed{old}"] if replayed else []
    prompt = _plain(row.get("prompt"))
    short = prompt.strip().replace("\n", " ")
    return {
        "kind": kind,
        "replayed": replayed,
        "badge": kind if reward is None else f"{kind} {reward:g}",
        "facts": facts,
        "short": visible(short if len(short) <= _MAX_SHORT else short[:_MAX_SHORT] + " ..."),
        "prompt": visible(_cut(prompt)),
        "completion": _completion(row),
    }


def _completion(row: Record) -> Markup:
    text = _plain(row.get("completion"))
    tokens, logprobs = row.get("tokens"), row.get("logprobs")
    if not (isinstance(tokens, list) and isinstance(logprobs, list)):
        return visible(_cut(text))
    spans = []
    for piece, value in zip(tokens, logprobs, strict=False):
        logprob = number(value)
        shown = visible(str(piece)) or Markup("&#9633;")  # end of text, or part of a multi-byte character
        if logprob is None:
            spans.append(Markup("<span>{}</span>").format(shown))
            continue
        p = math.exp(min(0.0, logprob))
        title = f"{100 * p:.3g}%, log-prob {logprob:.3g}"
        spans.append(Markup('<span class="p{}" title="{}">{}</span>').format(_level(p), title, shown))
    said = "".join(str(piece) for piece in tokens)
    rest = text[len(said) :] if len(said) < len(text) and text.startswith(said) else ""
    return Markup().join(spans) + visible(_cut(rest))


def _plain(text: object) -> str:
    if isinstance(text, list):  # chat messages
        return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in text)
    return "" if text is None else str(text)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + f" ... and {len(text) - _MAX_TEXT:,} more characters"

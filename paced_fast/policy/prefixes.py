"""Prefixes that many prompts begin with, such as a chat template with a system prompt: which to compute once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

Prompt = tuple[int, ...]

PASSES_TOKENS = 128
"""Tokens that a prefix has to save: it takes a pass of its own, and its prompts are no longer in passes with others.
On a CPU a pass of one token took as long as 160 tokens of a long pass with `tiny` (2 ms), 17 with SmolLM2 (53 ms)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Behind:
    """Prompts that are computed behind a prefix, which each of them begins with; an empty one behind nothing."""

    prefix: Prompt
    prompts: list[Prompt]


def by_prefix(prompts: Iterable[Prompt], *, passes_tokens: int = PASSES_TOKENS) -> list[Behind]:
    """Split distinct `prompts`: a prefix takes all that begin with it, and no prefix begins another.

    Of such splits it is one that computes the fewest tokens, where each prefix counts `passes_tokens` more. Sorted,
    prompts with a common prefix are neighbours, and a run of neighbours that share more tokens lies inside one that
    shares fewer: each is taken whole, or as the best of what lies inside it.
    """
    ordered = sorted(prompts)
    runs = [_Run(0, 0)]  # those that go on, from the outermost, which is everything, to the innermost
    for end, (last, following) in enumerate(itertools.pairwise([*ordered, ()]), start=1):
        shared, start = _num_shared(last, following), end - 1
        while runs[-1].shared > shared:
            ended = runs.pop()
            ended.end(end, passes_tokens)
            start = ended.start
            if runs[-1].shared < shared:
                runs.append(_Run(shared, start))
            runs[-1].take(ended)
        if runs[-1].shared < shared:
            runs.append(_Run(shared, start))
    chosen = [Behind(prefix=ordered[first][:n], prompts=ordered[first:end]) for n, first, end in runs[0].chosen]
    taken = {prompt for one in chosen for prompt in one.prompts}
    others = [prompt for prompt in ordered if prompt not in taken]
    return [*chosen, Behind(prefix=(), prompts=others)] if others else chosen


@dataclass(slots=True)
class _Run:
    """Neighbours from `start` on that share their first `shared` tokens, and what to take of those looked at."""

    shared: int
    start: int
    saved: int = 0
    chosen: list[tuple[int, int, int]] = field(default_factory=list)  # shared tokens, start and end of each part

    def end(self, end: int, passes_tokens: int) -> None:
        """The prompt at `end` does not share the tokens: choose between all of the run and the parts in it."""
        saved = (end - self.start - 1) * self.shared - passes_tokens
        if saved > self.saved:
            self.saved, self.chosen = saved, [(self.shared, self.start, end)]

    def take(self, inner: _Run) -> None:
        """Add what was chosen of a run inside this one."""
        self.saved += inner.saved
        self.chosen += inner.chosen


def _num_shared(one: Prompt, other: Prompt) -> int:
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

"""Score completions of many rows, each by the reward that its row names."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from paced_fast.config import RewardConfig
from paced_fast.config.reward_names import BUILT_IN
from paced_fast.config.reward_terms import Term, parse_reward
from paced_fast.data.records import Completion, PromptRow
from paced_fast.data.sources import MissingColumn
from paced_fast.errors import InputError, UnscoredError
from paced_fast.rewards.loading import RewardFunction, load_reward
from paced_fast.rewards.user_function import Call, missing_column, reason, run_all

_WINDOW = 256
"""Number of recent completions over which the unscored share is computed; a larger single call counts in full."""


class Scorer:
    """Score completions: each reward function is loaded once, and called once for all of its rows.

    A row's reward is a name or a weighted sum, `0.7*math+0.3*exact`; the weights are scaled to add up to 1. If one term
    returns None for a completion, the completion is unscored.

    Example: `Scorer(row.reward for row in table.rows)` loads all rewards of the rows, so that a wrong name fails early.

    Raises:
        InputError: `load_reward` does not know a name, or `parse_reward` cannot read a sum.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        settings: RewardConfig | None = None,
        functions: Mapping[str, RewardFunction] | None = None,
    ) -> None:
        """Load the rewards `names`; `functions` are those that Python handed over, by name."""
        self.settings = settings or RewardConfig()
        self._given = dict(functions or {})
        self._functions: dict[str, RewardFunction] = {}
        self._sums: dict[str, tuple[Term, ...]] = {}
        self._unscored: Counter[str] = Counter()
        self._recent: dict[str, deque[tuple[int, int]]] = {}
        for name in names:
            self._terms(name)

    def problem(self, name: str, columns: Mapping[str, Any]) -> str | MissingColumn | None:
        """Return the reason why the reward `name` can never judge a row with these columns, or None if it can."""
        for term in self._terms(name):
            function = self._functions[term.name]
            asked = getattr(function, "problem", None)
            if callable(asked):
                try:
                    found = asked(columns)
                except InputError:
                    raise
                except (Exception, SystemExit) as error:  # a user's own object may answer
                    raise InputError(f"reward {term.name!r}: its method `problem` failed: {reason(error)}") from error
                if found is not None:
                    return str(found)
                continue
            lacks = missing_column(getattr(function, "origin", function), columns)
            if lacks is not None:
                return MissingColumn(term.name, lacks)
        return None

    def take_counts(self) -> dict[str, dict[str, int]]:
        """Return verdicts by kind (right, wrong, timeout ...) per reward function since the last call, and reset them.

        For a function that does not count its verdicts, only `unscored` is reported.
        """
        taken: dict[str, dict[str, int]] = {}
        for name, function in self._functions.items():
            counts = getattr(function, "counts", None)
            if counts is None:
                counts = Counter({"unscored": self._unscored[name]})
            if +counts:
                taken[name] = dict(+counts)
            counts.clear()
        self._unscored.clear()
        return taken

    def close(self) -> None:
        """Close every reward function that has a `close` method, which ends its processes."""
        for function in self._functions.values():
            close = getattr(function, "close", None)
            if close is not None:
                close()

    def score(self, rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float | None]:
        """Return one reward in [0, 1] per completion, in order; `rows[i]` is the row of `completions[i]`.

        None means unscored: the reward could not decide, so the completion must count neither as right nor as wrong.
        Async functions run concurrently, while the plain ones run.

        Raises:
            InputError: a reward function failed, or did not return one number in [0, 1] or None per completion.
        """
        if len(rows) != len(completions):
            raise InputError(f"got {len(rows)} rows and {len(completions)} completions: give one row per completion")
        members: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            for term in self._terms(row.reward):
                members.setdefault(term.name, []).append(i)
        calls = [
            Call(
                name=name,
                function=self._functions[name],
                rows=[rows[i] for i in chosen],
                completions=[completions[i] for i in chosen],
                places=chosen,
                is_ours=name in BUILT_IN,
            )
            for name, chosen in members.items()
        ]
        verdicts: dict[str, dict[int, float | None]] = {}
        for name, found in zip(members, run_all(calls, self.settings), strict=True):
            verdicts[name] = dict(zip(members[name], found, strict=True))
            missing = sum(value is None for value in found)
            self._unscored[name] += missing
            self._recent.setdefault(name, deque()).append((missing, len(found)))
        return [_weighted(self._terms(row.reward), verdicts, i) for i, row in enumerate(rows)]

    def try_out(self, rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float | None]:
        """As `score`, for completions that no policy wrote: they enter neither the counts nor the unscored share."""
        names = {term.name for row in rows for term in self._terms(row.reward)}
        before = {name: Counter(getattr(self._functions[name], "counts", None) or {}) for name in names}
        unscored, recent = self._unscored.copy(), {name: deque(kept) for name, kept in self._recent.items()}
        try:
            return self.score(rows, completions)
        finally:
            self._unscored, self._recent = unscored, recent
            for name, kept in before.items():
                counts = getattr(self._functions[name], "counts", None)
                if counts is not None:
                    counts.clear()
                    counts.update(kept)

    def check_failures(self) -> None:
        """Raise UnscoredError, naming the reward function, if one left too many of the last completions unscored.

        The share is computed over the last 256 completions, or over the last call if that had more. Until there are
        256, the missing ones count as scored, so that one unscored completion in a small first batch does not stop a
        run; a function that has scored nothing at all does stop it.
        """
        limit = self.settings.max_unscored_share
        for name, recent in self._recent.items():
            while len(recent) > 1 and sum(count for _, count in recent) - recent[0][1] >= _WINDOW:
                recent.popleft()
            missing, total = (sum(column) for column in zip(*recent, strict=True))
            if missing > limit * max(total, _WINDOW) or (limit < 1.0 and missing == total > 0):
                kinds = getattr(self._functions[name], "counts", None) or {}
                verdicts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
                remedy = "see its warnings in the log, raise its time limit, or raise the share"
                if not hasattr(self._functions[name], "counts"):  # it has no log and no limit of its own
                    what = "all" if missing == total else "these"
                    remedy = f"it returned None for {what}: return a number for what it can judge, or raise the share"
                raise UnscoredError(
                    f"reward {name!r} left {missing} of the last {total} completions unscored, more than "
                    f"--reward.max-unscored-share {limit:g} allows{f' ({verdicts})' if verdicts else ''}: {remedy}"
                )

    def _terms(self, name: str) -> tuple[Term, ...]:
        if name not in self._sums:
            terms = parse_reward(name)
            for term in terms:
                if term.name not in self._functions:
                    self._functions[term.name] = load_reward(term.name, self.settings, self._given)
            self._sums[name] = terms
        return self._sums[name]


def _weighted(terms: Sequence[Term], verdicts: Mapping[str, Mapping[int, float | None]], index: int) -> float | None:
    total = 0.0
    for term in terms:
        value = verdicts[term.name][index]
        if value is None:
            return None
        total += term.weight * value
    return min(total, 1.0)  # the weights add up to 1, except for rounding


def score_sampled(
    score: Callable[[Sequence[PromptRow], Sequence[str]], list[float | None]],
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    completions: Sequence[Completion],
) -> list[float | None]:
    """Return the rewards from `score`, and None for completions without tokens, which `score` does not receive."""
    sampled = [i for i, completion in enumerate(completions) if completion.token_ids]
    rewards: list[float | None] = [None] * len(completions)
    for i, reward in zip(sampled, score([rows[i] for i in sampled], [texts[i] for i in sampled]), strict=True):
        rewards[i] = reward
    return rewards

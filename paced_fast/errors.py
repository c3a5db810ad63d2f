"""How a run ends early: wrong input, a run that cannot go on, and one that was asked to stop."""

import difflib
from collections.abc import Sequence

EVERYWHERE = "raised on every rank"
"""Note on an error that all ranks raise together, so that only one of them reports it."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that names the thing and the remedy; exit status 2."""


class TrainingError(RuntimeError):
    """The run stopped itself (non-finite steps in a row, for example). One line that says why; exit status 3."""


class StopRequested(Exception):
    """The run was asked to stop and did, at a boundary. One line that says after which step; see `signals.status`."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an error message: ` (did you mean 'x'?)`, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""How a run ends early: wrong input, a run that cannot go on, and one that was asked to stop."""

import contextlib
import difflib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires

EVERYWHERE = "raised on every rank"
"""Note on an error that all ranks raise together, so that only one of them reports it."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that names the thing and the remedy; exit status 2.

    What ends with it has trained nothing: a run that has made a step ends with a TrainingError that has the same words.
    """


class TrainingError(RuntimeError):
    """The run stopped itself (non-finite steps in a row, for example). One line that says why; exit status 3.

    Wrong input that shows after a step is one too: the line says after which step, and whether that is saved.
    """


class UnscoredError(TrainingError):
    """Too few completions of a step have a verdict; raised before anything of the step is trained."""


class StopRequested(Exception):
    """The run was asked to stop and did, at a boundary. One line that says after which step; see `signals.status`."""


INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended: 128 + SIGINT, as shells have it."""


@contextlib.contextmanager
def interrupts_in_one_line() -> Iterator[None]:
    """Context of a whole command: Ctrl-C ends it with one line in place of a traceback, after the cleanup of its
    blocks."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("SIGINT: stopped, nothing was written\n")
        raise SystemExit(INTERRUPTED) from None


def pip_install(extra: str) -> str:
    """Command that installs the packages of an optional part, by the metadata of this package, which is on no index."""
    try:
        wanted = requires("paced-fast") or []
    except PackageNotFoundError:  # run from a folder that was not installed
        wanted = []
    part = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    names = [f"'{one.partition(';')[0].strip()}'" for one in wanted if part.search(one)]
    return f"pip install {' '.join(names) or extra}"


def counted(count: int, what: str) -> str:
    """Format a count with its noun, singular or plural."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an error message: ` (did you mean 'x'?)`, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""

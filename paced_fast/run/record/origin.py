"""Where the numbers of a run come from: versions, machine, commit and command of each of its starts."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from paced_fast.run.record.files import write_json_atomic

logger = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
_SECONDS = 5.0


def note_start(folder: Path, **facts: object) -> None:
    """Add this start of a run to its origin.json: the command, the host, the commit and the given `facts`.

    A file that cannot be read or written costs the note and one warning, not the run.
    """
    path = folder / ORIGIN_FILE
    start = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": commit(Path(__file__).resolve().parents[3]),
    }
    try:
        write_json_atomic(path, [*_starts(path), start | dict(facts)])
    except OSError as error:
        logger.warning("%s was not written (%s): the run continues", path, error.strerror or error)


def newest_start(folder: Path) -> Mapping[str, object]:
    """The note of the latest start of the run in `folder`; empty if there is none that can be read."""
    starts = _starts(folder / ORIGIN_FILE)
    return starts[-1] if starts else {}


def _starts(path: Path) -> list[dict[str, object]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def commit(root: Path) -> str | None:
    """Commit of the sources at `root`, `, changed` behind it if files differ from it; None outside a git checkout."""
    if not (root / ".git").exists():
        return None
    words = ("git", "-C", str(root))
    try:
        head, changes = (
            subprocess.run(
                [*words, *rest], capture_output=True, text=True, timeout=_SECONDS, check=True, start_new_session=True
            ).stdout.strip()
            for rest in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user's
        return None
    return f"{head}, changed" if changes else head

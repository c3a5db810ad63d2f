"""The Hugging Face hub and model folders: whether the hub can be reached, and one-line errors of reading them.

The hub is asked once, with a short time limit, because its own client retries for a minute.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
import threading
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

_SECONDS = 5.0

UNREADABLE = (
    *(OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(SafetensorError, StrictDataclassError),
)
"""Exceptions of transformers for settings and files of models that it does not know."""


def told(error: BaseException) -> str:
    """First sentence of an error's message; its type where the message says too little."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    sentence = re.split(r"(?<=\w{2}\.) ", text, maxsplit=1)[0].rstrip(".")[:300]
    says = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and sentence
    return sentence if says else f"{type(error).__name__}: {sentence}".rstrip(": ")


def pointer(file: Path) -> str:
    """Hint for a file that is only a git-lfs pointer; empty for any other."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return "a git-lfs pointer instead of the file, which `git lfs pull` fetches" if is_pointer else ""


def place_of(name: str, what: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Resolve `name` to a folder, or to an id that the hub's client fetches.

    `what` names the setting in an error, such as `--model.name x`. While the hub cannot be reached, a model that was
    fetched before is read from the cache. Raises InputError, in one line and within a few seconds, if it is not cached.
    """
    from huggingface_hub import constants

    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()
    if is_path or constants.HF_HUB_OFFLINE:
        return name  # the hub is not asked
    reason = why_out_of_reach(constants.ENDPOINT)
    if reason is None:
        return name
    cached = _cached(name, kind)
    if cached is None:
        first = f"{what}: {no_folder(name)}, it is not" if kind == "model" else f"{what} is not"
        raise InputError(
            f"{first} in the cache, and {constants.ENDPOINT} cannot be reached ({reason}): give a local path, or "
            "download it on a machine with a network into the cache named by HF_HOME and set HF_HUB_OFFLINE=1"
        )
    logger.warning("%s cannot be reached (%s): reading %s from the cache, %s", constants.ENDPOINT, reason, name, cached)
    return str(cached)


def no_folder(name: str) -> str:
    """Words for a name that is no folder, with one beside it that has nearly the same name."""
    folder = Path(name).expanduser()
    try:
        beside = [one.name for one in folder.parent.iterdir() if one.is_dir()]
    except OSError:
        beside = []
    near = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.75)
    return f"there is no such folder (did you mean {folder.parent / near[0]}?)" if near else "there is no such folder"


def _cached(name: str, kind: str) -> Path | None:
    """Snapshot of the main branch that was fetched last."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    try:
        folder = root / "snapshots" / (root / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None


@functools.cache
def why_out_of_reach(endpoint: str) -> str | None:
    """Reason why the hub does not answer, None when it does; asked once per process."""
    answers: list[str | None] = []

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            status = get_session().head(endpoint, timeout=_SECONDS).status_code
            answers.append(f"it answers {status}" if status >= 500 else None)
        except Exception as error:  # the client's own, of its proxy, of the name's look-up
            answers.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])

    # In a separate thread, because the name look-up has no time limit.
    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return answers[0] if answers else f"no answer within {_SECONDS:g} s"

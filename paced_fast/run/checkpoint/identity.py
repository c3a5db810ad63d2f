"""Identity of a run besides its settings: hashes of data and tokenizer, which a resumed run must match."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paced_fast.data.records import PromptTable
from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "paced-fast")


def identity(table: PromptTable, eval_table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Short hashes by the name a message gives to the thing."""
    return {
        "training prompts": _table(table),
        "held-out prompts": _table(eval_table),
        "tokenizer": _hash(_tokenizer(tokenizer)),
        "chat template": _hash(getattr(tokenizer, "chat_template", None)),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that a run's numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # paced-fast run from its sources
            found[name] = "not installed"
    return found


def check_identity(saved: Mapping[str, Any], now: Mapping[str, str], folder: Path) -> None:
    """Refuse to go on with other data or another tokenizer; other versions of libraries are named in the log."""
    for name, value in now.items():
        if saved["identity"].get(name) != value:
            raise InputError(
                f"--resume auto: the {name} changed since {folder} was written ({saved['identity'].get(name)} then, "
                f"{value} now): use the same {name}, or give another --run-dir"
            )
    changed = [
        f"{name} {was} -> {here}"
        for name, here in versions().items()
        if (was := saved["versions"].get(name, "none")) != here
    ]
    if changed:
        told = "package versions differ from the checkpoint's, so results may differ from an uninterrupted run: %s"
        logger.warning(told, ", ".join(changed))


def _table(table: PromptTable) -> str:
    digest = hashlib.sha256()
    for row in table.rows:
        parts = (row.prompt, row.token_ids, row.reward, row.slice, dict(row.columns))
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return f"{digest.hexdigest()[:16]} of {len(table)} rows"


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    whole = json.loads(backend.to_str())
    return {name: value for name, value in whole.items() if name not in ("truncation", "padding")}  # set by calls


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
